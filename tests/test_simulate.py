"""`scalellm simulate` with vLLM's real engine, in virtual time, and its command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from scalellm_plugins import cli
from scalellm_plugins.virtual import command, plot, policies
from scalellm_plugins.virtual.job import Policy, Request, Run, Settings
from scalellm_plugins.virtual.metrics import summary
from scalellm_plugins.virtual.report import document
from scalellm_plugins.virtual.runs import SimulationError, run_all
from scalellm_plugins.virtual.tenants import Tenant
from scalellm_plugins.virtual.workload import Defaults, synthetic

BLOCKS = 120
SETTINGS = Settings(
    gpu="l4",
    model="1b",
    max_model_len=512,
    max_num_seqs=24,
    max_num_batched_tokens=256,
    kv_blocks=BLOCKS,
)


def workload() -> list[Request]:
    """Too much for so few blocks: requests are preempted and queue."""
    senders = [
        Tenant(name="calm", rate=2.0, weight=2.0, prefix=40),
        Tenant(name="flood", rate=14.0, cv=2.0, priority=1),
    ]
    sizes = Defaults(
        prompt="lognormal:median=120:sigma=0.6:max=300",
        output="lognormal:median=60:sigma=0.8:max=200",
        ttft_ms=800.0,
    )
    return synthetic(senders, sizes, 8.0, seed=3)


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    chosen = policies.parse(["vllm,vllm-priority,fcfs,fair"])
    chosen += [Policy(label="again", ours=True, options=chosen[3].options)]
    return run_all(SETTINGS, chosen, workload(), at_once=2)


@pytest.mark.vllm
def test_every_request_ends_with_what_it_asked_for(runs: dict[str, Run]) -> None:
    requests = workload()
    for label, run in runs.items():
        pairs = list(zip(requests, run.records, strict=True))
        assert all(record.outcome == "done" for _, record in pairs), label
        assert all(record.tokens == request.output for request, record in pairs), label
        assert run.tokens == sum(request.output for request in requests), label
        for request, record in pairs:
            assert record.scheduled is not None
            assert record.first is not None
            assert record.last is not None
            assert request.at <= record.scheduled < record.first <= record.last
        assert run.kv_left == 0, f"{label}: blocks leak"
        assert run.engine.kv_blocks == BLOCKS


@pytest.mark.vllm
def test_the_workload_is_a_hard_one(runs: dict[str, Run]) -> None:
    """Or the other tests would show nothing."""
    for run in runs.values():
        assert sum(record.preemptions for record in run.records) > 5
        assert run.kv_max > 0.95
        assert run.busy_s <= run.seconds
        assert run.gap is not None


@pytest.mark.vllm
def test_first_come_first_served_is_vllms_own_in_every_figure(runs: dict[str, Run]) -> None:
    ours, theirs = runs["fcfs"], runs["vllm"]
    assert ours.engine.scheduler == "LeanAsyncScheduler"
    assert theirs.engine.scheduler == "AsyncScheduler"
    assert ours.records == theirs.records
    assert ours.samples == theirs.samples
    requests = workload()
    assert summary(requests, ours) == summary(requests, theirs)


@pytest.mark.vllm
def test_the_same_seed_gives_the_same_json(runs: dict[str, Run]) -> None:
    def text(label: str) -> str:
        requests, run = workload(), runs[label]
        one = document("c", requests, {"x": run}, {"x": summary(requests, run)}, each=True)
        return json.dumps(one)

    assert text("fair") == text("again")
    assert text("fair") != text("fcfs")


@pytest.mark.vllm
def test_policies_do_what_they_are_for(runs: dict[str, Run]) -> None:
    requests = workload()
    found = {label: summary(requests, run) for label, run in runs.items()}

    def wait(label: str) -> Any:
        return found[label]["tenants"]["calm"]["ttft"]["p90"]

    assert wait("fair") < 0.5 * wait("fcfs")
    assert wait("vllm-priority") < 0.5 * wait("fcfs")
    fairness = {label: figures["fairness"] for label, figures in found.items()}
    assert fairness["fair"]["gap"] <= fairness["fair"]["bound"]
    assert fairness["fair"]["gap"] < 0.5 * fairness["fcfs"]["gap"]


@pytest.mark.vllm
def test_a_scheduler_that_is_not_ours_is_not_taken_for_it() -> None:
    off = Policy(label="off", ours=True, options={"enabled": False})
    with pytest.raises(SimulationError, match=r"policy off: .*vLLM's own AsyncScheduler"):
        run_all(SETTINGS, [off], workload()[:1])


@pytest.mark.vllm
def test_a_run_that_vllm_refuses_says_why() -> None:
    impossible = msgspec.structs.replace(SETTINGS, max_num_batched_tokens=8, max_num_seqs=24)
    said: list[str] = []
    with pytest.raises(SimulationError, match=r"policy vllm: .*max_num_batched_tokens"):
        run_all(impossible, policies.parse(["vllm,fcfs"]), workload()[:1], say=said.append)
    assert said == ["vllm: starting vLLM's engine"], "the others are not begun"


STUCK = """
from scalellm_plugins.virtual import engine as module
from scalellm_plugins.virtual.engine import StuckError, VirtualEngine
from scalellm_plugins.virtual.job import Job, Policy, Request, Settings

module.STUCK_AFTER_S = 5.0
requests = [Request(at=1.0, tenant="a", prompt=5, output=5)]
settings = Settings(max_model_len=64, kv_blocks=100)
job = Job(settings=settings, policy=Policy(label="lazy", ours=False), requests=requests)
engine = VirtualEngine(job)
engine.scheduler.max_num_scheduled_tokens = 0
try:
    engine.run(lambda *_: None)
except StuckError as error:
    print(error)
"""


@pytest.mark.vllm
def test_a_scheduler_that_never_runs_a_request_is_found_out() -> None:
    (policy,) = policies.parse(["vllm"])
    env = os.environ | policies.environment(policy, {"kv_blocks": 100})
    result = subprocess.run(
        [sys.executable, "-c", STUCK], env=env, check=True, capture_output=True, text=True
    )
    last = result.stdout.strip().splitlines()[-1]
    assert last == "policy lazy: 1 requests wait since 1 s and none is scheduled"


# The command line


def test_the_command_writes_json_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With runs that were made before: they are tested above."""
    pytest.importorskip("matplotlib")
    seen: list[Any] = []

    def fake(settings: Settings, chosen: list[Policy], requests: list[Request], **_: Any) -> Any:
        seen.extend([settings, chosen])
        return {policy.label: _run(requests) for policy in chosen}

    monkeypatch.setattr(command, "run_all", fake)
    output, picture = tmp_path / "out.json", tmp_path / "out.png"
    words = ["--policy", "vllm", "--policy", "fair", "--tenants", "a:rate=5,b", "--seconds", "9"]
    words += ["--kv-blocks", "300", "--output", str(output), "--plot", str(picture)]
    assert cli.main(["simulate", *words]) == 0
    settings, chosen = seen
    assert settings == Settings(max_model_len=656, kv_blocks=300)
    assert [policy.label for policy in chosen] == ["vllm", "fair"]
    written = json.loads(output.read_text())
    assert written["command"] == f"scalellm simulate {' '.join(words)}"
    assert list(written["policies"]) == ["vllm", "fair"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0].split() == ["vllm", "fair"]
    assert "on average 512 tokens in and 128 out" in captured.err


def _run(requests: list[Request]) -> Run:
    from scalellm_plugins.virtual.job import Engine, Record, Sample

    engine = Engine(
        vllm="0",
        scheduler="S",
        max_num_seqs=8,
        max_num_batched_tokens=64,
        kv_blocks=300,
        block_size=16,
    )
    records = [
        Record(scheduled=r.at, first=r.at + 1, last=r.at + 2, tokens=r.output, outcome="done")
        for r in requests
    ]
    samples = [
        Sample(at=float(at), waiting=1, running=2, kv=0.5, served=[1.0, 2.0]) for at in range(3)
    ]
    return Run(
        engine=engine,
        records=records,
        tenants=sorted({request.tenant for request in requests}),
        samples=samples,
        seconds=9.0,
        steps=9,
        busy_s=9.0,
        tokens=1,
        kv_mean=0.5,
        kv_max=0.5,
        kv_left=0,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--policy fare", "'fare'"),
        ("--workload trace", "belong together"),
        ("--workload poisson --trace x.csv", "belong together"),
        ("--trace nowhere.csv", "No such file"),
        ("--cv 2", "--cv: 2 belongs to --workload gamma, not to poisson"),
        ("--prompt-tokens many", "--prompt-tokens: 'many' is no length"),
        ("--gpu h20", "'h20' is unknown. Valid: h200"),
        ("--model 8c", "'8c' is unknown. Valid: 8b"),
        ("--model 8b --tensor-parallel 3", "do not divide"),
        ("--max-model-len 100", "100 tokens are fewer than the longest request's 640"),
        ("--kv-blocks 20", "Give at least 42"),
        ("--tenants a:rate=0", "--tenants: a:"),
        ("--output nowhere/x.json", "nowhere' is not a folder"),
        ("--set frontend.workers=1", "only options of scalellm.scheduler"),
    ],
)
def test_what_cannot_be_is_a_usage_error(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["simulate", *words.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith("scalellm simulate: ")
    assert message in said


@pytest.mark.parametrize("words", ["--rate 0", "--rate -1", "--seconds nan", "--max-num-seqs 0"])
def test_numbers_out_of_range_are_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["simulate", *words.split()])
    assert ended.value.code == 2
    assert f"argument {words.split()[0]}" in capsys.readouterr().err


def test_without_matplotlib_a_plot_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(plot.PlotError):
        plot.need_matplotlib()
    assert cli.main(["simulate", "--plot", "x.png"]) == 1
    assert "pip install" in capsys.readouterr().err


def test_the_command_needs_no_vllm_until_something_runs() -> None:
    script = (
        "import sys\nfrom scalellm_plugins.virtual import command\n"
        "command._parser().format_help()\n"
        "print([name for name in ('vllm', 'torch', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert result.stdout.strip() == "[]"
