"""Sockets by which an event loop hears that a queue is no longer empty.

Two connected Unix sockets: the producer keeps one (`Producer(..., notify=)`), the consumer the
other (`Consumer(..., listen=)`). The producer sends one byte when the queue stops being empty, and
never waits: a full socket says the same already. Not an eventfd: whether a write to one waits is
a flag that both sides share, so a hostile consumer could make the producer wait for ever. When
the other side's socket is gone, so is the other side.
"""

from __future__ import annotations

import contextlib
import errno
import socket as sockets

from memdesc.errors import AllocationError, InvalidArgument

SO_PASSRIGHTS = 83  # asm-generic/socket.h, Linux 6.16
_PART = 4096
_MOST_PARTS = 64


def notification_pair() -> tuple[sockets.socket, sockets.socket]:
    """Make (the producer's, the consumer's) socket of a queue.

    Hand one over as any socket: `multiprocessing`, `socket.send_fds`, inheritance.

    Raises
    ------
    AllocationError
        EMFILE, ENFILE, ENOMEM.
    """
    try:
        pair = sockets.socketpair(sockets.AF_UNIX, sockets.SOCK_STREAM)
    except OSError as error:
        raise AllocationError(
            f"can not make a pair of sockets: {error.strerror}; close some descriptors",
            errno=error.errno,
        ) from error
    for end in pair:
        with contextlib.suppress(OSError):  # ENOPROTOOPT
            # Nobody sends descriptors: the kernel would close them in the thread that reads.
            end.setsockopt(sockets.SOL_SOCKET, SO_PASSRIGHTS, 0)
    return pair


def own_socket(given: sockets.socket | None) -> sockets.socket | None:
    """Duplicate a socket that was given, checked to be of the right kind."""
    if given is None:
        return None
    if not isinstance(given, sockets.socket) or given.family != sockets.AF_UNIX:
        raise InvalidArgument(
            f"{given!r} is no socket of notification_pair(): give one", errno=errno.EINVAL
        )
    return given.dup()


def clear(listener: sockets.socket) -> bool:
    """Take out what was sent; tell whether the other side still has its socket.

    What a hostile producer sends without end is left after a bounded part.
    """
    try:
        for _ in range(_MOST_PARTS):
            if not listener.recv(_PART, sockets.MSG_DONTWAIT):
                return False
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False
    except OSError:
        if listener.fileno() >= 0:
            raise
        return False  # another thread has closed this end
    return True
