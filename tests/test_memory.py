"""Anonymous shared memory: whole, sealed, and refused where it is anything else."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from scalellm_plugins.ipc import memory

from .ipc_parts import leaving_nothing


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    with leaving_nothing():
        yield


def test_both_see_the_same() -> None:
    fd = memory.create(5000)
    one, other = memory.attach(fd, 5000), memory.attach(fd, 5000)
    os.close(fd)
    assert one[:] == bytes(5000)
    one[4999] = 7
    assert other[4999] == 7


def test_all_of_it_is_there_from_the_beginning() -> None:
    """A page that the kernel could not give when it is touched would kill the process."""
    fd = memory.create(1 << 20)
    assert os.fstat(fd).st_blocks * 512 == 1 << 20
    os.close(fd)


@pytest.mark.parametrize("size", [1 << 10, 1 << 14])
def test_nobody_changes_its_size(size: int) -> None:
    fd = memory.create(1 << 12)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, size)
    os.close(fd)


def test_programs_that_are_started_do_not_get_it() -> None:
    fd = memory.create(1 << 12)
    listing = [sys.executable, "-c", "import os; print(os.listdir('/proc/self/fd'))"]
    found = subprocess.run(listing, check=True, capture_output=True, text=True, close_fds=False)
    assert repr(str(fd)) not in found.stdout
    os.close(fd)


def unsealed() -> int:
    fd = os.memfd_create("scalellm-test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    return fd


def a_file() -> int:
    return os.open(__file__, os.O_RDONLY)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (unsealed, "4096 bytes that cannot shrink"),
        (lambda: memory.create(4095), "of 4095 bytes"),
        (lambda: memory.create(8192), "of 8192 bytes"),
        (a_file, "not a memfd"),
        (lambda: os.eventfd(0), "not a memfd"),
    ],
)
def test_what_is_not_it_is_refused(make: Callable[[], int], why: str) -> None:
    fd = make()
    with pytest.raises(memory.SegmentError, match=why):
        memory.attach(fd, 4096)
    os.close(fd)


def test_a_closed_descriptor_is_refused() -> None:
    fd = memory.create(4096)
    os.close(fd)
    with pytest.raises(memory.SegmentError, match="Bad file descriptor"):
        memory.attach(fd, 4096)


def test_what_cannot_be_allocated_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="Invalid argument"):
        memory.create(0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        memory.create(4096)
