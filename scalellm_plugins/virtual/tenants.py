"""Who sends what: tenants with rates, lengths and targets of their own. Pure.

On the command line `--tenants "a:weight=2:rate=3,b:prompt=sharegpt"`, or a file: YAML, or JSON by
its ending, with a list of mappings of the same keys::

    - {name: interactive, rate: 2, prompt: sharegpt, ttft_ms: 500, tpot_ms: 40, priority: -1}
    - {name: batch, rate: 6, cv: 3, prompt: 4096, output: 512, from_s: 60, until_s: 120}

In the short form `prompt` and `output` take what has no colon: a number or a preset.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from scalellm_plugins.errors import ConfigError, closest_first

OPTION = "--tenants"
_Positive = Annotated[float, Meta(gt=0)]


class Tenant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One sender. None: as the option of the whole workload says."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._@-]{1,64}$")] = "default"
    weight: Annotated[float, Meta(ge=1e-6, le=1e6)] = 1.0
    """Its share where shares matter."""
    rate: _Positive | None = None
    """Requests per second; in a trace, its part of the rows in proportion to the others'."""
    cv: _Positive | None = None
    """Coefficient of variation of the time between two requests: 1 is Poisson, more is bursty."""
    prompt: str | int | None = None
    output: str | int | None = None
    """Lengths, see lengths.py."""
    prefix: Annotated[int, Meta(ge=0)] = 0
    """Tokens at the beginning of every prompt that the tenant's requests share."""
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0
    ttft_ms: _Positive | None = None
    tpot_ms: _Positive | None = None
    deadline_ms: _Positive | None = None
    from_s: Annotated[float, Meta(ge=0)] = 0.0
    until_s: _Positive | None = None
    """It sends only between the two."""


def parse(text: str) -> list[Tenant]:
    """Make tenants from the value of the option: the short form, or the name of a file.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a value out of range, a name twice.
    """
    if Path(text).suffix.lower() in (".yaml", ".yml", ".json"):
        raw = _read(Path(text))
    else:
        raw = [_short(part) for part in text.split(",")]
    tenants = [_tenant(one) for one in raw]
    names = [tenant.name for tenant in tenants]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{OPTION}: {name!r} is there twice. Give each tenant its own name.")
    if not tenants:
        raise ConfigError(f"{OPTION}: {text!r} names no tenant. For example: a:weight=2:rate=3,b")
    return tenants


def _short(text: str) -> dict[str, Any]:
    name, *parts = text.strip().split(":")
    found: dict[str, Any] = {"name": name}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(
                f"{OPTION}: {name}: {part!r} is not KEY=VALUE, such as weight=2. Lengths with a "
                "colon go into a file (--tenants FILE.yaml)"
            )
        found[key] = _number(value)
    return found


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _read(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text) if path.suffix.lower() == ".json" else _yaml(path, text)
    except OSError as error:
        raise ConfigError(f"{OPTION}: {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{OPTION}: {str(path)!r} is not JSON: {error}") from None
    if isinstance(raw, dict) and list(raw) == ["tenants"]:
        raw = raw["tenants"]
    if not isinstance(raw, list):
        raise ConfigError(
            f"{OPTION}: {str(path)!r} is not a list of tenants such as [{{name: a, rate: 3}}]"
        )
    return raw


def _yaml(path: Path, text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise ConfigError(
            f"{OPTION}: {str(path)!r} needs PyYAML, which is not installed: pip install pyyaml, or "
            "write the file as JSON with a name in .json"
        ) from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{OPTION}: {str(path)!r} is not YAML: {error}") from None


def _tenant(raw: Any) -> Tenant:
    if not isinstance(raw, dict):
        raise ConfigError(f"{OPTION}: {raw!r} is not a mapping such as {{name: a, rate: 3}}")
    name = raw.get("name", "")
    fields = [field.name for field in msgspec.structs.fields(Tenant)]
    for key in raw:
        if key not in fields:
            valid = ", ".join(closest_first(str(key), fields))
            raise ConfigError(f"{OPTION}: {name}: unknown key {key!r}. Valid: {valid}")
    try:
        tenant = msgspec.convert({"name": None, **raw}, Tenant)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{OPTION}: {name}: {raw!r} is not valid: {error}") from None
    numbers = (value for value in raw.values() if isinstance(value, float))
    if not all(map(math.isfinite, numbers)):
        raise ConfigError(f"{OPTION}: {name}: {raw!r}: a number is not finite")
    if tenant.until_s is not None and tenant.until_s <= tenant.from_s:
        raise ConfigError(
            f"{OPTION}: {name}: until_s {tenant.until_s:g} is not after from_s {tenant.from_s:g}"
        )
    return tenant
