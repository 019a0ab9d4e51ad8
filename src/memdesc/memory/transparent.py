"""Transparent huge pages: put together of free memory, for as long as that does not cost time.

A huge page is made by touching one base page of it and having the kernel collapse the rest
(MADV_COLLAPSE, Linux 6.1). That works whatever shmem_enabled says but "deny"; where it allows
huge pages (MADV_HUGEPAGE), the touch alone makes one. As a rule it costs a tenth of faulting the
base pages in; but where free memory is in pieces, or the host of a virtual machine has taken it
back, many times as much. So AUTO watches the clock.
"""

from __future__ import annotations

import contextlib
import errno
import time
from dataclasses import dataclass

from memdesc import _core
from memdesc.errors import PageKindError, describe_errno
from memdesc.memory.limits import check_available
from memdesc.memory.made_of import look, whole_huge_pages
from memdesc.memory.page_kinds import PageKind, transparent_page_size
from memdesc.memory.populate import Reserving, populate
from memdesc.vm.pages import page_size
from memdesc.vm.proc import read_text

_TRANSPARENT = "/sys/kernel/mm/transparent_hugepage"
_SHMEM_ENABLED = f"{_TRANSPARENT}/shmem_enabled"
_ROUND = 64 << 20
"""Bytes made between two looks at the limits."""
_LOSS = 0.04
"""What attempts may lose, as a part of the time that base pages would take."""
_FORGIVEN = 0.01
"""Seconds of loss forgiven by each second that passes."""
_TRIES = 3
"""How often one collapse is tried that meets what passes (EAGAIN, EBUSY)."""


@dataclass(slots=True)
class _Books:
    """What this process has seen huge and base pages cost. Guesses: no lock holds them.

    `base_cost`: seconds for a byte of base pages. `debt`: seconds that attempts have lost, and
    that neither base pages (a twenty-fifth of their time), time, nor a success has paid.
    """

    base_cost: float = 0.25e-9
    debt: float = 0.0
    seen: float = 0.0

    def may_try(self) -> bool:
        """Whether no loss of before is still open."""
        now = time.monotonic()
        self.debt -= _FORGIVEN * (now - self.seen)
        self.seen = now
        return self.debt <= 0

    def tried(self, lost: float) -> None:
        """Note what an attempt lost, or gained (negative)."""
        self.debt = max(lost, 0.0)

    def populated(self, nbytes: int, seconds: float) -> None:
        """Note what base pages took."""
        self.debt -= _LOSS * seconds
        if nbytes >= transparent_page_size():
            self.base_cost = (self.base_cost + seconds / nbytes) / 2


_books = _Books()


def advise(address: int, length: int, advice: int) -> None:
    """Tell the kernel what is hoped for; one without huge pages (EINVAL) need not be told."""
    with contextlib.suppress(OSError):
        _core.madvise(address, length, advice)


def leave_to_faults(address: int, length: int, doing: str, pages: PageKind) -> None:
    """Have the faults to come make huge pages, where the kernel lets them.

    Raises
    ------
    PageKindError
        It does not, and they were asked for by name (EINVAL).
    """
    if pages is PageKind.TRANSPARENT_HUGE and not _faults_may_be_huge():
        raise PageKindError(
            f"{doing}: lazy shared memory gets no transparent huge pages here: set "
            f"{_SHMEM_ENABLED} to advise, or leave out lazy=True",
            errno=errno.EINVAL,
        )
    advise(address, length, _core.MADV_HUGEPAGE)


def _faults_may_be_huge() -> bool:
    """Whether a fault in shared memory makes a huge page where that is advised."""
    own = f"{_TRANSPARENT}/hugepages-{transparent_page_size() >> 10}kB/shmem_enabled"
    for setting in (own, _SHMEM_ENABLED):
        with contextlib.suppress(FileNotFoundError):
            chosen = read_text(setting).partition("[")[2].partition("]")[0]
            if chosen != "inherit":
                return chosen in ("always", "within_size", "advise", "force")
    return False


def _complete_page(offset: int, address: int, length: int) -> None:
    """Make the huge page that begins before a range and ends in it, where that can be.

    It can not where the part before is wired: then the two parts are two regions.
    """
    size = transparent_page_size()
    earlier = address % (size or 1)
    if 0 < earlier <= offset and size <= earlier + length:
        with contextlib.suppress(OSError):
            _core.madvise(address - earlier, size, _core.MADV_COLLAPSE)


def _make_page(address: int) -> None:
    _core.madvise(address, page_size, _core.MADV_POPULATE_WRITE)
    _core.madvise(address, transparent_page_size(), _core.MADV_COLLAPSE)


def populate_auto(object_: Reserving, offset: int, address: int, length: int, doing: str) -> None:
    """Fault in huge pages while they cost no more than base pages, then base pages.

    Parameters and errors as of `populate`.
    """
    start, whole = whole_huge_pages(address, length)
    done, slow = 0, False
    if _books.may_try():
        _complete_page(offset, address, length)
    if whole:
        advise(start, whole, _core.MADV_HUGEPAGE)
        done, slow = _make_while_cheap(start, whole, doing)
        if slow:  # nor shall the faults to come
            advise(start + done, whole - done, _core.MADV_NOHUGEPAGE)
    before, after = start - address, start + done - address
    by_faults = whole > done and not slow and _faults_may_be_huge()
    clock = time.perf_counter()
    for low, high in [(0, before), (after, length)] if done else [(0, length)]:
        if low < high:
            reserving = None if by_faults else object_
            populate(reserving, offset + low, address + low, high - low, doing)
            _books.populated(high - low, time.perf_counter() - clock)
    if whole > done:
        advise(start + done, whole - done, _core.MADV_HUGEPAGE)


def _make_while_cheap(address: int, length: int, doing: str) -> tuple[int, bool]:
    """Make huge pages, first to last: (bytes made, whether time was what ended it)."""
    if not _books.may_try():
        return 0, True
    size, done, lost, slow = transparent_page_size(), 0, 0.0, False
    fair = _books.base_cost * size
    while done < length and not slow:
        if done and done % _ROUND == 0:
            check_available(min(_ROUND, length - done), doing)
        clock = time.perf_counter()
        try:
            _make_page(address + done)
            done += size
        except OSError:  # whatever it is: base pages can still be had, or will say why not
            _books.tried(lost + time.perf_counter() - clock)
            return done, False
        loss = time.perf_counter() - clock - fair
        lost += loss
        # Stop before the next one, if it is like this one, makes the whole too slow.
        slow = loss > 0 and lost + loss > _LOSS * _books.base_cost * length
    _books.tried(lost)
    return done, slow


def populate_transparent(
    object_: Reserving, offset: int, address: int, length: int, doing: str
) -> None:
    """Fault in huge pages wherever a whole one fits, base pages around them.

    Parameters as of `populate`.

    Raises
    ------
    PageKindError
        Not all of the huge pages could be had.
    AllocationError
        Nor base pages.
    """
    start, whole = whole_huge_pages(address, length)
    advise(start, whole, _core.MADV_HUGEPAGE)
    _complete_page(offset, address, length)
    before = look(address, length).huge_bytes if offset else 0
    refusal, made = _make_all(start, whole, doing)
    if refusal is None:
        populate(object_, offset, address, length, doing)
        return
    try:
        populate(None if _faults_may_be_huge() else object_, offset, address, length, doing)
        made = look(address, length).huge_bytes - before
        if made < whole:
            raise PageKindError(
                f"{doing}: {made:,} of {whole:,} bytes came in transparent huge pages "
                f"({describe_errno(refusal)}): free memory or have the kernel compact it "
                f"(vm.compact_memory), set {_SHMEM_ENABLED} to advise, or say pages=AUTO",
                errno=refusal.errno,
                requested=whole,
                available=made,
            ) from refusal
    finally:
        del refusal  # its traceback leads here: they would keep one another, and the memory


def _make_all(start: int, length: int, doing: str) -> tuple[OSError | None, int]:
    """Make huge pages, first to last: (what the kernel answered instead of one, bytes made)."""
    made = 0
    while made < length:
        if made and made % _ROUND == 0:
            check_available(min(_ROUND, length - made), doing)
        try:
            _make_page_patiently(start + made)
        except OSError as error:  # maybe an older kernel, whose faults can make them
            return error, made
        made += transparent_page_size()
    return None, made


def _make_page_patiently(address: int) -> None:
    for left in reversed(range(_TRIES)):
        try:
            _make_page(address)
        except OSError as error:
            if not left or error.errno not in (errno.EAGAIN, errno.EBUSY):
                raise
        else:
            return
