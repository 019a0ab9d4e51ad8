"""Kept memory: what it is, which buffers it fits, and the words that tell of it."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from memdesc import _core
from memdesc.errors import InvalidArgument
from memdesc.memory.memfd import OwnedObject
from memdesc.memory.page_kinds import PageKind
from memdesc.memory.populate import in_parallel, workers_for
from memdesc.vm.pages import Access, round_page

_LONGEST_FIT = 1.25
"""How much larger than what is asked for a kept block may be."""
_STEP = 16 << 20
"""Bytes that a thread clears between two looks at signals."""
_WORTH = 32 << 20
"""Bytes for which another thread pays: 0.5 ms of work for 0.1 ms to start it."""


class Contents(Enum):
    """What a buffer shows at first."""

    ZEROED = "zeroed"
    """Zeros, as fresh memory does."""
    UNDEFINED = "undefined"
    """Zeros, or what an earlier buffer of this program left: whoever is given this buffer may see
    that too. For who fills all of it at once."""

    @classmethod
    def _missing_(cls, value: object) -> Contents:
        raise InvalidArgument(
            f"{value!r} is no contents: give Contents.ZEROED or UNDEFINED", errno=errno.EINVAL
        )


class Refusal(Enum):
    """Why a freed buffer's memory was not kept, or no longer."""

    NOT_ALLOWED = "its lifecycle forbids it: granted, forked, registered, exposed, snapshot"
    TOO_LARGE = "it is larger than the limit"
    NO_LEASE = "this system gives no lease, so that nobody can tell who else has it"
    SPOILED = "it was made visible once more after it was freed, perhaps where no lease sees"


@dataclass(frozen=True, slots=True)
class RecyclerStatistics:
    """What the recycler of this process keeps, and what it has done since the process began.

    Attributes
    ----------
    limit : int
        Bytes that it may keep now.
    kept_bytes, kept_blocks : int
    sizes : mapping of int to int
        How many blocks of each size in bytes are kept.
    hits, misses : int
        Buffers made of kept memory, and those for which none was found that fits.
    busy : int
        How often a kept block was passed over as somebody still had it.
    trimmed_bytes : int
        Given back to the kernel to keep to the limit, on demand, or under memory pressure.
    refused : mapping of Refusal to int
    """

    limit: int
    kept_bytes: int
    kept_blocks: int
    sizes: Mapping[int, int]
    hits: int
    misses: int
    busy: int
    trimmed_bytes: int
    refused: Mapping[Refusal, int]


@dataclass(frozen=True, slots=True)
class Kind:
    """What kept memory and the next buffer must have in common; a memfd can not be renamed."""

    pages: PageKind
    max_access: Access
    name: str


@dataclass(frozen=True, slots=True)
class Want:
    """The memory that a buffer needs."""

    kind: Kind
    capacity: int
    alignment: int
    contents: Contents


@dataclass(frozen=True, slots=True)
class Settings:
    """What the program said. `limit` None: a share of what is available."""

    limit: int | None = None
    trust_same_user: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Freed memory: a retired object, and its owner's view. Dropped, it goes to the kernel."""

    kind: Kind
    object: OwnedObject
    memory: _core.MappedMemory
    start: int

    @property
    def size(self) -> int:
        """Bytes of the object, all of them in memory."""
        return self.object.size


def fits(block: Block, want: Want) -> bool:
    """Whether a buffer can be made of a block, if nobody else has it."""
    needed = round_page(want.capacity, block.object.page_size)
    by_name = want.kind.pages is not PageKind.AUTO
    if by_name and block.object.pages is not want.kind.pages:
        return False  # the source of a snapshot, moved to what memory there was
    return (
        block.kind == want.kind
        and needed <= block.size <= min(needed * _LONGEST_FIT, 2 * round_page(want.capacity))
        and (block.memory.address + block.start) % want.alignment == 0
    )


def clear(memory: _core.MappedMemory, at: int, length: int) -> None:
    """Fill with zeros, on several CPUs where that pays."""

    def work(offset: int, nbytes: int) -> None:
        _core.zero_memory(memory, at + offset, nbytes)

    in_parallel(work, length, _STEP, max(workers_for(length, _WORTH), 1))
