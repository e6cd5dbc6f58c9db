"""Anonymous shared memory: it has no name, so there is nothing that a killed process leaves behind.

A memfd lives as long as a process holds its descriptor or maps it. It is sealed to its size, so
that no peer can shrink it under a reader, and only whoever was handed the descriptor can map it.
"""

from __future__ import annotations

import fcntl
import mmap
import os

from scalellm_plugins.errors import ScaleLLMError

_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SegmentError(ScaleLLMError):
    """A descriptor that is not the shared memory it was said to be."""


def create(size: int, name: str = "scalellm-ipc", *, allocate: bool = True) -> int:
    """Return the descriptor of `size` bytes of zeroed shared memory. `name` shows in /proc only.

    All of it is allocated now: a page that is not there when it is touched would kill the process.
    With `allocate` false the caller writes to every page (`os.pwrite`, which fails where there is
    no memory) before anybody maps it: zeroing what is then overwritten is a third of the time.

    Raises:
        OSError: the kernel gives no memory or descriptor.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        if allocate:
            os.posix_fallocate(fd, 0, size)
        else:
            os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def attach(fd: int, size: int) -> mmap.mmap:
    """Map shared memory that `create` made, here or in a peer.

    The descriptor is not needed then; Python keeps a duplicate until the mapping is closed.

    Raises:
        SegmentError: it has another size, or its size could still change: touching a page that was
            cut off would kill this process (SIGBUS).
        OSError: the kernel gives no address space or descriptor.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise SegmentError(f"descriptor {fd} is not a memfd: {error}") from None
    actual = os.fstat(fd).st_size
    if not seals & fcntl.F_SEAL_SHRINK or actual != size or not size:
        raise SegmentError(
            f"shared memory of {actual} bytes (seals {seals:#x}), expected {size} bytes that "
            "cannot shrink"
        )
    return mmap.mmap(fd, size)
