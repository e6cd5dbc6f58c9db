"""The command line of `scalellm compress`."""

from __future__ import annotations

import argparse
from pathlib import Path

from scalellm_plugins.errors import CheckpointError

from . import interrupt
from .progress import say
from .recipe import CHANNEL, GROUP_SIZE, GROUP_SIZES, METHODS, SCHEMES, TOKENS, Recipe

ABOUT = """\
Write a smaller copy of a model that servers load without this package: fewer layers, narrower
MLPs, integer weights (compressed-tensors). Prints what it cost; OUT/compression.json says more.
A run that was cut off goes on when the same command is given again; OUT appears when it is whole.
Exit code: 0 OUT is there, 2 refused or not written, 130 interrupted."""

EXAMPLES = """\
examples:
  scalellm compress MODEL OUT --scheme int4
  scalellm compress MODEL OUT --scheme w8a8 --ignore '*.down_proj' --calibration chats.jsonl
  scalellm compress MODEL OUT --scheme int4 --method gptq --calibration chats.jsonl
  scalellm compress MODEL OUT --drop-layers 4 --prune-ffn 0.25 --calibration text.txt
  vllm serve OUT"""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as of shells."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", metavar="MODEL", help="folder, or name on the Hugging Face hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make; must not exist")
    _add_schemes(parser)
    _add_pruning(parser)
    _add_text(parser)


def _add_schemes(parser: argparse.ArgumentParser) -> None:
    schemes = parser.add_argument_group("integer weights")
    schemes.add_argument(
        "--scheme",
        choices=SCHEMES,
        default="",
        help="; ".join(f"{name}: {scheme.about}" for name, scheme in SCHEMES.items()),
    )
    schemes.add_argument(
        "--group-size",
        type=_group_size,
        default=GROUP_SIZE,
        metavar="N",
        help="weights of a row that share a scale: 32, 64, 128 (default) or channel, the whole "
        "row; w8a8 is always by channel",
    )
    schemes.add_argument(
        "--asymmetric", action="store_true", help="zero points, too (int4 only); default: without"
    )
    schemes.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="linear layers that keep their dtype, such as '*.down_proj'; may be repeated. lm_head "
        "and the embedding always do",
    )
    schemes.add_argument(
        "--method",
        choices=METHODS,
        default="",
        help="with llm-compressor, in an environment of its own, and --calibration: "
        + "; ".join(f"{name} {about}" for name, (_, about) in METHODS.items())
        + ". Default: the scales with which the weights' own error is least",
    )


def _add_pruning(parser: argparse.ArgumentParser) -> None:
    pruning = parser.add_argument_group("fewer weights (both need --calibration)")
    pruning.add_argument(
        "--drop-layers",
        type=int,
        default=0,
        metavar="K",
        help="drop the K layers with the least block influence",
    )
    pruning.add_argument(
        "--prune-ffn",
        type=float,
        default=0.0,
        metavar="R",
        help="cut the share R of every MLP's channels, those that add the least; what stays is a "
        "multiple of 64",
    )


def _add_text(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("calibration and report")
    text.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help='text like what the model will serve: .jsonl with {"messages": […]} or '
        '{"text": "…"} on each line, else plain text. A fifth is held out, to measure on',
    )
    text.add_argument(
        "--calibration-tokens",
        type=int,
        default=TOKENS,
        metavar="N",
        help=f"tokens to choose layers and channels by (default {TOKENS})",
    )
    text.add_argument(
        "--no-measure",
        action="store_true",
        help="no quality and speed in the report: measuring needs both models in memory",
    )


def _group_size(text: str) -> int:
    if text == "channel":
        return CHANNEL
    if text.isdecimal() and int(text) in GROUP_SIZES:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is none of 32, 64, 128 and channel")


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says and print the report.

    Raises:
        ScaleLLMError: it was refused.
    """
    try:
        with interrupt.remembered():
            return _run(arguments)
    except KeyboardInterrupt:
        say("scalellm compress: interrupted; the same command goes on with what is finished")
        return INTERRUPTED


def _run(arguments: argparse.Namespace) -> int:
    try:
        from . import report, work
    except ImportError as error:
        raise CheckpointError(
            f"compressing needs torch, safetensors and transformers, which vLLM brings: {error}"
        ) from None
    recipe = Recipe(
        scheme=arguments.scheme,
        group_size=arguments.group_size,
        symmetric=not arguments.asymmetric,
        ignore=tuple(arguments.ignore),
        drop_layers=arguments.drop_layers,
        prune_ffn=arguments.prune_ffn,
        method=arguments.method,
        tokens=arguments.calibration_tokens,
    )
    job = work.Job(
        arguments.model, arguments.out, recipe, arguments.calibration, not arguments.no_measure
    )
    print(report.table(work.compress(job)))
    where = SCHEMES[recipe.scheme].runs if recipe.scheme else "or any other server"
    print(f"{arguments.out}: `vllm serve {arguments.out}`, {where}")
    return 0
