"""Lines of the access log are uvicorn's, whichever way they are written."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest

pytest.importorskip("uvicorn")

from uvicorn.logging import AccessFormatter

from scalellm_plugins.frontends.access_log import AccessLog

UVICORN = '%(levelprefix)s %(client_addr)s - "%(request_line)s" %(status_code)s'
REQUESTS: list[tuple[dict[str, Any], int]] = [
    ({"path": "/v1/completions"}, 200),
    ({"path": "/v1/completions"}, 500),
    ({"path": "/v1/completions", "client": None}, 200),
    ({"path": "/v1/completions", "client": ("::1", 7)}, 200),
    ({"path": "/ä b", "query_string": b"x=%s&y"}, 200),
    ({"path": "/100%", "http_version": "1.0"}, 404),
    ({"path": "/v1/completions"}, 200),
]


def scope(**others: Any) -> dict[str, Any]:
    base = {"type": "http", "method": "POST", "query_string": b"", "http_version": "1.1"}
    return {**base, "client": ("127.0.0.1", 5), "root_path": "", **others}


@pytest.fixture
def logger() -> logging.Logger:
    """As uvicorn sets its own up, with a stream to look at."""
    made = logging.Logger("tests.access")  # not in the tree: pytest would add a handler
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(AccessFormatter(UVICORN, use_colors=False))
    made.handlers = [handler]
    made.setLevel(logging.INFO)
    return made


def text(logger: logging.Logger) -> str:
    (handler,) = logger.handlers
    assert isinstance(handler, logging.StreamHandler)
    written: str = handler.stream.getvalue()
    handler.stream.seek(0)
    handler.stream.truncate()
    return written


def by_uvicorn(logger: logging.Logger) -> str:
    """The same requests, as uvicorn's own connection logs them."""
    from uvicorn.protocols.utils import get_client_addr, get_path_with_query_string

    for request, status in REQUESTS:
        of: Any = scope(**request)
        logger.info(
            '%s - "%s %s HTTP/%s" %d',
            get_client_addr(of),
            of["method"],
            get_path_with_query_string(of),
            of["http_version"],
            status,
        )
    return text(logger)


async def test_lines_are_uvicorns(logger: logging.Logger) -> None:
    expected = by_uvicorn(logger)
    log = AccessLog(logger)
    assert log._handler is not None, "the quick way is not taken"
    for request, status in REQUESTS:
        log.write(scope(**request), status)
    assert text(logger) == "", "lines are written together"
    log.flush()
    assert text(logger) == expected
    log.flush()
    assert text(logger) == ""


def filtered(logger: logging.Logger) -> None:
    logger.addFilter(lambda _record: True)


def timed(logger: logging.Logger) -> None:
    logger.handlers[0].setFormatter(logging.Formatter("%(asctime)s %(message)s"))


def filtered_handler(logger: logging.Logger) -> None:
    logger.handlers[0].addFilter(lambda _record: True)


def bare(logger: logging.Logger) -> None:
    logger.handlers[0].setFormatter(None)


class Own(logging.StreamHandler[Any]):
    """Somebody's own."""


def replaced(logger: logging.Logger) -> None:
    logger.handlers = [Own(io.StringIO())]
    logger.handlers[0].setFormatter(AccessFormatter(UVICORN, use_colors=False))


def quiet(logger: logging.Logger) -> None:
    logger.setLevel(logging.WARNING)


@pytest.mark.parametrize("change", [filtered, timed, filtered_handler, bare, replaced, quiet])
async def test_any_other_log_goes_through_logging(logger: logging.Logger, change: Any) -> None:
    """A filter would not be asked; a time would be that of the first line for ever."""
    change(logger)
    log = AccessLog(logger)
    assert log._handler is None
    log.write(scope(path="/x"), 200)
    assert ("/x" in text(logger)) == (change is not quiet)


async def test_a_second_handler_gets_every_line(logger: logging.Logger) -> None:
    other = logging.StreamHandler(io.StringIO())
    logger.addHandler(other)
    AccessLog(logger).write(scope(path="/x"), 200)
    assert "/x" in other.stream.getvalue()


async def test_kinds_of_lines_are_bounded(logger: logging.Logger) -> None:
    """Paths with queries may be any number."""
    log = AccessLog(logger)
    for number in range(2000):
        log.write(scope(path="/x", query_string=b"%d" % number), 200)
    assert len(log._kinds) <= 256
    log.flush()
    assert text(logger).count("\n") == 2000
