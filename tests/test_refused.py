"""What the engine refuses comes back as it was said."""

from __future__ import annotations

from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm_plugins.scheduling.refused import Refused

STATUSES = [status.value for status in HTTPStatus if status >= 400]


@given(st.sampled_from(STATUSES), st.text(), st.one_of(st.none(), st.integers(0, 999_999)))
def test_there_and_back(status: int, message: str, retry_after_s: int | None) -> None:
    refused = Refused(status, message, retry_after_s)
    assert Refused.of(refused.reason()) == refused


def test_the_form_that_is_agreed_on() -> None:
    assert Refused(504, "Too late: by 3 s").reason() == "scalellm:504:Too late: by 3 s"
    assert Refused.of("scalellm:429:a:b") == Refused(429, "a:b")
    assert Refused.of("scalellm:429;7:later") == Refused(429, "later", 7)


@pytest.mark.parametrize(
    "other",
    [
        *(None, 7, "", "stop", "scalellm", "scalellm:", "scalellm:504", b"scalellm:504:x"),
        *("scalellm:200:x", "scalellm:499:x", "scalellm:999:x", "scalellm:abc:x"),
        *("scalellm:5040:x", "scalellm:504;:x", "scalellm:504;-1:x", " scalellm:504:x"),
        "scalellm:\u0665\u0660\u0664:x",
    ],
)
def test_any_other_reason_is_none(other: object) -> None:
    """A stop string of a client may look like anything; a status must be one of HTTP's errors."""
    assert Refused.of(other) is None
