"""A rate that is kept: so many a second, and so many at once."""

from __future__ import annotations

import math
import time


class Bucket:
    """Holds `burst` tokens at most, and gets `rate` new ones a second.

    Threads: takes no lock; two that take at one moment may both have the last token.
    """

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = float(burst)
        self._at = time.monotonic()

    def take(self) -> bool:
        """Take a token, or say that there is none."""
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    @property
    def wait(self) -> float:
        """Seconds until there is a token again; endless with a rate of 0."""
        return max(1 - self._tokens, 0) / self._rate if self._rate else math.inf
