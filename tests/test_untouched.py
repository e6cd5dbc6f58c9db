"""Installed but not asked for: vLLM is what it was. And the same command line in every form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm

OUR_VARIABLES = (
    "VLLM_PLUGINS",
    "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY",
    "SCALELLM_CONFIG",
    "SCALELLM_STATE",
    "SCALELLM_RESTARTED",
)

_SNAPSHOT = """
import sys, types, json
import vllm
import vllm.entrypoints.cli.serve, vllm.entrypoints.llm
import vllm.v1.engine.core, vllm.v1.engine.async_llm
import vllm.v1.core.sched.async_scheduler, vllm.v1.executor.multiproc_executor
import vllm.v1.worker.worker_base, vllm.platforms
vllm.platforms.current_platform

METHODS = (staticmethod, classmethod, property)

def functions():
    '''Every function, class and method of every loaded module of vLLM, by identity.'''
    found = {}
    for name, module in list(sys.modules.items()):
        if not (name == "vllm" or name.startswith("vllm.")) or module is None:
            continue
        for key, value in list(vars(module).items()):
            if callable(value):
                found[name, key] = value
            if isinstance(value, type) and value.__module__.startswith("vllm"):
                for attribute, member in list(vars(value).items()):
                    if callable(member) or isinstance(member, METHODS):
                        found[f"{value.__module__}.{value.__qualname__}", attribute] = member
    return found

before = functions()
from vllm.entrypoints.cli.serve import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
def options():
    parser = make_arg_parser(FlexibleArgumentParser())
    return {o for a in parser._actions for o in a.option_strings}, vars(parser.parse_args([]))
with_us, defaults = options()
after = functions()
from scalellm_plugins.patches import registry
applied = [p.name for p in registry.PATCHES if p.name in registry._state.originals]
for patch in registry.PATCHES:
    registry.undo(patch)
without_us, upstream_defaults = options()
print(json.dumps({
    "changed": sorted(".".join(k) for k in before if after.get(k) is not before[k]),
    "options": sorted(with_us - without_us),
    "lost": sorted(without_us - with_us),
    "namespace": sorted(set(defaults) ^ set(upstream_defaults)),
    "loaded": sorted(m for m in sys.modules if m.startswith("scalellm_plugins.")),
    "applied": applied,
}))
"""


def _python(source: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    base = {name: value for name, value in os.environ.items() if name not in OUR_VARIABLES}
    return subprocess.run(
        [sys.executable, "-c", source, *arguments],
        env=base | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _last_json(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_not_asked_for_it_changes_nothing_but_two_options() -> None:
    """Load plugins as every vLLM process does, build the command line, and compare by identity."""
    report = _last_json(_python(_SNAPSHOT))
    assert report["changed"] == ["vllm.engine.arg_utils.EngineArgs.add_cli_args"]
    assert report["applied"] == ["cli_arguments"]
    assert report["options"] == ["--plugins", "--scalellm"]
    assert report["lost"] == []
    assert report["namespace"] == []
    assert not [name for name in report["loaded"] if ".simulator" in name or ".frontends" in name]


_LIBRARY = (
    _SNAPSHOT.partition("from vllm.entrypoints.cli.serve import")[0]
    + """
import os
environment = dict(os.environ)
assert not vllm.plugins.plugins_loaded
vllm.plugins.load_general_plugins()
assert vllm.plugins.plugins_loaded
assert "scalellm_plugins.plugin" in sys.modules
assert dict(os.environ) == environment
after = functions()
print(json.dumps(sorted(".".join(k) for k in before if after.get(k) is not before[k])))
"""
)


def test_without_a_command_line_it_changes_nothing_at_all() -> None:
    """As in an engine process, a worker or a Python program with `vllm.LLM`."""
    assert _last_json(_python(_LIBRARY)) == []


# One import of vLLM (seconds), then a fork per command line: each gets a process of its own.
_PARSE = """
import json, os, sys
import vllm.entrypoints.cli.serve, vllm.entrypoints.openai.api_server
from vllm.entrypoints.cli.serve import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

def parse(line):
    sys.argv = ["vllm", *line]
    parser = FlexibleArgumentParser()
    sub = parser.add_subparsers(dest="subparser")
    make_arg_parser(sub.add_parser("serve"))
    arguments = parser.parse_args()
    from scalellm_plugins import activation, config
    return {
        "model": arguments.model_tag or arguments.model,
        "servers": arguments.api_server_count,
        "plugins": os.environ.get("VLLM_PLUGINS"),
        "on": [state.name for state in activation.states() if state.on],
        "config": config.raw_from_env(),
    }

for case in json.loads(sys.argv[1]):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 1)  # where vLLM logs, once its logging is set up: before 0.32 at import
        os.dup2(write, 2)
        os.environ.update(case.get("env", {}))
        try:
            result = parse(case["line"])
        except SystemExit as stop:
            result = {"exit": stop.code}
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(write, b"\\0" + json.dumps(result).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text, _, result = pipe.read().rpartition(b"\\0")
    os.waitpid(pid, 0)
    print(json.dumps({**json.loads(result), "stderr": text.decode()}))
"""


@pytest.fixture(scope="module")
def parse() -> Callable[..., list[dict[str, Any]]]:
    def run(*cases: dict[str, Any]) -> list[dict[str, Any]]:
        done = _python(_PARSE, json.dumps(cases))
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    return run


def test_the_same_options_in_every_form(
    parse: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    """JSON, dotted, YAML map, YAML list and the variables all say the same."""
    as_map, as_text = tmp_path / "map.yaml", tmp_path / "text.yml"
    as_map.write_text(
        "plugins: [scalellm, lora_filesystem_resolver]\n"
        "scalellm:\n  strict: true\n  status: off\n  frontend:\n    workers: 3\n"
    )
    as_text.write_text(
        "model: M\nplugins: scalellm,lora_filesystem_resolver\n"
        'scalellm: \'{"strict": true, "status": "off", "frontend": {"workers": 3}}\'\n'
    )
    options = {"strict": True, "status": False, "frontend": {"workers": 3}}
    names = "scalellm,lora_filesystem_resolver"
    dotted = "--scalellm.strict --scalellm.status off --scalellm.frontend.workers 3"
    forms = [
        {"line": ["serve", "M", "--plugins", names, "--scalellm", json.dumps(options)]},
        {"line": ["serve", "M", "--plugins", *names.split(","), *dotted.split()]},
        {"line": ["serve", "--plugins", "scalellm,lora_filesystem_resolver", "M", *dotted.split()]},
        {"line": ["serve", "M", *dotted.split()[1:], "--plugins", names, "--scalellm.strict"]},
        {"line": ["serve", "M", "--config", str(as_map)]},
        {"line": ["serve", "--config", str(as_text)]},
        {
            "line": ["serve", "M"],
            "env": {"VLLM_PLUGINS": names, "SCALELLM_CONFIG": json.dumps(options)},
        },
    ]
    for form, got in zip(forms, parse(*forms), strict=True):
        assert "exit" not in got, (form, got["stderr"])
        assert got["model"] == "M", form
        assert got["servers"] == 3, form
        assert got["on"] == ["frontend", "ipc", "scheduler", "quantization"], form
        assert "lora_filesystem_resolver" in got["plugins"].split(","), form
        assert got["stderr"].count("ScaleLLM plugins") == 1, form


def test_the_command_line_beats_yaml_and_yaml_beats_the_variable(
    parse: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    yaml = tmp_path / "c.yaml"
    yaml.write_text("plugins: scalellm\nscalellm:\n  frontend:\n    workers: 3\n")
    environment = {"SCALELLM_CONFIG": '{"frontend": {"workers": 2}}'}
    line = ["serve", "M", "--config", str(yaml)]
    got = parse(
        {"line": [*line, "--scalellm.frontend.workers", "4"], "env": environment},
        {"line": line, "env": environment},
        {"line": ["serve", "M", "--plugins", "scalellm"], "env": environment},
    )
    assert [one["servers"] for one in got] == [4, 3, 2]


def test_mistakes_are_refused_before_anything_starts(
    parse: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    yaml = tmp_path / "c.yaml"
    yaml.write_text("model: M\nplugins: [scalellm, lora_filesystem_resolvr]\n")
    serve = ["serve", "M", "--plugins", "scalellm"]
    cases = [
        (["serve", "M", "--plugins", "scalelm"], "'scalelm'. Valid: scalellm,"),
        (["serve", "M", "--plugins", "scalellm.fronted"], "Valid: scalellm.frontend,"),
        (["serve", "--config", str(yaml)], "'lora_filesystem_resolvr'. Valid: lora_file"),
        ([*serve, "--scalellm.frontend.worker", "3"], "scalellm.frontend.worker: unknown option"),
        ([*serve, "--scalellm.frontend.workers", "none"], "scalellm.frontend.workers: 'none'"),
        ([*serve, "--scalellm.sim.gpu", "h20"], "scalellm.sim.gpu: 'h20' is unknown. Valid: h200"),
        ([*serve, "--scalellm.ipc", "--port", "1"], None),
        ([*serve, "--scalellm.frontend.workers", "3", "-asc", "2"], "--api-server-count 2"),
        ([*serve, "--scalellm.ipc", "maybe"], "scalellm.ipc: 'maybe' is neither on/off"),
        (["serve", "M", "--scalellm.ipc", "off"], "has no effect"),
    ]
    for (line, text), got in zip(cases, parse(*({"line": c[0]} for c in cases)), strict=True):
        if text is None:
            assert "exit" not in got, got["stderr"]
            continue
        assert got.get("exit") == 2, line
        assert text in got["stderr"], (line, got["stderr"])


def test_a_foreign_allowlist_does_not_hide_the_options() -> None:
    """VLLM_PLUGINS=other keeps vLLM from loading us; `--plugins` must work all the same."""
    vllm = str(Path(sys.executable).parent / "vllm")
    base = {name: value for name, value in os.environ.items() if name not in OUR_VARIABLES}
    done = subprocess.run(
        [vllm, "serve", "M", "--plugins", "scalellm.nothing"],
        env=base | {"VLLM_PLUGINS": "other"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert "no plugin is named 'scalellm.nothing'" in done.stderr


_AS_LIBRARY = """
import json, sys
from vllm import EngineArgs
EngineArgs(model=sys.argv[1])  # as vllm.LLM does: loads plugins, starts nothing
from scalellm_plugins import activation
print(json.dumps({state.name: state.why for state in activation.states()}))
"""


def test_from_python_the_variable_asks_and_the_table_says() -> None:
    done = _python(_AS_LIBRARY, str(Path(__file__).parent), VLLM_PLUGINS="scalellm")
    rows = _last_json(done)
    assert rows["status"] == "no HTTP server: vLLM runs as a library here"
    assert (done.stdout + done.stderr).count("ScaleLLM plugins") == 1


def test_from_python_a_wrong_name_is_refused() -> None:
    done = _python(_AS_LIBRARY, str(Path(__file__).parent), VLLM_PLUGINS="other, scalellm.sttus")
    assert done.returncode != 0
    assert (
        "VLLM_PLUGINS: no plugin is named 'scalellm.sttus'. Valid: scalellm.status" in done.stderr
    )
