"""What engines send by shared memory, for vLLM's own task that reads its output socket.

Stands in for the socket and the decoder while vLLM starts that task: it sees one stream of
messages, by socket and by ring, and does with them what it always does.
"""

from __future__ import annotations

import asyncio
from typing import Any

from .engine_rings import Columns, EngineRings


class _Decoded(list[Any]):
    """In place of frames: a message that needs no decoding. Empty, as vLLM looks at frames."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs


class MergedDecoder:
    """In place of vLLM's decoder."""

    def __init__(self, decoder: Any) -> None:
        self._decode = decoder.decode

    def decode(self, frames: Any) -> Any:
        """Decode frames, unless they are decoded."""
        return frames.outputs if type(frames) is _Decoded else self._decode(frames)


class MergedSocket:
    """In place of the output socket (`zmq.asyncio.Socket`)."""

    def __init__(self, socket: Any, rings: EngineRings) -> None:
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

        self._socket = socket
        self._rings = rings
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._output, self._outputs = EngineCoreOutput, EngineCoreOutputs

    def start(self, reader: asyncio.Task[Any]) -> None:
        """Fill the queue for as long as vLLM's task reads it."""
        self._rings.start(self)
        pump = asyncio.get_running_loop().create_task(self._pump(), name="scalellm-ipc-socket")
        reader.add_done_callback(lambda _: pump.cancel())

    async def _pump(self) -> None:
        try:
            while True:
                self._queue.put_nowait(await self._socket.recv_multipart(copy=False))
        except Exception as error:
            self._queue.put_nowait(error)

    async def recv_multipart(self, copy: bool = True) -> Any:  # noqa: ARG002
        """Return the next message's frames, or what stands for them.

        Raises:
            Exception: what the socket raised; EngineDeadError when an engine has ended.
        """
        frames = await self._queue.get()
        if isinstance(frames, Exception):
            raise frames
        return frames

    # Sink of the rings

    def on_step(self, step: Columns, general: Any, rings: EngineRings) -> None:
        """Make vLLM's message of columns."""
        if general is None:
            general = self._outputs(engine_index=step.engine, timestamp=step.timestamp)
            version = rings.weight_version()
            if version is not None:
                general.weight_version = version
        outputs = [
            self._output(request_id, [token])
            for request_id, token in zip(step.receivers, step.tokens, strict=True)
            if request_id is not None
        ]
        general.outputs = outputs + step.ended + general.outputs
        self.on_outputs(general)

    def on_outputs(self, outputs: Any) -> None:
        """Hand it on."""
        self._queue.put_nowait(_Decoded(outputs))

    def on_end(self) -> None:
        """Nothing: every message is handed on at once."""

    def on_dead(self, error: Exception) -> None:
        """Let vLLM's task fail, as it does when the engine says that it is dead."""
        self._queue.put_nowait(error)
