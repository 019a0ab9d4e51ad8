"""How does a block of N bytes best cross from one task to another?

What it costs the giver and the receiver together, waking apart (it is the same for every way), as
the calibration measures it: in the message; copied once by process_vm_readv into new memory;
mapped and used in place, one byte of each page; as a copy-on-write snapshot. Then, between this
task and others: copyin into memory that is warm, by process_vm_readv and through a mapping that is
made for it; and copy_between of two other tasks against copyin and then copyout of the whole.
All take turns; medians.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

from common import finish, summary

import memdesc as md
from memdesc import crossing
from memdesc.copyio import copyin_into

MIB = 1 << 20
TASK = """
import mmap, sys
from memdesc._core import buffer_address
memory = mmap.mmap(-1, int(sys.argv[1]))
memory[:] = b"x" * len(memory)
print(buffer_address(memory)[0], flush=True)
sys.stdin.read()
"""

Samples = dict[str, list[float]]


def in_turns(rounds: int, ways: dict[str, Callable[[], object]]) -> Samples:
    """Time each way in each round, in ms, after one round that does not count."""
    samples: Samples = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, act in ways.items():
            start = time.perf_counter_ns()
            act()
            if turn:
                samples[name].append((time.perf_counter_ns() - start) / 1e6)
    return samples


def start(nbytes: int) -> tuple[subprocess.Popen[bytes], md.Task, int]:
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", TASK, str(nbytes)], stdin=pipe, stdout=pipe)
    assert child.stdout is not None
    return child, md.Task(child.pid), int(child.stdout.readline())


def copies(nbytes: int, rounds: int) -> Samples:
    """copyin by both means, and copy_between against two copies of the whole."""
    first, source, here = start(nbytes)
    second, target, there = start(nbytes)
    room = bytearray(nbytes)

    def copy_in(limit: int | None) -> None:
        crossing.set_thresholds(crossing.Thresholds(copy_by_mapping=limit))
        copyin_into(source, here, room)

    try:
        return in_turns(
            rounds,
            {
                "copyin": lambda: copy_in(None),
                "copyin by mapping": lambda: copy_in(0),
                "copy_between": lambda: md.copy_between(source, here, target, there, nbytes),
                "copyin + copyout": lambda: md.copyout(
                    md.copyin(source, here, nbytes), target, there
                ),
            },
        )
    finally:
        crossing.set_thresholds(None)
        for child in (first, second):
            child.kill()
            child.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--short", action="store_true", help="small sizes, to see that it runs")
    arguments, _ = parser.parse_known_args()
    found = crossing.calibrate()
    names = list(found.figures)
    print(" " * 12 + "".join(f"{name[:15]:>16}" for name in names) + "   us")
    for size in sorted({size for by_size in found.figures.values() for size in by_size}):
        cells = (found.figures[name].get(size) for name in names)
        shown = ("" if cell is None else f"{cell * 1e6:.1f}" for cell in cells)
        print(f"{size:>12,}" + "".join(f"{cell:>16}" for cell in shown))
    print(found.thresholds)
    sizes = (MIB, 4 * MIB) if arguments.short else (MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
    results: dict[str, object] = {"figures_s": found.figures, "thresholds": str(found.thresholds)}
    medians: dict[tuple[int, str], float] = {}
    for size in sizes:
        for name, samples in copies(size, 3 if arguments.short else arguments.rounds).items():
            row = summary(samples)
            medians[size, name] = row["median"]
            results[f"{name}, {size // MIB} MiB"] = row | {"samples_ms": samples}
            print(f"{size // MIB:4} MiB  {name:20} {row['median']:10.3f} ms   p90 {row['p90']:.3f}")
    largest = sizes[-1]
    checks = {
        "copy_between of the largest block takes less time than copyin and copyout of it": medians[
            largest, "copy_between"
        ]
        < medians[largest, "copyin + copyout"],
        "mapping pays at some size, and never below a page": found.thresholds.mapping is not None
        and found.thresholds.mapping >= md.page_size,
    }
    finish("crossing", __doc__ or "", results, checks)


if __name__ == "__main__":
    main()
