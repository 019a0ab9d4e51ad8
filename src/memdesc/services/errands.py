"""Errands: what takes too long for the I/O thread, and is for no client to wait for."""

from __future__ import annotations

import errno
import logging
import threading
from collections import deque
from collections.abc import Callable

from memdesc.errors import AllocationError

log = logging.getLogger("memdesc.services")


class Errands:
    """Does one thing after the other on a thread that ends when nothing is left to do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None

    def add(self, call: Callable[[], None]) -> None:
        """Have something done, soon; does not wait for it.

        Raises
        ------
        AllocationError
            No thread can be had (EAGAIN).
        """
        with self._lock:
            self._left.append(call)
            if self._thread is not None:
                return
            thread = threading.Thread(target=self._run, name="memdesc-errands", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                self._left.remove(call)
                raise AllocationError(
                    f"can not start a thread for an errand: {error}; end some, or raise `ulimit "
                    "-u`",
                    errno=errno.EAGAIN,
                ) from error
            self._thread = thread

    def finish(self) -> None:
        """Wait until all that was added is done."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._left:
                    self._thread = None
                    return
                call = self._left.popleft()
            try:
                call()
            except BaseException:
                log.exception("service.errand_failed")
            del call
