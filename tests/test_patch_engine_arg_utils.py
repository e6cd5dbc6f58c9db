"""The patch that adds options to vLLM's command line, on a stand-in and on the real vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from scalellm_plugins.patches import patch_engine_arg_utils


def test_the_wrapper_survives_options_that_cannot_be_added(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every `vllm` command builds a parser: ours may fail, vLLM's must come out of it."""

    class EngineArgs:
        @staticmethod
        def add_cli_args(parser: str) -> str:
            return parser + "!"

    arg_utils = ModuleType("vllm.engine.arg_utils")
    arg_utils.EngineArgs = EngineArgs  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.engine"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, arg_utils.__name__, arg_utils)
    broken = ModuleType("scalellm_plugins.arguments")
    monkeypatch.setitem(sys.modules, broken.__name__, broken)  # has no add_arguments
    new: list[Callable[[str], str]] = []
    monkeypatch.setattr(
        patch_engine_arg_utils, "replace", lambda owner, name, function: new.append(function)
    )
    patch_engine_arg_utils.apply()
    assert new[0]("parser") == "parser!"


SCRIPT = """
import functools, json
from scalellm_plugins.patches import registry
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

patch = next(patch for patch in registry.PATCHES if patch.name == "cli_arguments")
before = vars(EngineArgs)["add_cli_args"]
states = [registry.apply(patch).state for _ in range(2)]
options = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())._option_string_actions
registry.undo(patch)
restored = vars(EngineArgs)["add_cli_args"] is before

@functools.wraps(EngineArgs.add_cli_args)
def elsewhere(parser):
    # Another plugin of vLLM, with the same idea.
    parser.add_argument("--elsewhere")
    return elsewhere.__wrapped__(parser)

EngineArgs.add_cli_args = staticmethod(elsewhere)
states.append(registry.apply(patch).state)
both = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())._option_string_actions
print("RESULT", json.dumps({
    "states": states, "plugins": "--plugins" in options, "model": "--model" in options,
    "restored": restored, "composed": "--plugins" in both and "--elsewhere" in both,
}))
"""


@pytest.mark.vllm
def test_the_patch_of_the_command_line_on_the_installed_vllm(
    clean_environment: pytest.MonkeyPatch,
) -> None:
    """In a process of its own: importing vLLM and patching it would stay with the other tests."""
    clean_environment.setenv("VLLM_PLUGINS", "")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    result = json.loads(line.removeprefix("RESULT "))
    assert result == {
        "states": ["applied", "already", "applied"],
        "composed": True,
        "plugins": True,
        "model": True,
        "restored": True,
    }
