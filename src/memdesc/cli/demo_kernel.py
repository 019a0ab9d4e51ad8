"""What the demo reads of the kernel: memory of processes, holders of objects, names, sockets."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from memdesc import _core
from memdesc.errors import MemdescError
from memdesc.memory.page_kinds import meminfo
from memdesc.vm.regions import RegionDetails, details
from memdesc.vm.task import Task

SHM = Path("/dev/shm")


def shmem() -> int:
    """Bytes of shared memory on the whole machine (meminfo, Shmem)."""
    return meminfo()["Shmem"]


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of several processes, no page counted twice and none missed; bytes.

    `private`, `shared` and `file` are the sums of Pss_Anon, Pss_Shmem and Pss_File: the kernel
    divides each page by the number of processes that map it. `huge` is the pages of the huge-page
    pool, which Pss leaves out: the private ones, and each shared object once. `swapped` is SwapPss.
    Of pages that processes outside the group map too (the interpreter's), only the group's part
    counts.
    """

    private: int
    shared: int
    file: int
    huge: int
    swapped: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.private + self.shared + self.file + self.huge + self.swapped


def memory_of(pids: Iterable[int]) -> Memory:
    """Read the memory of processes together. Linux: /proc/PID/smaps_rollup; their own user."""
    sums = dict.fromkeys(("Pss_Anon", "Pss_Shmem", "Pss_File", "SwapPss"), 0)
    huge: list[list[RegionDetails]] = []
    for pid in pids:
        rollup = _fields(Path(f"/proc/{pid}/smaps_rollup").read_text())
        for name in sums:
            sums[name] += rollup.get(name, 0)
        if rollup.get("Shared_Hugetlb", 0) or rollup.get("Private_Hugetlb", 0):
            with Task(pid) as task:
                huge.append(details(task))
    private, shared, file, swapped = sums.values()
    return Memory(private, shared, file, sum_huge(huge), swapped)


def _fields(text: str) -> dict[str, int]:
    """Give the fields told in kB, in bytes."""
    lines = (line.split() for line in text.splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def sum_huge(tasks: Iterable[Iterable[RegionDetails]]) -> int:
    """Sum pages of the huge-page pool over tasks; of a shared object, the most that one shows."""
    private = 0
    shared: dict[object, int] = {}
    for regions in tasks:
        own: dict[object, int] = {}
        for one in regions:
            private += one.private_hugetlb
            identity = one.region.object.identity
            own[identity] = own.get(identity, 0) + one.shared_hugetlb
        for which, nbytes in own.items():
            shared[which] = max(shared.get(which, 0), nbytes)
    return private + sum(shared.values())


def with_descendants(pids: Collection[int]) -> list[int]:
    """Give processes and all that they have started, by the parents that /proc tells."""
    parents = {pid: parent for pid in _all_pids() if (parent := _parent(pid))}
    found = list(pids)
    for pid in found:  # grows while it is gone through
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def _parent(pid: int) -> int:
    try:
        _, _, tail = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")
    except (FileNotFoundError, ProcessLookupError):  # ended since it was listed
        return 0
    state, parent, *_ = tail.split()
    return 0 if state in "ZX" else int(parent)


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def holders(identity: tuple[int, int, int]) -> list[int]:
    """Find the processes that map an object or have it open, as far as this user may look.

    `identity` is (major, minor, inode), as the maps file tells them.
    """
    major, minor, inode = identity
    mapped = f" {major:02x}:{minor:02x} {inode} "
    status = (os.makedev(major, minor), inode)
    return [pid for pid in _all_pids() if _maps_it(pid, mapped) or _has_open(pid, status)]


def _maps_it(pid: int, mapped: str) -> bool:
    try:
        with Task(pid) as task:
            return mapped in os.fsdecode(task.read_proc("maps", f"look at task {pid}"))
    except MemdescError:  # ended, or another user's, who could not have got at ours
        return False


def _has_open(pid: int, status: tuple[int, int]) -> bool:
    try:
        numbers = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    for number in numbers:
        try:
            device, inode, *_ = _core.stat_cached(-1, f"/proc/{pid}/fd/{number}".encode())
        except OSError:
            continue
        if (device, inode) == status:
            return True
    return False


def own_fds() -> set[str]:
    """List what the descriptors of this process refer to, each with its number."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{number}: {os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:  # the listing's own, closed by now
            continue
    return found


def shm_names() -> set[str]:
    """List the names in /dev/shm; none where there is no such folder."""
    try:
        return set(os.listdir(SHM))
    except (FileNotFoundError, PermissionError):
        return set()


def shm_free() -> int:
    """Bytes that /dev/shm has left; 0 where there is none to write to."""
    try:
        found = os.statvfs(SHM)
    except (FileNotFoundError, PermissionError):
        return 0
    return found.f_bavail * found.f_frsize if os.access(SHM, os.W_OK) else 0


def abandoned_names(before: set[str], settle: float = 2) -> list[str]:
    """List the names in /dev/shm that are new, and that no living process holds any more.

    A name that somebody else on the machine is about to unlink may be among them for a moment, so
    names count only if they are still there after `settle` seconds.
    """
    until = time.monotonic() + settle
    while (found := _unheld(shm_names() - before)) and time.monotonic() < until:
        time.sleep(0.05)
    return found


def _unheld(names: set[str]) -> list[str]:
    found = []
    for name in sorted(names):
        try:
            status = (SHM / name).stat()
        except FileNotFoundError:
            continue
        device = status.st_dev
        if not holders((os.major(device), os.minor(device), status.st_ino)):
            found.append(name)
    return found
