"""Page arithmetic, and the words for places in memory: address, offset, access.

Nothing here asks the kernel anything but the page size. An address belongs to a task and is
never dereferenced in another one; an offset belongs to a descriptor. They are different types.
"""

from __future__ import annotations

import errno
import os
from enum import Enum
from typing import Final, NewType, TypeVar

from memdesc.errors import InvalidArgument

Address = NewType("Address", int)
"""A virtual address, in bytes, in the address space of one task."""

Offset = NewType("Offset", int)
"""A distance in bytes from the start of a descriptor."""

page_size: Final[int] = os.sysconf("SC_PAGE_SIZE")
"""Bytes in a base page of this system. Never hard-code it; `page_size` in I/O Kit."""

MAX_LENGTH: Final[int] = 2**63 - 1
"""The largest length that Linux can express (off_t)."""


_E = TypeVar("_E", bound=Enum)


def by_name(kind: type[_E], value: object, what: str) -> _E:
    """Find a choice by its name, in any case; `InvalidArgument` names those that there are."""
    name = value.upper().replace("-", "_") if isinstance(value, str) else ""
    if name not in kind.__members__:
        choices = ", ".join(f"{kind.__name__}.{choice}" for choice in kind.__members__)
        raise InvalidArgument(f"{value!r} is no {what}: give one of {choices}", errno=errno.EINVAL)
    return kind[name]


class Access(Enum):
    """What a task may do with memory. Ordered by inclusion: READ_ONLY within READ_WRITE.

    Where one is wanted, its name does as well: "read_write".
    """

    READ_ONLY = "read-only"
    READ_WRITE = "read-write"

    @property
    def writable(self) -> bool:
        """Whether it includes storing."""
        return self is Access.READ_WRITE

    def within(self, other: Access) -> bool:
        """Whether `other` gives at least this."""
        return self is other or other is Access.READ_WRITE

    @classmethod
    def _missing_(cls, value: object) -> Access:
        return by_name(cls, value, "access")


class Direction(Enum):
    """Which way data moves, as the device sees it (I/O Kit: IODirection); its name does as well."""

    NONE = 0
    IN = 1
    """Device to memory; the memory is written (kIODirectionIn)."""
    OUT = 2
    """Memory to device; the memory is only read (kIODirectionOut)."""
    OUT_IN = 3
    """Both (kIODirectionOutIn)."""

    @property
    def writes_memory(self) -> bool:
        """Whether preparing for it needs write access, as all do but exactly OUT."""
        return self is not Direction.OUT

    @classmethod
    def _missing_(cls, value: object) -> Direction:
        return by_name(cls, value, "direction")


def check_length(length: int, what: str = "length") -> int:
    """Give `length` back if it is an integer from 1 to `MAX_LENGTH`, else raise.

    Raises
    ------
    InvalidArgument
        Not an integer, zero, negative, or past 2**63 - 1.
    """
    value = check_integer(length, what)
    if value < 1:
        raise InvalidArgument(f"{what} is {value}: give at least 1 byte", errno=errno.EINVAL)
    return value


def check_alignment(alignment: int) -> int:
    """Give an alignment in bytes back if it is a power of two up to 2**40, else raise."""
    value = check_integer(alignment, "alignment")
    if value < 1 or value & (value - 1) or value > 1 << 40:
        raise InvalidArgument(
            f"alignment is {value}: give a power of two up to 2**40", errno=errno.EINVAL
        )
    return value


def check_integer(value: int, what: str) -> int:
    """Give an integer within ±`MAX_LENGTH` back (also NumPy's), else raise `InvalidArgument`."""
    try:
        number = value.__index__()
    except AttributeError:
        kind = type(value).__name__
        raise InvalidArgument(
            f"{what} is of type {kind}: give an integer", errno=errno.EINVAL
        ) from None
    if not -MAX_LENGTH <= number <= MAX_LENGTH:
        raise InvalidArgument(
            f"{what} is {number}: Linux counts up to 2**63 - 1 ({MAX_LENGTH})", errno=errno.EINVAL
        )
    return number


def trunc_page(address: int, size: int = page_size) -> int:
    """Round down to a page border.

    Examples
    --------
    >>> trunc_page(page_size + 1) == page_size
    True
    """
    return address - address % size


def round_page(address: int, size: int = page_size) -> int:
    """Round up to a page border.

    Parameters
    ----------
    address : int
        Bytes, 0 or more: an address, offset or length.
    size : int
        The page size to round to; that of a huge page for huge memory.

    Raises
    ------
    InvalidArgument
        The result is past 2**63 - 1 (XNU's `round_page` wraps there; we do not).

    Examples
    --------
    >>> round_page(1) == page_size
    True
    """
    rounded = address + -address % size
    if rounded > MAX_LENGTH:
        raise InvalidArgument(
            f"{address} rounded up to a page of {size} is past 2**63 - 1: no such memory",
            errno=errno.EINVAL,
        )
    return rounded


def page_span(address: int, length: int, size: int = page_size) -> tuple[int, int]:
    """Give the whole pages that hold `length` bytes at `address`: (start, length)."""
    start = trunc_page(address, size)
    return start, round_page(address + length, size) - start


def add_run(runs: list[tuple[int, int]], start: int, nbytes: int) -> None:
    """Put a range behind (start, bytes) runs: into the last one, where it begins at its end."""
    if runs and sum(runs[-1]) == start:
        runs[-1] = runs[-1][0], runs[-1][1] + nbytes
    else:
        runs.append((start, nbytes))
