"""The ring between two processes: records by the million, and one of the two killed at any point.

`make stress` runs them at full size: 10 million records, 5000 kills.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .ipc_parts import FULL

PROGRAM = Path(__file__).with_name("ipc_stress.py")


def run(what: str, count: int, **options: int) -> Any:
    arguments = [what, "--count", str(count)]
    for name, value in options.items():
        arguments += [f"--{name}", str(value)]
    command = [sys.executable, str(PROGRAM), *arguments]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=3600 if FULL else 300
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(done.stdout)


@pytest.mark.parametrize("capacity", [4096, 1 << 16])
def test_every_record_arrives_whole_and_once(capacity: int) -> None:
    """Small rings, so that both sides sleep and wake all the time."""
    seen = run("records", 5_000_000 if FULL else 100_000, capacity=capacity)
    assert seen["times_around"] > 100


def test_a_word_is_never_half_written() -> None:
    """What all else stands on: that Python stores and loads a word at once."""
    run("words", 20_000_000 if FULL else 300_000)


def test_the_death_of_either_side() -> None:
    """Killed at any time, and before any bytecode of the library; in the handshake, too.

    The survivor reads all that was published, nothing twice and nothing torn, and has nothing open
    when it has closed its end. It knows within 100 ms: 9 of 10 times, as a busy machine keeps any
    process waiting now and then.
    """
    seen = run("kills", 5000 if FULL else 200, seed=1)
    assert seen["died"]["later"] > 50
    assert min(seen["survivors"].values()) > 10, "all of it happens: full rings, segments, sleep"
    assert seen["notice_ms"]["p90"] < 100
