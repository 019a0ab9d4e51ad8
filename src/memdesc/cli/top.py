"""What `memdesc top` tells at each look, as one record: services, and what moves in them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from memdesc.cli.looking import Seen, Watch, sockets
from memdesc.errors import MemdescError
from memdesc.vm.holders import huge_bytes, identity_of, resident_bytes, wired_bytes
from memdesc.vm.regions import RegionDetails, details
from memdesc.vm.task import Task

_TICKS = os.sysconf("SC_CLK_TCK")
_RATES = ("calls", "entries", "slots")
_MEMORY = ("shared", "wired", "huge")
_Memory = dict[str, int | None]


@dataclass(frozen=True, slots=True)
class _Sample:
    """What only grows of a service, at one time; `cpu` in seconds."""

    task: Task | None
    at: float
    cpu: float | None
    counts: dict[str, int]


class Looks:
    """One look after the other, at all services or at one; each tells the rates since the last."""

    def __init__(self, service: str | None = None) -> None:
        self._service = service
        self._watch = Watch()
        self._before: dict[Path, _Sample] = {}
        self._at = time.monotonic()

    def look(self) -> dict[str, Any]:
        """Ask all services; those where most moves come first."""
        begun = time.monotonic()
        memory: dict[int, _Memory] = {}
        found, samples = [], {}
        for seen in self._watch.look(sockets(self._service), items=False):
            sample = _sample(seen)
            samples[seen.path] = sample
            found.append(_told(seen, _rates(sample, self._before.get(seen.path)), memory))
        self._before, since, self._at = samples, begun - self._at, begun
        found.sort(key=_moves)
        return {"time": time.time(), "seconds": since, "services": found}

    def close(self) -> None:
        """Hang up."""
        self._watch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _moves(one: dict[str, Any]) -> tuple[object, ...]:
    """Sort by what moves: bytes, then calls, entries and slots, then processor time."""
    events = sum(one[f"{name}_per_second"] or 0 for name in _RATES)
    nbytes = one["bytes_per_second"] or 0
    return (one["state"] != "serving", -nbytes, -events, -(one["cpu"] or 0), one["name"])


def _sample(seen: Seen) -> _Sample:
    told = seen.told
    counts = {}
    if told is not None:
        counts = {
            "calls": told.calls,
            "entries": told.entries,
            "slots": told.slots,
            "bytes": told.entry_bytes + told.slot_bytes,
        }
    return _Sample(seen.task, seen.at, _cpu(seen.task), counts)


def _cpu(task: Task | None) -> float | None:
    """Give the seconds that a task has computed, of all CPUs; everybody may read it."""
    if task is None:
        return None
    try:
        text = task.read_proc("stat", f"look at task {task.pid}")
    except MemdescError:  # it has ended meanwhile
        return None
    user, system = text.rpartition(b") ")[2].split()[11:13]
    return (int(user) + int(system)) / _TICKS


def _rates(now: _Sample, before: _Sample | None) -> dict[str, float | None]:
    """Give what happened a second. What ended meanwhile took its counts along: never below 0."""
    names = (*_RATES, "bytes")
    if before is None or before.task != now.task or now.at <= before.at:
        return dict.fromkeys((*(f"{name}_per_second" for name in names), "cpu"))
    seconds = now.at - before.at
    rates: dict[str, float | None] = {}
    for name in names:
        known = name in now.counts and name in before.counts
        moved = max(now.counts[name] - before.counts[name], 0) if known else 0
        rates[f"{name}_per_second"] = moved / seconds if known else None
    known = now.cpu is not None and before.cpu is not None
    rates["cpu"] = 100 * ((now.cpu or 0) - (before.cpu or 0)) / seconds if known else None
    return rates


def _told(seen: Seen, rates: dict[str, float | None], memory: dict[int, _Memory]) -> dict[str, Any]:
    told, task = seen.told, seen.task
    if task is not None and task.pid not in memory:
        memory[task.pid] = _memory(task)
    return {
        **seen.described(),
        "clients": None if told is None else told.clients,
        **rates,
        **(dict.fromkeys(_MEMORY) if task is None else memory[task.pid]),
    }


def _memory(task: Task) -> _Memory:
    """Sum the memfds that a task maps; None where we may not look."""
    try:
        return _sum(one for one in details(task) if one.region.path.startswith("/memfd:"))
    except MemdescError:
        return dict.fromkeys(_MEMORY)


def _sum(regions: Iterable[RegionDetails]) -> _Memory:
    """Sum what is resident, locked, and in huge pages; what is mapped twice once."""
    most: dict[object, tuple[int, int, int]] = {}
    for one in regions:
        place = identity_of(one.region), one.region.offset
        figures = resident_bytes(one), wired_bytes(one), huge_bytes(one)
        known = most.get(place, (0, 0, 0))
        most[place] = (
            max(known[0], figures[0]),
            max(known[1], figures[1]),
            max(known[2], figures[2]),
        )
    return {name: sum(one[number] for one in most.values()) for number, name in enumerate(_MEMORY)}
