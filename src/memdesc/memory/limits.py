"""How much memory can be had before the kernel kills for it.

Allocating past a memory cgroup's limit, or past the machine, is not an error in Linux: it is
SIGKILL. So whoever allocates asks here first (`check_available`), and again between steps.
Between the question and the pages others may take them; what is left of that race, the
out-of-memory killer, is documented with `BufferMemoryDescriptor`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memdesc.errors import AllocationError
from memdesc.memory.page_kinds import PageKind, huge_page_size, meminfo

_UNLIMITED = 1 << 60  # cgroup v1 says "no limit" as 2**63 rounded down to a page


@dataclass(frozen=True, slots=True)
class Available:
    """What the tightest limit leaves: `nbytes`, and which `limit` that is, in words."""

    nbytes: int
    limit: str
    remedy: str


def available(pages: PageKind = PageKind.BASE) -> Available:
    """Tell how many bytes of such pages this process can still get.

    Linux: MemAvailable and the memory cgroups above this process (v1 and v2; the file cache of
    a cgroup counts as available), or HugePages_Free less HugePages_Rsvd. Needs no privilege.
    """
    info = meminfo()
    if pages is PageKind.HUGE:
        free = info.get("HugePages_Free", 0) - info.get("HugePages_Rsvd", 0)
        return Available(
            free * huge_page_size(),
            f"the pool of huge pages ({info.get('HugePages_Total', 0)} pages, {free} free)",
            "raise vm.nr_hugepages, or use base pages",
        )
    tightest = Available(
        info["MemAvailable"], "the machine's MemAvailable", "free memory or ask for less"
    )
    for folder, limit, used in _cgroups():
        if limit - used < tightest.nbytes:
            tightest = Available(
                max(limit - used, 0),
                f"the memory cgroup {folder} (limit {limit:,}, in use {used:,})",
                "raise the cgroup's limit (container: --memory) or ask for less",
            )
    return tightest


def check_available(nbytes: int, doing: str, pages: PageKind = PageKind.BASE) -> None:
    """Raise unless `nbytes` more can be had now.

    Raises
    ------
    AllocationError
        ENOMEM, with `requested` and `available`.
    """
    room = available(pages)
    if nbytes > room.nbytes:
        raise AllocationError(
            f"{doing} needs {nbytes:,} bytes, but {room.limit} leaves {room.nbytes:,}: "
            f"{room.remedy}",
            errno=errno.ENOMEM,
            requested=nbytes,
            available=room.nbytes,
        )


def _cgroups() -> Iterator[tuple[Path, int, int]]:
    """Every memory cgroup above this process that has a limit: (folder, limit, in use)."""
    mounts = _cgroup_mounts()
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            kind, names = "cgroup2", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            kind, names = "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        for mounted, root in mounts.get(kind, ()):
            inside = path[len(root) :] if root != "/" and path.startswith(root) else path
            folder = mounted / inside.lstrip("/")
            while folder.is_relative_to(mounted):
                limit, used = _number(folder / names[0]), _number(folder / names[1])
                if limit is not None and used is not None and limit < _UNLIMITED:
                    yield folder, limit, max(used - _file_cache(folder), 0)
                folder = folder.parent


def _cgroup_mounts() -> dict[str, list[tuple[Path, str]]]:
    """Where cgroup hierarchies are mounted: kind → [(mount point, root within the hierarchy)]."""
    mounts: dict[str, list[tuple[Path, str]]] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        root, point = left.split()[3:5]
        kind, _, options = right.split(" ", 2)
        if kind == "cgroup2":
            mounts.setdefault("cgroup2", []).append((Path(point), root))
        elif kind == "cgroup" and "memory" in options.split(","):
            mounts.setdefault("memory", []).append((Path(point), root))
    return mounts


def _number(file: Path) -> int | None:
    """The number in a cgroup's file; None for 'max', or where the file is not there."""
    try:
        text = file.read_text().strip()
    except OSError:  # the root has no limit file; a container may hide the folder: no limit seen
        return None
    return None if text == "max" else int(text)


def _file_cache(folder: Path) -> int:
    """Bytes of clean-able file cache charged to a cgroup: the kernel drops them before it kills."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    stat = dict(line.split(" ", 1) for line in lines)
    prefix = "total_" if "total_inactive_file" in stat else ""
    return int(stat.get(prefix + "inactive_file", 0)) + int(stat.get(prefix + "active_file", 0))
