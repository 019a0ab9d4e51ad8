"""How long does it take to hand a ready buffer to a connected process?

From the driver's call to the first byte read on the other side. Baselines in the same run: the
bytes through a multiprocessing.Pipe, and multiprocessing.shared_memory (create, copy in, attach by
name). After one hand-over to warm up, ready buffers of the sizes alternate:

* first: never handed over before, so it is sealed, granted and mapped for the first time;
* again: the same buffer once more, at new addresses;
* just built: first, and right after the driver has filled gigabytes of fresh pages, which leaves
  nothing of either program in the processor's caches.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import subprocess
import sys
import tempfile
import time
from multiprocessing import shared_memory
from multiprocessing.connection import Connection

from common import finish, summary

import memdesc as md

MIB = 1 << 20
SIZES = {"1 MiB": MIB, "64 MiB": 64 * MIB, "1 GiB": 1024 * MIB}

CLIENT = """
import sys, time, memdesc as md
with md.connect(sys.argv[1]) as service:
    clock = service.map("clock")  # where this side tells when it had read the first byte
    cells = clock.array(8, "i8")
    while True:
        try:
            mapping = service.wait_mapping(60)
        except md.MemdescError:
            break
        first = memoryview(mapping)[0]
        cells[1] = time.monotonic_ns()
        cells[0] += 1
        mapping.unmap() if first < 0 else None
        del first
"""


def ours(sizes: dict[str, int], rounds: int, repeat: int) -> dict[str, dict[str, list[float]]]:
    times: dict[str, dict[str, list[float]]] = {
        size: {"first": [], "again": [], "just built": []} for size in sizes
    }
    with tempfile.TemporaryDirectory() as folder, md.Service(folder + "/bench") as service:
        clock = md.BufferMemoryDescriptor(64, max_access=md.Access.READ_WRITE, name="clock")
        cells = clock.array(8, "i8")
        service.share("clock", clock)
        child = subprocess.Popen([sys.executable, "-c", CLIENT, service.path])
        client = service.wait_client(10)

        def hand_over(buffer: md.BufferMemoryDescriptor) -> float:
            seen, start = int(cells[0]), time.monotonic_ns()
            mapping = buffer.create_mapping_in_task(client.task)
            while cells[0] == seen:
                time.sleep(0)
            with mapping:
                return (int(cells[1]) - start) / 1e6

        def make(name: str, nbytes: int) -> md.BufferMemoryDescriptor:
            return md.BufferMemoryDescriptor(nbytes, pages=md.PageKind.BASE, name=name)

        warm_up = make("warm-up", 4096)
        for _ in range(rounds):
            ready = {size: make(size, nbytes) for size, nbytes in sizes.items()}
            hand_over(warm_up)
            for size, buffer in ready.items():
                times[size]["first"].append(hand_over(buffer))
            for _ in range(repeat):
                for size, buffer in ready.items():
                    times[size]["again"].append(hand_over(buffer))
            del ready, buffer
            for size, nbytes in sizes.items():
                times[size]["just built"].append(hand_over(make(size, nbytes)))
        child.terminate()
        child.wait()
    return times


def pipe_child(end: Connection, clock: Connection) -> None:
    while end.recv_bytes():
        clock.send(time.monotonic_ns())


def through_pipe(nbytes: int, rounds: int) -> list[float]:
    ours_end, theirs = mp.Pipe()
    clock, clock_end = mp.Pipe()
    child = mp.get_context("spawn").Process(target=pipe_child, args=(theirs, clock_end))
    child.start()
    data = bytes(nbytes)
    times = []
    for _ in range(rounds + 1):
        start = time.monotonic_ns()
        ours_end.send_bytes(data)
        times.append((clock.recv() - start) / 1e6)
    ours_end.send_bytes(b"")
    child.join()
    return times[1:]


def shm_child(end: Connection) -> None:
    while name := end.recv():
        segment = shared_memory.SharedMemory(name)
        first = segment.buf[0]
        end.send(time.monotonic_ns() + 0 * first)
        segment.close()


def through_shared_memory(nbytes: int, rounds: int) -> list[float]:
    end, theirs = mp.Pipe()
    child = mp.get_context("spawn").Process(target=shm_child, args=(theirs,))
    child.start()
    data = bytes(nbytes)
    times = []
    for _ in range(rounds + 1):
        start = time.monotonic_ns()
        segment = shared_memory.SharedMemory(create=True, size=nbytes)
        segment.buf[:nbytes] = data
        end.send(segment.name)
        times.append((end.recv() - start) / 1e6)
        segment.close()
        segment.unlink()
    end.send("")
    child.join()
    return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--short", action="store_true", help="small sizes, to see that it runs")
    arguments, _ = parser.parse_known_args()
    sizes = {"1 MiB": MIB, "16 MiB": 16 * MIB} if arguments.short else SIZES
    rounds = 3 if arguments.short else arguments.rounds
    times = ours(sizes, rounds, repeat=10)
    large = list(sizes)[-1]
    results = {
        f"memdesc, {size}, {kind}": summary(samples) | {"samples_ms": samples}
        for size, kinds in times.items()
        for kind, samples in kinds.items()
    }
    for name, peer in {"Pipe": through_pipe, "shared_memory": through_shared_memory}.items():
        for size in ("1 MiB", list(sizes)[1]):
            samples = peer(sizes[size], rounds)
            results[f"{name}, {size}"] = summary(samples) | {"samples_ms": samples}
    for name, row in results.items():
        print(f"{name:28} {row['median']:10.3f} ms   p10 {row['p10']:.3f}, p90 {row['p90']:.3f}")
    ratios = {
        kind: results[f"memdesc, {large}, {kind}"]["median"]
        / results[f"memdesc, 1 MiB, {kind}"]["median"]
        for kind in ("first", "again")
    }
    print(f"{large} / 1 MiB: first {ratios['first']:.2f}, again {ratios['again']:.2f}")
    results["ratios"] = ratios
    checks = {
        f"{large} takes at most 1.5 times as long as 1 MiB": max(ratios.values()) <= 1.5,
        f"the first hand-over of a ready {large} takes at most 0.5 ms": results[
            f"memdesc, {large}, first"
        ]["median"]
        <= 0.5,
    }
    finish("handover", __doc__ or "", results, checks)


if __name__ == "__main__":
    main()
