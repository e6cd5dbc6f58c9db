"""`--plugins` and `--scalellm` on vLLM's own command lines.

vLLM builds its parser after it has loaded general plugins, so `patches/patch_engine_arg_utils.py`
can let `add_arguments` add two options to it. Nothing else of the parser's class is touched: what
must happen once the arguments are known is hooked onto that one parser object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from typing import Any

from . import activation, config
from .errors import ScaleLLMError
from .features import FEATURES
from .names import known_names
from .quantization import asked as quantization

_PLUGINS = "--plugins"
_OPTIONS = "--scalellm"


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--plugins` and `--scalellm` to a parser of vLLM, and act on them once it has parsed.

    Defaults are suppressed: a namespace that names neither option looks exactly as without us
    (upstream compares namespaces attribute by attribute to log the non-default ones).

    Raises:
        argparse.ArgumentError: the parser has an option of that name which is not ours.
    """
    if isinstance(parser._option_string_actions.get(_PLUGINS), _AddNames):
        return parser
    group = parser.add_argument_group("ScaleLLM plugins", _group_help())
    group.add_argument(
        _PLUGINS,
        action=_AddNames,
        default=argparse.SUPPRESS,
        metavar="NAME[,NAME...]",
        help="Plugins to load, beside those in VLLM_PLUGINS. `scalellm` turns on every feature "
        "of ScaleLLM that is safe here; `scalellm.FEATURE` picks one of: "
        f"{', '.join(FEATURES)}.",
    )
    group.add_argument(
        _OPTIONS,
        action=_MergeOptions,
        type=_options,
        default=argparse.SUPPRESS,
        metavar="JSON",
        help="Options of ScaleLLM, as JSON or dotted: --scalellm.frontend.workers 4 "
        "--scalellm.ipc off --scalellm.strict.\n\n" + _options_help(),
    )
    _act_after_parsing(parser)
    mend_bare_switches(sys.argv)
    refuse_lost_switches(parser, sys.argv)
    return parser


def _group_help() -> str:
    # The first paragraph is what a bare `--help` shows.
    return "Plugins for vLLM's serving path: which to load and how they are tuned."


def _options_help() -> str:
    lines = [f"- {path}: {text} (default: {default})" for path, default, text in config.describe()]
    # argparse expands % in help texts.
    return "\n".join(lines).replace("%", "%%")


class _AddNames(argparse.Action):
    """Collect names over repeated options and comma lists, in order, without duplicates."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        del parser, option_string
        names = [name for name in str(values).replace(",", " ").split() if name]
        known = getattr(namespace, self.dest, [])
        setattr(namespace, self.dest, list(dict.fromkeys([*known, *names])))


class _MergeOptions(argparse.Action):
    """Deep-merge repeated options: vLLM folds all dotted ones into one more `--scalellm JSON`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        del parser, option_string
        known = getattr(namespace, self.dest, {})
        setattr(namespace, self.dest, config.merge(known, values))


def _options(text: str) -> dict[str, Any]:
    """The value of `--scalellm`: a JSON object, or on/off for the whole plugin."""
    if text.lower() in ("on", "off"):
        return {"enabled": text.lower()}
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f'{text!r} is not JSON ({error}). Write --scalellm \'{{"ipc": "off"}}\' or '
            "--scalellm.ipc off"
        ) from None
    if not isinstance(raw, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object of options")
    return raw


def _act_after_parsing(parser: argparse.ArgumentParser) -> None:
    """Let this one parser object call `activation.from_command_line` when it is done.

    Every command of vLLM that takes engine arguments goes through its parser's
    `parse_known_args`, before any of them starts a process.
    """
    parse = parser.parse_known_args

    def parse_known_args(
        args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        tokens = list(sys.argv[1:] if args is None else args)
        tokens = gather_names(tokens, known_names(), sys.argv[1:])
        parsed, rest = parse(tokens, namespace)
        names = getattr(parsed, "plugins", None)
        options = getattr(parsed, "scalellm", None)
        # A method of ours without us: the name would only be unknown to vLLM.
        alone = bool(quantization.methods(parsed)) and not activation.states()
        if names is not None or options is not None or activation.is_due() or alone:
            try:
                activation.from_command_line(
                    names or [], options or {}, parsed, _command(parser.prog)
                )
            except ScaleLLMError as error:
                parser.error(str(error))
        return parsed, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign, assignment]


def _command(program: str) -> str:
    """vLLM's command in a parser's `prog`: "vllm bench throughput" → "bench throughput".

    Empty for a module that is run by itself, whose parser is the whole command line.
    """
    words = program.split()[1:]
    return " ".join(words[2:] if words[:1] == ["-m"] else words)


def gather_names(
    tokens: Sequence[str], known: Collection[str], typed: Collection[str]
) -> list[str]:
    """Give `--plugins a b` the single value "a,b", and leave the model's name alone.

    vLLM turns a YAML list into one value per item, which a single-value option would leave to the
    positional MODEL; `nargs="+"` would swallow the MODEL of `--plugins scalellm MODEL`. So an item
    after the first belongs to `--plugins` if it consists of known names, or if it was never typed
    (`typed` is the command line as the user wrote it: what is not in it came from the YAML file,
    and an unknown name there deserves our error rather than being served as a model).
    """
    out: list[str] = []
    position = 0
    while position < len(tokens):
        token = tokens[position]
        position += 1
        out.append(token)
        if token != _PLUGINS or position >= len(tokens) or tokens[position].startswith("-"):
            continue
        names = [tokens[position]]
        position += 1
        while position < len(tokens) and not tokens[position].startswith("-"):
            item = tokens[position]
            if item in typed and not all(name in known for name in item.split(",")):
                break
            names.append(item)
            position += 1
        out.append(",".join(names))
    return out


def mend_bare_switches(argv: list[str]) -> None:
    """Append `=on` to switches without a value (`--scalellm.strict`), in place.

    vLLM takes the token after a dotted option as its value whatever it is, so that a bare switch
    would swallow the next option or the model, or raise IndexError at the end of the line. It does
    so before our parser is asked; the command line itself is the only place to mend it.
    """
    switches = config.switches()
    for position, token in enumerate(argv):
        path = token.removeprefix("--").replace("-", "_")
        if not token.startswith(_OPTIONS + ".") or path not in switches:
            continue
        following = argv[position + 1] if position + 1 < len(argv) else "-"
        # A section (scalellm.ipc) may be followed by a value that is wrong, and deserves an error.
        pure = path.endswith((".strict", ".enabled")) and not config.is_switch(following)
        if pure or following.startswith("-"):
            argv[position] = f"{token}=on"


def refuse_lost_switches(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Refuse booleans of ours at the top level of vLLM's `--config` YAML.

    Of `scalellm: off` and `scalellm.ipc: off` vLLM keeps nothing, and of `scalellm.strict: on` an
    option without a value; neither reaches us in a shape that says what was meant.
    """
    position = argv.index("--config") + 1 if "--config" in argv else len(argv)
    try:
        with open(argv[position]) as file:
            import yaml

            options = yaml.safe_load(file)
    except Exception:  # no such file, no YAML: vLLM says so itself
        return
    for key, value in options.items() if isinstance(options, dict) else ():
        path, _, rest = str(key).partition(".")
        if path == config.ROOT and isinstance(value, bool):
            text = "on" if value else "off"
            remedy = f"scalellm: {{{rest.replace('.', ': {')}: {text}" + "}" * (rest.count(".") + 1)
            parser.error(
                f"{key}: {text} in {argv[position]}: vLLM drops switches at the top level of its "
                f"YAML. Write `{remedy if rest else f'scalellm: {chr(34)}{text}{chr(34)}'}`."
            )


def withdraw(argv: list[str], reason: str) -> None:
    """Take our options off a command line that cannot know them, in place, and say why.

    So that the server serves without us rather than dying of an unknown option.

    Raises:
        SystemExit: the line says `--scalellm.strict`.
    """
    kept: list[str] = []
    ours: list[str] = []
    tokens = gather_names(argv, known_names(), argv)
    position = 0
    while position < len(tokens):
        token = tokens[position]
        name = token.partition("=")[0].partition(".")[0]
        takes = 1
        if name in (_PLUGINS, _OPTIONS):
            following = tokens[position + 1 : position + 2]
            takes += "=" not in token and bool(following) and not following[0].startswith("-")
            ours += tokens[position : position + takes]
        else:
            kept.append(token)
        position += takes
    if not ours:
        return
    text = f"ScaleLLM plugins are off ({' '.join(ours)} has no effect): {reason}"
    if any(token.startswith("--scalellm.strict") for token in ours):
        raise SystemExit(f"scalellm.strict: {text}")
    activation.announce(text)
    argv[:] = kept
