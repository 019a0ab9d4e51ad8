"""How many claims cover each address: pure interval arithmetic, knowing nothing of the kernel."""

from __future__ import annotations

import sys
from bisect import bisect_right

Run = tuple[int, int]
"""A range of addresses: its start, and its end, which is past the last byte."""


class Counts:
    """How many claims cover each address, as sorted steps: (address, count from there on).

    Neighbouring steps differ, so the cost is in the number of intervals, never of pages. A
    change is one slice assignment: a signal handler that raises in the middle leaves the old
    counts or the new ones.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[int, int]] = [(0, 0)]

    def at(self, address: int) -> int:
        steps = self._steps.copy()  # one step for the interpreter: needs no lock
        return steps[_index(steps, address)][1]

    def runs(self, start: int, end: int, count: int) -> list[Run]:
        """Give the longest ranges within start..end that exactly `count` claims cover."""
        steps = self._steps
        found = []
        for i in range(_index(steps, start), len(steps)):
            left, here = steps[i]
            if left >= end:
                break
            right = steps[i + 1][0] if i + 1 < len(steps) else end
            if here == count:
                found.append((max(left, start), min(right, end)))
        return found

    def change(self, start: int, end: int, delta: int) -> None:
        """Add `delta` to the count of start..end."""
        steps = self._steps
        first, last = _index(steps, start), _index(steps, end)
        changed = [
            (max(at, start), count + delta) for at, count in steps[first : last + 1] if at < end
        ]
        changed.append((end, steps[last][1]))
        if steps[first][0] < start:
            changed.insert(0, steps[first])
        merged = steps[first - 1 : first] if first else []
        kept = len(merged)
        for step in changed:
            if not merged or merged[-1][1] != step[1]:
                merged.append(step)
        steps[first : last + 1] = merged[kept:]


def _index(steps: list[tuple[int, int]], address: int) -> int:
    return bisect_right(steps, (address, sys.maxsize)) - 1
