"""The process of one simulation: `python -m scalellm_plugins.virtual.process JOB RESULT`.

vLLM resolves its platform, and this package its patches, once per process; and virtual time is for
ever. JOB and RESULT are msgpack files (job.py). Progress goes to standard error, a line of JSON
each: {"ended": requests, "at": virtual seconds}; so does {"error": …} in the place of a result.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import msgspec

from scalellm_plugins.errors import ScaleLLMError

from .job import Job

MARK = "scalellm-simulate "
"""Before every line that is for the parent; others are vLLM's log."""

_PROGRESS_EVERY_S = 1.0


def tell(**message: object) -> None:
    """Send the parent a message."""
    print(f"{MARK}{json.dumps(message)}", file=sys.stderr, flush=True)


def main(job_file: str, result_file: str) -> int:
    """Run the job and write its result."""
    job = msgspec.msgpack.decode(Path(job_file).read_bytes(), type=Job)
    told = 0.0

    def progress(ended: int, at: float) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told > _PROGRESS_EVERY_S:
            told = now
            tell(ended=ended, at=at)

    try:
        # vLLM, which takes seconds, and must find the plugins named in the environment.
        from .engine import VirtualEngine

        run = VirtualEngine(job).run(progress)
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        tell(error="there is no vLLM in this environment: pip install vllm (no GPU is needed)")
        return 1
    except (ScaleLLMError, ValueError) as error:  # vLLM's own complaints about options, too
        tell(error=_text(error))
        return 1
    Path(result_file).write_bytes(msgspec.msgpack.encode(run))
    return 0


def _text(error: Exception) -> str:
    """An error in one line; pydantic, which checks vLLM's options, makes a page of it."""
    if callable(details := getattr(error, "errors", None)):
        return "; ".join(one["msg"] for one in details())
    return str(error)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
