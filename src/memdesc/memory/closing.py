"""Closing what came from a stranger, without waiting for him; and what to say when none is left.

close() can wait for as long as whoever made the file likes: a FUSE server that does not answer, a
TCP socket with SO_LINGER. Memory is closed at once; anything else by a thread of its own.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Sequence

from memdesc.errors import AllocationError, describe_errno

_PATIENCE = 0.1
"""Seconds that one closing is given all the same: nearly always it takes a few microseconds."""

_last: threading.Thread | None = None
_left: list[int] = []
"""What no thread could be had for; the next one closes it."""


def close_all(fds: Sequence[int]) -> None:
    """Close every one of these descriptors."""
    for fd in fds:
        os.close(fd)


def discard(fds: Sequence[int]) -> None:
    """Close descriptors that a stranger sent; returns soon, also where he holds up the closing."""
    global _last
    memory = [fd for fd in fds if is_memory(fd)]
    close_all(memory)
    others = [fd for fd in fds if fd not in memory]
    if not others:
        return
    stuck = _last is not None and _last.is_alive()  # then patience has been tried already
    while _left:
        others.append(_left.pop())
    closer = threading.Thread(target=close_all, args=(others,), name="memdesc-close", daemon=True)
    try:
        closer.start()
    except RuntimeError:  # this user may have no more
        _left.extend(others)
        return
    if not stuck:
        _last = closer
        closer.join(_PATIENCE)


def is_memory(fd: int) -> bool:
    """Whether it is a file of a memory file system: nobody can hold up who asks, or closes it."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) >= 0
    except OSError:  # EINVAL; EBADF for O_PATH
        return False


def no_descriptor(doing: str, error: OSError) -> AllocationError:
    """Say in the family's terms that a descriptor could not be had (EMFILE, ENFILE, ENOMEM)."""
    return AllocationError(
        f"cannot {doing}: {describe_errno(error)}; close descriptors, or raise `ulimit -n`",
        errno=error.errno,
    )
