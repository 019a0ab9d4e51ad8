"""Closing what came from a stranger, without waiting for him; and what to say when none is left.

close() can wait for as long as whoever made the file likes: a FUSE server that does not answer, a
TCP socket with SO_LINGER. Memory is closed at once. All else is closed by threads, one for each
user it came from: who holds up the closing of one descriptor holds up that of his others. With too
many of them nothing more is received from his tasks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket as sockets
import threading
import time
from collections import deque
from collections.abc import Sequence

from memdesc.errors import AccessDeniedError, AllocationError, describe_errno
from memdesc.vm.forks import lock_for, tell_child
from memdesc.vm.task import peer_credentials

MOST_HELD_UP = 16
"""Descriptors of one user that may wait to be closed; with more his tasks are refused, if any have
waited for `SOON` or there are more than `MOST_AT_ONCE`: else a busy machine would refuse them."""
SOON = 1.0
"""Seconds."""
MOST_AT_ONCE = 256
"""As many as come with one message (SCM_MAX_FD is 253)."""
_PATIENCE = 0.1
"""Seconds that closings are given all the same: nearly always one takes a few microseconds."""
_SHARE = 0.1
"""Of the time, that is waited for them in the long run: each may take just less than too long."""

_SENDER = sockets.CMSG_SPACE(12)
"""Bytes that struct ucred takes beside a packet."""


def close_all(fds: Sequence[int]) -> None:
    """Close every one of these descriptors."""
    for fd in fds:
        os.close(fd)


def discard(fds: Sequence[int], user: int) -> None:
    """Close descriptors that a task of that user sent; returns soon, also where he holds it up."""
    others = [fd for fd in fds if not is_memory(fd)]
    close_all([fd for fd in fds if fd not in others])
    if others:
        _closings.add(others, user)


def close_socket(sock: sockets.socket) -> None:
    """End a connection with a stranger, who can still read what was sent; returns soon.

    With a socket the kernel closes the descriptors that lie unread in it. Again is a no-op.
    """
    if sock.fileno() < 0:
        return
    with contextlib.suppress(OSError):  # ENOTCONN: the peer was first
        # He is to see the end also where a fork child holds the socket; and sends no more.
        sock.shutdown(sockets.SHUT_RDWR)
    if _has_descriptors(sock):
        user = peer_credentials(sock)[1]
        _closings.add([sock.detach()], user)
    else:
        sock.close()


def check_held_up(sock: sockets.socket) -> None:
    """Raise `AccessDeniedError` (EDQUOT) where the peer's user holds up too many closings."""
    if not _closings.lines:
        return
    user = peer_credentials(sock)[1]
    count, seconds = _closings.waiting(user)
    if count > MOST_HELD_UP and (seconds > SOON or count > MOST_AT_ONCE):
        raise AccessDeniedError(
            f"nothing is received from user {user}: of the descriptors that his tasks sent task "
            f"{os.getpid()}, {count:,} wait to be closed (for {seconds:.1f} s), and "
            f"{MOST_HELD_UP} may; they are of a "
            "file system that does not answer (FUSE), or sockets that linger (SO_LINGER): end "
            "its server, or reset them",
            errno=errno.EDQUOT,
        )


def held_up() -> dict[int, int]:
    """How many descriptors wait to be closed, by the user they came from."""
    return {user: _closings.waiting(user)[0] for user in list(_closings.lines)}


class _Line:
    """What is to be closed of one user's; the thread is that which does it, if there is one."""

    __slots__ = ("fds", "since", "thread")

    def __init__(self) -> None:
        self.fds: deque[int] = deque()
        self.since = time.monotonic()  # a line ends when nothing waits in it
        self.thread: threading.Thread | None = None


class _Closings:
    """What is to be closed of all users."""

    def __init__(self) -> None:
        self._lock = lock_for(self)  # reentrant: the collector may discard at any moment
        self.lines: dict[int, _Line] = {}
        self._patience = _PATIENCE
        self._since = 0.0
        tell_child(self)

    def add(self, fds: Sequence[int], user: int) -> None:
        with self._lock:
            line = self.lines.setdefault(user, _Line())
            line.fds.extend(fds)
            started = self._go_on(user, line)
        if started is not None:
            self._wait_for(started)

    def waiting(self, user: int) -> tuple[int, float]:
        """How many of his wait, and for how many seconds there always were some."""
        with self._lock:
            line = self.lines.get(user)
            if line is None:
                return 0, 0.0
            self._go_on(user, line)
            return len(line.fds) + (line.thread is not None), time.monotonic() - line.since

    def _go_on(self, user: int, line: _Line) -> threading.Thread | None:
        """Have a line closed; give the thread if that began now."""
        if line.thread is not None:
            return None
        thread = line.thread = threading.Thread(
            target=self._close, args=(user, line), name="memdesc-close", daemon=True
        )
        try:
            thread.start()
        except BaseException as error:  # RuntimeError: this user may have no more
            if thread.ident is None:
                line.thread = None  # the next who asks tries again
            if not isinstance(error, RuntimeError):
                raise
            return None
        return thread

    def _close(self, user: int, line: _Line) -> None:
        while True:
            with self._lock:
                if not line.fds:
                    line.thread = None
                    if self.lines.get(user) is line:
                        del self.lines[user]
                    return
                fd = line.fds.popleft()
            with contextlib.suppress(OSError):  # its last word (EIO); closed it is all the same
                os.close(fd)

    def _wait_for(self, closer: threading.Thread) -> None:
        """Wait a little, and a little of the time."""
        now = time.monotonic()
        self._patience = min(self._patience + _SHARE * (now - self._since), _PATIENCE)
        closer.join(max(self._patience, 0.0))
        self._since = time.monotonic()
        self._patience -= self._since - now

    def _inherit(self) -> None:
        """In a fork child, which has no such threads: what they would close stays open there."""
        self.lines = {}


_closings = _Closings()


def _has_descriptors(sock: sockets.socket) -> bool:
    """Whether descriptors lie in a socket that gets nothing more; takes out what has none."""
    try:
        # Then the kernel tells with every packet, also an empty one, who sent it; with the end not.
        sock.setsockopt(sockets.SOL_SOCKET, sockets.SO_PASSCRED, 1)
        while True:
            how = sockets.MSG_PEEK | sockets.MSG_DONTWAIT
            data, sender, flags, _ = sock.recvmsg(1, _SENDER, how)
            if flags & sockets.MSG_CTRUNC:  # there is more than who sent it
                return True
            if not data and (not sender or sock.type == sockets.SOCK_STREAM):
                return False  # of a stream the end has a sender, too: nobody
            sock.recv(1)
    except BlockingIOError:
        return False
    except OSError:  # ECONNRESET comes before what lies there
        return True


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
