"""`scalellm bench compare`: vLLM's frontends and ours, on the same simulated GPU, under one load.

What runs is in `session.py`, the systems in `systems.py`, the load in `workloads.py` and `load.py`.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scalellm_plugins.errors import ConfigError, ScaleLLMError

from . import report
from .generators import Generator, Setting, generator_named
from .ideals import Ideals
from .options import Plan, parse
from .plot import PlotError, draw
from .server import exit_on_signals
from .session import Session, outcome, say, turns
from .systems import Target, vllm_executable
from .workloads import WORKLOADS, words_of

_CYCLES = 2  # that a window covers: prompts that take turns come in bunches
_USAGE = "usage: scalellm bench compare [options]; see scalellm bench compare --help"


def main(argv: Sequence[str]) -> int:
    """Run `scalellm bench`; `argv[0]` is the kind of benchmark, of which there is `compare`.

    Returns 0 when everything was measured without a failure, 1 when something failed, 2 for options
    that cannot be, 130 after Ctrl-C (what was measured until then is reported).
    """
    if not argv or argv[0] != "compare":
        known = argv and argv[0] in ("-h", "--help")
        problem = "" if known or not argv else f"scalellm bench: {argv[0]!r} is unknown\n"
        print(problem + _USAGE, file=sys.stdout if known else sys.stderr)
        return 0 if known else 2
    try:
        plan = parse(argv[1:])
        _check(plan)
        return _compare(plan, "scalellm bench " + shlex.join(argv))
    except ConfigError as error:
        say(f"scalellm bench compare: {error}")
        return 2
    except ScaleLLMError as error:
        say(f"scalellm bench compare: {error}")
        return 1


def _check(plan: Plan) -> None:
    vllm_executable()
    for name, reason in plan.skipped.items():
        say(f"{name}: left out: {reason}")
    if not plan.systems:
        raise ConfigError("--systems: none of the systems named can be started here (see above)")
    generator = generator_named(plan.load_generator, plan.vllm_rs)
    for cell in plan.cells:
        lacking = generator.refusal(cell)
        if lacking:
            raise ConfigError(
                f"--load-generator: {plan.load_generator!r} {lacking}, so it cannot do "
                f"'{cell}'. Take 'own', or leave that load out (--stream-modes stream, --workloads "
                "short,long)."
            )


def _compare(plan: Plan, command: str) -> int:
    exit_on_signals()
    logs = plan.logs or Path(tempfile.mkdtemp(prefix="scalellm-bench-"))
    logs.mkdir(parents=True, exist_ok=True)
    say(f"logs of servers and load generators: {logs}")
    with tempfile.TemporaryDirectory(prefix="scalellm-bench-model-") as scratch:
        model_dir = plan.model_dir or _model_dir(plan, Path(scratch))
        words = words_of(model_dir)
        target = Target(model_dir, plan.gpu, plan.preset, plan.vllm_rs, plan.server_args)
        ideals = Ideals(plan.gpu, plan.preset, plan.server_args)
        interrupted = False
        with Session(plan.systems, target, logs, plan.start_timeout_s) as session:
            try:
                session.start()
                words_file = logs / "words.json"
                words_file.write_text(json.dumps(words))
                setting = Setting(
                    window_s=plan.seconds,
                    scratch=logs,
                    model_dir=model_dir,
                    words=words_file,
                    template=session.template(words),
                    timeout_s=plan.request_timeout_s,
                )
                _measure(plan, session, setting, ideals, command)
            except KeyboardInterrupt:
                interrupted = True
                say("interrupted; what was measured until now:")
    records = _report(plan, session.samples, command)
    if interrupted:
        return 130
    return 1 if not records or any(r["failed"] or r["error"] for r in records) else 0


def _model_dir(plan: Plan, scratch: Path) -> Path:
    if not (plan.tokenizer / "tokenizer.json").is_file():
        raise ConfigError(
            f"--tokenizer: {str(plan.tokenizer)!r} holds no tokenizer.json. Give the folder of a "
            "model whose tokenizer and chat template are to be used."
        )
    from scalellm_plugins.simulator.model_dir import make_model_dir

    assert plan.preset is not None
    return make_model_dir(plan.preset, plan.tokenizer, scratch)


def _measure(plan: Plan, session: Session, setting: Setting, ideals: Ideals, command: str) -> None:
    generator: Generator = generator_named(plan.load_generator, plan.vllm_rs)
    order = list(turns(plan.systems, plan.cells, plan.rounds))
    started = time.monotonic()
    for done, (number, cell, name) in enumerate(order):
        left = (time.monotonic() - started) / done * (len(order) - done) if done else None
        eta = f", {left / 60:.0f} min left" if left else ""
        seed = plan.seed + 1 + number * len(plan.cells) + plan.cells.index(cell)
        window = max(plan.seconds, _CYCLES * ideals.cycle_s(cell))
        sample = session.measure(name, cell, generator, replace(setting, window_s=window), seed)
        ideal = ideals.output_tok_s(cell)
        sample |= {"round": number, "ideal_tok_s": ideal}
        if ideal and sample.get("output_tok_s") is not None:
            sample["ideal_fraction"] = sample["output_tok_s"] / ideal
        say(
            f"[{done + 1}/{len(order)}{eta}] round {number + 1}/{plan.rounds} {cell} {name}: "
            f"{outcome(sample)}"
        )
        last_of_round = done + 1 == len(order) or order[done + 1][0] != number
        if plan.output and last_of_round:
            _save(plan, session.samples, command)


def _report(plan: Plan, samples: Sequence[report.Sample], command: str) -> list[report.Record]:
    records = report.aggregate(samples)
    if not records:
        say("nothing was measured")
        return records
    print(report.table(records, {name: w.summary for name, w in WORKLOADS.items()}))
    for name, reason in plan.skipped.items():
        print(f"{name}: left out: {reason}")
    if plan.output:
        _save(plan, samples, command)
        say(f"written: {plan.output}")
    if plan.plot:
        host = report.machine()
        title = f"{plan.preset} on a simulated {plan.gpu}" if plan.gpu else "no simulated GPU"
        rounds = f"median of {plan.rounds} rounds" if plan.rounds > 1 else "1 round"
        title += f" · {host['cores']} × {host['cpu']} · {rounds}"
        try:
            draw(plan.plot, records, title)
            say(f"written: {plan.plot}")
        except PlotError as error:
            say(str(error))
    return records


def _save(plan: Plan, samples: Sequence[report.Sample], command: str) -> None:
    assert plan.output is not None
    settings: dict[str, Any] = {
        "gpu": plan.gpu,
        "model": plan.preset,
        "rounds": plan.rounds,
        "window_s": plan.seconds,
        "load_generator": plan.load_generator,
        "systems": {s.name: s.summary for s in plan.systems},
        "skipped": dict(plan.skipped),
    }
    versions = report.versions()
    if plan.vllm_rs:
        versions["vllm-rs"] = _vllm_rs_version(plan.vllm_rs)
    records = report.aggregate(samples)
    report.save(plan.output, records, samples, command, settings, versions)


def _vllm_rs_version(path: Path) -> str:
    found = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
