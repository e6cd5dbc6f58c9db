"""Shared by all tests: an environment without traces of the one who runs them."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# Speed is not what tests assert, and machines that run them are busy.
settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("default")

# No test reaches for a model hub or reports usage, in this process or in the servers it starts.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Undo every change of VLLM_PLUGINS and SCALELLM_* after the test; start without them."""
    for name in ("VLLM_PLUGINS", "SCALELLM_CONFIG", "SCALELLM_STATE", "SCALELLM_RESTARTED"):
        # Set, then deleted: monkeypatch then restores "unset" even if the code under test sets it.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch
