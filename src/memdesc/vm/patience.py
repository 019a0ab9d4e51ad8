"""Looking at a task that can hold up whoever looks, without waiting for it for ever.

Much of what /proc shows of a task (maps, smaps, pagemap, cmdline) is read under the lock on its
address space, and a task can keep that for as long as it likes: mmap of a file of a FUSE server
that does not answer waits with the lock held. Who reads waits until he is killed; no other signal
ends that. So a thread takes the look, and is given up when it neither comes back nor computes.
A copy of its memory can be held up by that, and by each page of such a file: with a time limit it
is done so too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from memdesc.errors import AllocationError, MemdescError, TimedOutError

if TYPE_CHECKING:
    from memdesc.vm.task import Task

_T = TypeVar("_T")

PATIENCE = 3.0
"""Seconds that a look may take without computing."""
MOST_TEXT = 256 << 20
"""Bytes of one file: a task that maps ahead of the reader could make it endless."""
_LEAST_COMPUTING = 0.01
"""Of that time: one that is let on now and then would take hours."""
_MOST_HELD_UP = 4
"""Looks at tasks of one user, and copies, that wait; with so many, none of his is looked at."""
_CHUNK = 1 << 18

_held_up: list[_Look[Any]] = []


class _Look(threading.Thread, Generic[_T]):
    """One look; its thread is a daemon: the end of this process kills it."""

    def __init__(
        self,
        tasks: Sequence[Task],
        look: Callable[[], _T],
        undo: Callable[[_T], object] | None,
    ) -> None:
        super().__init__(name="memdesc-look", daemon=True)
        self.tasks = {(task.pid, task.start_time) for task in tasks}
        self.uids = {task.credentials.uid for task in tasks}
        self._look = look
        self._undo = undo
        self._turn = threading.Lock()
        self._given_up = False
        self._clock: int | None = None
        self._found: list[_T] = []
        self._error: BaseException | None = None
        self._done = threading.Event()

    def run(self) -> None:
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        found: list[_T] = []
        try:
            found.append(self._look())
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self._error = error
        with self._turn:
            self._found = found
            self._done.set()
            if self._given_up:
                _held_up.remove(self)  # and with it what the look has
                if found and self._undo is not None:
                    self._undo(found.pop())

    def wait(self, timeout: float | None) -> bool:
        """Wait for it, so long or while it computes; False if it was given up."""
        computed = 0.0
        try:
            if timeout is not None:
                self._done.wait(min(timeout, threading.TIMEOUT_MAX))
            while timeout is None and not self._done.wait(PATIENCE):
                now = self._computed()
                if now - computed < PATIENCE * _LEAST_COMPUTING:
                    break
                computed = now
        except BaseException:
            self._give_up()
            raise
        return self._done.is_set() or not self._give_up()

    def _computed(self) -> float:
        try:
            return 0.0 if self._clock is None else time.clock_gettime(self._clock)
        except OSError:  # it has ended meanwhile
            return 0.0

    def _give_up(self) -> bool:
        """Whether it was given up: it may have come to its end just now."""
        with self._turn:
            self._given_up = not self._done.is_set()
            if self._given_up:
                _held_up.append(self)
        return self._given_up

    def result(self) -> _T:
        """What it gave, or raised."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
            return self._found.pop()
        finally:
            del error  # see telling


def look_at(
    task: Task, doing: str, look: Callable[[], _T], undo: Callable[[_T], object] | None = None
) -> _T:
    """Take a look at a task: `look()`, of which it can not keep this process waiting.

    Parameters
    ----------
    task : Task
        At the own task it is a plain call.
    doing : str
        What is tried, for the message.
    look : callable
        Has no effect but its result.
    undo : callable, optional
        Is given the result of a look that came to its end after it was given up.

    Raises
    ------
    TimedOutError
        It was held up for longer than `PATIENCE`, is since an earlier look, or several other
        tasks of its user hold up theirs (ETIMEDOUT).
    AllocationError
        This process may have no more threads (EAGAIN).
    """
    return look() if task.is_current else _in_thread([task], doing, look, undo, None)


def within(timeout: float, tasks: Sequence[Task], doing: str, work: Callable[[], _T]) -> _T:
    """Give what `work()` gives, of which these tasks can not keep this process waiting for longer.

    A thread of its own does it: where it is held up it goes on later, or never, and must not touch
    what the caller has. Raises as `look_at`; so it is refused where one of the tasks holds up a
    look, or an earlier one of these.
    """
    return _in_thread(tasks, doing, work, None, timeout)


def _in_thread(
    tasks: Sequence[Task],
    doing: str,
    look: Callable[[], _T],
    undo: Callable[[_T], object] | None,
    timeout: float | None,
) -> _T:
    for task in tasks:
        _check_held_up(task, doing)
    mine = _Look(tasks, look, undo)
    try:
        mine.start()
    except RuntimeError as error:
        raise AllocationError(
            f"cannot {doing}: no thread can be had for it ({error}); see ulimit -u and the "
            "cgroup's pids.max",
            errno=errno.EAGAIN,
        ) from error
    if not mine.wait(timeout):
        seconds = PATIENCE if timeout is None else timeout
        raise _held(tasks[-1], doing, f"held it up for {seconds:g} s")
    return mine.result()


def _check_held_up(task: Task, doing: str) -> None:
    for one in list(_held_up):
        if not one.is_alive():  # in a fork child
            with contextlib.suppress(ValueError):  # another thread was faster
                _held_up.remove(one)
    user = task.credentials.uid
    same = [one for one in list(_held_up) if user in one.uids]
    if any((task.pid, task.start_time) in one.tasks for one in same):
        raise _held(task, doing, "holds up an earlier look at it, or copy, still")
    if len(same) >= _MOST_HELD_UP:
        raise _held(task, doing, f"is of user {user}, whose tasks hold up {len(same)} looks")


def _held(task: Task, doing: str, how: str) -> TimedOutError:
    return TimedOutError(
        f"cannot {doing}: task {task.pid} {how}; one of its threads may wait for a file system "
        "that does not answer",
        errno=errno.ETIMEDOUT,
    )


def read_file(path: str, most: int = MOST_TEXT) -> bytes:
    """Read a file of /proc, of so many bytes at most; more is an error (EFBIG)."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        left = most
        while part := os.read(fd, _CHUNK):
            parts.append(part)
            left -= len(part)
            if left < 0:
                raise MemdescError(
                    f"{path} is of more than {most:,} bytes: it is not read further",
                    errno=errno.EFBIG,
                )
    finally:
        os.close(fd)
    return b"".join(parts)
