"""What vLLM's entry points call, and nothing else.

Everything is imported inside the functions: installed but not asked for, this package costs vLLM
the import of this file and the two command-line options.
"""

from __future__ import annotations

import inspect
import os
import sys
from typing import Any


def register() -> None:
    """`vllm.general_plugins`: vLLM calls it in every process, possibly once per name of ours.

    Raises:
        ScaleLLMError: VLLM_PLUGINS or SCALELLM_CONFIG asks for what cannot be. (On the command
            line the same is a usage error.)
    """
    from . import activation, names

    if _building_command_line() and not activation.is_child():
        from . import arguments

        # What is asked for is known once the line is parsed, a moment later, unless our options
        # cannot be added; then it is what the environment asks for.
        reasons = activation.apply_patches("core", when="cli")
        if not reasons:
            return
        arguments.withdraw(sys.argv, reasons[0])
    names.load_general(activation.general_only())
    if names.asked_by_environment():
        activation.from_environment()


def simulated_platform() -> str | None:
    """`vllm.platform_plugins`: the simulated GPU's platform class, when it was asked for."""
    from . import activation

    if activation.simulation_is_asked_for():
        return "scalellm_plugins.simulator.platform.SimulatedGpuPlatform"
    return None


def endpoints() -> Any:
    """`vllm.endpoint_plugins`: the routes under /scalellm."""
    from .frontends.status import StatusEndpoint

    return StatusEndpoint()


def fast_lane() -> Any:
    """`vllm.endpoint_plugins`: no route; puts the fast lane beside vLLM's own."""
    from .frontends.attach import FastLaneEndpoint

    return FastLaneEndpoint()


def terms() -> Any:
    """`vllm.endpoint_plugins`: no route; what requests say to the scheduler, in vLLM's frontend."""
    from .frontends.attach import TermsEndpoint

    return TermsEndpoint()


def keep_options() -> None:
    """`torch.backends`: keep `--plugins` and `--scalellm` alive under a foreign `VLLM_PLUGINS`.

    With `VLLM_PLUGINS=other`, vLLM loads no plugin but `other`, so that `vllm serve MODEL
    --plugins scalellm` would end in "unrecognized arguments". PyTorch calls the entry points of
    this group at the end of `import torch`, which vLLM imports before it looks for plugins, and
    which no variable of vLLM's filters. Here it only adds a name that makes the options exist
    (`names.OPTIONS_ONLY`), and only where they may be used: see `names.keep_loadable`.
    """
    value = os.environ.get("VLLM_PLUGINS")
    if value is not None:
        from . import names

        os.environ["VLLM_PLUGINS"] = names.keep_loadable(value)


def _building_command_line() -> bool:
    """Whether vLLM loads us to build its command line: then parsing decides, a moment later.

    There is no other sign: the same function is called for the same reason in a library's process
    (`vllm.LLM`), where nothing will be parsed. The name is part of the contract in the registry.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "add_cli_args":
            return True
        frame = frame.f_back
    return False
