"""How fast do blocks of fresh data go from one Python process to others, filled and read whole?

A parent fills blocks of 4 KiB to 256 MiB, each byte new, and 1, 2 or 4 children read all of each.
None is dropped: who fills waits for the slowest. The same two C functions fill and read on every
way: a bare ring in C, which spins; our stream (policy BLOCK, waiting as it does by default: spins
50 us, then sleeps); `multiprocessing.shared_memory` with semaphores; iceoryx2, polling; pyzmq.

The data is `computed`, each word anew, a few cycles each, and the reader compares every word; or,
with one reader, also `copied` out of memory that no cache holds, as fast as the machine can copy.

Every way has the same slots: 1 MiB of them, from 8 to 256 (iceoryx2 more, which it needs to get
along with). Every slot was used before the clock starts. Rounds of all of them alternate. What
counts is the time until the slowest reader has all. What holds: with one reader at least 0.90 of
the bare ring at 64 KiB and above (the median of the rounds' ratios, which there are five times as
many of); ahead of iceoryx2, shared_memory and pyzmq at every size, or equal within the spread. One
case is another: 64 KiB are copied in 2 us, of which a loop in Python that does nothing but call the
bare ring for each block loses a tenth already. There it is 0.90 of that loop.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import finish, summary
from ways import WAYS, Way, library

KIB, MIB = 1 << 10, 1 << 20
SIZES = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
READERS = (1, 2, 4)
KINDS = ("copied", "computed")
PATIENCE = 600.0  # seconds, for a way that is slow on a busy machine
RING, CALLED = "C ring", "called C ring"
PAIR = (RING, CALLED, "stream")  # of which a ratio is claimed, and so measured more often
OTHERS = ("shared_memory", "iceoryx2", "pyzmq")


def slots_for(nbytes: int) -> int:
    """Small blocks have more: enough to work on while another process has the CPU."""
    return min(max(MIB // nbytes, 8), 256)


def one(kind: type[Way], nbytes: int, readers: int, count: int) -> float:
    """Bytes a second, as the slowest reader had them."""
    context = multiprocessing.get_context("fork")
    slots = slots_for(nbytes)
    way = kind(nbytes, slots, readers)
    gate = context.Barrier(readers + 1)
    ends = context.Array(ctypes.c_double, readers, lock=False)
    warm = 2 * slots

    def consume(reader: int) -> None:
        way.enter(reader)
        gate.wait()
        wrong = way.consume(0, warm)
        gate.wait()
        wrong += way.consume(warm, count)
        ends[reader] = time.monotonic()
        gate.wait()
        way.leave()
        assert wrong == 0, f"{kind.__name__}: {wrong} of {count} blocks were not as filled"

    children = [context.Process(target=consume, args=(reader,)) for reader in range(readers)]
    for child in children:
        child.start()
    way.enter(None)
    gate.wait(PATIENCE)
    way.produce(0, warm)
    gate.wait(PATIENCE)
    start = time.monotonic()
    way.produce(warm, count)
    gate.wait(PATIENCE)
    for child in children:
        child.join()
        assert child.exitcode == 0, f"{kind.__name__}: a child ended with {child.exitcode}"
    way.leave()
    way.close()
    return nbytes * count / (max(ends) - start)


def measure(
    sizes: tuple[int, ...], readers: tuple[int, ...], rounds: int, volume: int
) -> dict[str, Any]:
    """Blocks of `volume` bytes a round, at least 8 and at most 20,000."""
    found: dict[str, Any] = {}
    ways = {name: way for name, way in WAYS.items() if way.installed()}
    for size in sizes:
        count = min(max(volume // size, 8), 20_000)
        for number in readers:
            for kind in KINDS if number == 1 else ("computed",):
                Way.ring.choose(KINDS.index(kind))
                samples: dict[str, list[float]] = {name: [] for name in ways}
                for turn in range(5 * rounds if number == 1 else rounds):
                    for name, way in ways.items():
                        if turn < rounds or name in PAIR:
                            samples[name].append(one(way, size, number, count))
                for name, values in samples.items():
                    row = summary(values) | {"samples": values}
                    found[f"{size // KIB} KiB, {number} readers, {kind}, {name}"] = row
                    print(
                        f"{size // KIB:8,} KiB {number} readers {kind:8} {name:22} "
                        f"{row['median'] / 1e9:7.2f} GB/s "
                        f"({row['p10'] / 1e9:.2f} to {row['p90'] / 1e9:.2f})",
                        flush=True,
                    )
    return found


def checked(results: dict[str, Any]) -> dict[str, bool]:
    """What is claimed, of each size that was measured."""
    checks = {}
    for name, ours in results.items():
        case, _, way = name.rpartition(", ")
        if way != "stream":
            continue
        size, number, _ = case.split(", ")
        if number == "1 readers" and int(size.split()[0]) >= 64:
            ring = CALLED if case.startswith("64 KiB") and "copied" in case else RING
            pairs = zip(ours["samples"], results[f"{case}, {ring}"]["samples"], strict=True)
            ratio = statistics.median(stream / bare for stream, bare in pairs)
            checks[f"{case}: {ratio:.2f} of {ring}, at least 0.90"] = ratio >= 0.9
        for other in OTHERS:
            theirs = results.get(f"{case}, {other}")
            if theirs is not None:
                checks[f"{case}: ahead of {other}, or equal within the spread"] = (
                    ours["median"] >= theirs["median"] or ours["p90"] >= theirs["p10"]
                )
    return checks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--volume", type=int, default=1 << 30, help="bytes a round")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="bytes")
    parser.add_argument("--readers", type=int, nargs="*", default=READERS)
    parser.add_argument("--short", action="store_true", help="few blocks, to see that it runs")
    arguments, _ = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        Way.ring = library(Path(folder))
        print(f"{len(os.sched_getaffinity(0))} CPUs, unpinned")
        if arguments.short:
            results = measure((4 * KIB, MIB), (1, 2), 1, 8 * MIB)
        else:
            results = measure(
                tuple(arguments.sizes),
                tuple(arguments.readers),
                arguments.rounds,
                arguments.volume,
            )
    missing = [name for name, way in WAYS.items() if not way.installed()]
    if missing:
        print(f"not installed, so not measured: {', '.join(missing)}")
    finish("stream", __doc__ or "", results, {} if arguments.short else checked(results))


if __name__ == "__main__":
    main()
