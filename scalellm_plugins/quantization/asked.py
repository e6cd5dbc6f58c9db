"""What a command line asks of online quantization, judged before anything is built. Without torch.

An option that does nothing is refused: whoever gives one believes that it does something.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from scalellm_plugins.errors import ConfigError

Method = Literal["scalellm_int8", "scalellm_w8a8", "scalellm_int4"]

METHODS: tuple[Method, ...] = ("scalellm_int8", "scalellm_w8a8", "scalellm_int4")
"""Names for vLLM's --quantization."""

_FOUR_BITS: tuple[Method, ...] = ("scalellm_int4",)
_ACTS_WITH: dict[str, tuple[Method, ...]] = {
    "group_size": _FOUR_BITS,
    "zero_point": _FOUR_BITS,
    "search": _FOUR_BITS,
    "keep_8bit": _FOUR_BITS,
    "skip": METHODS,
    "lm_head_8bit": METHODS,
}
"""Options that act on a plain checkpoint while it is quantized → the methods that look at them."""

_EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
"""Where models say in their config.json how many experts they have, as vLLM knows it."""


def methods(arguments: Any) -> tuple[Method, ...]:
    """Our methods that vLLM's arguments ask for: for the model, and for its draft."""
    speculative = getattr(arguments, "speculative_config", None)
    draft = speculative.get("quantization") if isinstance(speculative, Mapping) else None
    wanted = (getattr(arguments, "quantization", None), draft)
    return tuple(method for method in METHODS if method in wanted)


def refuse_off(asked: Sequence[Method], why: str | None, *, by_choice: bool) -> None:
    """Refuse our methods where the feature is off; vLLM would only not know their names.

    `why` is None where no plugin of ours was asked for. `by_choice`: options or names leave the
    feature out, and can bring it back; otherwise it cannot be on with this vLLM.

    Raises:
        ConfigError: a method is asked for.
    """
    if not asked:
        return
    if why is None:
        raise ConfigError(
            f"argument --quantization: {asked[0]!r} is a plugin's, and no plugin of ScaleLLM was "
            "asked for. Add --plugins scalellm (or VLLM_PLUGINS=scalellm)."
        )
    remedy = "Drop --quantization, or see `scalellm doctor`."
    if by_choice:
        remedy = "Switch it on with --scalellm.quantization on, or drop --quantization."
        if why.startswith("--scalellm off"):
            remedy = "Drop --scalellm off, or drop --quantization."
    raise ConfigError(
        f"argument --quantization: {asked[0]!r} needs the feature `quantization`, which is off "
        f"({why}). {remedy}"
    )


def given(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The section's options as they were written, without those that are left unset or off."""
    found: dict[str, Any] = {}
    for key, section in raw.items():
        if key.replace("-", "_") == "quantization" and isinstance(section, Mapping):
            found |= {name.replace("-", "_"): value for name, value in section.items()}
    return {name: value for name, value in found.items() if value not in (None, False)}


def without_effect(asked: Sequence[Method], raw: Mapping[str, Any]) -> str:
    """Say which of the options that were given do nothing with the methods; "" if none.

    By what was written, not by value: `group_size: 128`, the default, does as little.
    """
    for name, value in given(raw).items():
        acting = _ACTS_WITH.get(name, ())
        if acting and not set(acting) & set(asked):
            here = f"with --quantization {asked[0]}" if asked else "without --quantization"
            return (
                f"scalellm.quantization.{name}: {value!r} has no effect {here}, only with "
                f"{', '.join(acting)}. Drop it, or take --quantization {acting[-1]}."
            )
    return ""


def has_experts(hf_config: Any) -> bool:
    """Whether a model's config.json tells of a mixture of experts.

    One expert is none: models whose mixtures are an option say so of their plain ones.
    """
    text = getattr(hf_config, "get_text_config", lambda: hf_config)()
    counts = (getattr(part, name, None) for part in (hf_config, text) for name in _EXPERTS)
    return any(isinstance(count, int) and count > 1 for count in counts)


def mixture(method: Method, who: str) -> ConfigError:
    """The refusal of a mixture of experts: it would silently stay in 16 bits."""
    return ConfigError(
        f"--quantization {method}: {who} is a mixture of experts, which is not quantized. "
        "To leave experts in 16 bits: --scalellm.quantization.skip '*.experts'"
    )


def may_name_experts(globs: Iterable[str]) -> bool:
    """Whether one of the patterns could match experts, whatever the layers above are named."""
    return any("expert" in glob or glob.endswith(("*", "?", "]")) for glob in globs)
