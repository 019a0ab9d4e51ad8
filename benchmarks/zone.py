"""What does it cost to have a small piece of memory and give it back?

A pair is one allocation and one free of 256 bytes, in one thread, in a loop of the interpreter:

* zone: `zone.free(zone.alloc())`, with all checks on: zeroed at free, looked at when given again;
* dropped: `zone.alloc()`, the element going back by itself;
* bytearray, numpy.empty: created and dropped (the second is not zeroed);
* mmap: an anonymous mapping of 256 bytes (a page), made and closed.

Rounds of all of them alternate, so that a change of the machine's speed strikes all alike. What
holds: a pair of the zone takes at most three times as long as one of bytearray.
"""

from __future__ import annotations

import argparse
import mmap
import time
from collections.abc import Callable
from itertools import repeat

import numpy as np
from common import finish, summary

import memdesc as md

SIZE = 256
BASE = "bytearray"


def pairs(zone: md.Zone) -> dict[str, Callable[[int], None]]:
    """Each way, as a loop of so many pairs."""

    def through_zone(count: int) -> None:
        alloc, free = zone.alloc, zone.free
        for _ in repeat(None, count):
            free(alloc())

    def dropped(count: int) -> None:
        alloc = zone.alloc
        for _ in repeat(None, count):
            alloc()

    def through_bytearray(count: int) -> None:
        make = bytearray
        for _ in repeat(None, count):
            make(SIZE)

    def through_numpy(count: int) -> None:
        make = np.empty
        for _ in repeat(None, count):
            make(SIZE, np.uint8)

    def through_mmap(count: int) -> None:
        make = mmap.mmap
        for _ in repeat(None, count):
            make(-1, SIZE).close()

    return {
        "zone": through_zone,
        "zone, dropped": dropped,
        BASE: through_bytearray,
        "numpy.empty": through_numpy,
        "mmap": through_mmap,
    }


def measure(ways: dict[str, Callable[[int], None]], rounds: int, count: int) -> dict[str, list]:
    """Nanoseconds a pair, round by round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(count // 10 + 1)  # to warm up
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter_ns()
            way(count)
            times[name].append((time.perf_counter_ns() - start) / count)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--short", action="store_true", help="few pairs, to see that it runs")
    arguments, _ = parser.parse_known_args()
    rounds, count = (5, 20_000) if arguments.short else (arguments.rounds, 200_000)
    zone = md.Zone("benchmark", element_size=SIZE, capacity=1 << 20)
    times = measure(pairs(zone), rounds, count)
    told = zone.statistics()
    assert told.allocs == told.frees + told.drops, "the books do not balance"
    results = {name: summary(samples) | {"samples_ns": samples} for name, samples in times.items()}
    base = results[BASE]["median"]
    for name, row in results.items():
        row["ratio"] = row["median"] / base
        print(
            f"{name:14} {row['median']:8.1f} ns   p10 {row['p10']:.1f}, p90 {row['p90']:.1f}"
            f"   {row['ratio']:6.2f} x {BASE}"
        )
    checks = {
        "alloc + free of 256 bytes takes at most 3 times as long as bytearray(256)": results[
            "zone"
        ]["ratio"]
        <= 3,
    }
    finish("zone", __doc__ or "", results, checks)


if __name__ == "__main__":
    main()
