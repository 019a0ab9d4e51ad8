"""The programs of the comparison, each a process of its own: a driver, and clients that work.

    python -m memdesc.cli.demo_worker driver WAY SERVICE CLIENTS [FD ...]
    python -m memdesc.cli.demo_worker client WAY SERVICE JOB [FD]

WAY is memdesc, pipe or shared_memory; JOB is sha256 or histogram; FD is an end of a
multiprocessing.Pipe. Each answers requests on its standard input; see `demo_processes`.
"""

from __future__ import annotations

import hashlib
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from memdesc import _core
from memdesc.cli import demo_ways as ways
from memdesc.cli.demo_processes import Answer, say, serve

_STEP = 8 << 20
_CHUNK = 1 << 18  # bincount makes eight times as much of it: keep that in the cache

Tell = Callable[[int], None]


def driver(way: str, name: str, clients: str, *fds: str) -> None:
    """Fill and give, when told to."""
    with ExitStack() as stack:
        side: Any
        if way == "memdesc":
            side = ways.MemdescDriver(name, int(clients), stack)
        else:
            pipes = [stack.enter_context(ways.Pipe(int(fd))) for fd in fds]
            side = ways.PipeDriver(pipes) if way == "pipe" else ways.SegmentDriver(pipes)

        def fill(paths: list[str]) -> Answer:
            begun = time.monotonic_ns()
            side.fill([Path(path) for path in paths])
            answer: Answer = {"ns": time.monotonic_ns() - begun}
            if way == "memdesc":
                answer["ways"] = sorted({one.way.value for one in side.inputs})
                answer["bounced"] = sum(one.bounced_bytes for one in side.inputs)
            return answer

        def give() -> Answer:
            side.copied = 0
            before = _Usage()
            begun = time.monotonic_ns()
            side.give()
            return {
                "begun": begun,
                "copied": side.copied,
                "places": side.places(),
                "names": side.names() if way == "shared_memory" else [],
                **before.until_now(),
            }

        def drop() -> Answer:
            side.drop()
            lost, side.lost = side.lost, []
            return {"lost": lost}

        say({"ready": True})
        serve({"fill": fill, "give": give, "drop": drop})


def client(way: str, name: str, job: str, *fds: str) -> None:
    """Take what the driver gives and work on it, when told to."""
    work_on = _make_job(job)
    with ExitStack() as stack:
        side: ways.ClientSide
        if way == "memdesc":
            side = ways.MemdescClient(name, stack)
        else:
            pipe = stack.enter_context(ways.Pipe(int(fds[0])))
            side = ways.PipeClient(pipe) if way == "pipe" else ways.SegmentClient(pipe)

        def work(count: int, stop: bool = False) -> Answer:
            before = _Usage()
            firsts, results, places = [], [], []
            for data in side.take(count):
                data[0]
                firsts.append(time.monotonic_ns())
                places.append(_core.buffer_address(data)[:2])
                results.append(work_on(data, _stop_here if stop else _tell))
            ended = time.monotonic_ns()
            return {
                "first": firsts[0],
                "ended": ended,
                "results": results,
                "places": places,
                **before.until_now(),
            }

        def drop() -> Answer:
            side.drop()
            return {}

        say({"ready": True})
        serve({"work": work, "drop": drop})


class _Usage:
    """What this process has used, as the kernel counts: minor faults, bytes read and written."""

    def __init__(self) -> None:
        self.faults, self.through = self._read()

    @staticmethod
    def _read() -> tuple[int, int]:
        try:
            with open("/proc/self/io") as file:
                fields = dict(line.split(": ") for line in file.read().splitlines())
        except FileNotFoundError:  # a kernel without task accounting
            fields = {}
        through = int(fields.get("rchar", 0)) + int(fields.get("wchar", 0))
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt, through

    def until_now(self) -> Answer:
        """Give what was used since; `through_kernel` is 0 where the kernel does not count it."""
        faults, through = self._read()
        return {"faults": faults - self.faults, "through_kernel": through - self.through}


def _tell(nbytes: int) -> None:
    say({"progress": nbytes})


def _stop_here(nbytes: int) -> None:
    """In the middle of the work, with the data at hand: tell so, and wait to be killed."""
    say({"stopped": True})
    signal.pause()


def _sha256(data: memoryview, tell: Tell) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(data), _STEP):
        piece = data[start : start + _STEP]
        digest.update(piece)  # without the GIL, in the shared pages themselves
        tell(len(piece))
    return digest.hexdigest()


def _histogram(data: memoryview, tell: Tell) -> list[int]:
    import numpy as np

    counts = np.zeros(256, np.int64)
    for start in range(0, len(data), _STEP):
        piece = np.frombuffer(data[start : start + _STEP], "u1")
        for at in range(0, len(piece), _CHUNK):
            counts += np.bincount(piece[at : at + _CHUNK], minlength=256)
        tell(len(piece))
    return [int(count) for count in counts]


def _make_job(name: str) -> Callable[[memoryview, Tell], str | list[int]]:
    """Give the job, with all that it must import before the clock runs."""
    if name == "sha256":
        return _sha256
    _histogram(memoryview(b"warm"), lambda nbytes: None)
    return _histogram


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    {"driver": driver, "client": client}[role](*arguments)
