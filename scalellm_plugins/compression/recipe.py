"""What is to be done to a model: the options of `scalellm compress`, checked."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from scalellm_plugins.errors import ConfigError

CHANNEL = -1
"""The group size that means: one scale for a whole row."""

GROUP_SIZES, GROUP_SIZE = (32, 64, 128, CHANNEL), 128
"""What vLLM's kernels (Marlin on GPUs, WNA16 on CPUs) have in common, and the default."""

PACKED_MULTIPLE = 32
"""Inputs and outputs of a matrix in 4- or 8-bit words: what those kernels take at least."""

TOKENS = 32768
"""Of calibration text, by default."""

WIDTH_MULTIPLE = 64
"""A cut MLP keeps a multiple of so many channels: tiles of GEMM kernels, two or more TP ranks."""


class Scheme(msgspec.Struct, frozen=True):
    """An integer format.

    Attributes:
        activations: inputs become int8, too, one scale per token.
        runs: where vLLM has kernels for it.
    """

    bits: int
    activations: bool
    about: str
    runs: str


SCHEMES: Mapping[str, Scheme] = {
    "int4": Scheme(
        4, False, "W4A16: 4-bit weights with group scales; vLLM on GPU and CPU", "on GPUs and CPUs"
    ),
    "int8": Scheme(
        8,
        False,
        "W8A16: 8-bit weights with group scales; vLLM on GPU, on CPU with this plugin",
        "on GPUs; on CPUs with --plugins scalellm, for vLLM alone has no kernel there",
    ),
    "w8a8": Scheme(
        8,
        True,
        "W8A8: 8-bit weights per channel, 8-bit inputs per token; both",
        "on GPUs and CPUs",
    ),
}


METHODS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "gptq": (("int4", "int8", "w8a8"), "rounds a column after the other, each mending the last"),
    "awq": (("int4", "int8"), "scales channels by what they carry, before rounding"),
    "sparsegpt": ((), "no integers: two of four weights become zeros (2:4), the others mend it"),
}
"""What llm-compressor does with calibration text: the schemes that it goes with, and about it."""


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options that decide what OUT holds; a run may go on only with the same ones.

    Attributes:
        scheme: one of SCHEMES, or "" to keep the dtype.
        group_size: weights of a row that share a scale; CHANNEL: the whole row.
        symmetric: without zero points.
        ignore: shell patterns of modules that keep their dtype ("*.down_proj").
        drop_layers: decoder layers to drop.
        prune_ffn: share of the MLPs' channels to cut, 0 ≤ R < 1.
        method: one of METHODS, by which scales (or zeros) are found; "": by the weights alone.
        text: SHA-256 of the calibration text; "" without one.
        tokens: tokens of it that the choice of layers and channels rests on.
    """

    scheme: str = ""
    group_size: int = GROUP_SIZE
    symmetric: bool = True
    ignore: tuple[str, ...] = ()
    drop_layers: int = 0
    prune_ffn: float = 0.0
    method: str = ""
    text: str = ""
    tokens: int = TOKENS

    @property
    def selects(self) -> bool:
        """Whether layers or channels are chosen, for which text is needed."""
        return bool(self.drop_layers or self.prune_ffn)


def check(recipe: Recipe) -> Recipe:
    """Return the recipe, with what its scheme fixes filled in.

    Raises:
        ConfigError: an option is out of range, or two do not go together.
    """
    if recipe.method:
        _check_method(recipe)
    elif not (recipe.scheme or recipe.selects):
        raise ConfigError(
            f"nothing to do: give --scheme ({', '.join(SCHEMES)}), --drop-layers or --prune-ffn"
        )
    if recipe.drop_layers < 0:
        raise ConfigError(f"--drop-layers {recipe.drop_layers}: a number of layers, 0 or more")
    if not 0.0 <= recipe.prune_ffn < 1.0:
        raise ConfigError(f"--prune-ffn {recipe.prune_ffn}: it is a share, 0 ≤ R < 1, such as 0.25")
    if recipe.tokens < 1:
        raise ConfigError(
            f"--calibration-tokens {recipe.tokens}: a number of tokens, 1 or more, such as {TOKENS}"
        )
    if recipe.selects and not recipe.text:
        raise ConfigError(
            "--drop-layers and --prune-ffn choose by what the model does with text: give "
            "--calibration FILE (.txt, or .jsonl with a conversation on each line) of the kind "
            "that it will serve"
        )
    return _check_scheme(recipe)


def _check_method(recipe: Recipe) -> None:
    schemes, _ = METHODS[recipe.method]
    if recipe.selects:
        raise ConfigError(
            f"--method {recipe.method} and pruning are two runs: --drop-layers and --prune-ffn "
            "first, then --method on what that has written"
        )
    if recipe.scheme not in (schemes or ("",)):
        wanted = f"--scheme {' or '.join(schemes)}" if schemes else "no --scheme"
        given = f"--scheme {recipe.scheme}" if recipe.scheme else "none was given"
        raise ConfigError(f"--method {recipe.method} goes with {wanted}; {given}")
    if not recipe.text:
        raise ConfigError(
            f"--method {recipe.method} looks at what the model does with text: give --calibration "
            "FILE (.txt, or .jsonl with a conversation on each line) of the kind it will serve"
        )


def _check_scheme(recipe: Recipe) -> Recipe:
    if not recipe.scheme:
        given = {
            "--ignore": recipe.ignore and not recipe.method,
            "--asymmetric": not recipe.symmetric,
            f"--group-size {_size(recipe.group_size)}": recipe.group_size != GROUP_SIZE,
        }
        if idle := " and ".join(option for option, is_given in given.items() if is_given):
            raise ConfigError(
                f"{idle}: without --scheme it changes nothing; give one of {', '.join(SCHEMES)}"
            )
        return recipe
    scheme = SCHEMES[recipe.scheme]
    if recipe.group_size not in GROUP_SIZES:
        known = ", ".join(map(_size, GROUP_SIZES))
        raise ConfigError(f"--group-size {recipe.group_size}: vLLM's kernels know {known}")
    if not recipe.symmetric and recipe.scheme != "int4":
        raise ConfigError(
            f"--asymmetric goes with --scheme int4 only: vLLM has no kernel for {recipe.scheme} "
            "with zero points"
        )
    if scheme.activations and recipe.group_size not in (GROUP_SIZE, CHANNEL):
        raise ConfigError(
            f"--group-size {recipe.group_size}: --scheme {recipe.scheme} is always by channel; "
            "leave it out"
        )
    if scheme.activations:  # a sum over the row is made of integers alone: one scale
        return msgspec.structs.replace(recipe, group_size=CHANNEL)
    return recipe


def _size(size: int) -> str:
    return "channel" if size == CHANNEL else str(size)


_OPTIONS = {
    "scheme": "--scheme",
    "group_size": "--group-size",
    "symmetric": "--asymmetric",
    "ignore": "--ignore",
    "drop_layers": "--drop-layers",
    "prune_ffn": "--prune-ffn",
    "method": "--method",
    "text": "--calibration (its content)",
    "tokens": "--calibration-tokens",
}


def differences(before: Recipe, now: Recipe) -> list[str]:
    """The options in which two recipes differ, as words."""
    return [
        f"{_OPTIONS[field]}: {getattr(before, field)!r} then, {getattr(now, field)!r} now"
        for field in Recipe.__struct_fields__
        if getattr(before, field) != getattr(now, field)
    ]
