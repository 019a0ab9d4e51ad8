"""What `memdesc map` tells, as one record: an address space, and who else has what is in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from memdesc.cli.ls import holder_record, pages_of
from memdesc.cli.words import amount, program_of
from memdesc.errors import NotPrivilegedError, TaskGoneError, TimedOutError
from memdesc.vm.holders import (
    HeldObject,
    Survey,
    huge_bytes,
    identity_of,
    resident_bytes,
    survey,
    wired_bytes,
)
from memdesc.vm.regions import ObjectKind, Region, RegionDetails, details, task_status
from memdesc.vm.task import Task

KINDS = {
    "buffer": "a memfd as memdesc makes it",
    "memfd": "a memfd of another program, or one whose file can not be seen",
    "shared": "shared memory without a name: anonymous, or of System V",
    "file": "files and devices",
    "private": "private memory: malloc, private anonymous mmap",
    "heap": "the heap",
    "stack": "the stack",
    "kernel": "what the kernel itself maps: the vdso, rings",
}
FOLDED = ("file", "private", "kernel")
_NEAR = 1 << 30
"""Bytes of nothing that folded neighbours may have between them."""
_SHARED = (ObjectKind.SHARED_ANONYMOUS, ObjectKind.SYSV)


def gather(pid: int) -> dict[str, Any]:
    """Read the address space of a task, as far as this process may.

    Raises
    ------
    TaskGoneError
        There is none of that pid (ESRCH).
    InvalidArgument
        It is a thread, no process (EINVAL).
    """
    with Task(pid) as task:
        report: dict[str, Any] = {
            "pid": pid,
            "user": task.credentials.uid,
            "program": program_of(pid),
            "memory": asdict(task_status(task)),
            "hidden": None,
            "regions": [],
            "objects": [],
            "hidden_tasks": 0,
            "held_up_pids": [],
        }
        try:
            shown = details(task)
        except (NotPrivilegedError, TimedOutError) as error:
            report["hidden"] = str(error)
            return report
        except TaskGoneError:
            if not task.alive:
                raise
            shown = []
    if not shown:
        report["hidden"] = f"task {pid} has no address space: it is a thread of the kernel"
        return report
    wanted = {identity for one in shown if (identity := _shared_identity(one.region))}
    seen = survey(wanted)
    programs: dict[int, str] = {}
    report["regions"] = [_region(one, seen) for one in shown]
    report["objects"] = [
        _object(seen.objects[one], programs) for one in sorted(wanted & seen.objects.keys())
    ]
    report["hidden_tasks"] = seen.hidden
    report["held_up_pids"] = seen.held_up_pids
    return report


def _shared_identity(region: Region) -> tuple[int, int] | None:
    """Give the identity of what others may have too, and that no folder has a name for."""
    if region.path.startswith("/memfd:") or region.object.kind in _SHARED:
        return identity_of(region)
    return None


def _region(one: RegionDetails, seen: Survey) -> dict[str, Any]:
    region = one.region
    identity = identity_of(region)
    return {
        "start": hex(region.start),
        "end": hex(region.end),
        "length": region.length,
        "permissions": region.permissions,
        "kind": _kind(region, seen),
        "name": region.object.name if region.path.startswith("/memfd:") else region.path,
        "offset": region.offset,
        "device": identity[0] if identity else None,
        "inode": identity[1] if identity else None,
        "page_size": one.page_size,
        "resident": resident_bytes(one),
        "swapped": one.swapped,
        "huge": huge_bytes(one),
        "wired": wired_bytes(one),
    }


def _kind(region: Region, seen: Survey) -> str:
    """Name the kind of a region, as in `KINDS`."""
    kind = region.object.kind
    if region.path.startswith("/memfd:"):
        known = seen.objects.get(identity_of(region) or (0, 0))
        return "buffer" if known is not None and known.ours else "memfd"
    if kind in _SHARED:
        return "shared"
    if kind is ObjectKind.SPECIAL:
        return "kernel"
    if region.object.inode:
        return "file"
    return {"[heap]": "heap", "[stack]": "stack"}.get(region.path, "private")


def _object(known: HeldObject, programs: dict[int, str]) -> dict[str, Any]:
    holders = sorted(known.holders.values(), key=lambda one: one.pid)
    return {
        "device": known.identity[0],
        "inode": known.identity[1],
        "name": known.name,
        "ours": known.ours,
        "nbytes": known.nbytes,
        "allocated": known.allocated,
        "pages": pages_of(known),
        "holders": [holder_record(one, programs) for one in holders],
    }


# -- bands -----------------------------------------------------------------------------------------


def gap_before(band: Band) -> str:
    """Say what lies before a band; nothing where it follows at once."""
    if band.gap > 1 << 60:
        return "what no process may use"
    return f"{amount(band.gap)} of nothing" if band.gap else ""


@dataclass(slots=True)
class Band:
    """What a picture shows as one: neighbours of one kind.

    `others`: the other tasks that have its object. `gap`: bytes of nothing that lie before it.
    """

    kind: str
    regions: list[dict[str, Any]]
    others: Sequence[dict[str, Any]] = ()
    gap: int = 0

    @property
    def start(self) -> int:
        """Of the first region."""
        return int(self.regions[0]["start"], 16)

    @property
    def end(self) -> int:
        """Of the last region."""
        return int(self.regions[-1]["end"], 16)

    def total(self, what: str) -> int:
        """Sum a figure of all regions."""
        return sum(int(one[what]) for one in self.regions)

    @property
    def names(self) -> list[str]:
        """The names of its regions, each once, the largest first; without those that have none."""
        sizes: dict[str, int] = {}
        for one in self.regions:
            if one["name"]:
                sizes[one["name"]] = sizes.get(one["name"], 0) + one["length"]
        return sorted(sizes, key=lambda name: -sizes[name])


def bands(report: dict[str, Any], *, fold: bool) -> Iterator[Band]:
    """Put regions together for a picture; `fold`: files and private memory side by side in one."""
    others = {
        (one["device"], one["inode"]): [it for it in one["holders"] if it["pid"] != report["pid"]]
        for one in report["objects"]
    }
    last: Band | None = None
    for one in report["regions"]:
        if last is not None and _continues(last, one, fold=fold):
            last.regions.append(one)
            continue
        gap = 0
        if last is not None:
            yield last
            gap = int(one["start"], 16) - last.end
        last = Band(one["kind"], [one], others.get((one["device"], one["inode"]), ()), gap)
    if last is not None:
        yield last


def _continues(band: Band, one: dict[str, Any], *, fold: bool) -> bool:
    """Whether a region belongs to the band before it."""
    if not fold:
        return False
    before = band.regions[-1]
    if before["end"] != one["start"] and int(one["start"], 16) - band.end > _NEAR:
        return False
    if one["kind"] in FOLDED and band.kind in FOLDED:
        if one["kind"] == "file":
            band.kind = "file"  # private memory between files is theirs, or near
        return True
    same = ("kind", "device", "inode", "name", "permissions")
    return before["end"] == one["start"] and all(before[name] == one[name] for name in same)
