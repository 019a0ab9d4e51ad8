"""How many messages a second go from one Python process to another, and how long is one under way?

Two children of one process, which have met and warmed up before the clock starts:

* rate: one sends for a while, the other receives, unpinned; messages of 64 and of 4,096 bytes. Our
  queue one entry at a time, and in batches of 256; the others have no batches.
* hop: 64 bytes there and back, one message at a time, half of the time that both take. Pinned to
  two CPUs ("apart"); for our queue as it comes, which spins and then sleeps, also on one CPU, not
  pinned, and apart while two programs that never rest want the same CPUs ("busy").

Beside them the least that can be done: a word in shared memory on which Python spins (`BareSpin` in
trips.py), and a futex on which C sleeps (futex.c). What is to sleep apart is played again where
less than nine of ten hops slept: two that answer at once can meet awake for a whole round.

Rounds of all alternate, and ratios are taken within a round. CPU time is that of both processes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Behind the standard library: from in front, this folder would be its `queue`.
sys.path.append(str(Path(__file__).parents[1]))

from common import finish, summary
from pairs import CPUs, beside, busy
from trips import MESSAGE, BareSpin, FutexInC, Trip, library
from ways import (
    BATCH,
    Asleep,
    Batches,
    Iceoryx,
    IceoryxEvents,
    MultiprocessingQueue,
    Pipe,
    Queue,
    Spinning,
    Way,
    Zmq,
)

Sample = dict[str, float]

RATES: dict[str, type[Way]] = {
    "queue, batches": Batches,
    "queue": Queue,
    "iceoryx2": Iceoryx,
    "Pipe": Pipe,
    "multiprocessing.Queue": MultiprocessingQueue,
    "pyzmq": Zmq,
}


@dataclass(frozen=True, slots=True)
class Row:
    """What makes a trip, times as many of them a round, and whether each hop should sleep."""

    make: Callable[[], Trip]
    weight: float = 0.1
    asleep: bool = False


TRIPS = {
    "bare spin in Python": Row(BareSpin, 1),
    "queue, spinning": Row(lambda: Trip(Spinning), 1),
    "queue, as it comes": Row(lambda: Trip(Queue), 1),
    "iceoryx2, polling": Row(lambda: Trip(Iceoryx), 0.2),
    "futex in C": Row(FutexInC, 0.2, asleep=True),
    "queue, sleeping": Row(lambda: Trip(Asleep), 0.2, asleep=True),
    "iceoryx2, events": Row(lambda: Trip(IceoryxEvents)),
    "Pipe": Row(lambda: Trip(Pipe)),
    "multiprocessing.Queue": Row(lambda: Trip(MultiprocessingQueue)),
    "pyzmq": Row(lambda: Trip(Zmq)),
}
EVERYWHERE = ("queue, as it comes", "queue, sleeping", "futex in C", "Pipe")


def rate(kind: type[Way], size: int, count: int) -> Sample:
    """Messages a second, and microseconds of CPU a message."""
    way, message = kind(size), bytes(size)
    count = int(count * kind.weight) // BATCH * BATCH + BATCH

    def put() -> Iterator[int]:
        send = way.sender()
        for part in (BATCH, count):
            yield way.sleeps()
            way.send_all(send, message, part)
        yield way.sleeps()
        del send
        way.leave()

    def take() -> Iterator[int]:
        receive = way.receiver()
        for part in (BATCH, count):
            yield way.sleeps()
            way.receive_all(receive, part)
        yield way.sleeps()
        del receive
        way.leave()

    with closing(way):
        taker, putter = beside(take, put, (None, None))
    return {"value": count / taker.seconds, "cpu_us": (taker.cpu + putter.cpu) / count * 1e6}


def hop(row: Row, count: int, cpus: CPUs) -> Sample:
    """Microseconds a hop, microseconds of CPU, and which part of the hops slept."""
    count = int(count * row.weight) + 1
    warm = count // 10 + 1
    trip = row.make()

    def play(open_: Callable[[], None], go_on: Callable[[int, int], None]) -> Iterator[int]:
        open_()
        yield trip.sleeps()
        go_on(1, warm)
        yield trip.sleeps()
        go_on(1 + warm, count)
        yield trip.sleeps()
        trip.leave()

    with closing(trip):
        asking, answering = beside(
            lambda: play(trip.open_asking, trip.ask),
            lambda: play(trip.open_answering, trip.answer),
            cpus,
        )
    hops = 2 * count
    return {
        "value": asking.seconds / hops * 1e6,
        "cpu_us": (asking.cpu + answering.cpu) / hops * 1e6,
        "slept": (asking.sleeps + answering.sleeps) / hops,
    }


def hop_asleep(row: Row, count: int, cpus: CPUs) -> Sample:
    """As `hop`, until nearly all hops slept; what still did not is told by `slept`."""
    for _ in range(10):
        sample = hop(row, count, cpus)
        if sample["slept"] >= 0.9:
            break
    return sample


def places() -> dict[str, CPUs]:
    """Where the two run."""
    cpus = sorted(os.sched_getaffinity(0))
    here: dict[str, CPUs] = {"one CPU": (cpus[0], cpus[0]), "unpinned": (None, None)}
    apart = (cpus[0], cpus[1]) if len(cpus) > 1 else None
    return here if apart is None else {"apart": apart} | here | {"busy": apart}


def missing() -> dict[str, str]:
    """Rows that can not be had here, and what they lack."""
    ways = {"iceoryx2": Iceoryx, "iceoryx2, polling": Iceoryx, "iceoryx2, events": IceoryxEvents}
    lacks = {
        name: way.package for name, way in (ways | {"pyzmq": Zmq}).items() if not way.installed()
    }
    return lacks | ({} if library() else {"futex in C": "gcc"})


def one_round(entries: int, trips: int, lacks: dict[str, str]) -> Iterator[tuple[str, Sample]]:
    for size in (len(MESSAGE), 4096):
        for name, kind in RATES.items():
            if name not in lacks:
                count = entries if size == len(MESSAGE) else entries // 8
                yield f"rate {size}, {name}", rate(kind, size, count)
    for place, cpus in places().items():
        with busy(cpus) if place == "busy" else nullcontext():
            for name, row in TRIPS.items():
                if name not in lacks and (place == "apart" or name in EVERYWHERE):
                    play = hop_asleep if row.asleep and place == "apart" else hop
                    yield f"hop {place}, {name}", play(row, trips, cpus)


def measure(rounds: int, entries: int, trips: int, lacks: dict[str, str]) -> dict[str, Any]:
    samples: dict[str, list[Sample]] = {}
    for _ in range(rounds):
        for name, sample in one_round(entries, trips, lacks):
            samples.setdefault(name, []).append(sample)
    return {
        name: summary([sample["value"] for sample in many])
        | {
            key: summary([sample[key] for sample in many])["median"]
            for key in ("cpu_us", "slept")
            if key in many[0]
        }
        | {"samples": many}
        for name, many in samples.items()
    }


def ratios(results: dict[str, Any]) -> dict[str, Any]:
    """Of two rows in the same round, with their spread."""
    ours, hop = "rate 64, queue", "hop apart, "
    pairs = {
        f"rate, queue / {name}": (ours, f"rate 64, {name}")
        for name in ("iceoryx2", "Pipe", "multiprocessing.Queue", "pyzmq")
    } | {
        f"hop, {mine} / {theirs}": (hop + mine, hop + theirs)
        for mine, theirs in (
            ("queue, spinning", "iceoryx2, polling"),
            ("queue, spinning", "bare spin in Python"),
            ("queue, sleeping", "futex in C"),
            ("queue, sleeping", "Pipe"),
        )
    }
    return {
        name: summary(
            [
                one["value"] / other["value"]
                for one, other in zip(
                    results[first]["samples"], results[second]["samples"], strict=True
                )
            ]
        )
        for name, (first, second) in pairs.items()
        if first in results and second in results
    }


def checks(results: dict[str, Any]) -> dict[str, bool]:
    """What has to hold, as far as what it is measured against is here."""
    bounds = {
        "rate, queue / iceoryx2": (3.0, True),
        "rate, queue / Pipe": (1.0, True),
        "rate, queue / multiprocessing.Queue": (1.0, True),
        "rate, queue / pyzmq": (1.0, True),
        "hop, queue, spinning / iceoryx2, polling": (0.3, False),
        "hop, queue, spinning / bare spin in Python": (1.3, False),
        "hop, queue, sleeping / futex in C": (1.15, False),
    }
    held = {"at least 3 million messages of 64 bytes a second in batches": False}
    held = dict.fromkeys(held, results["rate 64, queue, batches"]["median"] >= 3e6)
    for name, (bound, least) in bounds.items():
        if name not in results:
            print(f"not measured here: {name}")
            continue
        median = results[name]["median"]
        word = "at least" if least else "at most"
        held[f"{name}: {word} {bound}"] = median >= bound if least else median <= bound
    return held


def show(results: dict[str, Any], compared: dict[str, Any]) -> None:
    for name, row in results.items():
        unit = "a second" if name.startswith("rate") else "us"
        spread = f"{row['p10']:,.2f} ... {row['p90']:,.2f}"
        slept = f"  {row['slept']:4.0%} slept" if row.get("slept", 0) > 0.01 else ""
        print(
            f"{name:38} {row['median']:14,.2f} {unit:8} ({spread})"
            f" {row['cpu_us']:7.2f} us CPU{slept}"
        )
    for name, row in compared.items():
        print(f"{name:46} {row['median']:6.2f} ({row['p10']:.2f} ... {row['p90']:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--short", action="store_true", help="few messages, to see that it runs")
    arguments, _ = parser.parse_known_args()
    lacks = missing()
    for name, package in lacks.items():
        print(f"{name}: {package} is not installed")
    if "apart" not in places():
        print("one CPU: nothing runs apart")
    counts = (1, 1_000, 200) if arguments.short else (arguments.rounds, 100_000, 20_000)
    results = measure(*counts, lacks)
    compared = ratios(results)
    show(results, compared)
    finish("queue", __doc__ or "", results | compared, checks(results | compared))


if __name__ == "__main__":
    main()
