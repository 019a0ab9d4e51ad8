"""Regions of a task and the VM objects behind them, read from the kernel's own files.

Parsing is pure, from text to frozen records; only the functions that take a task read
anything. The kernel fills these files a page at a time, so a task that maps and unmaps
meanwhile may show a mixture: whoever acts on a region checks the outcome of the act.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

from memdesc.errors import InvalidArgument
from memdesc.vm.pages import MAX_LENGTH, Access, Address, check_integer, check_length
from memdesc.vm.task import Task

_DELETED = " (deleted)"


class ObjectKind(Enum):
    """What lies behind a region, judged by the name under which the kernel shows it.

    The name is a hint: a task in a mount namespace of its own can give a file any of them, so
    whoever opens an object looks at what was opened.
    """

    ANONYMOUS = "private memory with no object: malloc, the stack, private anonymous mmap"
    SHARED_ANONYMOUS = "shared anonymous mmap"
    MEMFD = "a memfd"
    SYSV = "a System V shared memory segment"
    HUGETLB = "huge pages; of a memfd or a file only the details tell"
    FILE = "a file, or a device that has one"
    SPECIAL = "what the kernel itself maps: the vdso, rings, event buffers"


@dataclass(frozen=True, slots=True)
class VMObject:
    """What one or more regions, in one or more tasks, are mappings of (XNU: a VM object).

    Attributes
    ----------
    kind : ObjectKind
    device : tuple of int
        Major and minor, as the maps file tells them. Some file systems (btrfs, overlayfs) tell
        `stat` others, so compare what came from maps with nothing else.
    inode : int
    name : str
        The path, or what follows `memfd:`, without the kernel's ` (deleted)`.
    """

    kind: ObjectKind
    device: tuple[int, int]
    inode: int
    name: str

    @property
    def identity(self) -> tuple[int, int, int] | None:
        """Major, minor and inode, equal for two regions of one object; None for private memory."""
        return (*self.device, self.inode) if self.inode else None


@dataclass(frozen=True, slots=True)
class Region:
    r"""One mapping in a task: a line of /proc/PID/maps.

    Attributes
    ----------
    start, end : int
        Addresses in that task; whole pages; `end` is past the last byte.
    permissions : str
        Four characters as the kernel shows them, `rw-s`.
    offset : int
        Where in the object `start` lies, in bytes.
    object : VMObject
    path : str
        What the kernel shows as the name, empty if nothing. A newline in a file's name is shown
        by the kernel as `\012` and is a newline here.
    """

    start: Address
    end: Address
    permissions: str
    offset: int
    object: VMObject
    path: str

    @property
    def length(self) -> int:
        """Bytes from `start` to `end`."""
        return self.end - self.start

    @property
    def readable(self) -> bool:
        """Whether the task may load from it."""
        return self.permissions[0] == "r"

    @property
    def writable(self) -> bool:
        """Whether the task may store to it."""
        return self.permissions[1] == "w"

    @property
    def executable(self) -> bool:
        """Whether the task may run code in it."""
        return self.permissions[2] == "x"

    @property
    def shared(self) -> bool:
        """Whether stores go to the object (MAP_SHARED) and not to private copies of its pages."""
        return self.permissions[3] == "s"

    @property
    def access(self) -> Access | None:
        """What the task may do with its bytes; None where it may not even read them."""
        if not self.readable:
            return None
        return Access.READ_WRITE if self.writable else Access.READ_ONLY

    def offset_of(self, address: int) -> int:
        """Where in the object an address of this region lies, in bytes."""
        return self.offset + (address - self.start)


@dataclass(frozen=True, slots=True)
class RegionDetails:
    """What /proc/PID/smaps adds to a region; every size in bytes.

    Attributes
    ----------
    region : Region
        With the object's kind HUGETLB where the pages are huge by kind.
    page_size : int
        What the kernel maps it by: the base page, or that of the huge-page pool.
    resident : int
        In memory and in this task's page table; hugetlb pages are not among these.
    proportional : int
        As `resident`, each page divided by the number of tasks that map it.
    swapped : int
        Out on swap.
    locked : int
        Locked in memory; the kernel counts it proportionally, as `proportional`.
    huge : int
        Transparent huge pages: anonymous, shmem and file together.
    shared_hugetlb, private_hugetlb : int
        Pages of the huge-page pool, in more than one page table or in this one only.
    flags : tuple of str
        The kernel's two-letter flags: `lo` locked, `ht` hugetlb, `dd` left out of dumps, …
    """

    region: Region
    page_size: int
    resident: int
    proportional: int
    swapped: int
    locked: int
    huge: int
    shared_hugetlb: int
    private_hugetlb: int
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TaskStatus:
    """A task's memory in sum, from /proc/PID/status; every size in bytes.

    `locked` is VmLck (whole regions, present or not), `pinned` VmPin, `resident` VmRSS without
    hugetlb pages, of which `anonymous`, `file` and `shared` (RssShmem) are the parts; `swapped`
    is VmSwap, without shared memory; `hugetlb` is HugetlbPages. A kernel thread has 0 of all.
    """

    locked: int
    pinned: int
    resident: int
    anonymous: int
    file: int
    shared: int
    swapped: int
    hugetlb: int


def regions(task: Task) -> list[Region]:
    """Give all regions of a task, by ascending address.

    Linux: /proc/PID/maps; the task's own user, or CAP_SYS_PTRACE.
    I/O Kit: `mach_vm_region` over the whole map.

    Raises
    ------
    TaskGoneError
        The task has ended (ESRCH).
    NotPrivilegedError
        The kernel does not show this process that task's map (EACCES).

    Examples
    --------
    >>> any(region.path == "[stack]" for region in regions(Task.current()))
    True
    """
    return parse_maps(_read(task, "maps"))


def regions_in(task: Task, address: int, length: int) -> list[Region]:
    """Give the regions that overlap `length` bytes at `address`, whole; raises as `regions`."""
    low, high = check_range(address, length)
    return parse_maps(_read(task, "maps"), low, high)


def region_at(task: Task, address: int) -> Region | None:
    """Give the region that holds an address, or None where nothing is mapped."""
    found = regions_in(task, address, 1)
    return found[0] if found else None


def details(task: Task) -> list[RegionDetails]:
    """Give all regions of a task with their page kind and what of them is in memory.

    Linux: /proc/PID/smaps, privileges as for `regions`. The kernel walks the task's page
    tables for it: much slower than `regions` on large tasks.
    """
    return parse_smaps(_read(task, "smaps"))


def details_in(task: Task, address: int, length: int) -> list[RegionDetails]:
    """Give the details of the regions that overlap `length` bytes at `address`."""
    low, high = check_range(address, length)
    return parse_smaps(_read(task, "smaps"), low, high)


def holes(task: Task, address: int, length: int) -> list[tuple[Address, int]]:
    """Give the parts of a range that are not mapped, as (address, length)."""
    return find_holes(regions_in(task, address, length), address, length)


def find_holes(mapped: Iterable[Region], address: int, length: int) -> list[tuple[Address, int]]:
    """Give the parts of a range that none of `mapped` (ascending) covers, as (address, length)."""
    at, limit = check_range(address, length)
    found = []
    for region in mapped:
        if at < min(region.start, limit):
            found.append((Address(at), min(region.start, limit) - at))
        at = max(at, region.end)
    if at < limit:
        found.append((Address(at), limit - at))
    return found


def task_status(task: Task) -> TaskStatus:
    """Give a task's memory in sum. Linux: /proc/PID/status, no privilege."""
    return parse_status(_read(task, "status"))


def check_range(address: int, length: int) -> tuple[int, int]:
    """Give (address, end) of a range in an address space, or raise `InvalidArgument`."""
    start = check_integer(address, "address")
    end = start + check_length(length)
    if start < 0 or end > MAX_LENGTH:
        raise InvalidArgument(
            f"{length} bytes at address {start:#x}: addresses of a task go from 0 to 2**63 - 1",
            errno=errno.EINVAL,
        )
    return start, end


def _read(task: Task, name: str) -> str:
    return os.fsdecode(task.read_proc(name, f"read /proc/{task.pid}/{name}"))


def parse_maps(text: str, low: int = 0, high: int = 2**64) -> list[Region]:
    """Parse /proc/PID/maps; of its regions give those that overlap `low` to `high`."""
    objects: dict[tuple[str, str, str], VMObject] = {}
    found = []
    for line in text.split("\n"):
        # Most lines of a large task lie outside what is asked for: look at the addresses first.
        start, _, rest = line.partition("-")
        if not rest or int(start, 16) >= high:
            break
        if int(rest[: rest.index(" ")], 16) > low:
            found.append(_parse_line(line, objects))
    return found


def _parse_line(line: str, objects: dict[tuple[str, str, str], VMObject]) -> Region:
    addresses, permissions, offset, device, inode, shown = line.split(" ", 5)
    start, _, end = addresses.partition("-")
    path = shown.lstrip(" ").replace("\\012", "\n")
    key = device, inode, path
    found = objects.get(key)
    if found is None:
        found = objects[key] = _parse_object(device, int(inode), path)
    return Region(
        Address(int(start, 16)), Address(int(end, 16)), permissions, int(offset, 16), found, path
    )


def _parse_object(device: str, inode: int, path: str) -> VMObject:
    major, _, minor = device.partition(":")
    kind, name = _kind_and_name(inode, path)
    return VMObject(kind, (int(major, 16), int(minor, 16)), inode, name)


def _kind_and_name(inode: int, path: str) -> tuple[ObjectKind, str]:
    name = path.removesuffix(_DELETED)
    if not inode:
        # [heap], [stack] and [anon:a name given by prctl] are plain private memory.
        private = not path or path in ("[heap]", "[stack]") or path.startswith("[anon:")
        return (ObjectKind.ANONYMOUS if private else ObjectKind.SPECIAL), path
    if path.startswith("[anon_shmem:"):  # shared anonymous memory that was given a name
        return ObjectKind.SHARED_ANONYMOUS, path[12:-1]
    if path.startswith("anon_inode:"):
        return ObjectKind.SPECIAL, path
    if name == path:  # neither memfds nor anonymous objects have a name in any folder
        return ObjectKind.FILE, path
    if name == "/dev/zero":
        return ObjectKind.SHARED_ANONYMOUS, name
    if name == "/anon_hugepage":
        return ObjectKind.HUGETLB, name
    if name.startswith("/memfd:"):
        return ObjectKind.MEMFD, name[7:]
    if name.startswith("/SYSV"):
        return ObjectKind.SYSV, name
    return ObjectKind.FILE, name


def parse_smaps(text: str, low: int = 0, high: int = 2**64) -> list[RegionDetails]:
    """Parse /proc/PID/smaps; of its regions give those that overlap `low` to `high`."""
    return [_parse_details(header, fields) for header, fields in _smaps_blocks(text, low, high)]


def _smaps_blocks(text: str, low: int, high: int) -> Iterator[tuple[str, dict[str, str]]]:
    """Give each region's first line and its fields; only fields begin with a capital letter."""
    header, fields = "", dict[str, str]()
    for line in text.split("\n"):
        if "A" <= line[:1] <= "Z":
            if header:
                name, _, value = line.partition(":")
                fields[name] = value
        elif line:
            if header:
                yield header, fields
            start, _, rest = line.partition("-")
            if int(start, 16) >= high:
                return
            inside = int(rest[: rest.index(" ")], 16) > low
            header, fields = line if inside else "", {}
    if header:
        yield header, fields


def _parse_details(header: str, fields: dict[str, str]) -> RegionDetails:
    region = _parse_line(header, {})
    flags = tuple(fields.get("VmFlags", "").split())
    if "ht" in flags:
        region = replace(region, object=replace(region.object, kind=ObjectKind.HUGETLB))
    return RegionDetails(
        region=region,
        page_size=_bytes(fields, "KernelPageSize"),
        resident=_bytes(fields, "Rss"),
        proportional=_bytes(fields, "Pss"),
        swapped=_bytes(fields, "Swap"),
        locked=_bytes(fields, "Locked"),
        huge=_bytes(fields, "AnonHugePages", "ShmemPmdMapped", "FilePmdMapped"),
        shared_hugetlb=_bytes(fields, "Shared_Hugetlb"),
        private_hugetlb=_bytes(fields, "Private_Hugetlb"),
        flags=flags,
    )


def parse_status(text: str) -> TaskStatus:
    """Parse the memory part of /proc/PID/status."""
    fields = {}
    for line in text.split("\n"):
        name, _, value = line.partition(":")
        fields[name] = value
    return TaskStatus(
        locked=_bytes(fields, "VmLck"),
        pinned=_bytes(fields, "VmPin"),
        resident=_bytes(fields, "VmRSS"),
        anonymous=_bytes(fields, "RssAnon"),
        file=_bytes(fields, "RssFile"),
        shared=_bytes(fields, "RssShmem"),
        swapped=_bytes(fields, "VmSwap"),
        hugetlb=_bytes(fields, "HugetlbPages"),
    )


def _bytes(fields: dict[str, str], *names: str) -> int:
    """Sum fields told in kB; the kernel leaves out those that it was built without."""
    return sum(int(fields[name].split()[0]) for name in names if name in fields) * 1024
