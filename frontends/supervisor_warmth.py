"""Getting ready to fork: everything that workers need is imported and remembered once.

What is here must not start a thread; `check_threads` says if something did.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
from contextlib import suppress
from typing import Any

from scalellm_plugins import activation
from scalellm_plugins.errors import ContractError

from .worker import Job

logger = logging.getLogger("vllm.scalellm")


def warm_up(job: Job) -> None:
    """Import what a worker imports, load plugins, and leave the heap as it is for good."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    for name in (
        "uvloop",
        "vllm.entrypoints.launchers.api_server.entry",
        "vllm.v1.engine.async_llm",
    ):
        importlib.import_module(name)
    engine_args = AsyncEngineArgs.from_cli_args(job.args)  # loads plugins
    for reason in activation.apply_patches("frontend", when="worker"):
        raise ContractError(
            f"scalellm.frontend: API servers cannot be supervised here: {reason}. "
            "--scalellm.frontend off serves without"
        )
    _warm(engine_args, job)
    _settle()


def _warm(engine_args: Any, job: Job) -> None:
    """Do once, for vLLM to remember, what every worker would do again while it starts.

    Inspecting the model's class may take a process of its own, and ten seconds; a tokenizer of
    100,000 tokens takes one to load. Neither starts a thread, but encoding a text would.
    """
    from vllm.usage.usage_lib import UsageContext

    engine_args._api_process_count = job.client_config["client_count"]
    engine_args._api_process_rank = -1  # as in the main process: no particular worker
    logging.disable(logging.WARNING)  # the workers say the same
    try:
        made = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        from vllm.tokenizers import cached_tokenizer_from_config

        cached_tokenizer_from_config(made.model_config)
    except Exception:
        # If it is an error, the workers will meet it too, and say so where it counts.
        logger.debug("the workers start cold", exc_info=True)
    finally:
        logging.disable(logging.NOTSET)


_tried: set[str] = set()


def import_modules(names: list[str]) -> None:
    """Import what a worker has imported while it came up: its successors will find it here."""
    fresh = [name for name in names if name not in sys.modules and name not in _tried]
    _tried.update(fresh)
    for name in fresh:
        # Some exist only in the worker: made at run time, or from the model's own repository.
        with suppress(Exception):
            importlib.import_module(name)
    if fresh:
        _settle()


def _settle() -> None:
    """Keep the collector from touching, and so from copying, the pages that workers share."""
    gc.collect()
    gc.freeze()


def check_threads() -> None:
    """Say so if there is a thread besides this one: a fork would copy the locks that it holds."""
    tasks = os.listdir("/proc/self/task")
    if len(tasks) > 1:
        names = []
        for task in tasks:
            with suppress(OSError), open(f"/proc/self/task/{task}/comm") as file:
                names.append(file.read().strip())
        logger.warning(
            "the supervisor has %d threads (%s) and should have one: API servers forked from it "
            "may hang. A plugin that starts threads when it is loaded is the likely cause.",
            len(tasks),
            ", ".join(names),
        )
