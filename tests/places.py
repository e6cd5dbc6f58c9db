"""Servers at other addresses than a plain port, and what they leave behind when they end."""

from __future__ import annotations

import datetime
import http.client
import ipaddress
import json
import os
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT_S = 120.0
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Certificate:
    """A certificate for 127.0.0.1, signed by itself, and its key, in files."""

    cert: Path
    key: Path

    @classmethod
    def make(cls, folder: Path) -> Certificate:
        """Write a new pair, in place: vLLM's watcher loses a file that a rename has replaced."""
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
        now = datetime.datetime.now(datetime.UTC)
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        signed = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([address]), critical=False)
            .sign(key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        texts = {
            folder / "key.pem": key.private_bytes(
                pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
            folder / "cert.pem": signed.public_bytes(pem),
        }
        for path, text in texts.items():
            path.write_bytes(text)
        return cls(folder / "cert.pem", folder / "key.pem")

    def options(self) -> tuple[str, ...]:
        """For `vllm serve`."""
        return "--ssl-certfile", str(self.cert), "--ssl-keyfile", str(self.key)


class Connection(http.client.HTTPConnection):
    """To a server by TCP, TLS or a Unix socket; `sock` stays the same as long as it is kept."""

    def __init__(self, place: Place) -> None:
        super().__init__("127.0.0.1", timeout=LIMIT_S)
        self._place = place

    def connect(self) -> None:
        """Called by the base when a request needs it: at first, and if the server closed."""
        self.sock = self._place.socket()

    def start(self, body: dict[str, Any] | None, path: str = "/v1/completions") -> Any:
        """Send a request (a GET without a body); return the response, unread."""
        method, text = ("GET", None) if body is None else ("POST", json.dumps(body))
        self.request(method, path, text, {"content-type": "application/json"})
        return self.getresponse()

    def ask(self, body: dict[str, Any] | None, path: str = "/v1/completions") -> str:
        """Return the text of the answer."""
        response = self.start(body, path)
        text = response.read().decode()
        assert response.status == 200, (path, response.status, text)
        return str(text)

    def leave(self, how: str) -> float:
        """Go away with a FIN or an RST; return when, in seconds of `time.monotonic`."""
        sock = self.sock
        now = time.monotonic()
        if how == "FIN":
            sock.shutdown(socket.SHUT_RDWR)  # a close alone is an RST where data waits to be read
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        self.sock = None
        return now


@dataclass
class Place:
    """A running `vllm serve` at `path` (a Unix socket) or `port`; with TLS if `trusted`."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int = 0
    path: Path | None = None
    trusted: Path | None = None
    """The certificate that the server must show."""

    def socket(self) -> socket.socket:
        """Connect."""
        plain = self.plain()
        if self.trusted is None:
            return plain
        context = ssl.create_default_context(cafile=str(self.trusted))
        try:
            return context.wrap_socket(plain, server_hostname="127.0.0.1")
        except BaseException:
            plain.close()
            raise

    def plain(self) -> socket.socket:
        """Connect without TLS."""
        if self.path is None:
            return socket.create_connection(("127.0.0.1", self.port), LIMIT_S)
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(LIMIT_S)
        made.connect(str(self.path))
        return made

    def refuses(self) -> bool:
        """Whether nobody listens (and not: whether nobody accepts)."""
        try:
            self.plain().close()
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
        return False

    def answers(self) -> bool:
        """Whether it is up."""
        connection = Connection(self)
        try:
            return connection.ask(None, "/health") == ""
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's values over all labels but these."""
        connection = Connection(self)
        text = connection.ask(None, "/metrics")
        connection.close()
        rows = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(float(value) for given, value in rows if all(w in given for w in wanted))

    def workers(self, titles: dict[int, str]) -> dict[int, int]:
        """Slot → process id, from the server's processes."""
        named = [(title, pid) for pid, title in titles.items()]
        return {
            int(title.rpartition("_")[2]): pid
            for title, pid in named
            if title.startswith("VLLM::APIServer_")
        }

    def end(self) -> int:
        """Say SIGTERM; return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(LIMIT_S)


def start(
    stack: ExitStack,
    conftest: Any,
    log: Path,
    *options: str,
    port: int = 0,
    path: Path | None = None,
    trusted: Path | None = None,
    **environment: str,
) -> Place:
    """Start the demo model with a simulated GPU; as conftest's `_start`, at any address."""
    where = ("--uds", str(path)) if path else ("--host", "127.0.0.1", "--port", str(port))
    base = {k: v for k, v in os.environ.items() if k not in conftest.OUR_VARIABLES}
    # In the variable, not on the command line: that saves a restart of the process.
    environment = {"VLLM_PLUGINS": "scalellm,scalellm.sim", **environment}
    command = [str(Path(sys.executable).parent / "vllm"), "serve"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, str(ROOT / "examples" / "demo_model"), *where, *options],
            env=base | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    stack.callback(conftest._stop, process)
    made = Place(process, log, port, path, trusted)
    limit_s = conftest.STARTUP_LIMIT_S
    up = conftest._wait_until(lambda: process.poll() is not None or made.answers(), limit_s)
    assert up, log.read_text()[-6000:]
    assert process.poll() is None, log.read_text()[-6000:]
    return made


class Stream(threading.Thread):
    """One streamed completion, read to its end."""

    def __init__(self, place: Place, tokens: int, **more: Any) -> None:
        super().__init__(daemon=True)
        self.connection = Connection(place)
        usage = {"include_usage": True, "continuous_usage_stats": True}
        self.body = completion(tokens, stream=True, stream_options=usage, **more)
        self.first = threading.Event()
        self.events: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.done = False
        self.start()

    def run(self) -> None:
        try:
            for line in self.connection.start(self.body):
                if line == b"data: [DONE]\n":
                    self.done = True
                elif line.startswith(b"data: "):
                    self.times.append(time.monotonic())
                    self.events.append(json.loads(line[6:]))
                    self.first.set()
        except (OSError, http.client.HTTPException):
            pass  # its server, or the test, has ended it
        finally:
            self.connection.close()

    @property
    def tokens(self) -> int:
        """How many have come; several may have come together."""
        return sum(event["usage"]["completion_tokens"] for event in self.events[-1:])

    @property
    def reason(self) -> Any:
        """How it ended, as the server said."""
        reasons = [choice["finish_reason"] for event in self.events for choice in event["choices"]]
        return reasons[-1] if reasons else None


def completion(tokens: int, **more: Any) -> dict[str, Any]:
    """A request for exactly so many tokens."""
    return {"model": "demo", "prompt": "Hello", "max_tokens": tokens, "ignore_eos": True, **more}


def traces(pids: Iterable[int]) -> set[Path]:
    """What processes have in the file system for others to find: shared memory and sockets."""
    found: set[Path] = set()
    inodes: set[str] = set()
    for pid in pids:
        with suppress(OSError):  # it ended while we looked
            maps = Path(f"/proc/{pid}/maps").read_text()
            found |= {Path(name) for name in re.findall(r" (/dev/shm/\S+)$", maps, re.MULTILINE)}
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    inodes |= set(re.findall(r"^socket:\[(\d+)\]$", os.readlink(entry)))
    for line in Path("/proc/net/unix").read_text().splitlines():
        fields = line.split()
        if len(fields) == 8 and fields[6] in inodes and fields[7].startswith("/"):
            found.add(Path(fields[7]))
    return found
