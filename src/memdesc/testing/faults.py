"""Fault injection: make one call of the compiled core fail as the kernel would.

Works because every room calls the core as `_core.name(...)`. It reaches this process, and the
children that fork while it is on; a program started anew has a core of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

from memdesc import _core

__all__ = ["Fault", "failing"]


@final
class Fault:
    """A call that fails when it is told to: stands in for one function of the core.

    Attributes
    ----------
    calls, failures : int
        How often it was called since `failing` began, and how many of those calls failed.
    """

    def __init__(
        self, name: str, original: Callable[..., Any], errno: int, after: int, times: int | None
    ) -> None:
        self._name = name
        self._original = original
        self._errno = errno
        self._after = after
        self._times = times
        self._lock = threading.Lock()
        self.calls = 0
        self.failures = 0

    def __call__(self, *arguments: Any) -> Any:
        with self._lock:
            self.calls += 1
            fails = self.calls > self._after and (
                self._times is None or self.failures < self._times
            )
            self.failures += fails
        if fails:
            raise OSError(self._errno, f"{self._name}: {os.strerror(self._errno)}")
        return self._original(*arguments)


@contextmanager
def failing(name: str, errno: int, *, after: int = 0, times: int | None = 1) -> Iterator[Fault]:
    """Let calls of `memdesc._core.<name>` raise `OSError(errno)` inside the `with` block.

    Parameters
    ----------
    name : str
        A function of the core, such as "mlock" or "map_memory".
    errno : int
        What the kernel shall have answered (`errno.ENOMEM`, …).
    after : int
        How many calls succeed first, 0 or more. Those really happen.
    times : int or None
        How many calls fail then; None for all. Later ones succeed again.

    Yields
    ------
    Fault
        Counts the calls; assert its `failures`, or the test may have missed its point.

    Raises
    ------
    ValueError
        The core has no function of that name, or a count is negative.

    Notes
    -----
    Calls from several threads are counted as one sequence. Blocks may be nested; they must
    be left in the order opposite to that in which they were entered, as `with` does.

    Examples
    --------
    >>> import errno
    >>> with failing("mlock", errno.ENOMEM) as fault:
    ...     _core.mlock(0, 0)
    Traceback (most recent call last):
    OSError: [Errno 12] mlock: Cannot allocate memory
    """
    original = getattr(_core, name, None)
    if not callable(original) or isinstance(original, type):
        raise ValueError(f"memdesc._core has no function {name!r} to let fail")  # noqa: TRY004
    if after < 0 or (times is not None and times < 0):
        raise ValueError(f"after={after}, times={times}: counts of calls are 0 or more")
    fault = Fault(name, original, errno, after, times)
    setattr(_core, name, fault)
    try:
        yield fault
    finally:
        setattr(_core, name, original)
