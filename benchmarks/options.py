"""The command line of `scalellm bench compare`, parsed into one frozen plan."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from scalellm_plugins.errors import ConfigError, closest_first

from .generators import Cell
from .systems import BUILT_IN, System, choose
from .workloads import WORKLOADS, workload_named

_USUAL = {"streams": "16,64,256", "rounds": 3, "seconds": 8.0, "stream_modes": "stream,nonstream"}
_QUICK = {"streams": "16,64", "rounds": 1, "seconds": 4.0, "stream_modes": "stream"}
_Number = TypeVar("_Number", int, float)

_DESCRIPTION = """\
Start each system on the same simulated GPU, drive all with the same load, and compare: output
tokens per second and their share of what the GPU could do, TTFT, ITL, CPU per output token by
process role, peak memory, failures. Rounds are interleaved; what is reported is medians.
"""

_EPILOG = """\
systems:
{systems}
workloads (all are sent as text to /v1/chat/completions, every prompt its own):
{workloads}
examples:
  scalellm bench compare --quick
      three minutes: a first impression, and whether everything starts
  scalellm bench compare --vllm-rs ~/bin/vllm-rs --output results.json
      the default comparison with vLLM's Rust frontend in it; also draws results.png
  scalellm bench compare --systems vllm,scalellm \\
          --system 'noipc=scalellm --scalellm.ipc off' --system 'x4=vllm --api-server-count 4'
      two variations on known systems: NAME=[VARIABLE=VALUE …] BASE [OPTION …]
  scalellm bench compare --workloads long,chat --streams 16 --stream-modes stream
  scalellm bench compare --gpu none --model-dir examples/demo_model --systems vllm
      a real model on the device that is here, without a simulated GPU

how long: a measurement takes --seconds and 3-5 s more, a server's start 15-40 s. The default, 4
systems × 3 stream counts × 2 modes × 3 rounds, takes about 18 minutes. Where --seconds does not
cover every stream's request twice, the window is longer: with the long prompts a measurement at 64
streams takes a minute, at 256 four.

a quiet machine: server and load generator share the cores. What others use is measured, shown, and
in the JSON file as `other_cores`.
"""


@dataclass(frozen=True)
class Plan:
    """What to compare, as the user asked."""

    systems: tuple[System, ...]
    skipped: Mapping[str, str]
    """Systems left out, and why."""
    cells: tuple[Cell, ...]
    rounds: int
    seconds: float
    gpu: str | None
    preset: str | None
    tokenizer: Path
    model_dir: Path | None
    vllm_rs: Path | None
    load_generator: str
    server_args: tuple[str, ...]
    output: Path | None
    plot: Path | None
    logs: Path | None
    start_timeout_s: float
    request_timeout_s: float
    seed: int


def parse(argv: Sequence[str]) -> Plan:
    """Parse the options after `compare`.

    Raises:
        ConfigError: a value that cannot be; the text has the option, the value and the remedy.
        SystemExit: after --help, or when argparse refuses.
    """
    args = _parser().parse_args(argv)
    for name, value in (_QUICK if args.quick else _USUAL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    gpu, preset = _simulated(args)
    vllm_rs = _vllm_rs(args.vllm_rs)
    chosen = choose(_names(args.systems), args.system)
    skipped = {
        system.name: "no vllm-rs binary here; give it with --vllm-rs PATH"
        for system in chosen
        if system.needs == "--vllm-rs" and vllm_rs is None
    }
    return Plan(
        systems=tuple(system for system in chosen if system.name not in skipped),
        skipped=skipped,
        cells=_cells(args),
        rounds=_at_least("--rounds", args.rounds, 1),
        seconds=_at_least("--seconds", args.seconds, 0.5),
        gpu=gpu,
        preset=preset,
        tokenizer=args.tokenizer,
        model_dir=args.model_dir,
        vllm_rs=vllm_rs,
        load_generator=_load_generator(args.load_generator, vllm_rs),
        server_args=tuple(shlex.split(args.server_args)),
        output=_writable("--output", args.output),
        plot=_writable("--plot", args.plot or (args.output and args.output.with_suffix(".png"))),
        logs=args.logs,
        start_timeout_s=_at_least("--start-timeout", args.start_timeout, 1),
        request_timeout_s=_at_least("--request-timeout", args.request_timeout, 1),
        seed=args.seed,
    )


def _parser() -> argparse.ArgumentParser:
    systems = "".join(f"  {s.name:<10}{s.summary}\n" for s in BUILT_IN.values())
    workloads = "".join(f"  {w.name:<10}{w.summary}\n" for w in WORKLOADS.values())
    parser = argparse.ArgumentParser(
        prog="scalellm bench compare",
        description=_DESCRIPTION,
        epilog=_EPILOG.format(systems=systems, workloads=workloads),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_what(parser.add_argument_group("what is compared"))
    _add_on_what(parser.add_argument_group("what it runs on"))
    _add_how(parser.add_argument_group("how it is measured and reported"))
    return parser


def _add_what(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--systems", metavar="A,B", default=",".join(BUILT_IN), help="default: %(default)s")
    add("--system", metavar="NAME=…", action="append", default=[], help="define one; repeatable")
    add("--streams", metavar="N,M", help="concurrent users (default: 16,64,256)")
    add("--workloads", metavar="A,B", default="short", help="default: %(default)s")
    add("--stream-modes", metavar="A,B", help="default: stream,nonstream")
    add("--vllm-rs", metavar="PATH", type=Path, help="vllm-rs binary (default: vLLM's, if it has)")


def _add_on_what(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--gpu", default="h200", help="simulated card, or none (default: %(default)s)")
    add("--model", default="8b", help="model whose timeline is simulated (default: %(default)s)")
    add(
        "--tokenizer",
        metavar="DIR",
        type=Path,
        default=Path(__file__).resolve().parent.parent / "examples" / "demo_model",
        help="model folder with the tokenizer and chat template to use (default: the demo model)",
    )
    add("--model-dir", metavar="DIR", type=Path, help="serve this folder as it is")
    add("--server-args", metavar="'…'", default="", help="options that every system gets")


def _add_how(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--rounds", type=int, metavar="N", help="default: 3")
    add(
        "--seconds",
        type=float,
        metavar="S",
        help="measured window of each cell, at least (default: 8)",
    )
    add("--quick", action="store_true", help="16 and 64 streams, 1 round of 4 s, streaming only")
    add(
        "--load-generator",
        metavar="NAME",
        default="own",
        help="own, vllm-rs or vllm (default: own, which does every workload, checks every answer "
        "and costs little CPU; the others stream single requests only, and vllm's needs more CPU "
        "than some servers)",
    )
    add("--output", metavar="FILE.json", type=Path, help="write everything here; a picture beside")
    add("--plot", metavar="FILE.png", type=Path, help="where the picture goes")
    add("--logs", metavar="DIR", type=Path, help="keep the servers' logs here")
    add("--start-timeout", type=float, metavar="S", default=240.0, help="default: %(default)g")
    add("--request-timeout", type=float, metavar="S", default=300.0, help="default: %(default)g")
    add("--seed", type=int, metavar="N", default=0, help="of the prompts (default: %(default)s)")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _cells(args: argparse.Namespace) -> tuple[Cell, ...]:
    workloads = [workload_named(name) for name in _names(args.workloads)]
    modes = []
    for name in _names(args.stream_modes):
        if name not in ("stream", "nonstream"):
            raise ConfigError(f"--stream-modes: {name!r} is unknown. Valid: stream, nonstream")
        modes.append(name == "stream")
    streams = []
    for text in _names(args.streams):
        if not text.isdigit() or not 1 <= int(text) <= 65536:
            raise ConfigError(
                f"--streams: {text!r} is not a number of concurrent users (1-65536). "
                "For example --streams 16,64"
            )
        streams.append(int(text))
    for option, values in (("--workloads", workloads), ("--stream-modes", modes)):
        if not values:
            raise ConfigError(f"{option}: nothing is named, so there is nothing to measure")
    if not streams:
        raise ConfigError("--streams: nothing is named, so there is nothing to measure")
    return tuple(
        Cell(workload, stream, count)
        for workload in dict.fromkeys(workloads)
        for stream in dict.fromkeys(modes)
        for count in dict.fromkeys(streams)
    )


def _simulated(args: argparse.Namespace) -> tuple[str | None, str | None]:
    """Check the simulated GPU's options; both None where none is simulated."""
    if args.gpu == "none":
        if args.model_dir is None:
            raise ConfigError(
                "--gpu: 'none' serves a real model, so it needs --model-dir DIR with its weights"
            )
        return None, None
    from scalellm_plugins.simulator.roofline import GPUS, MODELS

    for option, value, valid in (("--gpu", args.gpu, GPUS), ("--model", args.model, MODELS)):
        if value not in valid:
            names = ", ".join(closest_first(value, valid))
            raise ConfigError(f"{option}: {value!r} is unknown. Valid: {names}")
    return args.gpu, args.model


def _vllm_rs(path: Path | None) -> Path | None:
    """The binary that the user gave, or the one inside an installed vLLM (its CUDA wheels)."""
    if path is not None:
        if not (path.is_file() and os.access(path, os.X_OK)):
            raise ConfigError(
                f"--vllm-rs: {str(path)!r} is not an executable file. It is in vLLM's CUDA wheel "
                "as vllm/vllm-rs; leave the option out to compare without it."
            )
        return path.resolve()
    spec = importlib.util.find_spec("vllm")
    for folder in (spec and spec.submodule_search_locations) or ():
        if os.access(Path(folder) / "vllm-rs", os.X_OK):
            return Path(folder) / "vllm-rs"
    return None


def _load_generator(name: str, vllm_rs: Path | None) -> str:
    if name not in ("own", "vllm", "vllm-rs"):
        names = ", ".join(closest_first(name, ("own", "vllm", "vllm-rs")))
        raise ConfigError(f"--load-generator: {name!r} is unknown. Valid: {names}")
    if name == "vllm-rs" and vllm_rs is None:
        raise ConfigError(
            "--load-generator: 'vllm-rs' needs its binary. Give it with --vllm-rs PATH, or take "
            "'own'."
        )
    return name


def _at_least(option: str, value: _Number, least: _Number) -> _Number:
    if value < least:
        raise ConfigError(f"{option}: {value:g} is too small. Give at least {least:g}.")
    return value


def _writable(option: str, path: Path | None) -> Path | None:
    """Find out before half an hour of measuring whether the result can be written."""
    if path is not None and not path.resolve().parent.is_dir():
        raise ConfigError(
            f"{option}: {str(path)!r} is in a folder that does not exist. Create "
            f"{str(path.resolve().parent)!r} first, or give another place."
        )
    return path
