"""How long does a snapshot of 1 GiB take without copying, against copying the bytes?

Baselines in the same run: copying by hand into a warm buffer that exists already (numpy.copyto),
and a snapshot that has to copy (its source was granted), into recycled memory.

* free: the first snapshot of a buffer that nobody else saw;
* 1% changed: a second one after 1% of the pages changed, one after the other;
* scattered: a second one after every 64th page changed: too many extents, so all is copied;
* a store: to a page that source and snapshot share, for the first time (it is copied then), and
  again; beside it the same on a buffer without a snapshot.

Memory is what the objects and the private pages of this process take afterwards, in all.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from alloc import pool
from common import finish, summary

import memdesc as md
from memdesc.vm.regions import task_status

MIB = 1 << 20
ROUNDS = 7
Samples = dict[str, list[float]]


def timed(what: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = what()
    return (time.perf_counter() - start) * 1e3, result


def memory_of(*descriptors: md.MemoryDescriptor) -> int:
    """Bytes that several descriptors take together: their objects, and private pages over them."""
    blocks = {}
    for descriptor in descriptors:
        for extent in getattr(descriptor, "_parts", ()) or descriptor._extents(0, 1, md.Access(1)):
            fd = extent.object.open(md.Access.READ_ONLY)
            status = os.fstat(fd)
            os.close(fd)
            huge = extent.object.page_size > md.page_size
            blocks[status.st_ino] = extent.object.size if huge else status.st_blocks * 512
    return sum(blocks.values())


def anonymous() -> int:
    with md.Task.current() as task:
        return task_status(task).anonymous


def filled(nbytes: int, pages: md.PageKind) -> md.BufferMemoryDescriptor:
    buffer = md.BufferMemoryDescriptor(nbytes, pages=pages, name="source")
    buffer.array(nbytes, "u1").fill(7)
    return buffer


def copies(samples: Samples, nbytes: int, pages: md.PageKind) -> None:
    source, target = filled(nbytes, pages), filled(nbytes, pages)
    elapsed, _ = timed(lambda: np.copyto(target.array(), source.array()))
    samples["copied by hand"].append(elapsed)
    os.close(source.memory.grant(md.Access.READ_ONLY, user=os.geteuid()))
    target.close()
    kept = md.recycler.statistics().kept_bytes
    elapsed, frozen = timed(source.snapshot)
    assert frozen.copied_bytes == nbytes
    key = "copied snapshot" if kept >= nbytes else "copied snapshot, fresh memory"
    samples[key].append(elapsed)
    samples["memory, copied"].append((memory_of(frozen) + nbytes) / MIB)
    frozen.close()
    source.close()
    md.recycler.trim()


def stores(array: Any, step: int, count: int) -> float:
    """Microseconds for a store to each of `count` pages."""
    cells = array[: count * step : step]
    elapsed, _ = timed(lambda: cells.fill(1))
    return elapsed * 1e3 / count


def shares(samples: Samples, nbytes: int, pages: md.PageKind) -> None:
    source = filled(nbytes, pages)
    array, step = source.array(nbytes, "u1"), source.memory.page_size
    count = min(4096, nbytes // step // 8)
    samples["a store, us: no snapshot"].append(stores(array, step, count))
    before = anonymous()
    elapsed, frozen = timed(source.snapshot)
    assert frozen.copied_bytes == 0, frozen.reason
    samples["free"].append(elapsed)
    samples["memory, free"].append((memory_of(frozen) + anonymous() - before) / MIB)
    changed = max(nbytes // 100 // step, 1) * step
    array[nbytes // 2 : nbytes // 2 + changed].fill(9)
    elapsed, second = timed(source.snapshot)
    assert second.reason is md.SnapshotReason.CHANGED
    samples["1% changed"].append(elapsed)
    samples["memory, free and 1% changed"].append(
        (memory_of(frozen, second) + anonymous() - before) / MIB
    )
    second.close()
    samples["a store, us: first"].append(stores(array, step, count))
    samples["a store, us: again"].append(stores(array, step, count))
    if nbytes // step // 64 > 500:
        array[:: 64 * step] = 3
        elapsed, third = timed(source.snapshot)
        assert third.reason is md.SnapshotReason.SCATTERED
        samples["scattered"].append(elapsed)
        third.close()
    frozen.close()
    del array
    source.close()


def measure(nbytes: int, pages: md.PageKind, rounds: int) -> dict[str, dict[str, Any]]:
    samples: Samples = defaultdict(list)
    for number in range(rounds + 1):
        for case in (copies, shares):
            case(samples, nbytes, pages)
        if number == 0:  # to warm up
            samples.clear()
    return {
        f"{pages.value}: {name}": summary(values) | {"samples": values}
        for name, values in samples.items()
    }


def targets(results: dict[str, Any], pages: md.PageKind, factor: float) -> dict[str, bool]:
    checks = {}
    for name, wanted in (("free", factor), ("1% changed", 10.0)):
        for slow in ("copied by hand", "copied snapshot"):
            row = results.get(f"{pages.value}: {slow}")
            if row is None:
                print(f"skipped: {slow}: nothing was recycled")
                continue
            ratio = row["median"] / results[f"{pages.value}: {name}"]["median"]
            met = "met" if ratio >= wanted else "not met"
            text = f"{pages.value} pages, {name}: {ratio:.1f} times as fast as {slow}, "
            checks[text + f"at least {wanted:.1f} wanted: {met}"] = ratio >= wanted
    return checks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--short", action="store_true", help="small sizes, to see that it runs")
    arguments, _ = parser.parse_known_args()
    nbytes = 64 * MIB if arguments.short else 1024 * MIB
    rounds = 1 if arguments.short else arguments.rounds
    md.recycler.configure(limit=nbytes)
    results = measure(nbytes, md.PageKind.BASE, rounds)
    checks = targets(results, md.PageKind.BASE, 1.2)
    with pool(3 * nbytes) as lacking:
        if lacking:
            print(f"skipped: huge pages: {lacking}")
        else:
            results |= measure(nbytes, md.PageKind.HUGE, rounds)
            checks |= targets(results, md.PageKind.HUGE, 20.0)
        md.recycler.trim()
    for name, row in results.items():
        unit = "MiB" if "memory" in name else "us" if "store" in name else "ms"
        spread = f"p10 {row['p10']:.3f}, p90 {row['p90']:.3f}"
        print(f"{name:34} {row['median']:10.3f} {unit:3}  {spread}")
    finish("snapshot", __doc__ or "", results, checks)


if __name__ == "__main__":
    main()
