"""An engine and API servers connected by shared memory, without a model: both real, in one process.

The engine is vLLM's queues and what its main loop does with them; the API server's client is what
`EngineRings` uses of vLLM's `AsyncMPClient`, over a real ZMQ socket.
"""

from __future__ import annotations

import queue
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import zmq
import zmq.asyncio
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.request import Request
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from scalellm_plugins.engine.rings import Rings
from scalellm_plugins.frontends.engine_rings import EngineRings


class Engine:
    """What `Rings` uses of vLLM's `EngineCoreProc`."""

    engine_index = 0
    scheduler = SimpleNamespace(sends_columns=False)

    def __init__(self, addresses: list[str]) -> None:
        self.input_queue: Any = queue.Queue()
        self.output_queue: Any = queue.Queue()
        self.aborts_queue: Any = queue.Queue()
        self.upstream = self.output_queue
        """vLLM's queue: what goes to the sockets."""
        self.refuses: Exception | None = None
        self.refused: list[str] = []
        self.rings = Rings(self, addresses)
        self.rings.install()

    def preprocess_add_request(self, request: EngineCoreRequest) -> tuple[Request, int]:
        """As vLLM's: make the scheduler's request of it."""
        if self.refuses is not None:
            raise self.refuses
        return Request.from_engine_core_request(request, None), request.current_wave

    def _handle_request_preproc_error(self, request: EngineCoreRequest) -> None:
        self.refused.append(request.request_id)

    def _handle_mm_cache_miss(self, request: EngineCoreRequest, _: Exception) -> None:
        self.refused.append(f"miss {request.request_id}")

    def give(self, outputs: EngineCoreOutputs, client: int = 0) -> None:
        """What the main loop does after a step."""
        self.output_queue.put_nowait((client, outputs))

    def close(self) -> None:
        """Its process ends."""
        self.rings.close()
        for one in self.rings.inbox._connected:
            one.channel.close()

    def take(self) -> list[tuple[Any, Any]]:
        """What the main loop does before a step."""
        items = []
        while not self.input_queue.empty():
            items.append(self.input_queue.get_nowait())
        return items


class Seen:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, Any]] = []
        self.outputs: list[Any] = []
        self.errors: list[Exception] = []

    def on_step(self, step: Any, general: Any, rings: Any) -> None:
        """Keep it."""
        self.steps.append((step, general))

    def on_outputs(self, outputs: Any) -> None:
        """Keep it."""
        self.outputs.append(outputs)

    def on_end(self) -> None:
        """Nothing to write."""

    def on_dead(self, error: Exception) -> None:
        """Keep it."""
        self.errors.append(error)


def addresses(number: int = 1) -> list[str]:
    """Names such as vLLM gives its output sockets."""
    return [f"ipc:///tmp/{uuid.uuid4()}" for _ in range(number)]


@contextmanager
def client_at(address: str, index: int = 0) -> Iterator[Any]:
    """What `EngineRings` uses of vLLM's client."""
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.PULL)
    socket.bind(address)
    client = SimpleNamespace(
        resources=SimpleNamespace(output_socket=socket, engine_dead=False, output_queue_task=None),
        encoder=MsgpackEncoder(),
        decoder=MsgpackDecoder(EngineCoreOutputs),
        core_engines=[b"\0\0"],
        client_index=index,
        _finalizer=SimpleNamespace(alive=True),
    )
    try:
        yield client
    finally:
        socket.close(0)
        context.term()


def connected(client: Any) -> EngineRings:
    """Connect, as the first message of a client does."""
    rings = EngineRings.connect(client)
    assert rings is not None
    return rings


def request(name: str = "a", prompt: list[int] | None = None, **others: Any) -> EngineCoreRequest:
    """A request as vLLM's input processor makes them."""
    values: dict[str, Any] = {
        "request_id": name,
        "prompt_token_ids": [1, 2, 3] if prompt is None else prompt,
        "mm_features": None,
        "sampling_params": SamplingParams(max_tokens=5),
        "pooling_params": None,
        "arrival_time": 1.5,
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    return EngineCoreRequest(**(values | others))
