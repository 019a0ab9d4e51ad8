"""Two processes that are ready at the same time, each timed in itself."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

PATIENCE = 120.0  # seconds

# Stops when it is ready, when it has warmed up, and when it is done, each time with how often it
# has slept; then lets go of what it has.
Body = Callable[[], Iterator[int]]
CPUs = tuple[int | None, int | None]


@dataclass(frozen=True, slots=True)
class Span:
    """Of what came after warming up: seconds, seconds of the CPU, and how often it slept."""

    seconds: float
    cpu: float
    sleeps: int


def cpu_time() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def settle(cpu: int | None) -> None:
    """Stay on a CPU, and end with the parent, also where that is killed."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})


def play(body: Body, cpu: int | None, parent: Any) -> None:
    settle(cpu)
    steps = body()
    for _ in range(2):  # it is ready, it is warm; so is the other
        slept = next(steps)
        parent.send(None)
        parent.recv()
    used, begin = cpu_time(), time.perf_counter()
    slept = next(steps) - slept
    seconds = time.perf_counter() - begin
    parent.send(Span(seconds, cpu_time() - used, slept))
    parent.recv()  # the other has all that came from here
    next(steps, None)


def heard(child: Any) -> Any:
    assert child.poll(PATIENCE), f"a child said nothing for {PATIENCE} s"
    return child.recv()


def go_on(children: list[Any]) -> None:
    for child in children:
        child.send(None)


def beside(first: Body, second: Body, cpus: CPUs) -> tuple[Span, Span]:
    """Run both, each in a child of its own, on the CPUs given, or on any."""
    context = multiprocessing.get_context("fork")
    children: list[Any] = []
    ends: list[Any] = []
    try:
        for body, cpu in zip((first, second), cpus, strict=True):
            ours, theirs = context.Pipe()
            children.append(context.Process(target=play, args=(body, cpu, theirs)))
            children[-1].start()
            theirs.close()
            ends.append(ours)
            heard(ours)
        go_on(ends)
        for end in ends:
            heard(end)
        go_on(ends)
        spans = [heard(end) for end in ends]
        go_on(ends)
        for child in children:
            child.join(PATIENCE)
        codes = [child.exitcode for child in children]
        assert codes == [0, 0], f"the children ended with {codes}"
    finally:
        for child in children:
            child.kill()
            child.join()
        for end in ends:
            end.close()
    return spans[0], spans[1]


def work_for_ever(cpu: int | None) -> None:
    settle(cpu)
    while True:
        pass


@contextmanager
def busy(cpus: CPUs) -> Iterator[None]:
    """Have a program that never rests on each of the CPUs."""
    context = multiprocessing.get_context("fork")
    programs = [context.Process(target=work_for_ever, args=(cpu,), daemon=True) for cpu in cpus]
    for program in programs:
        program.start()
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.join()
