"""What every waiting call takes: seconds, or None for ever."""

from __future__ import annotations

import errno
import math
import time

from memdesc.errors import InvalidArgument

SPIN = 50e-6
"""Seconds that a wait spins before it sleeps: about what one waking costs both sides."""


def check_timeout(timeout: object) -> None:
    """Raise `InvalidArgument` (EINVAL) for what is neither None nor a number of seconds from 0."""
    if timeout is None:
        return
    number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not (number and 0 <= timeout < math.inf):  # type: ignore[operator]
        raise InvalidArgument(
            f"timeout is {timeout!r}: give seconds, 0 or more, or None to wait for ever",
            errno=errno.EINVAL,
        )


def deadline_of(timeout: float | None) -> float | None:
    """When a call has to be over, by the monotonic clock; None: never. Checks the timeout."""
    check_timeout(timeout)
    return None if timeout is None else time.monotonic() + timeout
