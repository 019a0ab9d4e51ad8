"""The model's allocators: blocks of this task's memory. NULL is None; a pointer is the block.

A block is a writable buffer with an `address`. The model's IOFree family is told the size again
and panics where it can not be; here that raises.
"""

from __future__ import annotations

import errno

from memdesc._core import ZoneElement
from memdesc.alloc.iomalloc import (
    PageBlock,
    io_free,
    io_malloc,
    io_malloc_aligned,
    io_malloc_contiguous,
    io_malloc_pageable,
)
from memdesc.errors import InvalidArgument
from memdesc.iokit.values import NullWhere, Why

Block = ZoneElement | PageBlock


def IOMalloc(size: int, why: Why = None) -> Block | None:
    """Allocate; never to be shared."""
    with NullWhere(why):
        return io_malloc(size)
    return None


def IOMallocAligned(size: int, alignment: int, why: Why = None) -> Block | None:
    """Allocate aligned; an alignment that is no power of two is rounded up to one."""
    with NullWhere(why):
        return io_malloc_aligned(size, _power_of_two(alignment))
    return None


def IOMallocContiguous(
    size: int, alignment: int, physicalAddress: list[int] | None = None, why: Why = None
) -> Block | None:
    """Allocate physically contiguous memory; `physicalAddress` gets where that is."""
    with NullWhere(why):
        block = io_malloc_contiguous(size, _power_of_two(alignment))
        if physicalAddress is not None:
            physicalAddress.append(block.physical_address)
        return block
    return None


def IOMallocPageable(size: int, alignment: int, why: Why = None) -> Block | None:
    """Allocate memory that may be paged out."""
    with NullWhere(why):
        return io_malloc_pageable(size, _power_of_two(alignment))
    return None


def IOFree(address: Block, size: int) -> None:
    """Give a block back. Its size is known; one that it can not have had raises."""
    if not 0 < size <= len(address):
        raise InvalidArgument(
            f"a block of {len(address)} bytes is freed as one of {size}: give the size that was "
            "allocated",
            errno=errno.EINVAL,
        )
    io_free(address)


IOFreeAligned = IOFreeContiguous = IOFreePageable = IOFree


def _power_of_two(alignment: int) -> int:
    return 1 << (alignment - 1).bit_length() if alignment > 0 else 1
