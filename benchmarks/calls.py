"""What does a call cost, and 64 MiB of result?

A service in a process of its own. Small: a method that does nothing, one call after the other and
64 in flight. Large: 64 MiB that the service has in an ordinary array, stored in place in the
client's own buffer (`into=`) or taken by value; and 64 MiB that lie in a descriptor there, taken
as those pages. The client reads one byte of each page of what it gets. Baseline in the same run:
the same by a multiprocessing.Pipe, both ways of it (send, and send_bytes with recv_bytes_into).
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from common import finish, summary

import memdesc as md

MIB = 1 << 20
SERVICE = """
import sys, numpy as np, memdesc as md
with md.Service(sys.argv[1]) as service:
    size = int(sys.argv[2])
    private = np.ones(size, "u1")
    frames = md.BufferMemoryDescriptor(size)
    pages = frames.array()
    pages[:] = 1
    service.method(lambda: None, name="nothing")
    service.method(lambda: private, name="private")
    service.method(lambda: pages, name="pages")
    print(flush=True)
    sys.stdin.read()
"""


def timed(work: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each round, after one to warm up."""
    work()
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        samples.append(time.perf_counter() - start)
    return samples


def touched(values: Any) -> int:
    return int(np.frombuffer(values, "u1")[:: md.page_size].sum())


def ours(size: int, small: int, large: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        name = folder + "/bench"
        command = [sys.executable, "-c", SERVICE, name, str(size)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe) as child:
            try:
                assert child.stdout is not None
                child.stdout.readline()
                with md.connect(name) as service:
                    return measured(service, size, small, large)
            finally:
                child.kill()


def measured(service: md.Connection, size: int, small: int, large: int) -> dict[str, list[float]]:
    room = np.ones(size, "u1")

    def in_flight() -> None:
        for call in [service.begin("nothing") for _ in range(64)]:
            call.result(60)

    def in_place() -> None:
        assert service.call("private", into=room, timeout=60) == size
        touched(room)

    several = timed(in_flight, max(small // 64, 5))
    return {
        "small call": timed(lambda: service.call("nothing"), small),
        "small call, 64 in flight": [seconds / 64 for seconds in several],
        "large, in place": timed(in_place, large),
        "large, by value": timed(lambda: touched(service.call("private", timeout=60)), large),
        "large, as its pages": timed(lambda: touched(service.call("pages", timeout=60)), large),
    }


def answer(pipe: Connection, size: int) -> None:
    private = np.ones(size, "u1")
    while (asked := pipe.recv()) != "end":
        if asked == "bytes":
            pipe.send_bytes(private)
        else:
            pipe.send(private if asked == "array" else None)


def by_pipe(size: int, small: int, large: int) -> dict[str, list[float]]:
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=answer, args=(there, size), daemon=True)
    child.start()
    room = np.ones(size, "u1")

    def ask(what: str) -> Any:
        here.send(what)
        return here.recv()

    def in_place() -> None:
        here.send("bytes")
        here.recv_bytes_into(room)
        touched(room)

    times = {
        "small, Pipe": timed(lambda: ask("nothing"), small),
        "large, Pipe in place": timed(in_place, large),
        "large, Pipe": timed(lambda: touched(ask("array")), large),
    }
    here.send("end")
    child.join(30)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a second, with 4 MiB for 64")
    short = parser.parse_known_args()[0].short
    size, small, large = (4 * MIB, 200, 5) if short else (64 * MIB, 5000, 31)
    times = ours(size, small, large) | by_pipe(size, small, large)
    results = {name: summary(samples) for name, samples in times.items()}
    for name, one in results.items():
        scale, unit = (1e6, "us") if name.startswith("small") else (1e3, "ms")
        spread = f"{one['p10'] * scale:8.1f} to {one['p90'] * scale:8.1f}"
        print(f"{name:26} {one['median'] * scale:8.1f} {unit}  ({spread})")
    median = {name: one["median"] for name, one in results.items()}
    checks = {} if short else judged(median)
    finish("calls", str(__doc__).splitlines()[0], results | {"bytes": size}, checks)


def judged(median: dict[str, float]) -> dict[str, bool]:
    return {
        "a small call takes less than 250 us": median["small call"] < 250e-6,
        "in place takes less than half of what a Pipe takes, in place too": (
            2 * median["large, in place"] < median["large, Pipe in place"]
        ),
        "by value it takes less than by a Pipe": median["large, by value"] < median["large, Pipe"],
        "pages of a descriptor take less than half of a copy by value": (
            2 * median["large, as its pages"] < median["large, by value"]
        ),
    }


if __name__ == "__main__":
    main()
