"""The memory cgroups that this process is in: limits past which the kernel kills.

Both hierarchies are read, version 1 and version 2, wherever they are mounted.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

from memdesc.vm.proc import read_text

_UNLIMITED = 1 << 60  # version 1 tells "no limit" as 2**63 rounded down to a page
_FILES = {
    "cgroup2": ("memory.max", "memory.current"),
    "cgroup": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}


@dataclass(frozen=True, slots=True)
class MemoryCgroup:
    """One memory cgroup that holds this process, directly or through those below it.

    Attributes
    ----------
    folder : str
    limit : int or None
        Bytes; None where it sets none.
    used : int
        Bytes charged to it now, the file cache among them; not asked for where there is no limit
        (0).
    file_cache : int
        Bytes of cached files, which the kernel drops before it kills; as `used`.
    """

    folder: str
    limit: int | None
    used: int
    file_cache: int


def memory_cgroups() -> list[MemoryCgroup]:
    """Give the memory cgroups above this process, innermost first, whose files can be read.

    Linux: /proc/self/cgroup and the mounted hierarchies, no privilege. The root has no limit
    and is not among them; a container may show only a part, or nothing.
    """
    # Each allocation asks: what is read is told apart, and only what is new is parsed.
    texts = read_text("/proc/self/cgroup"), read_text("/proc/self/mountinfo")
    found = (_read_group(folder, *_FILES[kind]) for kind, folder in _folders(*texts))
    return [group for group in found if group]


@functools.lru_cache(maxsize=4)
def _folders(memberships: str, mountinfo: str) -> list[tuple[str, str]]:
    """Give (kind, folder) of each cgroup above this process, innermost first."""
    kinds = _memberships(memberships)
    found = []
    for kind, point, root in _mounts(mountinfo):
        path = kinds.get(kind)
        if path is None:
            continue
        inside = path[len(root) :] if root != "/" and path.startswith(root) else path
        folder = os.path.normpath(f"{point}/{inside}")
        while folder.startswith(f"{point}/"):
            found.append((kind, folder))
            folder = os.path.dirname(folder)
        if folder == point:  # not where it lies outside of what is mounted: /.. in a namespace
            found.append((kind, folder))
    return found


def _memberships(text: str) -> dict[str, str]:
    """Tell this process's cgroup in each kind of hierarchy: /proc/self/cgroup, cgroups(7)."""
    found = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found["cgroup2"] = path
        elif "memory" in controllers.split(","):
            found["cgroup"] = path
    return found


def _mounts(text: str) -> list[tuple[str, str, str]]:
    """Give (kind, mount point, root within the hierarchy) of each, from /proc/self/mountinfo."""
    found = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        root, point = left.split()[3:5]
        kind, _, options = right.split(" ", 2)
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            found.append((kind, point, root))
    return found


def _read_group(folder: str, limit_file: str, used_file: str) -> MemoryCgroup | None:
    try:
        limit = read_text(f"{folder}/{limit_file}").strip()
        if limit == "max" or int(limit) >= _UNLIMITED:
            return MemoryCgroup(folder, None, 0, 0)
        used = int(read_text(f"{folder}/{used_file}"))
        lines = read_text(f"{folder}/memory.stat").splitlines()
    except OSError:  # the root, a hierarchy without memory, or a folder that is hidden from us
        return None
    stat = dict(line.split(" ", 1) for line in lines)
    prefix = "total_" if "total_inactive_file" in stat else ""  # version 1: with those below
    cache = sum(int(stat.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))
    return MemoryCgroup(folder, int(limit), used, cache)
