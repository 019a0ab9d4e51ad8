"""Where each array goes in a version's memory, so that the device itself can put it there.

O_DIRECT wants memory and file aligned alike. So arrays keep their place within the page: what lies
together in the file lies together in memory, and is read in one go, from whole page to whole page;
headers that stand in between come along. Nothing is bounced then.

An array that is not aligned for its elements in its file (most of an .npz are) is aligned in memory
all the same: programs would pay for that with every access. It goes through the page cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from memdesc.files.formats import StoredArray
from memdesc.vm.pages import page_size, round_page, trunc_page

_ALIGNED = 64
"""Of what keeps no place from its file: a cache line, and any vector's alignment."""


@dataclass(slots=True)
class Run:
    """A range of a file that is read in one go.

    Attributes
    ----------
    file_offset, nbytes : int
        What must be there.
    offset : int
        Of its first byte in memory.
    whole_pages : bool
        Whether all of its pages are read, before and behind it, and have room in memory.
    """

    file_offset: int
    nbytes: int
    offset: int
    whole_pages: bool


@dataclass(slots=True)
class Place:
    """Where the arrays of a file go: `offsets` by array, and what is read for that."""

    offsets: list[int]
    runs: list[Run] = field(default_factory=list)


def place(arrays: Iterable[StoredArray], start: int) -> tuple[Place, int]:
    """Place the arrays of one file from an offset in memory on: (where, the first offset behind).

    Arrays without elements are at 0, and not read.
    """
    known = list(arrays)
    found = Place([0] * len(known))
    end = start
    order = sorted(range(len(known)), key=lambda at: known[at].offset)
    end = _place_in_pages(found, known, [at for at in order if _keeps_its_place(known[at])], end)
    for at in order:
        array = known[at]
        if array.nbytes and not _keeps_its_place(array):
            step = max(_ALIGNED, array.alignment)
            found.offsets[at] = offset = -(-end // step) * step
            end = offset + array.nbytes
            if not array.deflated:
                found.runs.append(Run(array.offset, array.nbytes, offset, False))
    return found, end


def _keeps_its_place(array: StoredArray) -> bool:
    return array.nbytes > 0 and not array.deflated and not array.offset % array.alignment


def _place_in_pages(found: Place, known: list[StoredArray], order: list[int], end: int) -> int:
    run: Run | None = None
    for at in order:
        array = known[at]
        if run is None or array.offset - (run.file_offset + run.nbytes) > page_size:
            offset = round_page(end) + array.offset % page_size
            run = Run(array.offset, 0, offset, True)
            found.runs.append(run)
        # Entries of an archive may lie inside one another.
        run.nbytes = max(run.nbytes, array.offset + array.nbytes - run.file_offset)
        found.offsets[at] = run.offset + array.offset - run.file_offset
        end = round_page(run.offset + run.nbytes)
    return end


def pages_of(run: Run) -> tuple[int, int, int]:
    """Give what is asked of the file for a run: (offset in it, bytes, offset in memory)."""
    if not run.whole_pages:
        return run.file_offset, run.nbytes, run.offset
    first = trunc_page(run.file_offset)
    before = run.file_offset - first
    return first, round_page(run.file_offset + run.nbytes) - first, run.offset - before
