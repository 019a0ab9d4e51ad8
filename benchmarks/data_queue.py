"""How many entries a second go from one Python process to another, and how long is a round trip?

A parent and a forked child, entries of 64 bytes and of 4 KiB, in a queue of 1 MiB:

* rate: the child puts entries in for a while, the parent takes them out; one at a time, and in
  batches of 256 (a Pipe and a multiprocessing.Queue have no batches);
* round trip: the parent puts one in, the child gives it back, one at a time. `queue` spins for the
  default time before it sleeps, `queue, asleep` not at all.

Rounds of all of them alternate. CPU time is that of both processes. What holds: in batches of 64
bytes at least 3 million entries a second; more of both sizes than a Pipe; a shorter round trip.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from typing import Any

from common import finish, summary

import memdesc as md

CAPACITY = 1 << 20
BATCH = 256
SIZES = (64, 4096)
Ends = tuple[Callable[[bytes], object], Callable[[], Any]]


class Queue:
    """Our queue, one entry at a time."""

    spin = 50e-6
    more = 1  # times as many entries, so that starting the child weighs little

    def __init__(self) -> None:
        self.memory = md.create_data_queue(CAPACITY)

    def sender(self) -> Callable[[bytes], object]:
        self.end: Any = md.Producer(self.memory, spin=self.spin)
        return self.end.enqueue

    def receiver(self) -> Callable[[], Any]:
        self.end = md.Consumer(self.memory, spin=self.spin)
        return self.end.dequeue

    def send_all(self, entry: bytes, count: int) -> None:
        send = self.sender()
        for _ in range(count):
            send(entry)

    def receive_all(self, count: int) -> None:
        receive = self.receiver()
        for _ in range(count):
            receive()

    def close(self) -> None:
        self.memory.close()


class Batches(Queue):
    """Our queue, many at a time."""

    more = 10

    def send_all(self, entry: bytes, count: int) -> None:
        self.sender()
        entries = [entry] * BATCH
        for _ in range(count // BATCH):
            self.end.enqueue_many(entries)

    def receive_all(self, count: int) -> None:
        self.receiver()
        left = count // BATCH * BATCH
        while left:
            left -= len(self.end.dequeue_many())


class Asleep(Queue):
    spin = 0.0


class Pipe(Queue):
    def __init__(self) -> None:
        self.reader, self.writer = multiprocessing.Pipe(duplex=False)

    def sender(self) -> Callable[[bytes], object]:
        return self.writer.send_bytes

    def receiver(self) -> Callable[[], Any]:
        return self.reader.recv_bytes

    def close(self) -> None:
        self.reader.close()
        self.writer.close()


class MultiprocessingQueue(Queue):
    def __init__(self) -> None:
        self.queue: multiprocessing.Queue[bytes] = multiprocessing.Queue()

    def sender(self) -> Callable[[bytes], object]:
        return self.queue.put

    def receiver(self) -> Callable[[], Any]:
        return self.queue.get

    def close(self) -> None:
        self.queue.close()
        self.queue.join_thread()


RATES: dict[str, type[Queue]] = {
    "queue, batches": Batches,
    "queue": Queue,
    "Pipe": Pipe,
    "multiprocessing.Queue": MultiprocessingQueue,
}
TRIPS: dict[str, type[Queue]] = {
    "queue": Queue,
    "queue, asleep": Asleep,
    "Pipe": Pipe,
    "multiprocessing.Queue": MultiprocessingQueue,
}


def cpu_time() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def beside(work: Callable[[], None], own: Callable[[], None]) -> tuple[float, float]:
    """Run both, one in a child: seconds that it took here, CPU seconds of both."""
    context = multiprocessing.get_context("fork")
    child = context.Process(target=work)
    before = cpu_time()
    child.start()
    start = time.perf_counter()
    own()
    seconds = time.perf_counter() - start
    child.join()
    assert child.exitcode == 0, f"the child ended with {child.exitcode}"
    return seconds, cpu_time() - before


def rate(kind: type[Queue], size: int, count: int) -> tuple[float, float]:
    """Entries a second, and CPU microseconds an entry."""
    queue = kind()
    entry = bytes(size)
    count *= kind.more
    work = beside(lambda: queue.send_all(entry, count), lambda: queue.receive_all(count))
    queue.close()
    return count / work[0], work[1] / count * 1e6


def trip(kind: type[Queue], size: int, count: int) -> tuple[float, float]:
    """Microseconds a round trip, and CPU microseconds of it."""
    there, back = kind(), kind()
    entry = bytes(size)

    def give_back() -> None:
        receive, send = there.receiver(), back.sender()
        for _ in range(count):
            send(receive())

    def ask() -> None:
        send, receive = there.sender(), back.receiver()
        for _ in range(count):
            send(entry)
            receive()

    seconds, cpu = beside(give_back, ask)
    there.close()
    back.close()
    return seconds / count * 1e6, cpu / count * 1e6


def measure(rounds: int, entries: int, trips: int) -> dict[str, Any]:
    samples: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for size in SIZES:
            for name, kind in RATES.items():
                samples.setdefault(f"rate {size} {name}", []).append(rate(kind, size, entries))
            for name, kind in TRIPS.items():
                samples.setdefault(f"trip {size} {name}", []).append(trip(kind, size, trips))
    return {
        name: summary([value for value, _ in pairs])
        | {"cpu_us": summary([cpu for _, cpu in pairs])["median"], "samples": pairs}
        for name, pairs in samples.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--short", action="store_true", help="few entries, to see that it runs")
    arguments, _ = parser.parse_known_args()
    counts = (2, 5_120, 200) if arguments.short else (arguments.rounds, 102_400, 5_000)
    results = measure(*counts)
    print(f"{len(os.sched_getaffinity(0))} CPUs, unpinned")
    for name, row in results.items():
        unit = "entries/s" if name.startswith("rate") else "us a round trip"
        print(f"{name:32} {row['median']:14,.1f} {unit:16} {row['cpu_us']:8.2f} us CPU")

    def better(what: str, size: int) -> bool:
        ours, pipe = (results[f"{what} {size} {who}"]["median"] for who in ("queue", "Pipe"))
        return bool(ours > pipe if what == "rate" else ours < pipe)

    checks = {
        "at least 3 million entries of 64 bytes a second in batches": results[
            "rate 64 queue, batches"
        ]["median"]
        >= 3e6
    }
    for size in SIZES:
        checks[f"more entries of {size} bytes a second than a Pipe"] = better("rate", size)
        checks[f"a shorter round trip of {size} bytes than a Pipe"] = better("trip", size)
    finish("data_queue", __doc__ or "", results, checks)


if __name__ == "__main__":
    main()
