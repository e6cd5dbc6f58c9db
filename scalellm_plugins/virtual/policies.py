"""Which schedulers are compared, from what the user wrote. Pure.

fcfs,fair                        policies of scalellm.scheduler.policy, whatever there are
deadline:tpot_target_ms=40       one with options of its own; any number, with colons between
vllm, vllm-priority              vLLM's own AsyncScheduler, by arrival or by priority
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from scalellm_plugins import config
from scalellm_plugins.errors import ConfigError

from .job import Policy

UPSTREAM = {"vllm": "fcfs", "vllm-priority": "priority"}
"""Names of vLLM's own scheduler → its --scheduling-policy."""

_SECTION = "scheduler."


def parse(texts: Sequence[str], settings: Sequence[str] = ()) -> list[Policy]:
    """Make policies from `--policy` (comma lists) and `--set scheduler.KEY=VALUE`, which is for all
    of ours.

    Raises:
        ConfigError: an unknown policy or option, an option for vLLM's own, or one named twice.
    """
    shared = dict(_setting(text) for text in settings)
    policies = [
        _policy(part.strip(), shared) for text in texts for part in text.split(",") if part.strip()
    ]
    labels = [policy.label for policy in policies]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"--policy: {label!r} is given twice. Name each policy once.")
    if not policies:
        raise ConfigError("--policy: no policy is named. For example: --policy vllm,fcfs,fair")
    return policies


def _policy(text: str, shared: dict[str, Any]) -> Policy:
    name, *parts = text.split(":")
    own = dict(_pair(part, f"--policy {name}") for part in parts)
    if name in UPSTREAM:
        if own:
            raise ConfigError(
                f"--policy: {text!r}: {name} is vLLM's own scheduler, which has no options of "
                "scalellm.scheduler. Drop them."
            )
        return Policy(label=text, ours=False, order=UPSTREAM[name])  # type: ignore[arg-type]
    options = _named(name) | shared | own
    try:
        config.parse({"scheduler": options})
    except ConfigError as error:
        raise ConfigError(f"--policy {text}: {error}; or vLLM's own: vllm, vllm-priority") from None
    return Policy(label=text, ours=True, options=options)


def _named(name: str) -> dict[str, Any]:
    """The option that chooses a policy. First come, first served is also what no policy means."""
    named = {"policy": name.replace("+", ",")}
    if name == "fcfs":
        try:
            config.parse({"scheduler": named})
        except ConfigError:
            return {}
    return named


def _setting(text: str) -> tuple[str, Any]:
    if not text.startswith(_SECTION):
        raise ConfigError(
            f"--set: {text!r}: only options of scalellm.scheduler matter here, such as "
            f"{_SECTION}tpot_target_ms=40"
        )
    return _pair(text.removeprefix(_SECTION), "--set")


def _pair(text: str, option: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{option}: {text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value  # text, or a switch such as on


def environment(policy: Policy, gpu: dict[str, Any]) -> dict[str, str]:
    """Variables for the process that runs a policy: plugins and options, nothing inherited."""
    plugins = ["scalellm.sim", *(["scalellm.scheduler"] if policy.ours else [])]
    options: dict[str, Any] = {"strict": True, "sim": gpu}
    if policy.ours:
        options["scheduler"] = policy.options
    return {"VLLM_PLUGINS": ",".join(plugins), "SCALELLM_CONFIG": json.dumps(options)}
