"""Run pip, show how far it is, and explain its failures in the user's terms.

Standard library only.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from environment import PYTORCH_CPU_INDEX, SetupError

# pip's words for a network that does not answer. Looked for before "no matching distribution",
# which pip also prints when it could reach no index at all.
NETWORK = re.compile(
    r"NewConnectionError|ConnectionError|Connection refused|ConnectTimeout|ReadTimeout|timed out"
    r"|name resolution|Name or service not known|Network is unreachable|IncompleteRead"
    r"|Connection (?:aborted|broken|reset)|Temporary failure",
    re.IGNORECASE,
)
PROXY = re.compile(r"ProxyError|Proxy Authentication|\b407\b")
CERTIFICATE = re.compile(r"CERTIFICATE_VERIFY_FAILED|SSLError|SSLCertVerification")
REFUSED = re.compile(r"\b(?:401|403) (?:Client )?(?:Error|Forbidden|Unauthorized)")
MISSING = re.compile(r"No matching distribution found|Could not find a version")


@dataclass
class Result:
    """What pip said. `returncode` as from subprocess; `errors` holds its stderr."""

    returncode: int
    errors: str

    @property
    def not_on_index(self) -> bool:
        """The index answered, and does not have it."""
        return bool(MISSING.search(self.errors)) and not NETWORK.search(self.errors)


def cause(errors: str) -> tuple[str, str]:
    """(what is probably wrong, what to do about it), from pip's error output."""
    if PROXY.search(errors):
        return "the proxy refuses or is not reachable", "check HTTPS_PROXY and its password"
    if CERTIFICATE.search(errors):
        return (
            "the certificate of the package index is not trusted (a proxy that opens TLS?)",
            "point PIP_CERT at your organisation's certificate file",
        )
    if REFUSED.search(errors):
        return "the package index refuses access", "check PIP_INDEX_URL and its credentials"
    if NETWORK.search(errors):
        return (
            "the package index was not reachable, or the connection broke",
            "check the network; behind a proxy set HTTPS_PROXY; with a mirror set PIP_INDEX_URL,\n"
            "          and PIP_EXTRA_INDEX_URL for one that has torch's CPU build",
        )
    if "No space left on device" in errors:
        return "the disk is full", "free about 4 GB (`pip cache purge` helps), or use another VENV="
    if "hash" in errors.lower() and "mismatch" in errors.lower():
        return "a download arrived damaged", "run `pip cache purge` first"
    if MISSING.search(errors):
        return (
            "the package index does not have this version for this Python and machine",
            "try another Python (make setup PYTHON=python3.12), or add an index that has it: "
            f"PIP_EXTRA_INDEX_URL={PYTORCH_CPU_INDEX} for torch",
        )
    return "see pip's own message above", "if it says nothing useful: make distclean setup"


def failure(what: str, result: Result) -> SetupError:
    """The error for a pip that failed while installing `what`."""
    why, remedy = cause(result.errors)
    status = f"exit code {result.returncode}"
    if result.returncode < 0:
        status = f"killed by signal {-result.returncode}"
        why, remedy = "the machine ran out of memory, or somebody stopped it", "free some memory"
    return SetupError(
        f"Installing {what} failed ({status}).\n"
        f"Probably: {why}.\n"
        f"To do:    {remedy};\n"
        "          then run the same command again: finished downloads are kept in pip's cache."
    )


@dataclass
class Progress:
    """Counts what pip collects; one line that is redrawn on a terminal, a few lines elsewhere."""

    total: int
    out: IO[str] = field(default_factory=lambda: sys.stdout)
    count: int = 0
    current: str = ""
    started: float = field(default_factory=time.monotonic)

    def feed(self, line: str) -> None:
        """Take one line of pip's output."""
        if line.startswith(("Collecting ", "Requirement already satisfied: ")):
            self.count += 1
            self.current = line.partition(": ")[2] or line.partition(" ")[2]
            self.current = re.split(r"[ =;]", self.current.strip())[0]
            if not self.out.isatty() and self.count % 40 == 0:
                self.say()
        elif line.startswith("Installing collected packages"):
            self.count, self.current = self.total, "unpacking and compiling"
            self.say()

    def say(self) -> None:
        """Show the state once."""
        seconds = time.monotonic() - self.started
        text = f"      {min(self.count, self.total)}/{self.total} {self.current}  {seconds:.0f} s"
        # \x1b[K clears what a longer line left behind.
        self.out.write(f"\r{text}\x1b[K" if self.out.isatty() else text + "\n")
        self.out.flush()

    def tick(self, stop: threading.Event) -> None:
        """Redraw every second: one package can take many."""
        while not stop.wait(1.0):
            self.say()


def run(command: list[str], progress: Progress | None = None, show_errors: bool = True) -> Result:
    """Run pip. Without `progress` its own output, with the bars of big downloads, is shown."""
    stdout = subprocess.PIPE if progress else None
    process = subprocess.Popen(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    errors: list[str] = []
    threads = [threading.Thread(target=_copy_errors, args=(process.stderr, errors, show_errors))]
    stop = threading.Event()
    if progress and progress.out.isatty():
        threads.append(threading.Thread(target=progress.tick, args=(stop,), daemon=True))
    for thread in threads:
        thread.start()
    try:
        for line in process.stdout or ():
            if progress:
                progress.feed(line)
        process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        if progress and progress.out.isatty():
            progress.out.write("\r\x1b[K")
    return Result(process.returncode, "".join(errors))


def _copy_errors(stream: IO[str] | None, errors: list[str], show: bool) -> None:
    for line in stream or ():
        errors.append(line)
        # One such line per package where the index is a folder that does not have them all.
        if show and "is ignored: it is neither a file nor a directory" not in line:
            sys.stderr.write(line)


def pip(venv: Path, *args: str) -> list[str]:
    """The command line of the environment's pip."""
    common = ["--disable-pip-version-check", "--no-input"]
    return [os.fspath(venv / "bin" / "python"), "-m", "pip", *common, *args]
