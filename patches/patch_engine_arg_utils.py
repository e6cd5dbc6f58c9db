"""`vllm.engine.arg_utils`: options of our own on vLLM's command line (patch "cli_arguments").

`vllm serve` loads general plugins while it builds its parser, right before it looks up
`EngineArgs.add_cli_args`; a wrapper installed at that moment adds its options to the same parser,
so help, config files and dotted forms (`--scalellm.ipc off`) all work.
"""

from __future__ import annotations

import logging
from typing import Any

from .registry import replace

logger = logging.getLogger("vllm.scalellm")  # below "vllm": its handlers and its level


def apply() -> None:
    """Wrap `EngineArgs.add_cli_args`. Called through `registry.apply`, which checks and records."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.add_cli_args

    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        try:
            from scalellm_plugins.arguments import add_arguments

            add_arguments(parser)
        except Exception:
            # Every `vllm` command runs through here; without our options it still works.
            logger.exception("ScaleLLM's options could not be added to the command line")
        return parser

    replace(EngineArgs, "add_cli_args", add_cli_args)
