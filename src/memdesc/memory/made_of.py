"""What memory is made of: read from smaps, never from what was asked for."""

from __future__ import annotations

from dataclasses import dataclass

from memdesc.memory.page_kinds import PageKind, transparent_page_size
from memdesc.vm.pages import page_size, round_page, trunc_page
from memdesc.vm.regions import details_in
from memdesc.vm.task import Task


@dataclass(frozen=True, slots=True)
class MadeOf:
    """The pages of a range: their kind, the bytes in huge ones, whether that can not change."""

    kind: PageKind
    huge_bytes: int
    fixed: bool


def whole_huge_pages(address: int, length: int) -> tuple[int, int]:
    """Give the transparent huge pages that fit whole into a range of addresses: (start, length)."""
    size = transparent_page_size()
    if not size:
        return address, 0
    start = round_page(address, size)
    return start, max(trunc_page(address + length, size) - start, 0)


def look(address: int, length: int) -> MadeOf:
    """Look what a range of this task, mapped at whole pages, is made of.

    Linux: /proc/self/smaps, no privilege: KernelPageSize, and what is mapped by huge entries
    (ShmemPmdMapped).
    """
    _, whole = whole_huge_pages(address, length)
    with Task.current() as task:
        shown = details_in(task, address, length)
    if shown and all(one.page_size > page_size for one in shown):
        return MadeOf(PageKind.HUGE, length, fixed=True)
    huge = sum(one.huge for one in shown)
    kind = PageKind.TRANSPARENT_HUGE if whole and huge >= whole else PageKind.BASE
    return MadeOf(kind, huge, fixed=length < transparent_page_size())
