"""How long until 256 MiB of memory can be filled without a fault: fresh, and the second time?

From the call to every page being there and writable; memory is made, filled and freed, and that is
one sample. Baselines in the same run, each page written once: a bare memfd, numpy.empty, and
multiprocessing.shared_memory. The rounds go through all of them in turn.

* fresh: nothing is kept of what was freed before;
* again: the same buffer once more, its memory recycled: cleared, or left as it was (undefined).

Reserved huge pages are measured apart, with the base pages of that part: as root, who can fill the
pool and puts it back, or where it is filled already. AUTO is measured in both parts.
"""

from __future__ import annotations

import argparse
import mmap
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import numpy as np
from common import finish, summary

import memdesc as md
from memdesc.memory.page_kinds import huge_page_size, meminfo

MIB = 1 << 20
POOL = Path("/proc/sys/vm/nr_hugepages")
UNDEFINED = md.Contents.UNDEFINED

Case = Callable[[int], tuple[float, int]]
"""Makes so many bytes and frees them: milliseconds until ready, and faults of filling it then."""


def measure(make: Callable[[], Any], array_of: Callable[[Any], Any], free: Callable[[Any], None]):
    start = time.perf_counter()
    memory = make()
    elapsed = time.perf_counter() - start
    array = array_of(memory)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array.fill(1)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    del array
    free(memory)
    return elapsed * 1e3, faults


def touch(array: Any) -> None:
    array[:: md.page_size] = 0


def ours(pages: md.PageKind, *, again: bool, contents: md.Contents = md.Contents.ZEROED) -> Case:
    def case(nbytes: int) -> tuple[float, int]:
        def make() -> md.BufferMemoryDescriptor:
            return md.BufferMemoryDescriptor(nbytes, pages=pages, contents=contents)

        if not again:
            md.recycler.trim()
        elif md.recycler.statistics().kept_bytes < nbytes:
            make().close()
        hits = md.recycler.statistics().hits
        result = measure(make, lambda buffer: buffer.array(nbytes, "u1"), lambda b: b.close())
        assert md.recycler.statistics().hits - hits == again
        return result

    return case


def bare_memfd(nbytes: int) -> tuple[float, int]:
    def make() -> mmap.mmap:
        fd = os.memfd_create("bare")
        os.ftruncate(fd, nbytes)
        mapped = mmap.mmap(fd, nbytes)
        os.close(fd)
        touch(np.frombuffer(mapped, "u1"))
        return mapped

    return measure(make, lambda mapped: np.frombuffer(mapped, "u1"), lambda mapped: mapped.close())


def shm(nbytes: int) -> tuple[float, int]:
    def make() -> shared_memory.SharedMemory:
        segment = shared_memory.SharedMemory(create=True, size=nbytes)
        touch(np.frombuffer(segment.buf, "u1"))
        return segment

    def free(segment: shared_memory.SharedMemory) -> None:
        segment.close()
        segment.unlink()

    return measure(make, lambda segment: np.frombuffer(segment.buf, "u1"), free)


def numpy_empty(nbytes: int) -> tuple[float, int]:
    def make() -> Any:
        array = np.empty(nbytes, "u1")
        touch(array)
        return array

    return measure(make, lambda array: array, lambda array: None)


def free_huge_pages() -> int:
    info = meminfo()
    return info.get("HugePages_Free", 0) - info.get("HugePages_Rsvd", 0)


@contextmanager
def pool(nbytes: int) -> Iterator[str]:
    """Have that many bytes of reserved huge pages free; gives why not, or nothing."""
    if not huge_page_size():
        yield "this kernel has no huge pages"
        return
    missing = -(-nbytes // huge_page_size()) - free_huge_pages()
    if missing <= 0:
        yield ""
        return
    before = int(POOL.read_text())
    try:
        POOL.write_text(str(before + missing))
    except OSError as error:
        yield f"{missing} more reserved huge pages are needed, and {POOL} says {error.strerror}"
        return
    try:
        short = -(-nbytes // huge_page_size()) - free_huge_pages()
        yield f"the kernel found {short} huge pages too few" if short > 0 else ""
    finally:
        POOL.write_text(str(before))


def rounds_of(cases: dict[str, Case], nbytes: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Go through the cases in turn, once to warm up; what this machine can not do is left out."""
    samples: dict[str, list[tuple[float, int]]] = {name: [] for name in cases}
    for name, case in list(cases.items()):
        try:
            case(nbytes)
        except md.PageKindError as error:
            print(f"skipped: {name}: {error}")
            del samples[name]
    for _ in range(rounds):
        for name in samples:
            samples[name].append(cases[name](nbytes))
    md.recycler.trim()
    return {
        name: summary([elapsed for elapsed, _ in pairs])
        | {
            "samples_ms": [elapsed for elapsed, _ in pairs],
            "faults_after": max(faults for _, faults in pairs),
        }
        for name, pairs in samples.items()
    }


KIND = md.PageKind
CASES: dict[str, Case] = {
    "memfd": bare_memfd,
    "shared_memory": shm,
    "numpy.empty": numpy_empty,
    "base, fresh": ours(KIND.BASE, again=False),
    "base, again, zeroed": ours(KIND.BASE, again=True),
    "base, again, undefined": ours(KIND.BASE, again=True, contents=UNDEFINED),
    "auto, fresh": ours(KIND.AUTO, again=False),
    "auto, again, zeroed": ours(KIND.AUTO, again=True),
    "auto, again, undefined": ours(KIND.AUTO, again=True, contents=UNDEFINED),
    "transparent, fresh": ours(KIND.TRANSPARENT_HUGE, again=False),
}
RESERVED: dict[str, Case] = {
    "reserved: base, fresh": ours(KIND.BASE, again=False),
    "reserved: huge, fresh": ours(KIND.HUGE, again=False),
    "reserved: huge, again, zeroed": ours(KIND.HUGE, again=True),
    "reserved: huge, again, undefined": ours(KIND.HUGE, again=True, contents=UNDEFINED),
    "reserved: auto, fresh": ours(KIND.AUTO, again=False),
}
# Which must be how many times as fast as which.
TARGETS = [
    ("base, again, zeroed", "base, fresh", 12.0),
    ("base, again, undefined", "base, fresh", 200.0),
    ("reserved: huge, fresh", "reserved: base, fresh", 10.0),
    ("auto, fresh", "base, fresh", 1 / 1.05),
    ("reserved: auto, fresh", "reserved: base, fresh", 1 / 1.05),
]
COLLAPSED = ("auto, fresh", "base, fresh", 4.0)


def targets(results: dict[str, dict[str, Any]]) -> dict[str, bool]:
    wanted = [*TARGETS, COLLAPSED] if "transparent, fresh" in results else TARGETS
    checks = {}
    for fast, slow, factor in wanted:
        if fast not in results or slow not in results:
            print(f"skipped: {fast} against {slow}")
            continue
        ratio = results[slow]["median"] / results[fast]["median"]
        checks[f"{fast}: {ratio:.1f} times as fast as {slow}, at least {factor:.2f} wanted"] = (
            ratio >= factor
        )
    return checks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--short", action="store_true", help="little memory, to see that it runs")
    arguments, _ = parser.parse_known_args()
    nbytes = 4 * MIB if arguments.short else 256 * MIB
    rounds = 2 if arguments.short else arguments.rounds
    results: dict[str, dict[str, Any]] = {}
    if free_huge_pages() * huge_page_size() >= nbytes:
        print("skipped: AUTO without reserved huge pages: this machine has them reserved")
        results |= rounds_of({k: v for k, v in CASES.items() if "auto" not in k}, nbytes, rounds)
    else:
        results |= rounds_of(CASES, nbytes, rounds)
    with pool(nbytes) as denied:
        if denied:
            print(f"skipped: reserved huge pages: {denied}")
        else:
            results |= rounds_of(RESERVED, nbytes, rounds)
    base = results["base, fresh"]["median"]
    for name, row in results.items():
        print(
            f"{name:32} {row['median']:9.3f} ms   p10 {row['p10']:.3f}, p90 {row['p90']:.3f}   "
            f"{base / row['median']:8.1f} x base   {row['faults_after']} faults after"
        )
    checks = targets(results)
    finish("alloc", __doc__ or "", results, {} if arguments.short else checks)


if __name__ == "__main__":
    main()
