"""How fast does a disk fill one descriptor that other processes share?

O_DIRECT reads of a file of 256 MiB into a descriptor of that size, in blocks of 4 KiB, 64 KiB and
1 MiB, one after the other and in random order, with 1, 8 and 32 requests in flight:

* memdesc: `DirectFile.read_into` (one after the other) and `read_many` (random), registered, into
  huge pages where there are any: a block of 1 MiB is one run of memory then, else up to 256;
* base pages: the same, into pages of 4 KiB. For comparison; nothing is asked of it;
* fio: its io_uring engine, with registered buffers and files, into buffers of its own. It keeps
  no block: it reads into the same few buffers all the time;
* readinto: of a plain file, the page cache emptied of it before.

Rounds of all of them alternate. What holds: at least 0.95 of fio's bytes a second at 64 KiB and
above, at least 0.8 at 4 KiB; and the bytes are those of the file. The CPU time is that of the whole
process, as a share of the time taken.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import finish, summary

import memdesc as md

KIB, MIB = 1 << 10, 1 << 20
Sample = tuple[float, float]
"""MiB a second, and the share of a CPU."""


def make_file(folder: Path, nbytes: int) -> tuple[Path, str]:
    path, digest = folder / "disk.bin", hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(0, nbytes, MIB):
            block = os.urandom(MIB)
            digest.update(block)
            file.write(block)
        os.fsync(file.fileno())
    return path, digest.hexdigest()


def timed(action: Callable[[], object], nbytes: int) -> Sample:
    cpu, start = time.process_time(), time.perf_counter()
    action()
    took = time.perf_counter() - start
    return nbytes / MIB / took, (time.process_time() - cpu) / took


def by_memdesc(
    path: Path, into: md.MemoryDescriptor, block: int, depth: int, order: str, nbytes: int
) -> Sample:
    size = into.length
    with md.dma.DirectFile(path, queue_depth=depth, block_size=block, register=True) as disk:
        result = disk.read_into(into, length=block)  # registers, as fio does before its clock
        assert result.bounced_bytes == 0, result
        if order == "sequential":
            return timed(lambda: disk.read_into(into, length=nbytes), nbytes)
        offsets = random.sample(range(0, size, block), nbytes // block)
        asks = [(into, offset, block, offset) for offset in offsets]
        return timed(lambda: disk.read_many(asks), nbytes)


def by_fio(path: Path, size: int, block: int, depth: int, order: str, nbytes: int) -> Sample | None:
    """None where fio can not: it registers its buffers, which RLIMIT_MEMLOCK may forbid."""
    command = [
        "fio",
        "--name=disk",
        f"--filename={path}",
        "--ioengine=io_uring",
        "--fixedbufs=1",
        "--registerfiles=1",
        "--direct=1",
        "--thread",
        f"--rw={'read' if order == 'sequential' else 'randread'}",
        f"--bs={block}",
        f"--iodepth={depth}",
        f"--size={size}",
        f"--io_size={nbytes}",
        "--output-format=json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        print(f"fio, {block // KIB} KiB, depth {depth}: {done.stderr.strip().splitlines()[-1:]}")
        return None
    (job,) = json.loads(done.stdout)["jobs"]
    share = (job["usr_cpu"] + job["sys_cpu"]) / 100
    return job["read"]["bw_bytes"] / MIB, share


def by_readinto(path: Path, into: md.MemoryDescriptor, block: int, nbytes: int) -> Sample:
    view = memoryview(into)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        def read() -> None:
            for at in range(0, nbytes, block):
                file.readinto(view[at : at + block])

        return timed(read, nbytes)


def buffer(size: int, pages: md.PageKind) -> md.BufferMemoryDescriptor:
    return md.BufferMemoryDescriptor(size, pages=pages, recycle=False, name="disk")


def huge_or_not(size: int) -> md.BufferMemoryDescriptor:
    try:
        return buffer(size, md.PageKind.TRANSPARENT_HUGE)
    except md.PageKindError:
        return buffer(size, md.PageKind.AUTO)


def measure(
    path: Path, digest: str, size: int, cases: list[tuple[str, int, int]], rounds: int, fio: bool
) -> tuple[dict[str, Any], bool]:
    """Every case by every means, round by round: (results by case, whether the bytes are equal)."""
    samples: dict[str, dict[str, list[Sample]]] = {}
    equal = True
    with huge_or_not(size) as into, buffer(size, md.PageKind.BASE) as base:
        print(f"read into {into.huge_bytes // MIB} MiB of huge pages, and into base pages")
        for turn in range(rounds):
            for order, block, depth in cases:
                nbytes = size if block > 4 * KIB or depth > 1 else size // 8
                ways = samples.setdefault(f"{order}, {block // KIB} KiB, depth {depth}", {})
                whole = nbytes == size and turn == 0
                for way, memory in (("memdesc", into), ("base pages", base)):
                    if whole:
                        memoryview(memory)[:] = bytes(size)
                    ways.setdefault(way, []).append(
                        by_memdesc(path, memory, block, depth, order, nbytes)
                    )
                    if whole:
                        equal &= hashlib.sha256(memory).hexdigest() == digest
                sample = by_fio(path, size, block, depth, order, nbytes) if fio else None
                if sample is not None:
                    ways.setdefault("fio", []).append(sample)
                if order == "sequential" and depth == 1:
                    ways.setdefault("readinto", []).append(by_readinto(path, into, block, nbytes))
    return {case: summed(ways) for case, ways in samples.items()}, equal


def summed(ways: dict[str, list[Sample]]) -> dict[str, Any]:
    rows: dict[str, Any] = {
        way: summary([speed for speed, _ in samples])
        | {"cpu": summary([cpu for _, cpu in samples])["median"], "samples": samples}
        for way, samples in ways.items()
    }
    for other in ("fio", "readinto", "base pages"):
        if other in rows:
            # Round by round: what one round meets, the other meets too.
            ratios = [
                ours[0] / theirs[0]
                for ours, theirs in zip(ways["memdesc"], ways[other], strict=False)
            ]
            rows[f"of {other}"] = summary(ratios)["median"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="few blocks, to see that it runs")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    arguments, _ = parser.parse_known_args()
    short = arguments.short
    size = (8 if short else 256) * MIB
    blocks, depths = ([4, 1024], [8]) if short else ([4, 64, 1024], [1, 8, 32])
    cases = [
        (order, block * KIB, depth)
        for order in ("sequential", "random")
        for block in blocks
        for depth in depths
    ]
    fio = shutil.which("fio") is not None
    if not fio:
        print("fio is not installed: nothing to compare with but readinto")
    with tempfile.TemporaryDirectory(dir=arguments.folder or ".") as folder:
        path, digest = make_file(Path(folder), size)
        rounds = 1 if short else arguments.rounds
        results, equal = measure(path, digest, size, cases, rounds, fio)
    checks = {"the bytes are those of the file": equal}
    for case, rows in results.items():
        text = "   ".join(
            f"{way} {rows[way]['median']:7.0f} MiB/s, CPU {rows[way]['cpu']:4.2f}"
            for way in ("memdesc", "base pages", "fio", "readinto")
            if way in rows
        )
        ratio = rows.get("of fio")
        print(f"{case:32} {text}" + (f"   {ratio:.2f} of fio" if ratio else ""))
        if ratio:
            least = 0.8 if ", 4 KiB" in case else 0.95
            checks[f"{case}: at least {least} of fio"] = ratio >= least
    finish("disk", __doc__ or "", results, checks)


if __name__ == "__main__":
    main()
