"""Tasks: a process as the owner of an address space, held by pidfd.

A pid alone may come to name another process; a pidfd never does. Whatever is read under
`/proc/PID` counts only if the pidfd says afterwards that its process has not ended, for then
the pid was its own all the while.
"""

from __future__ import annotations

import errno
import math
import os
import select
import socket as sockets
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, final

from memdesc.errors import (
    AllocationError,
    ClosedError,
    InvalidArgument,
    MemdescError,
    NotPrivilegedError,
    TaskGoneError,
    UnsupportedError,
    describe_errno,
)
from memdesc.vm.pages import check_integer
from memdesc.vm.patience import look_at, read_file
from memdesc.vm.timeouts import check_timeout

SO_PEERPIDFD = 77  # asm-generic/socket.h, Linux 6.5
_T = TypeVar("_T")
_MAX_PID = 2**31 - 1
_UCRED = struct.Struct("iII")  # pid, uid, gid: unix(7), SO_PEERCRED
_NEVER_WAITS = ("stat", "status", "comm")  # read without the lock on the task's address space
_LONGEST_POLL = 10**9  # milliseconds: poll takes an int, so longer waits go in turns


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who a task is: its pid, and its effective user and group.

    Of a task taken from a socket they are those that the kernel noted when the peer connected
    (or began to listen), so a later `setuid` does not change them.
    """

    pid: int
    uid: int
    gid: int


def check_task(task: object, name: str = "task") -> None:
    """Raise `InvalidArgument` for what is no task, a pid for instance. `name`: the parameter's."""
    if not isinstance(task, Task):
        raise InvalidArgument(
            f"{name} is of type {type(task).__name__}: give a Task, for instance Task(pid), or the "
            "`task` of a client or connection",
            errno=errno.EINVAL,
        )


def key_of(task: Task) -> tuple[int, int]:
    """Give what a task is known by where it is not to be held: as a key, its pidfd would stay."""
    return task.pid, task.start_time


@final
class Task:
    """A process as the owner of an address space (I/O Kit: `task_t`).

    It is held by pidfd, so a recycled pid is never mistaken for it; it is not a thread, and
    holding it neither keeps the process alive nor makes this process its parent. A process that
    has ended and is not yet waited for (a zombie) counts as ended.

    Two tasks are equal when pid and start time are. Pickling and copying open the task again,
    which fails with `TaskGoneError` once it has ended.

    Linux: pidfd_open (5.3), /proc/PID/stat and status (no privilege, unless /proc is mounted
    with hidepid). Threads, fork: usable from any thread; a fork child holds the same process,
    so what was `Task.current()` is its parent there.

    Parameters
    ----------
    pid : int
        1 or more, as this process's pid namespace counts.
    start_time : int, optional
        Clock ticks since boot that the process must have started at.

    Raises
    ------
    InvalidArgument
        `pid` is not positive (EINVAL), or names a thread that is not a process.
    TaskGoneError
        No such process, it has ended, or the start time is another's (ESRCH).
    AllocationError
        This process has no file descriptor left (EMFILE).

    Examples
    --------
    >>> with Task.current() as task:
    ...     task.pid == os.getpid(), task.alive
    (True, True)
    """

    __slots__ = ("__weakref__", "_pidfd", "credentials", "pid", "start_time")

    pid: int
    start_time: int
    credentials: Credentials

    def __init__(self, pid: int, *, start_time: int | None = None) -> None:
        self._pidfd = -1  # so that __del__ finds it however this ends
        number = check_integer(pid, "pid")
        if not 0 < number <= _MAX_PID:
            raise InvalidArgument(
                f"pid is {number}: a process has one from 1 to {_MAX_PID}", errno=errno.EINVAL
            )
        self._hold(_pidfd_open(number), number, start_time)

    def _hold(
        self,
        pidfd: int,
        pid: int,
        start_time: int | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        """Take ownership of `pidfd` (closed if this fails) and learn whom it holds."""
        self._pidfd = pidfd
        self.pid = pid
        try:
            doing = f"look at task {pid}"
            self.start_time = _parse_start_time(self.read_proc("stat", doing))
            self._check_start_time(start_time, doing)
            self.credentials = credentials or _parse_credentials(
                pid, self.read_proc("status", doing)
            )
        except BaseException:
            self.close()
            raise

    def _check_start_time(self, expected: int | None, doing: str) -> None:
        if expected is not None and self.start_time != expected:
            raise TaskGoneError(
                f"cannot {doing}: that pid now names a process that started at "
                f"{self.start_time}, not at {expected} (clock ticks since boot); the task that "
                "was meant has ended",
                errno=errno.ESRCH,
            )

    @classmethod
    def current(cls) -> Task:
        """Give this process as a task: a new object each time; in a fork child, the child."""
        return cls(os.getpid())

    @classmethod
    def from_pidfd(cls, pidfd: int) -> Task:
        """Make a task of a pidfd, and take ownership of it, also if its process has ended.

        A descriptor that is no pidfd stays the caller's.

        Raises
        ------
        InvalidArgument
            It is no pidfd (EBADF).
        TaskGoneError
            Its process has ended (ESRCH).
        NotPrivilegedError
            Its process has no pid in this process's pid namespace (EPERM).
        """
        return cls._from_pidfd(pidfd)

    @classmethod
    def _from_pidfd(cls, pidfd: int, user: tuple[int, int] | None = None) -> Task:
        try:
            shown = _pid_of_pidfd(pidfd)
        except InvalidArgument:
            raise
        except BaseException:  # EMFILE: it may well be one, so it is ours
            os.close(pidfd)
            raise
        task = cls.__new__(cls)
        task._pidfd = pidfd  # the task's own from here on
        try:
            pid = _check_pid(shown, f"make a task of pidfd {pidfd}")
        except BaseException:
            task.close()
            raise
        task._hold(pidfd, pid, credentials=None if user is None else Credentials(pid, *user))
        return task

    @classmethod
    def from_socket(cls, sock: sockets.socket) -> Task:
        """Give the process on the other side of a connected Unix socket.

        Linux: SO_PEERPIDFD (6.5), which can not mistake one process for another. Before that
        SO_PEERCRED and pidfd_open, which can, if the peer ends and its pid is given anew
        between its connecting and this call. The credentials are those of SO_PEERCRED.

        Raises
        ------
        InvalidArgument
            Not a Unix socket, or not connected (ENOTCONN).
        TaskGoneError
            The peer has ended (ESRCH).
        NotPrivilegedError
            The peer lives outside this process's pid namespace (EPERM).
        """
        if sock.family != sockets.AF_UNIX:
            raise InvalidArgument(
                "only a Unix socket tells whose task the peer is: give one", errno=errno.EINVAL
            )
        doing = "tell whose task is the socket's peer"
        pid, uid, gid = peer_credentials(sock)
        pidfd = _peer_pidfd(sock, doing)
        if pidfd is not None:
            return cls._from_pidfd(pidfd, (uid, gid))
        task = cls(_check_pid(pid, doing))
        task.credentials = Credentials(task.pid, uid, gid)
        return task

    @property
    def is_current(self) -> bool:
        """Whether this is the process that asks."""
        return self.pid == os.getpid()

    @property
    def name(self) -> str:
        """What the task calls itself now, up to 15 bytes, as in /proc/PID/comm."""
        return os.fsdecode(self.read_proc("comm", f"read the name of task {self.pid}"))[:-1]

    @property
    def alive(self) -> bool:
        """Whether the task has not ended; False for a zombie."""
        return not self.wait(0)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the task has ended; signal handlers run meanwhile and may raise.

        Its exit status goes to its parent alone.

        Parameters
        ----------
        timeout : float, optional
            Seconds, 0 or more; None waits for ever.

        Returns
        -------
        bool
            True when the task has ended, False when the time ran out.
        """
        check_timeout(timeout)
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        poller = select.poll()
        poller.register(self.fileno(), select.POLLIN)
        while True:
            left = max(0.0, deadline - time.monotonic())
            if poller.poll(min(left * 1000, _LONGEST_POLL)):
                return True
            if time.monotonic() >= deadline:
                return False

    async def wait_async(self, timeout: float | None = None) -> bool:
        """As `wait`, for asyncio."""
        from memdesc.vm.awaiting import happens, readable

        return await happens(lambda: self.wait(0), lambda: readable(self.fileno), timeout)

    def fileno(self) -> int:
        """Give the pidfd: readable once the task has ended. It stays the task's own."""
        if self._pidfd < 0:
            raise ClosedError(f"task {self.pid} was closed here", errno=errno.EBADF)
        return self._pidfd

    def proc_path(self, name: str) -> str:
        """Give the path of a file of the task under /proc; good only while it is alive."""
        return f"/proc/{self.pid}/{name}"

    def check_alive(self, doing: str) -> None:
        """Raise `TaskGoneError` (ESRCH) if the task has ended; `doing` is what was tried."""
        if not self.alive:
            raise TaskGoneError(f"cannot {doing}: task {self.pid} has ended", errno=errno.ESRCH)

    def open_proc(self, name: str, doing: str) -> int:
        """Open a file of the task under /proc to read. The caller owns the descriptor.

        Raises
        ------
        TaskGoneError
            The task has ended.
        NotPrivilegedError
            The kernel does not show this process that file (EACCES, EPERM).
        TimedOutError
            The task holds up whoever looks at it (ETIMEDOUT).
        """
        path = self.proc_path(name)
        fd = self._look(
            name, doing, lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC), undo=os.close
        )
        try:
            self.check_alive(doing)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def read_proc(self, name: str, doing: str) -> bytes:
        """Read a whole file of the task under /proc; raises as `open_proc` does.

        One of more than 256 MiB is an error (EFBIG): a task could make it endless.
        """
        path = self.proc_path(name)
        data = self._look(name, doing, lambda: read_file(path))
        self.check_alive(doing)  # a zombie's files read as empty
        return data

    def _look(
        self,
        name: str,
        doing: str,
        look: Callable[[], _T],
        undo: Callable[[_T], object] | None = None,
    ) -> _T:
        """Look at a file of the task under /proc; it can not make this process wait."""
        self.check_alive(doing)
        try:
            return look() if name in _NEVER_WAITS else look_at(self, doing, look, undo)
        except MemdescError:
            raise
        except OSError as error:
            raise self.explain(doing, error) from error

    def explain(self, doing: str, error: OSError) -> MemdescError:
        """Say in the family's terms why the kernel refused `doing` on this task."""
        if not self.alive or error.errno == errno.ESRCH:
            return TaskGoneError(f"cannot {doing}: task {self.pid} has ended", errno=errno.ESRCH)
        if error.errno == errno.ENOENT:
            return NotPrivilegedError(
                f"cannot {doing}: the task lives, but /proc does not show it (mounted with "
                "hidepid, or of another pid namespace); see proc(5)",
                errno=errno.ENOENT,
            )
        return _call_failed(doing, error)

    def close(self) -> None:
        """Let go of the task; the process itself is not touched. Closing again does nothing."""
        pidfd, self._pidfd = self._pidfd, -1  # forgotten first: a number is never closed twice
        if pidfd >= 0:
            os.close(pidfd)

    def __enter__(self) -> Task:
        self.fileno()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Task):
            return NotImplemented
        return key_of(self) == key_of(other)

    def __hash__(self) -> int:
        return hash(key_of(self))

    def __reduce__(self) -> Any:
        return _reopen, key_of(self)

    def __repr__(self) -> str:
        closed = ", closed" if self._pidfd < 0 else ""
        return f"<Task {self.pid} of user {self.credentials.uid}{closed}>"


def _reopen(pid: int, start_time: int) -> Task:
    return Task(pid, start_time=start_time)


def _pid_of_pidfd(pidfd: int) -> int:
    """Give the pid that /proc/self/fdinfo shows for a pidfd."""
    doing = f"make a task of file descriptor {pidfd}"
    try:
        text = read_file(f"/proc/self/fdinfo/{pidfd}")
    except FileNotFoundError as error:
        raise InvalidArgument(f"cannot {doing}: it is not open", errno=errno.EBADF) from error
    except OSError as error:
        raise _call_failed(doing, error) from error
    for line in text.splitlines():
        if line.startswith(b"Pid:"):
            return int(line[4:])
    raise InvalidArgument(
        f"cannot {doing}: it is not a pidfd; open one with os.pidfd_open", errno=errno.EBADF
    )


def _check_pid(pid: int, doing: str) -> int:
    # fdinfo shows -1 for a process that was waited for, 0 for one of a foreign namespace.
    if pid < 0:
        raise TaskGoneError(f"cannot {doing}: its process has ended", errno=errno.ESRCH)
    if pid == 0:
        raise NotPrivilegedError(
            f"cannot {doing}: its process has no pid in this process's pid namespace; run "
            "both in one pid namespace",
            errno=errno.EPERM,
        )
    return pid


def _pidfd_open(pid: int) -> int:
    doing = f"open task {pid}"
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):  # ENOENT since Linux 6.15
            raise InvalidArgument(
                f"cannot {doing}: it is a thread, not a process; give its process's pid "
                "(Tgid in /proc/PID/status)",
                errno=errno.EINVAL,
            ) from error
        if error.errno == errno.ESRCH:
            raise TaskGoneError(
                f"cannot {doing}: there is no process of that pid; it never was, or has ended",
                errno=errno.ESRCH,
            ) from error
        raise _call_failed(doing, error) from error


def peer_credentials(sock: sockets.socket) -> tuple[int, int, int]:
    """The pid, effective user and group of the other end when it connected, or began to listen."""
    try:
        raw = sock.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, _UCRED.size)
    except OSError as error:
        raise _call_failed("read the credentials of the socket's peer", error) from error
    pid, uid, gid = _UCRED.unpack(raw)
    if uid == 2**32 - 1:  # -1: the kernel has none, as nobody ever connected
        raise InvalidArgument(
            "cannot tell whose task is the socket's peer: it is not connected",
            errno=errno.ENOTCONN,
        )
    return pid, uid, gid


def _peer_pidfd(sock: sockets.socket, doing: str) -> int | None:
    """Give the peer's pidfd, or None where the kernel has no SO_PEERPIDFD."""
    try:
        return sock.getsockopt(sockets.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            return None
        if error.errno in (errno.ESRCH, errno.EINVAL):  # EINVAL: waited for (before Linux 6.16)
            raise TaskGoneError(f"cannot {doing}: it has ended", errno=errno.ESRCH) from error
        raise _call_failed(doing, error) from error


def _call_failed(doing: str, error: OSError) -> MemdescError:
    """Turn the errno of a call that looks at a task into an error of the family."""
    told = f"cannot {doing}: {describe_errno(error)}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return NotPrivilegedError(
            f"{told}; it takes the task's own user with no capability less than the task "
            "has, or CAP_SYS_PTRACE",
            errno=error.errno,
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return AllocationError(
            f"{told}: no file descriptor is left; close some, or raise `ulimit -n`",
            errno=error.errno,
        )
    if error.errno == errno.ENOMEM:
        return AllocationError(f"{told}: the kernel is out of memory", errno=error.errno)
    if error.errno == errno.ENOSYS:
        return UnsupportedError(
            f"{told}: Linux has pidfds since 5.3; a container's filter may hide them",
            errno=error.errno,
        )
    return MemdescError(told, errno=error.errno)


def _parse_start_time(stat: bytes) -> int:
    # The command name, in parentheses, may itself hold spaces and parentheses: proc_pid_stat(5).
    return int(stat[stat.rindex(b")") + 2 :].split()[19])


def _parse_credentials(pid: int, status: bytes) -> Credentials:
    ids = {
        line[:4]: int(line.split()[2])  # real, effective, saved, file system
        for line in status.splitlines()
        if line.startswith((b"Uid:", b"Gid:"))
    }
    return Credentials(pid, ids[b"Uid:"], ids[b"Gid:"])
