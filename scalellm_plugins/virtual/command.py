"""The command `scalellm simulate`: from options to runs, tables, JSON and a picture."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from scalellm_plugins.errors import ConfigError, ScaleLLMError
from scalellm_plugins.simulator.model_dir import MAX_POSITIONS
from scalellm_plugins.simulator.roofline import GPUS, MODELS, gpu_preset, model_preset

from . import lengths, plot, policies, report, tenants, trace, workload
from .job import Request, Settings
from .metrics import summary
from .runs import run_all
from .tenants import Tenant

_BLOCK = 16
"""Tokens of a KV block, vLLM's default on GPUs."""

_DESCRIPTION = """\
Serve a workload with vLLM's engine and scheduler on a simulated GPU, in virtual time:
an hour of traffic takes a minute or two. Several policies see the same requests and are
compared side by side. Times are the GPU's and the queue's; HTTP, tokenizing and the
engine's own CPU take no time at all. Needs vLLM; no GPU, no model."""

_EPILOG = """\
lengths (--prompt-tokens, --output-tokens; prompt and output of a tenant):
  512 | uniform:100-500 | lognormal:median=1020:sigma=0.5[:min=16][:max=8192]
  or a preset: {presets}

tenants (--tenants): a short form, or a YAML or JSON file with a list of the same keys
  "a:weight=2:rate=3,b:rate=10:ttft_ms=500"
  keys: {keys}

examples:
  scalellm simulate --policy vllm,fcfs --rate 8 --seconds 3600
  scalellm simulate --policy fcfs,fair --tenants "calm:rate=1,flood:rate=40" --kv-blocks 4000
  scalellm simulate --policy fcfs --workload trace --trace AzureLLMInferenceTrace_conv.csv \\
      --ttft-ms 1000 --tpot-ms 40 --output result.json --plot result.png

Exit code: 0 all policies ran, 1 one failed, 2 usage error."""


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(argv)
    try:
        return _simulate(options, "scalellm simulate " + shlex.join(argv))
    except ConfigError as error:
        _say(f"scalellm simulate: {error}")
        return 2
    except ScaleLLMError as error:
        _say(f"scalellm simulate: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


def _simulate(options: argparse.Namespace, command: str) -> int:
    chosen = policies.parse(options.policy or ["fcfs"], options.set)
    if options.plot:
        plot.need_matplotlib()  # before minutes of work, not after
    for path in (options.output, options.plot):
        if path and not path.absolute().parent.is_dir():
            raise ConfigError(f"{str(path.absolute().parent)!r} is not a folder to write to")
    requests = workload_of(options)
    settings = settings_of(options, requests)
    _say(_about(requests))
    runs = run_all(settings, chosen, requests, at_once=options.jobs or _jobs(), say=_say)
    results = {label: summary(requests, run) for label, run in runs.items()}
    print(report.table(results))
    if options.output:
        document = report.document(command, requests, runs, results, each=options.per_request)
        options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot.draw(options.plot, requests, runs, results)
    return 0


def workload_of(options: argparse.Namespace) -> list[Request]:
    """Make the requests that the options ask for.

    Raises:
        ConfigError: options that contradict each other, or that cannot be.
    """
    given = options.workload or ("trace" if options.trace else "poisson")
    if (given == "trace") != (options.trace is not None):
        raise ConfigError("--workload trace and --trace FILE.csv belong together")
    if given != "gamma" and options.cv is not None:
        raise ConfigError(f"--cv: {options.cv:g} belongs to --workload gamma, not to {given}")
    senders = tenants.parse(options.tenants) if options.tenants else [Tenant()]
    defaults = workload.Defaults(
        rate=options.rate,
        cv=1.0 if options.cv is None else options.cv,
        prompt=options.prompt_tokens,
        output=options.output_tokens,
        ttft_ms=options.ttft_ms,
        tpot_ms=options.tpot_ms,
        deadline_ms=options.deadline_ms,
    )
    if given != "trace":
        seconds = 60.0 if options.seconds is None else options.seconds
        return workload.synthetic(senders, defaults, seconds, options.seed)
    rows = trace.load(options.trace, seconds=options.seconds, speed=options.trace_speed)
    if rows.left_out:
        _say(f"{options.trace}: {rows.left_out:,} rows without a prompt or an answer left out")
    return workload.traced(rows, senders, defaults, options.seed)


def settings_of(options: argparse.Namespace, requests: Sequence[Request]) -> Settings:
    """Make the server's settings; what vLLM would refuse or hang on is refused here.

    Raises:
        ConfigError: an unknown preset, or a request that does not fit.
    """
    gpu_preset(options.gpu)
    model_preset(options.model, options.tensor_parallel)
    longest = max(request.prompt + request.output for request in requests)
    most = options.max_model_len or min(MAX_POSITIONS, longest + _BLOCK)
    if longest > most:
        raise ConfigError(
            f"--max-model-len: {most} tokens are fewer than the longest request's {longest}. Give "
            f"more (up to {MAX_POSITIONS}), or cut the lengths (lognormal:…:max=N)"
        )
    blocks = options.kv_blocks
    if blocks is not None and (blocks - 1) * _BLOCK < most:
        raise ConfigError(
            f"--kv-blocks: {blocks} blocks of {_BLOCK} tokens, one of which vLLM keeps, hold no "
            f"sequence of {most} tokens. Give at least {-(-most // _BLOCK) + 1}"
        )
    return Settings(
        gpu=options.gpu,
        model=options.model,
        tensor_parallel=options.tensor_parallel,
        max_model_len=most,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        kv_blocks=blocks,
        prefix_caching=not options.no_prefix_caching,
    )


def _about(requests: Sequence[Request]) -> str:
    count = len(requests)
    prompt = sum(request.prompt for request in requests) / count
    output = sum(request.output for request in requests) / count
    return (
        f"{count:,} requests in {requests[-1].at:,.0f} s, on average {prompt:,.0f} tokens in and "
        f"{output:,.0f} out"
    )


def _jobs() -> int:
    return len(os.sched_getaffinity(0))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


_positive.__name__, _count.__name__ = "number", "whole number"  # for argparse's messages


def _parser() -> argparse.ArgumentParser:
    keys = ", ".join(Tenant.__struct_fields__)
    parser = argparse.ArgumentParser(
        "scalellm simulate",
        description=_DESCRIPTION,
        epilog=_EPILOG.format(presets=", ".join(lengths.PRESETS), keys=keys),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_policies(parser.add_argument_group("what is compared"))
    _add_workload(parser.add_argument_group("workload"))
    _add_targets(parser.add_argument_group("targets of requests whose tenant has none of its own"))
    _add_server(parser.add_argument_group("server"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_policies(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--policy",
        action="append",
        metavar="NAME[:KEY=VALUE…]",
        help="comma list, may be repeated: policies of --scalellm.scheduler.policy, each with "
        "options of its own if need be, several in one as a+b; vllm and vllm-priority: vLLM's own "
        "scheduler (default: fcfs)",
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="scheduler.KEY=VALUE",
        help="an option of --scalellm.scheduler for all policies but vLLM's; may be repeated",
    )


def _add_workload(group: argparse._ArgumentGroup) -> None:
    number = {"type": _positive, "metavar": "N"}
    group.add_argument(
        "--workload",
        choices=("poisson", "gamma", "trace"),
        help="how requests arrive; gamma is bursty by --cv (default: poisson, or trace with "
        "--trace)",
    )
    group.add_argument(
        "--rate",
        **number,  # type: ignore[arg-type]
        default=1.0,
        help="requests per second of each tenant that has no rate of its own (default: 1)",
    )
    group.add_argument(
        "--cv",
        **number,  # type: ignore[arg-type]
        help="coefficient of variation of the time between two requests (default: 1, as Poisson)",
    )
    group.add_argument(
        "--seconds",
        **number,  # type: ignore[arg-type]
        help="of traffic; the run goes on until all is answered (default: 60, or the whole trace)",
    )
    group.add_argument(
        "--prompt-tokens", default="512", metavar="LENGTHS", help="see below (default: 512)"
    )
    group.add_argument(
        "--output-tokens", default="128", metavar="LENGTHS", help="see below (default: 128)"
    )
    group.add_argument("--tenants", metavar="TENANTS|FILE", help="see below (default: one)")
    group.add_argument(
        "--trace", metavar="FILE.csv", help="in the columns of Azure's traces or of BurstGPT"
    )
    group.add_argument(
        "--trace-speed",
        **number,  # type: ignore[arg-type]
        default=1.0,
        help="times as fast as recorded (default: 1)",
    )
    group.add_argument("--seed", type=int, default=0, help="of the workload (default: 0)")


def _add_targets(group: argparse._ArgumentGroup) -> None:
    for name, what in (
        ("ttft", "to the first token, ms from the arrival"),
        ("tpot", "per further token, ms on average"),
        ("deadline", "to the end of the answer, ms from the arrival"),
    ):
        group.add_argument(f"--{name}-ms", type=_positive, metavar="N", help=what)


def _add_server(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--gpu", default="h200", metavar="NAME", help=f"{', '.join(GPUS)} (default: h200)"
    )
    group.add_argument(
        "--model", default="8b", metavar="NAME", help=f"{', '.join(MODELS)} (default: 8b)"
    )
    for name, what in (
        ("--tensor-parallel", "cards (default: as the model's preset has it)"),
        ("--max-num-seqs", "sequences that run at a time (default: vLLM's, for the card)"),
        ("--max-num-batched-tokens", "tokens of a step (default: vLLM's, for the card)"),
        ("--kv-blocks", f"KV blocks of {_BLOCK} tokens (default: what the card has room for)"),
        ("--max-model-len", "tokens of a sequence (default: what the longest request needs)"),
    ):
        group.add_argument(name, type=_count, metavar="N", help=what)
    group.add_argument(
        "--no-prefix-caching", action="store_true", help="compute every prompt as a whole"
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output", type=Path, metavar="FILE.json", help="write the results and the command there"
    )
    group.add_argument("--per-request", action="store_true", help="with every request's times, too")
    group.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them (needs matplotlib)")
    group.add_argument(
        "--jobs", type=_count, metavar="N", help="runs at a time (default: as there are cores)"
    )
