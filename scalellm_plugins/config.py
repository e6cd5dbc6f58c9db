"""Every option of the plugin: parsed once into frozen structs, with errors that show the way.

The same tree of options can come from `--scalellm '{…}'`, from dotted `--scalellm.frontend.workers
4`, from vLLM's `--config` YAML and, where there is no command line, from the environment variable
`SCALELLM_CONFIG` (JSON). This is the only module that reads or writes `SCALELLM_*` variables; they
are also how the options reach the processes that vLLM starts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta

from .errors import ConfigError, closest_first

_S = TypeVar("_S", bound=msgspec.Struct)

ROOT = "scalellm"
"""The path of the whole tree in error messages; also the option's name."""

_TRUE = frozenset({"on", "true", "yes"})
_FALSE = frozenset({"off", "false", "no"})

Toggle = Annotated[bool | None, Meta(description="on or off; unset: as --plugins says")]
_Count = Annotated[int, Meta(ge=1)] | None
_Path = Annotated[str, Meta(min_length=1)] | None


class StatusConfig(msgspec.Struct, frozen=True, kw_only=True):
    """GET /scalellm/features."""

    enabled: Toggle = None


class FrontendConfig(msgspec.Struct, frozen=True, kw_only=True):
    """HTTP workers: their number follows demand between two bounds; see `worker_bounds`."""

    enabled: Toggle = None
    workers: Annotated[
        Annotated[int, Meta(ge=1, le=256)] | None,
        Meta(description="API server processes (1-256), always; min_workers and max_workers"),
    ] = None
    min_workers: Annotated[
        Annotated[int, Meta(ge=1, le=256)] | None,
        Meta(description="API server processes when idle (1-256); unset: 1"),
    ] = None
    max_workers: Annotated[
        Annotated[int, Meta(ge=1, le=256)] | None,
        Meta(description="API server processes when busy (1-256); unset: a quarter of the cores"),
    ] = None
    max_requests: Annotated[_Count, Meta(description="requests in flight; more get 503")] = None
    max_queued_requests: Annotated[
        _Count, Meta(description="requests without a first token yet; more get 503")
    ] = None
    max_prompt_tokens: Annotated[
        _Count, Meta(description="prompt tokens in flight; more get 503")
    ] = None
    max_queued_prompt_tokens: Annotated[
        _Count, Meta(description="prompt tokens without a first token yet; more get 503")
    ] = None
    access_log: Annotated[
        Literal["uvicorn", "text", "json"],
        Meta(description="uvicorn: as without us; text, json: at the end, with id and timings"),
    ] = "uvicorn"
    tenants: Annotated[_Path, Meta(description="file: names, key hashes, limits")] = None


class IpcConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Frontend ↔ engine transport."""

    enabled: Toggle = None


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The lean decode step, and who is next."""

    enabled: Toggle = None
    policy: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(description="fcfs, priority, fair, deadline, a plugin's; several: priority,fair"),
    ] = None
    ageing_s: Annotated[
        Annotated[float, Meta(gt=0)],
        Meta(description="priority: waiting work rises a class every so many seconds"),
    ] = 30.0
    min_run_s: Annotated[
        Annotated[float, Meta(ge=0)],
        Meta(
            description="who was preempted n times then runs n times so long (priority, deadline)"
        ),
    ] = 1.0
    prompt_weight: Annotated[
        Annotated[float, Meta(ge=0)], Meta(description="fair: what a prompt's token costs")
    ] = 1.0
    output_weight: Annotated[
        Annotated[float, Meta(gt=0)], Meta(description="fair: what a generated token costs")
    ] = 2.0
    locality_tokens: Annotated[
        Annotated[int, Meta(ge=0)],
        Meta(description="fair: service that prefixes in the cache may put before turns (DLPM)"),
    ] = 0
    late: Annotated[
        Literal["drop", "demote"],
        Meta(description="deadline: what becomes of requests that cannot make it any more"),
    ] = "drop"
    tpot_target_ms: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="prompts get as much of a step as keeps decodes at this pace"),
    ] = None


class QuantizationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Quantization: how --quantization scalellm_… rounds weights; what multiplies on CPUs."""

    enabled: Toggle = None
    group_size: Annotated[
        Annotated[int, Meta(ge=32, le=4096, multiple_of=32)],
        Meta(description="4 bits: weights per scale, a multiple of 32; less where it does not fit"),
    ] = 128
    zero_point: Annotated[
        Literal["asymmetric", "symmetric"],
        Meta(description="4 bits: each group has its own zero, or it is the middle"),
    ] = "asymmetric"
    search: Annotated[
        Literal["mse", "none"],
        Meta(description="4 bits: clip where that makes the squared error least, or never"),
    ] = "mse"
    skip: Annotated[
        str | None, Meta(description="layers that stay in 16 bits: *.o_proj,model.layers.0.*")
    ] = None
    keep_8bit: Annotated[
        str | None, Meta(description="layers that scalellm_int4 keeps in 8 bits, likewise")
    ] = None
    lm_head_8bit: Annotated[
        bool, Meta(description="8 bits for the output layer, too: much of a small model's weights")
    ] = False
    checkpoints: Annotated[
        bool, Meta(description="CPUs: checkpoints of 4 and 8 bits by our kernels, not by vLLM's")
    ] = True
    gpu: Annotated[
        bool, Meta(description="allow GPUs: their kernels have only run in Triton's interpreter")
    ] = False


class SimConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The simulated GPU. Its timeline belongs to `gpu` and `model`, whatever model is served."""

    enabled: Toggle = None
    gpu: Annotated[str, Meta(description="card whose timeline is simulated")] = "h200"
    model: Annotated[str, Meta(description="model whose timeline is simulated")] = "8b"
    tensor_parallel: Annotated[
        Annotated[int, Meta(ge=1, le=64)] | None,
        Meta(description="cards per replica (1-64); unset: as the model preset has it"),
    ] = None
    speed: Annotated[
        Annotated[float, Meta(gt=0, le=1000)],
        Meta(description="how much faster than the card the clock runs (0-1000)"),
    ] = 1.0
    kv_blocks: Annotated[
        Annotated[int, Meta(ge=2)] | None,
        Meta(description="KV cache blocks (at least 2); unset: from the card's memory"),
    ] = None


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """All options. One section per feature, named as the feature (tests hold them equal)."""

    enabled: Annotated[bool, Meta(description="off: the whole plugin stays out")] = True
    strict: Annotated[
        bool, Meta(description="refuse to start when a feature that was asked for cannot be on")
    ] = False
    status: StatusConfig = StatusConfig()
    frontend: FrontendConfig = FrontendConfig()
    ipc: IpcConfig = IpcConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    sim: SimConfig = SimConfig()


def _sim_gpus() -> Sequence[str]:
    from .simulator.roofline import GPUS

    return tuple(GPUS)


def _sim_models() -> Sequence[str]:
    from .simulator.roofline import MODELS

    return tuple(MODELS)


MOST_DEFAULT_WORKERS = 8


def worker_bounds(
    frontend: FrontendConfig, api_server_count: int | None, cores: int, at_least: int = 1
) -> tuple[int, int]:
    """How few and how many API server processes there are to be.

    `api_server_count` is vLLM's own option, None where it was not given: exactly so many. Without
    any of the options: from 1 to a quarter of the `cores` (at most `MOST_DEFAULT_WORKERS`) or to
    `at_least`, what vLLM would start by itself.

    Raises:
        ConfigError: two of the options contradict each other.
    """
    given = {
        f"scalellm.frontend.{name}": value
        for name in ("workers", "min_workers", "max_workers")
        if (value := getattr(frontend, name)) is not None
    }
    if api_server_count is not None:
        given["--api-server-count"] = api_server_count
    exact = {name: value for name, value in given.items() if not name.endswith("_workers")}
    low, high = frontend.min_workers, frontend.max_workers
    if exact:
        (name, value), *others = exact.items()
        for other, number in others:
            if number != value:
                raise _contradiction(name, value, other, number)
        if high not in (None, value):
            raise _contradiction("scalellm.frontend.max_workers", high, name, value)
        # vLLM's own count is the maximum where a minimum is given too: its slots exist throughout.
        if low is not None and (low > value or (name.endswith("workers") and low != value)):
            raise _contradiction("scalellm.frontend.min_workers", low, name, value)
        return low or value, value
    if high is None:
        high = max(1, min(MOST_DEFAULT_WORKERS, cores // 4), at_least, low or 1)
    if low is not None and low > high:
        names = ("scalellm.frontend.min_workers", "scalellm.frontend.max_workers")
        raise _contradiction(names[0], low, names[1], high)
    return low or 1, high


def _contradiction(one: str, value: int | None, other: str, number: int) -> ConfigError:
    return ConfigError(f"{one}: {value} contradicts {other} {number}. Give one of the two.")


CHOICES: dict[str, Callable[[], Sequence[str]]] = {
    "scalellm.sim.gpu": _sim_gpus,
    "scalellm.sim.model": _sim_models,
}
"""Options that take one of a list of names; functions, so that nothing is imported before use."""


def _check_policies(text: str) -> None:
    from .scheduling.registry import split

    split(text)


CHECKS: dict[str, Callable[[str], None]] = {"scalellm.scheduler.policy": _check_policies}
"""Options whose values are looked at more closely: each raises `ConfigError`."""


def parse(raw: Mapping[str, Any]) -> Config:
    """Build a `Config` from the nested mapping that the command line, YAML or JSON gave.

    A feature's section may be a mapping of options or simply on/off (true/false, yes/no, also as
    text). Dashes in keys count as underscores.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range; the text holds the
            option's path, the value and what would be valid, closest match first.
    """
    return _struct(Config, raw, ROOT)


def _struct(kind: type[_S], raw: Any, path: str) -> _S:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path}: {raw!r} is not a mapping of options. {_valid(kind, '', path)}")
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            raise ConfigError(
                f"{path}.{key}: unknown option (given {value!r}). {_valid(kind, name, path)}"
            )
        values[name] = _value(fields[name], value, f"{path}.{name}")
    return kind(**values)


def _value(field: msgspec.structs.FieldInfo, value: Any, path: str) -> Any:
    if isinstance(field.default, msgspec.Struct):
        section = type(field.default)
        toggled = _as_bool(value)
        if toggled is not None:
            return section(enabled=toggled)
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"{path}: {value!r} is neither on/off nor a mapping of options. "
                f"{_valid(section, '', path)}"
            )
        return _struct(section, value, path)
    if field.name in ("enabled", "strict"):
        toggled = _as_bool(value)
        if toggled is None:
            raise ConfigError(f"{path}: {value!r} is not a switch. Valid: on, off")
        return toggled
    try:
        converted = msgspec.convert(value, field.type, strict=True)
    except msgspec.ValidationError as error:
        if words := _words(field.type):
            names = ", ".join(closest_first(str(value), words))
            raise ConfigError(f"{path}: {value!r} is unknown. Valid: {names}") from None
        raise ConfigError(f"{path}: {value!r} is not valid: {error}") from None
    if converted is not None and path in CHOICES:
        valid = CHOICES[path]()
        if converted.lower() not in valid:
            names = ", ".join(closest_first(converted, valid))
            raise ConfigError(f"{path}: {converted!r} is unknown. Valid: {names}")
    if converted is not None and path in CHECKS:
        CHECKS[path](converted)
    return converted


def _words(kind: Any) -> list[str]:
    """The words that an option may be, where its type is a list of them."""
    if get_origin(kind) is Literal:
        return list(map(str, get_args(kind)))
    return [word for part in get_args(kind) for word in _words(part)]


def _as_bool(value: Any) -> bool | None:
    """on/off in any of its spellings, or None."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        lowered = value.lower()
        return True if lowered in _TRUE else False if lowered in _FALSE else None
    return None


def is_switch(text: str) -> bool:
    """Whether a text is one of the spellings of on and off."""
    return _as_bool(text) is not None


def _valid(kind: type[msgspec.Struct], near: str, path: str) -> str:
    names = closest_first(near, (field.name for field in msgspec.structs.fields(kind)))
    return f"Valid under {path}: {', '.join(names)}"


def switches() -> frozenset[str]:
    """Dotted paths of the options that are switches, such as "scalellm.ipc" (no value means on)."""
    paths = {f"{ROOT}.strict", f"{ROOT}.enabled"}
    for field in msgspec.structs.fields(Config):
        if isinstance(field.default, msgspec.Struct):
            paths |= {f"{ROOT}.{field.name}", f"{ROOT}.{field.name}.enabled"}
    return frozenset(paths)


def describe() -> list[tuple[str, str, str]]:
    """Every option as (dotted path, default, description), in the structs' order, for help texts.

    Lists of names are not spelt out here: they would be imported to print a help text.
    """
    return _describe(Config, ROOT)


def _describe(kind: type[msgspec.Struct], path: str) -> list[tuple[str, str, str]]:
    rows = []
    types = msgspec.inspect.type_info(kind)
    assert isinstance(types, msgspec.inspect.StructType)
    for field, info in zip(msgspec.structs.fields(kind), types.fields, strict=True):
        # A section's switch is written without its name: --scalellm.ipc off.
        short = field.name == "enabled" and path != ROOT
        name = path if short else f"{path}.{field.name}"
        if isinstance(field.default, msgspec.Struct):
            rows += _describe(type(field.default), name)
            continue
        meta = info.type
        text = ""
        if isinstance(meta, msgspec.inspect.Metadata):
            text = (meta.extra_json_schema or {}).get("description", "")
        default = "unset" if field.default is None else json.dumps(field.default)
        rows.append((name, default, text))
    return rows


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay the options of `over` over those of `base`, mapping by mapping; `over` wins.

    A section that is merely switched (`ipc: off`) keeps the options that it had.
    """
    merged = dict(base)
    for key, value in over.items():
        name = key.replace("-", "_")
        old = merged.get(name)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[name] = merge(old, value)
        elif isinstance(old, Mapping) and _as_bool(value) is not None:
            merged[name] = {**old, "enabled": value}
        elif isinstance(value, Mapping) and _as_bool(old) is not None:
            merged[name] = {"enabled": old, **value}
        else:
            merged[name] = value
    return merged


# The environment: options and decisions on their way to child processes.

_CONFIG = "SCALELLM_CONFIG"
_STATE = "SCALELLM_STATE"
_RESTARTED = "SCALELLM_RESTARTED"
_RAY_PREFIXES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"


def raw_from_env() -> dict[str, Any]:
    """Return the options in `SCALELLM_CONFIG` as the nested mapping that they are, unchecked.

    Raises:
        ConfigError: the variable is not a JSON object.
    """
    text = os.environ.get(_CONFIG, "").strip()
    if not text:
        return {}
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{_CONFIG}={text!r} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{_CONFIG}={text!r} is not a JSON object such as " + '{"strict": true}')
    return raw


def raw_to_env(raw: Mapping[str, Any]) -> None:
    """Export options (unparsed, so that a child reads exactly what the user wrote)."""
    os.environ[_CONFIG] = json.dumps(raw, sort_keys=True)


def current() -> Config:
    """The options of this process, from the environment. Parsed at each call: keep the result.

    Raises:
        ConfigError: as `parse`.
    """
    return parse(raw_from_env())


def state_from_env() -> dict[str, Any] | None:
    """What the first process decided (see activation.py), or None in the first process.

    A state that belongs to other names or options is somebody else's: a program that ran a vLLM in
    its own process leaves one in the environment of whatever it starts next.
    """
    text = os.environ.get(_STATE)
    state: dict[str, Any] = json.loads(text) if text else {}
    return state if state and state.get("of") == _decided_from() else None


def state_to_env(state: Mapping[str, Any]) -> None:
    """Export the decisions, so that every process of the server agrees on them."""
    os.environ[_STATE] = json.dumps({**state, "of": _decided_from()})
    # On its way to other machines, vLLM copies variables by their prefixes.
    prefixes = os.environ.get(_RAY_PREFIXES, "").split(",")
    os.environ[_RAY_PREFIXES] = ",".join(dict.fromkeys([*filter(None, prefixes), "SCALELLM_"]))


def _decided_from() -> list[str]:
    return [os.environ.get(name, "") for name in ("VLLM_PLUGINS", _CONFIG)]


def mark_restarted() -> bool:
    """Note that the process restarts itself once; False if it already did."""
    if os.environ.get(_RESTARTED):
        return False
    os.environ[_RESTARTED] = "1"
    return True


def clear_restarted() -> None:
    """Forget the restart: it has done its work, and is none of the children's business."""
    os.environ.pop(_RESTARTED, None)
