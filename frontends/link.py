"""The engine's messages without tasks: read in the callback that says they are there.

vLLM receives through zmq.asyncio: a callback, a future and two tasks with a queue between them for
every message, a third of what an API server spends where answers are not streamed. Here one
callback reads what there is, and a step is through the lane before it returns; requests and aborts
leave in the turn that makes them. The sockets, the codec and the order of messages stay vLLM's.

Used where all is plain: vLLM's own `AsyncMPClient`, no multimodal cache. Anything else keeps vLLM's
tasks, and the lane works all the same (`Link.open` returns None).
"""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import zmq

from scalellm_plugins import messages

from .bookkeeping import Bookkeeper
from .engine_rings import Columns, EngineRings
from .shared_values import clock

if TYPE_CHECKING:
    from .lane import Lane

logger = logging.getLogger("vllm.scalellm")

_NOBLOCK, _RCVMORE = int(zmq.NOBLOCK), int(zmq.RCVMORE)
_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)

_AT_ONCE = 64
"""Messages in a row, before connections get their turn."""


class Link:
    """One API server's side of the connection to one engine."""

    def __init__(self, engine_client: Any) -> None:
        self._client = engine_client
        self._core = engine_client.engine_core
        self._loop = asyncio.get_running_loop()
        self._outputs: Any = zmq.Socket.shadow(self._core.resources.output_socket)
        self._inputs: Any = zmq.Socket.shadow(self._core.input_socket)
        self._fd = int(self._outputs.getsockopt(zmq.FD))
        self._closed = self._loop.create_future()
        from vllm.v1.engine import EngineCoreOutput, EngineCoreRequestType, core, core_client

        self._dead_length = len(core.EngineCoreProc.ENGINE_CORE_DEAD)
        self._settle = core_client._process_utility_output
        self._add_type = EngineCoreRequestType.ADD.value
        self._abort_type = EngineCoreRequestType.ABORT.value
        self.book = Bookkeeper(engine_client)
        self.lane: Lane | None = None
        self._rings: EngineRings | None = getattr(self._core, "_scalellm_rings", None)
        self._output = EngineCoreOutput

    @classmethod
    def open(cls, engine_client: Any) -> Link | None:
        """Take over from vLLM's two tasks; None where only they will do."""
        core = engine_client.engine_core
        kind = type(core)
        plain = (kind.__module__, kind.__name__) == (
            "vllm.v1.engine.core_client",
            "AsyncMPClient",
        )
        cached = getattr(engine_client.renderer, "mm_processor_cache", None) is not None
        if not plain or cached:
            return None
        tasks = (getattr(core.resources, "output_queue_task", None), engine_client.output_handler)
        if None in tasks or not core.outputs_queue.empty():
            return None
        if getattr(core.vllm_config.parallel_config, "enable_fault_tolerance", False):
            return None
        link = cls(engine_client)
        link._take_over(tasks)
        return link

    def _take_over(self, tasks: tuple[Any, ...]) -> None:
        """Stop vLLM's tasks and put one in their place that lives as long as the link does.

        vLLM asks whether they are done to tell whether the engine is reachable, and cancels them at
        its end.
        """
        for task in tasks:
            task.cancel()
        guard = self._loop.create_task(self._guard(), name="scalellm-link")
        self._core.resources.output_queue_task = guard
        self._client.output_handler = guard
        self._core.resources.output_socket._clear_io_state()
        self._loop.add_reader(self._fd, self._read)
        if self._rings is not None:
            self._rings.start(self)
        self._loop.call_soon(self._read)  # what came in between does not make the descriptor ready

    async def _guard(self) -> None:
        try:
            await self._closed
        except asyncio.CancelledError:
            # The end of the client. vLLM's own tasks let those wait for ever who still do, and
            # the server with them.
            from vllm.v1.engine.exceptions import EngineDeadError

            self._client.output_processor.propagate_error(EngineDeadError())
            raise
        finally:
            self._loop.remove_reader(self._fd)
            if self._rings is not None:
                self._rings.close()

    def _read(self) -> None:
        """Read all that is there: the descriptor only tells that there is more than before.

        By pyzmq's plain calls: its conveniences (frames, flags as enums, an exception to say that
        nothing is left) cost 10 µs per message, these 4.
        """
        outputs, decode = self._outputs, self._core.decoder.decode
        try:
            for _ in range(_AT_ONCE):
                data = outputs.recv(_NOBLOCK)
                if outputs.getsockopt(_RCVMORE):
                    frames = [data, *outputs.recv_multipart(_NOBLOCK)]
                    self._handle(decode(frames))
                else:
                    if len(data) == self._dead_length:
                        self._core.resources.validate_alive([SimpleNamespace(buffer=data)])
                    self._handle(decode(data))
                if not outputs.getsockopt(_EVENTS) & _POLLIN:
                    return
            self._loop.call_soon(self._read)
        except zmq.Again:
            pass
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if self._closed.done():
            return
        logger.exception("the engine is lost")
        self._closed.set_result(None)
        self._client.output_processor.propagate_error(self._core._format_exception(error))

    def _handle(self, outputs: Any) -> None:
        """What vLLM's two tasks do with a message, in one go."""
        if outputs.utility_output is not None:
            self._settle(outputs.utility_output, self._core.utility_results)
            return
        if not outputs.outputs and outputs.scheduler_stats is None:
            return
        client = self._client
        stats = self.book.statistics() if client.log_stats and outputs.outputs else None
        self._process(outputs.outputs, outputs.timestamp, stats, outputs)
        self.book.message(outputs.engine_index, outputs.scheduler_stats, stats)

    def _process(self, outputs: list[Any], timestamp: float, stats: Any, message: Any) -> None:
        """Have a message's outputs processed: by the lane, and what is not its own by vLLM."""
        processor = self._client.output_processor
        version = getattr(message, "weight_version", None)
        named = {} if version is None else {"weight_version": version}
        done = processor.process_outputs(outputs, timestamp, stats, **named)
        if done.reqs_to_abort:
            self.abort(done.reqs_to_abort)
        if message.scheduler_stats is not None:
            processor.update_scheduler_stats(message.scheduler_stats)
            clock.heard(message)

    # Sink of the rings

    def on_step(self, step: Columns, general: Any, rings: EngineRings) -> None:
        """Columns to the lane; for vLLM's own requests outputs are made of them."""
        stats = self.book.statistics() if self._client.log_stats else None
        assert self.lane is not None
        others, aborts = self.lane.on_columns(step, stats)
        if aborts:
            self.abort(aborts)
        outputs = [self._output(request_id, [token]) for request_id, token in others]
        scheduler = None
        outputs += step.ended
        if general is not None:
            scheduler = general.scheduler_stats
            self._process(outputs + general.outputs, step.timestamp, stats, general)
        elif outputs:
            self._process(outputs, step.timestamp, stats, _Bare(rings.weight_version()))
        self.book.message(step.engine, scheduler, stats)

    def on_outputs(self, outputs: Any) -> None:
        """A message like those of the socket."""
        self._handle(outputs)

    def on_end(self) -> None:
        """Write what has come, now: nothing else is here that could go along."""
        if self.lane is not None:
            self.lane.flush()

    def on_dead(self, error: Exception) -> None:
        """As when the engine says so."""
        self._fail(error)

    # To the engine

    def add(self, request: Any, answer: Any) -> None:
        """Send a request of the lane to the engine.

        Raises:
            EngineDeadError: there is none any more.
        """
        core = self._core
        core.ensure_alive()
        request.client_index = core.client_index
        rings = self._rings
        if rings is not None and rings.reaches(core.core_engine):
            rings.add(core.core_engine, request, answer)
            return
        self._send(self._add_type, request)

    def abort(self, request_ids: list[str]) -> None:
        """Tell the engine to drop requests, if it is alive."""
        if self._core.resources.engine_dead:
            return
        rings = self._rings
        if rings is None or not rings.reaches(self._core.core_engine):
            self._send(self._abort_type, request_ids)
            return
        for request_id in request_ids:
            rings.forget(request_id)
        frames = self._core.encoder.encode(request_ids)
        rings.send(self._core.core_engine, messages.ABORT, frames)

    def _send(self, kind: bytes, message: Any) -> None:
        core = self._core
        parts = (core.core_engine, kind, *core.encoder.encode(message))
        # vLLM's sockets have no high-water mark: this does not block.
        self._inputs.send_multipart(parts, copy=False)


class _Bare:
    """A message of columns alone, as far as vLLM's functions look at one."""

    scheduler_stats = None
    timestamp = 0.0

    def __init__(self, weight_version: Any) -> None:
        self.weight_version = weight_version
