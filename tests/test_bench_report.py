"""Samples to records, table, JSON and picture."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from scalellm_plugins.benchmarks import report
from scalellm_plugins.benchmarks.plot import PlotError, draw


def sample(system: str = "vllm", speed: float | None = 100.0, **fields: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "system": system,
        "workload": "short",
        "stream": True,
        "streams": 16,
        "failed": 0,
        "ideal_tok_s": 200.0,
    }
    if speed is not None:
        base |= {
            "output_tok_s": speed,
            "ideal_fraction": speed / 200,
            "cpu_us_per_token": {"frontend": 1e4 / speed, "engine": 30.0, "client": 5.0},
            "rss_peak_mb": speed,
            "pss_mb": speed / 2,
            "other_cores": 0.0,
            "idle_cores": 0.0,
            "tokens_per_event": 1.0,
            "prompt_tokens": 128.0,
        }
        for metric in ("ttft", "itl", "tpot", "e2e"):
            base |= {f"{metric}_p50_ms": 1.0, f"{metric}_p99_ms": 2.0}
    return base | fields


def test_medians_over_rounds() -> None:
    rounds = [sample(speed=speed, failed=1) for speed in (90.0, 100.0, 140.0)]
    (record,) = report.aggregate(rounds)
    assert record["output_tok_s"] == 100
    assert record["ideal_fraction"] == 0.5
    assert record["output_tok_s_range"] == [90, 140]
    assert record["cpu_us_per_token"] == {"frontend": 100.0, "engine": 30.0, "client": 5.0}
    assert (record["rss_peak_mb"], record["failed"], record["rounds"]) == (140, 3, 3)
    assert record["error"] is None


def test_a_record_for_each_system_and_cell_in_order() -> None:
    samples = [
        sample("b"),
        sample("a"),
        sample("b", stream=False),
        sample("b", streams=64),
        sample("a"),
    ]
    keys = [tuple(record[key] for key in report.KEY) for record in report.aggregate(samples)]
    assert keys == [
        ("b", "short", True, 16),
        ("a", "short", True, 16),
        ("b", "short", False, 16),
        ("b", "short", True, 64),
    ]


def test_failed_rounds_do_not_spoil_the_medians() -> None:
    samples = [sample(speed=100.0), sample(speed=None, failed=16, error="died\nlog"), sample()]
    (record,) = report.aggregate(samples)
    assert (record["output_tok_s"], record["rounds"], record["failed"]) == (100, 2, 16)
    assert record["error"] == "died\nlog"


def test_a_system_that_never_started() -> None:
    (record,) = report.aggregate([sample(speed=None, failed=16, error="did not start")])
    assert record["output_tok_s"] is None
    assert record["cpu_us_per_token"] == {"frontend": None, "engine": None, "client": None}
    assert "did not start" in report.table([record], {})


def test_json_has_the_promised_shape(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    samples = [sample(), sample("scalellm", speed=None, failed=16, error="x")]
    records = report.aggregate(samples)
    report.save(path, records, samples, "scalellm bench compare", {"gpu": "h200"}, {"vllm": "1"})
    document = json.loads(path.read_text())
    assert {"machine", "versions", "command", "records"} <= document.keys()
    assert document["machine"]["cores"] >= 1
    promised = {
        "system": str,
        "workload": str,
        "stream": bool,
        "streams": int,
        "output_tok_s": float,
        "ideal_fraction": float,
        "ttft_p50_ms": float,
        "ttft_p99_ms": float,
        "itl_p50_ms": float,
        "itl_p99_ms": float,
        "rss_peak_mb": float,
        "failed": int,
    }
    for name, kind in promised.items():
        assert type(document["records"][0][name]) is kind, name
    assert document["records"][0].keys() == document["records"][1].keys()
    assert document["records"][0]["cpu_us_per_token"].keys() == {"frontend", "engine", "client"}
    assert list(tmp_path.iterdir()) == [path]


def test_table_has_a_block_for_each_load_and_keeps_its_columns() -> None:
    samples = [
        sample("a-system-with-a-long-name", speed=12345.0, ideal_fraction=0.5),
        sample("b", stream=False, ttft_p50_ms=None, ttft_p99_ms=None),
    ]
    text = report.table(report.aggregate(samples), {"short": "128 in"})
    assert "short (128 in), streaming, 16 streams, ideal 200 tok/s" in text
    assert "not streaming" in text
    assert "12,345" in text
    blocks = [block.splitlines()[1:] for block in text.split("\n\n")[1:]]
    assert all(len({len(line) for line in lines}) == 1 for lines in blocks)


def test_versions_name_what_is_installed() -> None:
    assert {"python", "scalellm-plugins"} <= report.versions().keys()


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    samples = [
        sample(),
        sample("scalellm", speed=None, failed=16, error="x"),
        sample(stream=False, ttft_p50_ms=None, ttft_p99_ms=None),
        sample(streams=64),
    ]
    path = tmp_path / "out.png"
    draw(path, report.aggregate(samples), "title")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PlotError, match="pip install matplotlib"):
        draw(tmp_path / "out.png", report.aggregate([sample()]), "title")
