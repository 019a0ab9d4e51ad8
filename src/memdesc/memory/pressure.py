"""Watching for memory pressure, by a thread that lives while there is something to give back."""

from __future__ import annotations

import _thread
import sys
import threading
from collections.abc import Callable

from memdesc.vm.proc import read_text

_EVERY = 0.25
"""Seconds between two looks."""
_STALLING = 10.0
"""Per cent of the last ten seconds in which some task waited for memory."""
_PRESSURE = "/proc/pressure/memory"


def is_stalling() -> bool:
    """Whether tasks of this machine wait for memory (PSI); False where the kernel does not tell."""
    try:
        some = read_text(_PRESSURE).split("\n", 1)[0]
    except OSError:  # a kernel without PSI
        return False
    _, _, rest = some.partition("avg10=")
    return float(rest.split(" ", 1)[0]) >= _STALLING


class Watch:
    """A thread that calls `look` a few times a second until it gives False.

    Started by whoever frees memory, which is the collector or a signal handler too: so by
    `_thread`, which takes no lock, and not by `threading`, in the middle of which that may be.
    All but `end` is called under one lock, the caller's.
    """

    def __init__(self, look: Callable[[], bool]) -> None:
        self._look = look
        self._running = False
        self._woken = _thread.allocate_lock()
        self._ended = _thread.allocate_lock()

    def start(self) -> bool:
        """Have the thread run. False where none can be had, or the program is at its end.

        Then CPython (at least up to 3.12) crashes if a thread has not begun before it ends.
        """
        if not self._running:
            if not threading.main_thread().is_alive():
                return False
            self._woken = _thread.allocate_lock()
            self._ended = _thread.allocate_lock()
            self._woken.acquire()
            self._ended.acquire()
            try:
                _thread.start_new_thread(_watch, (self._look, self._woken, self._ended))
            except RuntimeError:
                return False
            self._running = True
        return True

    def stop(self) -> bool:
        """Note that the thread ends by itself: the answer of `look`, False."""
        self._running = False
        return False

    def end(self) -> None:
        """Wake the thread, which finds nothing to watch, and wait until it has ended.

        Before a fork, which warns where there are threads, and before the program ends.
        """
        if not self._running:
            return
        try:
            self._woken.release()
        except RuntimeError:  # another thread forks as well, and has woken it
            return
        self._ended.acquire(timeout=1)


def _watch(
    look: Callable[[], bool],
    woken: _thread.LockType,
    ended: _thread.LockType,
    ending: Callable[[], bool] = sys.is_finalizing,  # bound: modules are taken apart at the end
) -> None:
    try:
        _name_thread()
        while True:
            woken.acquire(timeout=_EVERY)
            if ending() or not look():
                return
    finally:
        ended.release()


def _name_thread() -> None:
    """Show as ``memdesc-recycle`` in top and in /proc/PID/task/TID/comm (15 bytes at most)."""
    try:
        with open(f"/proc/self/task/{threading.get_native_id()}/comm", "w") as comm:
            comm.write("memdesc-recycle")
    except OSError:  # no /proc, or no descriptor left: it watches without a name
        return
