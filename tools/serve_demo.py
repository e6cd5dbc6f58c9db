"""Serve the shipped demo model, and print what to paste once it answers.

Run as `make serve PORT=8000 ARGS="…"`, by the environment's Python. Whatever follows `--` goes to
`vllm serve` and wins over the defaults below.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = REPOSITORY / "examples" / "demo_model"

# One option per line; a user's own value for it replaces ours.
DEFAULTS = {
    "--plugins": "scalellm",
    "--host": "127.0.0.1",
    "--served-model-name": "demo",
    "--max-model-len": "2048",
}
# The user's own settings of these win.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # GiB. Left alone, vLLM takes a good part of the memory.
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
# A server that was asked to stop finishes what it is sending; after this it is made to.
STOP_SECONDS = 20.0


def option(args: Sequence[str], name: str, default: str) -> str:
    """The value of `--name value` or `--name=value` in `args`; the last one wins."""
    value = default
    for index, arg in enumerate(args):
        if arg == name and index + 1 < len(args):
            value = args[index + 1]
        elif arg.startswith(f"{name}="):
            value = arg.partition("=")[2]
    return value


def given(args: Sequence[str], name: str) -> bool:
    """Whether `args` sets the option `name`."""
    return any(arg == name or arg.startswith(f"{name}=") for arg in args)


def command(vllm: Path, model: Path, port: int, extra: Sequence[str]) -> list[str]:
    """The command line of the server."""
    line = [str(vllm), "serve", str(model)]
    for name, value in DEFAULTS.items():
        if not given(extra, name):
            line += [name, value]
    if not given(extra, "--no-enforce-eager"):
        # Compiling a model this small costs more than it will ever save.
        line.append("--enforce-eager")
    return [*line, *extra, *([] if given(extra, "--port") else ["--port", str(port)])]


def port_problem(host: str, port: int) -> str:
    """Why `port` cannot be served on and what to do, or an empty string."""
    if not 1 <= port <= 65535:
        return f"PORT={port} is no port number; 1 to 65535 are: make serve PORT=8000"
    reason = bind_error(host, port)
    if reason is None:
        return ""
    if reason.errno == errno.EADDRINUSE:
        following = (p for p in range(port + 1, 65536) if bind_error(host, p) is None)
        return (
            f"port {port} is in use by another program.\n"
            f"Choose another one: make serve PORT={next(following, 8000)}"
        )
    if reason.errno == errno.EACCES:
        return f"port {port} is reserved for root; choose one from 1024 on: make serve PORT=8000"
    return f"cannot listen on {host}:{port}: {reason.strerror}"


def bind_error(host: str, port: int) -> OSError | None:
    """What happens to a server that binds this address now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: a connection that is still closing does not occupy the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def healthy(host: str, port: int) -> bool:
    """Whether the server answers /health. http.client, because it knows of no proxy."""
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def reachable(host: str) -> str:
    """The address to talk to a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def banner(url: str, model: str, key: str, seconds: float) -> str:
    """What a newcomer wants to see: where it is, what to paste, how to stop it."""
    rule = "─" * 78
    auth = f"\n    -H 'Authorization: Bearer {key}' \\" if key else ""
    question = '"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 64'

    def curl(flags: str, more: str) -> str:
        return (
            f"curl {flags} {url}/v1/chat/completions \\{auth}\n"
            "    -H 'Content-Type: application/json' \\\n"
            f'    -d \'{{"model": "{model}", {question}{more}}}\''
        )

    return "\n".join(
        [
            "",
            rule,
            f"  Ready after {seconds:.0f} s:  {url}   model: {model}   docs: {url}/docs",
            rule,
            "Ask it something, from another terminal:\n",
            curl("-s", ""),
            "\nThe same, streaming:\n",
            curl("-N", ', "stream": true'),
            "\nCtrl-C stops the server.",
            rule,
            "",
        ]
    )


def die_with_parent() -> None:
    """In the child: a `kill -9` of this script must not leave a server behind (Linux)."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


class Server:
    """The `vllm serve` process and everything that it starts, as one process group."""

    def __init__(self, line: Sequence[str], env: dict[str, str]) -> None:
        # A session of its own: a Ctrl-C would otherwise reach every process of vLLM at the same
        # moment, and the engine would be gone before the server could finish.
        self.process = subprocess.Popen(
            line, env=env, start_new_session=True, preexec_fn=die_with_parent
        )
        self.deadline = float("inf")

    def stop(self, signum: int, _frame: FrameType | None = None) -> None:
        """Pass a signal on; the second one, or STOP_SECONDS, ends the patience."""
        if self.deadline < float("inf"):
            self.kill_group()
            return
        self.deadline = time.monotonic() + STOP_SECONDS
        # vLLM knows nothing of a closed terminal.
        self.process.send_signal(signal.SIGTERM if signum == signal.SIGHUP else signum)

    def exit_code(self) -> int | None:
        """The server's exit code once it has ended; enforces the deadline."""
        if time.monotonic() > self.deadline:
            self.kill_group()
        return self.process.poll()

    def kill_group(self) -> None:
        """End whatever is left of the group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def wait(self, host: str, port: int, on_ready: Callable[[], str]) -> int:
        """Follow the server to its end; prints `on_ready()` when it answers. Returns its code."""
        ready = False
        while (code := self.exit_code()) is None:
            if not ready and healthy(host, port):
                ready = True
                # The server's own log lines of starting up come first.
                time.sleep(0.3)
                print(on_ready(), flush=True)
            time.sleep(0.2)
        stopped = self.deadline < float("inf")
        self.kill_group()
        if stopped:
            print("serve: stopped", flush=True)
        elif not ready:
            print(f"\nserve: {early_end(code)}", file=sys.stderr)
        return 0 if stopped and code < 0 else code if code >= 0 else 128 - code


def early_end(code: int) -> str:
    """What to say about a server that ended before it answered."""
    if code == -signal.SIGKILL:
        return "vllm serve was killed before it was ready: the machine is probably out of memory"
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return (
        f"vllm serve ended before it was ready ({how}); its log above says why.\n"
        "Which features this vLLM supports: make doctor"
    )


def fail(message: str) -> int:
    """Report a user's mistake."""
    print(f"serve: {message}", file=sys.stderr)
    return 2


def main() -> int:
    """Parse the command line, check what can be checked, and serve."""
    parser = argparse.ArgumentParser(description="Serve the demo model.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model", type=Path, default=MODEL, metavar="FOLDER")
    parser.add_argument("extra", nargs="*", metavar="-- ARGS", help="more for `vllm serve`")
    args = parser.parse_args()
    extra: list[str] = args.extra
    host = option(extra, "--host", DEFAULTS["--host"])
    port = int(option(extra, "--port", str(args.port)))
    if not (args.model / "config.json").exists():
        return fail(f"there is no model in {args.model}; restore it: git checkout -- examples")
    if problem := port_problem(host, port):
        return fail(problem)
    vllm = Path(sys.executable).parent / "vllm"
    line = command(vllm, args.model, port, extra)
    print("serve: starting, which takes 20 to 60 seconds:\n  " + " ".join(line), flush=True)
    started = time.monotonic()
    server = Server(line, ENVIRONMENT | os.environ)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, server.stop)
    name = option(extra, "--served-model-name", DEFAULTS["--served-model-name"])
    key = option(extra, "--api-key", "")
    address = reachable(host)
    url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
    return server.wait(address, port, lambda: banner(url, name, key, time.monotonic() - started))


if __name__ == "__main__":
    sys.exit(main())
