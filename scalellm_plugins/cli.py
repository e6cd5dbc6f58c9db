"""The `scalellm` command. Sub-commands import what they need when they run."""

from __future__ import annotations

import argparse
import codecs
import io
import os
import sys
from collections.abc import Callable, Sequence

from scalellm_plugins import __version__
from scalellm_plugins.compression import command
from scalellm_plugins.errors import ConfigError, ScaleLLMError

USAGE_ERROR = 2
"""Exit code for what the user asked for and cannot be, argparse's own."""

_DESCRIPTION = "Tools beside the plugins that `vllm serve --plugins scalellm` loads."

_DOCTOR = """\
Compare every patch and seam with vLLM's source and say which features can be on.
Imports neither vLLM nor torch. Exit code: 0 every built feature can be on, 1 one
cannot, 2 usage error or no vLLM."""

_DOCTOR_EXAMPLES = """\
examples:
  scalellm doctor
  scalellm doctor --feature status --feature sim
  scalellm doctor --json | jq .features
  pip download --no-deps vllm==0.33.0 && scalellm doctor --strict --wheel vllm-0.33.0-*.whl"""


_TENANTS = """\
The tenants file of --scalellm.frontend.tenants: `hash` reads an API key from standard input and
prints what the file keeps of it, `check` reads a file as the server would.
Exit code: 0 as it should be, 2 not."""

_TENANTS_EXAMPLES = """\
examples:
  openssl rand -hex 24 | tee new-key.txt | scalellm tenants hash
  scalellm tenants check tenants.yaml"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; raises SystemExit only where argparse does."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _print_anywhere()
    # Handed over whole: argparse would want to understand their own options.
    if argv[:1] == ["bench"]:
        return _bench(argv[1:])
    if argv[:1] == ["simulate"]:
        return _simulate(argv[1:])
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return USAGE_ERROR
    try:
        return _COMMANDS[arguments.command](arguments)
    except ScaleLLMError as error:
        print(f"scalellm {arguments.command}: {error}", file=sys.stderr)
        return USAGE_ERROR
    except BrokenPipeError:  # `scalellm doctor | head`: nobody reads on, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


_SPELLED = {"×": "x", "…": "...", "≤": "<=", "→": "->", "–": "-"}


def _print_anywhere() -> None:
    """Where a terminal or a pipe has no ×, as under LC_ALL=C, it is spelled and no error.

    Bytes of file names that are no text there stay what they are, as Python has it by default.
    """

    def spell(error: UnicodeError) -> tuple[str | bytes, int]:
        assert isinstance(error, UnicodeEncodeError)
        part = "".join(_SPELLED.get(c, c) for c in error.object[error.start : error.end])
        if part.isascii():
            return part, error.end
        raw = "".join(c if "\udc80" <= c <= "\udcff" or c.isascii() else "?" for c in part)
        return raw.encode("ascii", "surrogateescape"), error.end

    codecs.register_error("scalellm-spell", spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="scalellm-spell")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("scalellm", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"scalellm-plugins {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    doctor = commands.add_parser(
        "doctor",
        help="which features this vLLM can carry",
        description=_DOCTOR,
        epilog=_DOCTOR_EXAMPLES,
        formatter_class=raw,
    )
    doctor.add_argument(
        "--wheel", metavar="FILE", help="check this vLLM wheel, without installing it"
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of the table")
    doctor.add_argument(
        "--feature",
        metavar="NAME",
        action="append",
        help="only this feature, or core; may be repeated. Core must hold in any case",
    )
    doctor.add_argument(
        "--strict", action="store_true", help="broken seams of planned features fail, too"
    )
    _add_tenants(commands)
    command.add_arguments(
        commands.add_parser(
            "compress",
            help="make a model smaller: integers, fewer layers, narrower MLPs",
            description=command.ABOUT,
            epilog=command.EXAMPLES,
            formatter_class=raw,
        )
    )
    # Only for the help; `main` never lets argparse see the arguments after these.
    commands.add_parser("bench", help="measure vLLM with and without the plugins", add_help=False)
    commands.add_parser(
        "simulate", help="compare scheduling policies in virtual time", add_help=False
    )
    return parser


def _add_tenants(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    tenants = commands.add_parser(
        "tenants",
        help="hash an API key, check a tenants file",
        description=_TENANTS,
        epilog=_TENANTS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = tenants.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("hash", help="read a key from standard input, print its SHA-256")
    actions.add_parser("check", help="read a file and list its tenants").add_argument("file")


def _doctor(arguments: argparse.Namespace) -> int:
    from scalellm_plugins import doctor

    return doctor.run(arguments)


def _tenants(arguments: argparse.Namespace) -> int:
    from scalellm_plugins.frontends import tenants

    if arguments.action == "check":
        print(tenants.table(tenants.load(arguments.file)))
        return 0
    key = sys.stdin.readline().rstrip("\r\n")
    if not key:
        raise ConfigError("no key on standard input, such as from `openssl rand -hex 24`")
    print(tenants.digest_of(key).hex())
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "doctor": _doctor,
    "tenants": _tenants,
    "compress": command.run,
}


def _bench(argv: list[str]) -> int:
    from scalellm_plugins.benchmarks import compare

    return compare.main(argv)


def _simulate(argv: list[str]) -> int:
    from scalellm_plugins.virtual import command

    return command.main(argv)


if __name__ == "__main__":
    sys.exit(main())
