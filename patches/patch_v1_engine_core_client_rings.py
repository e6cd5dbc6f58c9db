"""API servers talk to engines by shared memory (`frontends/engine_rings.py`).

Symptom without it: per decode step a ZMQ message, two passes of msgpack over an object per token,
and two asyncio tasks.
"""

from __future__ import annotations

import logging
from typing import Any

from .registry import replace

logger = logging.getLogger("vllm.scalellm")


def apply() -> None:
    """Wrap what `AsyncMPClient` sends with, and the start of the task that reads its socket."""
    from vllm.v1.engine import EngineCoreRequestType, core_client

    from scalellm_plugins import messages
    from scalellm_plugins.frontends.engine_rings import EngineRings
    from scalellm_plugins.frontends.merged_socket import MergedDecoder, MergedSocket

    client = core_client.AsyncMPClient
    ensure = client._ensure_output_queue_task
    send_input, send_message = client._send_input, client._send_input_message
    add, abort = EngineCoreRequestType.ADD, EngineCoreRequestType.ABORT
    kinds = {
        add.value: messages.ADD,
        abort.value: messages.ABORT,
        EngineCoreRequestType.UTILITY.value: messages.UTILITY,
    }

    def rings_of(self: Any) -> EngineRings | None:
        rings: EngineRings | None
        try:
            rings = self._scalellm_rings
        except AttributeError:
            why = _why_not(self)
            if why:
                logger.info("ipc: by vLLM's sockets, not shared memory: %s", why)
            rings = self._scalellm_rings = None if why else EngineRings.connect(self)
        return rings

    def _ensure_output_queue_task(self: Any) -> None:
        resources = self.resources
        if resources.output_queue_task is not None:
            return
        rings = rings_of(self)
        if rings is None:
            ensure(self)
            return
        socket: Any = resources.output_socket
        decoder = self.decoder
        merged = MergedSocket(socket, rings)
        # vLLM's function takes both into a closure; everybody else means the real ones.
        resources.output_socket, self.decoder = merged, MergedDecoder(decoder)
        try:
            ensure(self)
        finally:
            resources.output_socket, self.decoder = socket, decoder
        reader: Any = resources.output_queue_task
        merged.start(reader)

    def _send_input(self: Any, request_type: Any, request: Any, engine: Any = None) -> Any:
        rings = rings_of(self)
        target = self.core_engine if engine is None else engine
        if rings is None or not rings.reaches(target):
            return send_input(self, request_type, request, *(() if engine is None else (engine,)))
        if request_type is abort:
            for request_id in request:
                rings.forget(request_id)
        if request_type is not add:
            return send_input(self, request_type, request, *(() if engine is None else (engine,)))
        self.ensure_alive()
        rings.add(target, request)
        return _done()

    def _send_input_message(self: Any, message: Any, engine: Any) -> Any:
        rings = rings_of(self)
        if rings is None or message[0] not in kinds or not rings.reaches(engine):
            return send_message(self, message, engine)
        self.ensure_alive()
        rings.send(engine, kinds[message[0]], message[1:])
        return _done()

    replace(client, "_ensure_output_queue_task", _ensure_output_queue_task)
    replace(client, "_send_input", _send_input)
    replace(client, "_send_input_message", _send_input_message)


def _why_not(client: Any) -> str | None:
    """Why a client's messages need vLLM's sockets."""
    parallel = client.vllm_config.parallel_config
    if getattr(parallel, "enable_elastic_ep", False):
        return "--enable-elastic-ep: engines come and go"
    if getattr(parallel, "enable_fault_tolerance", False):
        return "--enable-fault-tolerance: engines are restarted behind the sockets"
    if getattr(client.encoder, "oob_tensor_consumer", None) is not None:
        return "multimodal tensors go by a queue of torch"
    return None


async def _done() -> None:
    """What vLLM awaits after sending."""
