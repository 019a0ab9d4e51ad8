"""The comparison: one job, three ways from the driver to its clients, in turn.

The job: the driver holds the files in its memory; every client works through all of them (half
of the clients by SHA-256, half by counting bytes) and keeps them until all are done. The clock
runs from when the driver, with all files in its memory, begins to hand over, until the last
client is done. Each way has a driver and clients of its own, which live through all rounds; the
ways take turns, and each round begins with another one.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import Pipe as make_pipe
from typing import Any, Protocol

import memdesc as md
from memdesc.cli import demo_kernel as kernel
from memdesc.cli.demo_files import Source
from memdesc.cli.demo_processes import Answer, Program, Programs, answers
from memdesc.vm.physical import same_pages
from memdesc.vm.regions import region_at

WAYS = {
    "memdesc": "memdesc",
    "pipe": "multiprocessing Pipe",
    "shared_memory": "multiprocessing shared_memory",
}
_JOBS = ("sha256", "histogram")
MOST_ROUNDS = 3
_SLOWEST = 10 << 20  # bytes a second that a client works through at the very least


class Telling(Protocol):
    """Where progress goes."""

    def advance(self, way: str, nbytes: int) -> None:
        """Tell that a client has worked through so many bytes."""

    def finish_round(self, way: str, number: int, rate: float) -> None:
        """Tell that a way's turn is over: gigabytes a second."""


@dataclass(slots=True)
class Group:
    """The driver and the clients of one way."""

    way: str
    driver: Program
    clients: list[Program]
    jobs: list[str]

    def pids(self) -> list[int]:
        """All processes of it, with those that they started."""
        return kernel.with_descendants([p.pid for p in self.living()])

    def living(self) -> list[Program]:
        """Those that were not ended."""
        return [program for program in (self.driver, *self.clients) if not program.ended]


def start(programs: Programs, ways: Sequence[str], count: int) -> list[Group]:
    """Start all groups, and wait until each is ready."""
    groups = [_start_group(programs, way, count) for way in ways]
    for group in groups:
        for program in group.living():
            program.read_json(timeout=60)
    return groups


def _start_group(programs: Programs, way: str, count: int) -> Group:
    name = f"demo-{os.getpid()}-{way}"
    jobs = [_JOBS[n % len(_JOBS)] for n in range(count)]
    with ExitStack() as stack:  # closes our copies, so that an end without a holder is seen
        ends = [] if way == "memdesc" else [make_pipe() for _ in range(count)]
        for end in (end for pair in ends for end in pair):
            stack.enter_context(end)
        fds = [pair[0].fileno() for pair in ends]
        driver = programs.module(
            f"driver ({way})",
            *("demo_worker", "driver", way, name, str(count), *map(str, fds)),
            pass_fds=fds,
        )
        clients = []
        for n, job in enumerate(jobs):
            fds = [ends[n][1].fileno()] if ends else []
            clients.append(
                programs.module(
                    f"client {n + 1} ({way})",
                    *("demo_worker", "client", way, name, job, *map(str, fds)),
                    pass_fds=fds,
                )
            )
    return Group(way, driver, clients, jobs)


def run_round(group: Group, sources: Sequence[Source], advance: Callable[[int], None]) -> Answer:
    """Let a group do the job once; give what was measured, and leave the data where it is."""
    total = sum(source.nbytes for source in sources)
    paths = [str(source.path.resolve()) for source in sources]
    limit = 60 + total * len(group.clients) / _SLOWEST
    fill = group.driver.ask("fill", paths=paths, timeout=limit)
    for client in group.clients:
        client.tell("work", count=len(sources))
    group.driver.tell("give")
    everyone = [group.driver, *group.clients]
    given, *worked = answers(everyone, limit, lambda _, answer: advance(answer["progress"]))
    begun = given["begun"]
    seconds = (max(one["ended"] for one in worked) - begun) / 1e9
    return {
        "fill_seconds": fill["ns"] / 1e9,
        "fill_ways": fill.get("ways", ["read"]),
        "fill_bounced": fill.get("bounced", total),
        "first_byte_seconds": (min(one["first"] for one in worked) - begun) / 1e9,
        "every_client_seconds": (max(one["first"] for one in worked) - begun) / 1e9,
        "seconds": seconds,
        "gb_per_second": total * len(group.clients) / seconds / 1e9,
        "bytes_copied": given["copied"],
        "bytes_through_kernel": sum(one["through_kernel"] for one in (given, *worked)),
        "page_faults": sum(one["faults"] for one in (given, *worked)),
        "memory": _memory(group),
        "wrong": _wrong(group, sources, worked),
        "places": [given["places"], *(one["places"] for one in worked)],
    }


def _memory(group: Group) -> dict[str, int]:
    found = kernel.memory_of(group.pids())
    return {**asdict(found), "total": found.total}


def _wrong(group: Group, sources: Sequence[Source], worked: Sequence[Answer]) -> list[str]:
    """List the results that are not what is true of the file."""
    found = []
    for client, job, answer in zip(group.clients, group.jobs, worked, strict=True):
        for source, result in zip(sources, answer["results"], strict=True):
            right = source.sha256 if job == "sha256" else list(source.histogram)
            if result != right:
                found.append(f"{client.name}: the {job} of {source.path}")
    return found


def compare_pages(group: Group, places: Sequence[Sequence[Sequence[int]]]) -> dict[str, Any]:
    """Show whether each client's data lie in the driver's very pages."""
    first, *others = places
    proofs = []
    for client, theirs in zip(group.clients, others, strict=True):
        for (address, length), (there, _) in zip(first, theirs, strict=True):
            try:
                proofs.append(same_pages(group.driver.task, address, client.task, there, length))
            except md.NotPrivilegedError as error:
                return {"same": None, "proof": "", "denied": str(error)}
    weakest = min(proofs, key=lambda one: (one.same, one.proof == "frames"))
    return {"same": weakest.same, "proof": weakest.proof, "denied": weakest.denied}


def drop(group: Group, timeout: float = 60) -> list[str]:
    """Let clients and driver let go; give what the driver met with."""
    for client in group.clients:
        if not client.ended:
            client.ask("drop", timeout=timeout)
    lost: list[str] = group.driver.ask("drop", timeout=timeout)["lost"]
    return lost


def kill_one(group: Group, source: Source) -> dict[str, Any]:
    """Kill a client in the middle of its work; tell how the others fare and what is left."""
    victim, *others = group.clients
    limit = 60 + source.nbytes * len(group.clients) / _SLOWEST
    group.driver.ask("fill", paths=[str(source.path.resolve())], timeout=limit)
    victim.tell("work", count=1, stop=True)
    for client in others:
        client.tell("work", count=1)
    group.driver.tell("give")
    victim.read_json(limit)  # it has worked on a part, has the rest at hand, and stands still
    with_helpers = kernel.with_descendants([victim.pid])
    victim.kill()
    _wait_gone(with_helpers)
    given, *worked = answers([group.driver, *others], limit, lambda *_: None)
    survivors = Group(group.way, group.driver, others, group.jobs[1:])
    objects = [_identity(group.driver, address) for address, _ in given["places"]]
    destroyed = [name for name in given["names"] if name not in kernel.shm_names()]
    lost = drop(survivors)
    return {
        "others": len(others),
        "others_wrong": _wrong(survivors, [source], worked),
        "segments": len(given["names"]),
        "destroyed": destroyed,
        "driver_met": lost,
        "left": [
            *(name for name in given["names"] if name in kernel.shm_names()),
            *(f"process {pid}" for pid in with_helpers if os.path.exists(f"/proc/{pid}")),
            *(
                f"memory held by process {pid}"
                for one in objects
                if one is not None
                for pid in kernel.holders(one)
            ),
        ],
    }


def _identity(program: Program, address: int) -> tuple[int, int, int] | None:
    """Give the object at an address of a program; None where it is private memory."""
    region = region_at(program.task, address)
    return region.object.identity if region and region.shared else None


def _wait_gone(pids: Sequence[int], seconds: float = 3) -> None:
    """Wait until processes have ended, or the time has run out."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(os.path.exists(f"/proc/{pid}") for pid in pids):
        time.sleep(0.01)


def compare(
    groups: Sequence[Group], sources: Sequence[Source], telling: Telling, until: float
) -> dict[str, dict[str, Any]]:
    """Let the ways take turns until the time is up (once at least), then kill a client of each."""
    found: dict[str, dict[str, Any]] = {
        group.way: {
            "title": WAYS[group.way],
            "nbytes": sum(source.nbytes for source in sources),
            "memory_before": _memory(group),
            "rounds": [],
        }
        for group in groups
    }
    for number in range(MOST_ROUNDS):
        begun = time.monotonic()
        turn = number % len(groups)
        for group in (*groups[turn:], *groups[:turn]):
            way, report = group.way, found[group.way]

            def advance(nbytes: int, way: str = way) -> None:
                telling.advance(way, nbytes)

            measured = run_round(group, sources, advance)
            places = measured.pop("places")
            if number == 0:
                report["pages"] = compare_pages(group, places)
            measured["driver_met"] = drop(group)
            report["rounds"].append(measured)
            telling.finish_round(way, number + 1, measured["gb_per_second"])
        now = time.monotonic()
        if now + (now - begun) > until:
            break
    smallest = min(sources, key=lambda source: source.nbytes)
    for group in groups:
        found[group.way]["killed"] = kill_one(group, smallest)
        found[group.way]["median"] = _medians(found[group.way]["rounds"])
    return found


def _medians(rounds: Sequence[Answer]) -> dict[str, float]:
    names = [name for name, value in rounds[0].items() if isinstance(value, int | float)]
    return {name: statistics.median(one[name] for one in rounds) for name in names}


def failures(way: str, report: dict[str, Any]) -> list[str]:
    """List what did not hold: of every way its results, of ours all that is claimed."""
    title = report["title"]
    failed = [
        f"{title}: wrong: {one}" for measured in report["rounds"] for one in measured["wrong"]
    ]
    killed = report["killed"]
    failed += [f"{title}: wrong after a kill: {one}" for one in killed["others_wrong"]]
    if way != "memdesc":
        return failed
    if report["pages"]["same"] is False:
        failed.append("memdesc: the clients' data are not in the driver's pages")
    if any(measured["bytes_copied"] for measured in report["rounds"]):
        failed.append("memdesc: bytes were copied after the filling")
    most = report["nbytes"] + (4 << 20)  # far less than one client's copy, but for small files
    if any(measured["bytes_through_kernel"] > most for measured in report["rounds"]):
        failed.append("memdesc: the files went through read and write")
    met = [one for measured in report["rounds"] for one in measured["driver_met"]]
    failed += [f"memdesc: {one}" for one in (*met, *killed["driver_met"])]
    failed += [f"memdesc: left behind: {one}" for one in killed["left"]]
    return failed
