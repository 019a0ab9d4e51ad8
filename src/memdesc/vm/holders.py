"""Who has which shared memory: all tasks, as far as this process may look, by their maps.

What the kernel shows of each object that has no name in any folder (memfds above all): who maps
it with which access, who has it open, and what of it is resident, huge or wired. Nothing is opened
or mapped for it, so nobody notices. Tasks come and go meanwhile: one that ends while it is read is
left out. One that holds up whoever looks at it is left out too, and told of.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from memdesc import _core
from memdesc.errors import MemdescError, NotPrivilegedError, TimedOutError
from memdesc.vm.pages import Access, page_size
from memdesc.vm.regions import Region, RegionDetails, details, parse_maps
from memdesc.vm.task import Task

Identity = tuple[int, int]
"""Device and inode of a VM object, as fstat and the maps file tell them."""

_MEMFD = "/memfd:"
_OWN_MODE = 0o600
_MOST_OF_A_USER = 30.0
"""Seconds that the tasks of one user get together: they could have descriptors without end."""
_FEW = 64
"""Objects that are looked for in a text; for more of them it is parsed at once."""


@dataclass(slots=True)
class Holding:
    """What one task has of an object; bytes.

    Attributes
    ----------
    pid, uid : int
    access : Access, optional
        The most that its shared mappings give; None where it has none.
    copies : bool
        Whether it maps it copy-on-write (MAP_PRIVATE).
    mapped : int
        Of all its mappings.
    resident : int
        Of these, in memory and in its page table.
    huge : int
        Of these, in huge pages.
    wired : int
        Of these, in regions that it has locked.
    descriptors : int
        Open in it.
    """

    pid: int
    uid: int
    access: Access | None = None
    copies: bool = False
    mapped: int = 0
    resident: int = 0
    huge: int = 0
    wired: int = 0
    descriptors: int = 0


@dataclass(slots=True)
class HeldObject:
    """A VM object, and who has it.

    Attributes
    ----------
    identity : tuple of int
        Device and inode.
    name : str
        As the kernel shows it: a stranger may have chosen it.
    page_size : int
        Bytes of the pages it is mapped by: those of the huge-page pool, or base pages.
    nbytes, allocated : int, optional
        The file's length, and what of it has memory; None where no descriptor of it can be seen.
    mode : int, optional
        Of the file. `OwnedObject` makes it 0600, and `memfd_create` alone does not.
    holders : dict of int to Holding
        By pid.
    """

    identity: Identity
    name: str
    page_size: int = page_size
    nbytes: int | None = None
    allocated: int | None = None
    mode: int | None = None
    holders: dict[int, Holding] = field(default_factory=dict)

    @property
    def ours(self) -> bool | None:
        """Whether it looks as memdesc makes it; None where that can not be seen."""
        return None if self.mode is None else self.mode == _OWN_MODE

    def holder(self, task: Task) -> Holding:
        """Give what a task has of it, from now on at least nothing."""
        return self.holders.setdefault(task.pid, Holding(task.pid, task.credentials.uid))


@dataclass(slots=True)
class Survey:
    """What was seen.

    Attributes
    ----------
    objects : dict of tuple to HeldObject
    hidden_pids : list of int
        Tasks that the kernel does not let this process look at.
    held_up_pids : list of int
        Tasks that hold up whoever looks at them, or whose user's took too long together: nothing,
        or not all, is known of them.
    """

    objects: dict[Identity, HeldObject] = field(default_factory=dict)
    hidden_pids: list[int] = field(default_factory=list)
    held_up_pids: list[int] = field(default_factory=list)

    @property
    def hidden(self) -> int:
        """How many of them there are."""
        return len(self.hidden_pids)


def survey(
    wanted: Iterable[Identity] | None = None, *, pids: Iterable[int] | None = None
) -> Survey:
    """Look at all tasks but this one for memfds, or for the objects that are wanted.

    Parameters
    ----------
    wanted : iterable of tuple, optional
        Device and inode of each; by default every memfd that is found.
    pids : iterable of int, optional
        Look at these tasks alone.

    Notes
    -----
    Linux: /proc/PID/maps, smaps and fd; tasks of the same user, or CAP_SYS_PTRACE. Reading smaps
    walks page tables, so it is read only of tasks that have such an object.
    """
    found = Survey()
    known = None if wanted is None else frozenset(wanted)
    if known is not None and not known:
        return found
    spent: dict[int, float] = {}
    for pid in all_pids() if pids is None else pids:
        if pid == os.getpid():
            continue
        try:
            with Task(pid) as task:
                _look_in_time(task, found, known, spent)
        except NotPrivilegedError:
            found.hidden_pids.append(pid)
        except TimedOutError:
            found.held_up_pids.append(pid)
        except MemdescError:
            continue  # it has ended, or it is a kernel thread
    return found


def all_pids() -> list[int]:
    """List the processes that /proc shows."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def identity_of(region: Region) -> Identity | None:
    """Give what tells the object behind a region from others; None for private memory."""
    if not region.object.inode:
        return None
    return os.makedev(*region.object.device), region.object.inode


def _look_in_time(
    task: Task, found: Survey, wanted: frozenset[Identity] | None, spent: dict[int, float]
) -> None:
    """Look at a task, in what is left of its user's seconds."""
    uid, begun = task.credentials.uid, time.monotonic()
    until = begun + _MOST_OF_A_USER - spent.get(uid, 0.0)
    _check_time(task, until)
    try:
        _look(task, found, wanted, until)
    finally:
        spent[uid] = spent.get(uid, 0.0) + time.monotonic() - begun


def _check_time(task: Task, until: float) -> None:
    if time.monotonic() >= until:
        raise TimedOutError(
            f"the tasks of user {task.credentials.uid} took {_MOST_OF_A_USER:g} s to look at: "
            f"task {task.pid} is left out",
            errno=errno.ETIMEDOUT,
        )


def _look(task: Task, found: Survey, wanted: frozenset[Identity] | None, until: float) -> None:
    text = os.fsdecode(task.read_proc("maps", f"look at task {task.pid}"))

    def is_meant(region: Region) -> bool:
        if wanted is None:
            return region.path.startswith(_MEMFD)
        return identity_of(region) in wanted

    if _may_have(text, wanted) and any(map(is_meant, parse_maps(text))):
        _add_mappings(task, found, is_meant)
    _add_descriptors(task, found, wanted, until)


def _may_have(text: str, wanted: frozenset[Identity] | None) -> bool:
    """Whether a maps file is worth parsing: most are not."""
    if wanted is None:
        return _MEMFD in text
    return len(wanted) > _FEW or any(f" {inode} " in text for _, inode in wanted)


def _add_mappings(task: Task, found: Survey, is_meant: Callable[[Region], bool]) -> None:
    for one in details(task):
        region = one.region
        identity = identity_of(region)
        if identity is None or not is_meant(region):
            continue
        object_ = found.objects.get(identity)
        if object_ is None:
            object_ = found.objects[identity] = HeldObject(identity, region.object.name)
        object_.page_size = max(object_.page_size, one.page_size)
        add_region(object_.holder(task), one)


def add_region(holding: Holding, one: RegionDetails) -> None:
    """Count one more region of the object to what its task has of it."""
    region, resident, huge = one.region, resident_bytes(one), huge_bytes(one)
    if region.shared:
        if region.access is not None and (holding.access is None or region.writable):
            holding.access = region.access
    else:
        holding.copies = True
    holding.mapped += region.length
    holding.resident += resident
    holding.huge += huge
    holding.wired += wired_bytes(one)


def resident_bytes(one: RegionDetails) -> int:
    """Bytes of a region that are in memory, those of the huge-page pool among them."""
    return one.resident + one.shared_hugetlb + one.private_hugetlb


def huge_bytes(one: RegionDetails) -> int:
    """Bytes of a region that are in huge pages of either kind."""
    return one.huge + one.shared_hugetlb + one.private_hugetlb


def wired_bytes(one: RegionDetails) -> int:
    """Bytes of a region that are locked in memory. What `Locked` tells is a share of them."""
    return one.resident if "lo" in one.flags else 0


def _add_descriptors(
    task: Task, found: Survey, wanted: frozenset[Identity] | None, until: float
) -> None:
    for target, path in _descriptors(task):
        _check_time(task, until)
        if not target.startswith(_MEMFD):
            continue
        try:
            # Any file may have that name, or the number by now: a stat of it could hang.
            device, inode, mode, nbytes, blocks = _core.stat_cached(-1, os.fsencode(path))
        except OSError:
            continue  # closed since the listing
        identity = device, inode
        if wanted is not None and identity not in wanted:
            continue
        object_ = found.objects.get(identity)
        if object_ is None:
            name = target.removeprefix(_MEMFD).removesuffix(" (deleted)")
            object_ = found.objects[identity] = HeldObject(identity, name)
        object_.nbytes, object_.allocated = nbytes, blocks * 512
        object_.mode = stat.S_IMODE(mode)
        object_.holder(task).descriptors += 1


def _descriptors(task: Task) -> Iterator[tuple[str, str]]:
    """Give what each descriptor of a task refers to, and its path under /proc."""
    folder = task.proc_path("fd")
    try:
        numbers = os.listdir(folder)
    except OSError:
        return  # it has ended, or shows its maps but not these
    for number in numbers:
        path = f"{folder}/{number}"
        try:
            yield os.readlink(path), path
        except OSError:
            continue
