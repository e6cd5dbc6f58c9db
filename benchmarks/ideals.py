"""What the simulated GPU could do with a load if everything around it cost nothing.

The simulator's virtual-time run (`simulator/ideal.py`) is given the requests that `load.py` makes:
first the shortened ones that spread the streams, then whole ones. Two runs of different length are
subtracted, so that the beginning and the end, which the load generator does not measure either,
cancel out. Its KV cache is unlimited: where a load does not fit (256 streams of 8,192 tokens on one
card) no server can reach it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from .generators import Cell
from .workloads import Workload

_BLOCK = 16  # tokens of a block of the prefix cache
_SHORT, _LONG = 6, 18  # requests per stream, beside the first
_GIB = 1 << 30


class Ideals:
    """Ideal output rates on one simulated GPU."""

    def __init__(
        self, gpu: str | None, preset: str | None, server_args: Sequence[str] = ()
    ) -> None:
        self._gpu = gpu
        self._preset = preset
        self._seqs = _option(server_args, "--max-num-seqs")
        self._tokens = _option(server_args, "--max-num-batched-tokens")
        self._rate = cache(self._output_tok_s)

    def output_tok_s(self, cell: Cell) -> float | None:
        """Output tokens per second with all streams busy; None where no GPU is simulated.

        Streaming or not is the same to a GPU.
        """
        return self._rate(cell.workload, cell.streams) if self._gpu else None

    def cycle_s(self, cell: Cell) -> float:
        """Seconds in which each stream would be answered once; 0 where no GPU is simulated."""
        rate = self.output_tok_s(cell)
        return cell.streams * cell.workload.output / rate if rate else 0.0

    def _output_tok_s(self, workload: Workload, streams: int) -> float:
        from scalellm_plugins.simulator.ideal import Batching, Request, run
        from scalellm_plugins.simulator.roofline import Roofline, gpu_preset, model_preset

        assert self._gpu is not None
        assert self._preset is not None
        card = gpu_preset(self._gpu)
        roofline = Roofline(card, model_preset(self._preset))
        tokens, seqs = _vllm_defaults(card.memory_bytes, card.name)
        batching = Batching(int(self._tokens or tokens), int(self._seqs or seqs))
        runs = [
            run(
                [Request(*lengths) for lengths in request_lengths(workload, streams, waves)],
                streams,
                roofline,
                batching,
            )
            for waves in (_SHORT, _LONG)
        ]
        tokens = runs[1].output_tokens - runs[0].output_tokens
        return tokens / (runs[1].seconds - runs[0].seconds)


def _vllm_defaults(memory_bytes: int, name: str) -> tuple[int, int]:
    """Return max_num_batched_tokens and max_num_seqs as vLLM sets them for an API server.

    Follows `EngineArgs.get_batch_defaults`, whose rule has been the same from vLLM 0.29 on.
    """
    if memory_bytes >= 160 * _GIB:
        return 16384, 1024
    if memory_bytes >= 70 * _GIB and "a100" not in name:
        return 8192, 1024
    return 2048, 256


def request_lengths(workload: Workload, streams: int, waves: int) -> list[tuple[int, int, int]]:
    """Return (prompt, output, cached) tokens of the requests of all streams, in order of sending.

    As `workloads.Prompts` makes them, with whole blocks of what was said before in the cache.
    """
    lengths = []
    for wave in range(waves + 1):
        for index in range(streams):
            # Stream `index` starts with a conversation of 1 + index % turns turns.
            turn = wave - (1 + index % workload.turns)
            turn = wave if turn < 0 else turn % workload.turns
            said = turn * (workload.prompt + workload.output)
            prompt = workload.system + said + workload.prompt
            first = max(2, workload.output * (index + 1) // streams)
            output = workload.output if wave else first
            lengths.append((prompt, output, (workload.system + said) // _BLOCK * _BLOCK))
    return lengths


def _option(args: Sequence[str], name: str) -> str:
    """Return the value of `--name value` or `--name=value`, "" if it is not there."""
    for place, word in enumerate(args):
        option, equals, value = word.partition("=")
        if option == name:
            return value if equals else "".join(args[place + 1 : place + 2])
    return ""
