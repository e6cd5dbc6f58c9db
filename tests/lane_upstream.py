"""vLLM's own way beside the lane: the same requests and outputs, to compare with."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

from scalellm_plugins.engine.holding import HOLD, TokenHolder, can_wait
from scalellm_plugins.frontends import probes

from .lane_parts import ARRIVAL, CHAT, Bench, Peer


class Upstream:
    """vLLM's own way: its output processor, its handlers' generators and its metrics."""

    def __init__(self, bench: Bench) -> None:
        from vllm.v1.engine.output_processor import OutputProcessor
        from vllm.v1.metrics.loggers import StatLoggerManager

        config = bench.client.vllm_config
        self.bench = bench
        self.processor = OutputProcessor(bench.tokenizer, log_stats=True)
        self.manager = StatLoggerManager(config, engine_idxs=[0], client_count=1)
        self.aborts: list[str] = []

    def add(self, peer: Peer) -> asyncio.Task[Any]:
        """Serve the request of a peer, too; the task's result is what its client gets."""
        request = copy.copy(self.bench.core.requests[peer.answer.request_id])
        params = request.sampling_params = copy.copy(request.sampling_params)
        kept = {name: value for name, value in (params.extra_args or {}).items() if name != HOLD}
        params.extra_args = kept or None
        queue = self.queue(request)
        return self.bench.loop.create_task(self._answer(peer, queue))

    def queue(self, request: Any) -> Any:
        """Put a request into the output processor, as vLLM's engine client does."""
        from vllm.v1.engine.output_processor import RequestOutputCollector

        queue = RequestOutputCollector(request.sampling_params.output_kind, request.request_id)
        self.processor.add_request(request, None, None, 0, queue)
        self.processor.request_states[request.request_id].stats.arrival_time = ARRIVAL
        return queue

    def deliver(self, message: Any) -> None:
        """Do with a message what vLLM's output handler does."""
        from vllm.v1.metrics.stats import IterationStats

        stats = IterationStats() if message.outputs else None
        if stats is not None:
            stats.iteration_timestamp = ARRIVAL + 5.0
        done = self.processor.process_outputs(message.outputs, message.timestamp, stats)
        self.aborts += done.reqs_to_abort
        self.manager.record(
            engine_idx=0, scheduler_stats=message.scheduler_stats, iteration_stats=stats
        )
        self.bench.turn()

    async def _answer(self, peer: Peer, queue: Any) -> bytes:
        route = self.bench.routes[peer.path]
        made = route.request_class(**peer.body)
        name = peer.answer.ask.request_id
        if peer.path == CHAT:
            return await self._chat(route.handler, made, results(queue), name)
        return await self._completion(route.handler, made, results(queue), name)

    async def _chat(self, handler: Any, made: Any, outputs: Any, name: str) -> bytes:
        metadata = probes._protocol(handler, "RequestResponseMetadata")(request_id=name)
        rest = (name, handler.models.model_name(None), made.messages, self.bench.tokenizer)
        if made.stream:
            stream = handler.chat_completion_stream_generator(made, outputs, *rest, metadata)
            return "".join([event async for event in stream]).encode()
        response = await handler.chat_completion_full_generator(made, outputs, *rest, metadata)
        return bytes(JSONResponse(response.model_dump()).body)

    async def _completion(self, handler: Any, made: Any, outputs: Any, name: str) -> bytes:
        metadata = probes._protocol(handler, "RequestResponseMetadata")(request_id=name)
        model = handler.models.model_name(None)
        if made.stream:
            stream = handler.completion_stream_generator(
                made,
                [{"type": "token", "prompt_token_ids": [0], "prompt": ""}],
                probes._numbered(outputs),
                name,
                0,
                model,
                num_prompts=1,
                tokenizer=self.bench.tokenizer,
                request_metadata=metadata,
            )
            return "".join([event async for event in stream]).encode()
        final = [one async for one in outputs][-1]
        final.prompt = ""
        response = handler.request_output_to_completion_response(
            [final], made, name, 0, model, self.bench.tokenizer, metadata
        )
        return bytes(JSONResponse(response.model_dump()).body)


@dataclass
class Run:
    """Both ways with the same requests and the same outputs of the engine."""

    bench: Bench
    upstream: Upstream
    holder: TokenHolder = field(default_factory=TokenHolder)
    peers: list[Peer] = field(default_factory=list)
    tasks: list[Any] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def add(self, path: str, **body: Any) -> str:
        """Have both serve a request; returns its id."""
        peer = self.bench.take(path, **body)
        request_id = peer.answer.request_id
        self.holder.add(self.bench.core.requests[request_id])
        self.peers.append(peer)
        self.tasks.append(self.upstream.add(peer))
        self.ids.append(request_id)
        return request_id

    def step(self, outputs: list[Any], timestamp: float, stats: Any = None) -> None:
        """Deliver a step to both; the lane's goes through the engine's holder."""
        from vllm.v1.engine import EngineCoreOutputs

        message = EngineCoreOutputs(outputs=outputs, timestamp=timestamp, scheduler_stats=stats)
        self.upstream.deliver(wired(message))
        held = {0: wired(message)}
        self.holder.filter(held, can_wait)
        if 0 in held:
            self.bench.deliver(wired(held[0]))


async def results(queue: Any) -> AsyncIterator[Any]:
    """Yield what comes out of a queue until the request has finished, as vLLM's client does."""
    finished = False
    while not finished:
        result = queue.get_nowait() or await queue.get()
        finished = result.finished
        yield result


def wired(message: Any) -> Any:
    """Send a message through vLLM's codec, as between two processes."""
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    return MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(message))


def counters(manager: Any) -> dict[str, float]:
    """Return every counter and histogram of a StatLoggerManager's Prometheus logger, by name.

    Gauges say what is now, and are left out.
    """
    (logger,) = [one for one in manager.stat_loggers if "Prometheus" in type(one).__name__]
    found: dict[str, float] = {}

    def walk(name: str, value: Any) -> None:
        value = getattr(value, "histogram", value)  # one that our bookkeeping stands before
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}.{key}", inner)
        elif type(value).__name__ in ("Counter", "Histogram") and value._is_observable():
            for sample in value._child_samples():
                if not sample.name.endswith("created"):
                    found[f"{name}{sample.name}{sample.labels}"] = sample.value

    for name, value in vars(logger).items():
        walk(name, value)
    return found
