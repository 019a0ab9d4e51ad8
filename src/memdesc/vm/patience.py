"""Looking at a task that can hold up whoever looks, without waiting for it for ever.

Much of what /proc shows of a task (maps, smaps, pagemap, cmdline) is read under the lock on its
address space, and a task can keep that for as long as it likes: mmap of a file of a FUSE server
that does not answer waits with the lock held. Who reads waits until he is killed; no other signal
ends that. So a thread takes the look, and is given up when it neither comes back nor computes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable
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
"""Looks at tasks of one user that wait; with so many, no other task of his is looked at."""
_CHUNK = 1 << 18

_held_up: list[_Look[Any]] = []


class _Look(threading.Thread, Generic[_T]):
    """One look; its thread is a daemon: the end of this process kills it."""

    def __init__(
        self, task: Task, look: Callable[[], _T], undo: Callable[[_T], object] | None
    ) -> None:
        super().__init__(name="memdesc-look", daemon=True)
        self.task = task.pid, task.start_time
        self.uid = task.credentials.uid
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
            if self._given_up and found and self._undo is not None:
                self._undo(found.pop())

    def wait(self) -> bool:
        """Wait for it; False if it was given up."""
        computed = 0.0
        try:
            while not self._done.wait(PATIENCE):
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
    if task.is_current:
        return look()
    for one in list(_held_up):
        if not one.is_alive():
            with contextlib.suppress(ValueError):  # another thread was faster
                _held_up.remove(one)
    same = [one for one in list(_held_up) if one.uid == task.credentials.uid]
    if any(one.task == (task.pid, task.start_time) for one in same):
        raise _held(task, doing, "holds up an earlier look at it still")
    if len(same) >= _MOST_HELD_UP:
        raise _held(task, doing, f"is of user {same[0].uid}, whose tasks hold up {len(same)} looks")
    mine = _Look(task, look, undo)
    try:
        mine.start()
    except RuntimeError as error:
        raise AllocationError(
            f"cannot {doing}: no thread can be had for it ({error}); see ulimit -u and the "
            "cgroup's pids.max",
            errno=errno.EAGAIN,
        ) from error
    if not mine.wait():
        raise _held(task, doing, f"held it up for {PATIENCE:g} s")
    return mine.result()


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
