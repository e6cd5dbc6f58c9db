"""Tenants: who sends a request, known from its API key alone, and what they may have in flight.

A tenants file (YAML, or JSON by its ending) is a list of entries; only the name is needed::

    - name: acme
      keys: [9f86d081884c7d65…]        # SHA-256 of each key: `scalellm tenants hash`

      # At the gate: answered with 429 beyond these, see limits.py.
      max_requests: 64
      max_queued_prompt_tokens: 50000

      # In the engine, for policies that look at it.
      weight: 2                        # share under contention
      max_running: 16                  # sequences that run at the same time
      kv_floor: 0.1                    # share of the KV blocks that others leave to it, 0 to 1 …
      kv_ceiling: 0.5                  # … and that it can have at most
      tokens_per_minute: 100000        # of prompts and answers together

      # Where its requests do not say so themselves.
      priority: 5                      # lower is sooner, as in vLLM; 0 says nothing
      ttft_ms: 500                     # target for the first token …
      tpot_ms: 50                      # … and for each after it

      isolate_prefix: true             # shares no cached prefix with other tenants

The entry named "default" is everybody with one of vLLM's own `--api-key`s. The file is read again
when it changes. With a file the tenant and its weight are the file's: what a request says about
them is looked at for mistakes, and has no effect. Pure: imports neither vLLM nor torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Protocol

import msgspec
from msgspec import Meta

from scalellm_plugins.errors import ConfigError, closest_first
from scalellm_plugins.scheduling import terms
from scalellm_plugins.scheduling.terms import DEFAULT

from .limits import GAUGES, Limit, Limits

logger = logging.getLogger("vllm.scalellm")

OPTION = "scalellm.frontend.tenants"

Hash = Annotated[str, Meta(pattern="^[0-9a-fA-F]{64}$")]
Target = Annotated[float, Meta(gt=0, le=terms.LONGEST_MS)] | None
_REMEDY = "Mend it there; `scalellm tenants check FILE` says whether it is right"
_HASH_WANTED = "64 hexadecimal digits, the SHA-256 of a key: `scalellm tenants hash` makes it"


class Tenant(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of the file."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._@:-]{1,64}$")]
    keys: tuple[Hash, ...] = ()
    key_hash: Hash | None = None
    weight: Annotated[float, Meta(ge=terms.LIGHTEST, le=terms.HEAVIEST)] = 1.0
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0
    max_running: Limit = None
    kv_floor: Annotated[float, Meta(ge=0, le=1)] | None = None
    kv_ceiling: Annotated[float, Meta(gt=0, le=1)] | None = None
    tokens_per_minute: Limit = None
    ttft_ms: Target = None
    tpot_ms: Target = None
    isolate_prefix: bool = False

    def hashes(self) -> list[bytes]:
        """Return the digests of its keys."""
        given = [*self.keys, *([self.key_hash] if self.key_hash else [])]
        return [bytes.fromhex(text) for text in given]


class TenantBook:
    """Tenants by key and by name. `api_keys` are vLLM's own, and the default tenant's.

    `closed`: nobody gets in without a key, even if there are no keys.
    """

    def __init__(
        self, tenants: Iterable[Tenant] = (), api_keys: Iterable[str] = (), *, closed: bool = False
    ) -> None:
        self.by_name = {tenant.name: tenant for tenant in tenants}
        self.default = self.by_name.setdefault(DEFAULT, Tenant(name=DEFAULT))
        self._keys = [
            (digest, tenant) for tenant in self.by_name.values() for digest in tenant.hashes()
        ]
        self._keys += [(digest_of(key), self.default) for key in api_keys]
        self.closed = closed or bool(self._keys)

    def of(self, authorization: bytes | None) -> Tenant | None:
        """Return whose request has this `Authorization` header; None: nobody's.

        Every key is compared in constant time, 0.1 µs each, so the time says nothing about which
        one it was or how much of one was right.
        """
        if not self.closed:
            return self.default
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        # As vLLM: what is not ASCII in a header is Latin-1 to Starlette, and UTF-8 in a hash.
        digest = hashlib.sha256(key.decode("latin-1").encode()).digest()
        found = None
        for known, tenant in self._keys:
            if secrets.compare_digest(digest, known):
                found = tenant
        return found


def digest_of(key: str) -> bytes:
    """Return the SHA-256 under which a key is kept."""
    return hashlib.sha256(key.encode()).digest()


# The file


def load(path: str) -> list[Tenant]:
    """Read a tenants file.

    Raises:
        ConfigError: it cannot be read, or an entry cannot be; names the entry and its field.
    """
    return parse(path, _read(path))


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{OPTION}: {path!r} cannot be read: {reason}. Name a UTF-8 file that the server may "
            "read, or leave the option out"
        ) from None


def parse(path: str, text: str) -> list[Tenant]:
    """Make tenants from the text of the file at `path`.

    Raises:
        ConfigError: as `load`.
    """
    raw = _document(path, text)
    if isinstance(raw, dict) and list(raw) == ["tenants"]:
        raw = raw["tenants"]
    if not isinstance(raw, list):
        raise ConfigError(
            f"{OPTION}: {path!r} is not a list of tenants such as "
            "[{name: acme, keys: [HASH], max_requests: 8}]"
        )
    tenants = [_entry(path, number, entry) for number, entry in enumerate(raw, 1)]
    _check_together(path, tenants)
    return tenants


def _document(path: str, text: str) -> Any:
    try:
        if path.endswith(".json"):
            return json.loads(text)
        import yaml
    except ValueError as error:
        raise ConfigError(f"{OPTION}: {path!r} is not JSON: {error}. {_REMEDY}") from None
    except ImportError:
        raise ConfigError(
            f"{OPTION}: {path!r} needs PyYAML, which is not installed: "
            "pip install pyyaml, or write the file as JSON with a name in .json"
        ) from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"{problem}: line {mark.line + 1} column {mark.column + 1}" if mark else str(error)
        raise ConfigError(f"{OPTION}: {path!r} is not YAML: {where}. {_REMEDY}") from None


def _entry(path: str, number: int, raw: Any) -> Tenant:
    where = f"{OPTION}: {path!r}, tenant {number}"
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: {raw!r} is not a mapping such as {{name: acme, keys: [HASH]}}")
    if isinstance(raw.get("name"), str):
        where += f" ({raw['name']!r})"
    names = [field.name for field in msgspec.structs.fields(Tenant)]
    for key in raw:
        if key not in names:
            valid = ", ".join(closest_first(str(key), names))
            raise ConfigError(f"{where}: unknown field {key!r}. Valid: {valid}")
    if "name" not in raw:
        raise ConfigError(f"{where}: has no name. Give it one, such as name: acme")
    for field, value in raw.items():
        try:
            msgspec.convert({"name": "x", field: value}, Tenant)
        except msgspec.ValidationError as error:
            if field in ("keys", "key_hash"):
                # Not shown: it may well be a key that should have been a hash.
                raise ConfigError(f"{where}: {field} must be {_HASH_WANTED}") from None
            raise ConfigError(f"{where}: {field}: {value!r} is not valid: {error}") from None
    tenant = msgspec.convert(raw, Tenant)
    floor, ceiling = tenant.kv_floor, tenant.kv_ceiling
    if floor is not None and ceiling is not None and floor > ceiling:
        raise ConfigError(
            f"{where}: kv_floor {floor:g} is above kv_ceiling {ceiling:g}; lower the one or raise "
            "the other"
        )
    return tenant


def _check_together(path: str, tenants: Sequence[Tenant]) -> None:
    names: set[str] = set()
    floors = sum(tenant.kv_floor or 0.0 for tenant in tenants)
    if floors > 1 + 1e-9:
        raise ConfigError(
            f"{OPTION}: {path!r}: the tenants' kv_floor come to {floors:g}, and there is 1 to "
            "share; lower some"
        )
    owners: dict[bytes, str] = {}
    for tenant in tenants:
        if tenant.name in names:
            raise ConfigError(
                f"{OPTION}: {path!r} has two tenants named {tenant.name!r}; make them one, or "
                "rename one"
            )
        names.add(tenant.name)
        for digest in tenant.hashes():
            owner = owners.setdefault(digest, tenant.name)
            if owner != tenant.name:
                raise ConfigError(
                    f"{OPTION}: {path!r}: the key with the hash {digest.hex()[:12]}… belongs to "
                    f"both {owner!r} and {tenant.name!r}; give it to one"
                )


class Memory(Protocol):
    """Where the file's last right text is kept, for workers that start when it is wrong."""

    def remember(self, note: bytes) -> None:
        """Keep a note in place of the last one."""

    def recall(self) -> bytes:
        """Return the note, empty if there is none."""


class TenantFile:
    """The file and what it said when it was last right. `poll` it: once per second is enough."""

    def __init__(
        self, path: str | None, api_keys: Iterable[str] = (), memory: Memory | None = None
    ) -> None:
        """Read the file, or what another worker has read before it was broken.

        Raises:
            ConfigError: see `load`.
        """
        self._path = path
        self._api_keys = [key for key in api_keys if key]
        self._memory = memory
        self._seen = self._signature()
        self.book = TenantBook((), self._api_keys)
        if path is None:
            return
        # One byte, whether keys were needed, and the text.
        known = b"" if memory is None else memory.recall()
        try:
            self._take(_read(path), closed=known[:1] == b"1")
        except ConfigError as error:
            if not known:
                raise
            self._take(known[1:].decode(), closed=known[:1] == b"1")
            logger.error("%s. The tenants are those that the file last had.", error)

    @property
    def is_file(self) -> bool:
        """Whether there is a file: without one, requests name their tenants themselves."""
        return self._path is not None

    def _take(self, text: str, *, closed: bool) -> None:
        assert self._path is not None
        tenants = parse(self._path, text)
        # A list from which the last key was struck off must not let everybody in.
        self.book = TenantBook(tenants, self._api_keys, closed=closed)
        if self._memory is not None:
            self._memory.remember((b"1" if self.book.closed else b"0") + text.encode())

    def _signature(self) -> tuple[int, int, int] | None:
        if self._path is None:
            return None
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def poll(self) -> bool:
        """Read the file again if it changed; whether `book` is a new one.

        A file that cannot be used is said so once, and what was known stays.
        """
        signature = self._signature()
        if self._path is None or signature == self._seen:
            return False
        self._seen = signature
        try:
            self._take(_read(self._path), closed=self.book.closed)
        except ConfigError as error:
            logger.error("%s. The tenants stay as they were.", error)
            return False
        logger.info("%s: %d tenants read from %s", OPTION, len(self.book.by_name), self._path)
        return True


# The command


_IN_ENGINE = ("max_running", "kv_floor", "kv_ceiling", "tokens_per_minute", "ttft_ms", "tpot_ms")


def table(tenants: Sequence[Tenant]) -> str:
    """Return the tenants as lines of text, keys by number only.

    What concerns the engine is shown where somebody has it: the table is wide enough.
    """
    columns = ["priority", *(f"max_{gauge}" for gauge in GAUGES)]
    columns += [name for name in _IN_ENGINE if any(getattr(one, name) for one in tenants)]
    columns += ["isolate_prefix"] if any(one.isolate_prefix for one in tenants) else []
    rows = [("name", "keys", "weight", *columns)]
    for tenant in tenants:
        cells = (_cell(getattr(tenant, name)) for name in columns)
        rows.append((tenant.name, str(len(tenant.hashes())), _cell(tenant.weight), *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _cell(value: float | bool | None) -> str:
    if value is None:
        return "-"
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value:.10g}"
