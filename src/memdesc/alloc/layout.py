"""How a zone's memory is cut: elements into strides, strides into chunks. Arithmetic alone."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from memdesc.errors import InvalidArgument
from memdesc.vm.pages import check_integer, check_length, page_size, round_page

MAX_ELEMENT = 1 << 20
"""Bytes of the largest element; what is larger is no small memory."""
_CHUNK = 64 << 10
"""Bytes of a usual chunk: growing takes a few system calls, and an idle zone holds little."""
DEFAULT_ALIGNMENT = 16
_LONGEST_NAME = 63


@dataclass(frozen=True, slots=True)
class Layout:
    """The measures of one zone, in bytes and elements.

    Attributes
    ----------
    element_size, stride : int
        What an element has; and from one to the next, a multiple of the alignment.
    max_elements : int
        As many strides as fit into the capacity.
    chunk_length : int
        What a chunk takes of the zone map: whole pages.
    chunk_elements : int
        How many strides fit into it; the last chunk of a zone may have fewer elements.
    """

    element_size: int
    stride: int
    max_elements: int
    chunk_length: int
    chunk_elements: int

    @property
    def max_size(self) -> int:
        """Bytes of all the chunks that the zone may ever hold."""
        return -(-self.max_elements // self.chunk_elements) * self.chunk_length


def plan(name: str, element_size: int, capacity: int, alignment: int) -> Layout:
    """Check what a zone is to be, and measure it out.

    Raises
    ------
    InvalidArgument
        Each with its numbers.
    """
    what = f"zone {name!r}"
    element_size = check_length(element_size, f"element_size of {what}")
    if element_size > MAX_ELEMENT:
        raise InvalidArgument(
            f"element_size of {what} is {element_size:,} bytes, a chunk gives {MAX_ELEMENT:,} at "
            "most: take a BufferMemoryDescriptor for large memory",
            errno=errno.EINVAL,
        )
    alignment = check_integer(alignment, f"alignment of {what}")
    if not 1 <= alignment <= page_size or alignment & (alignment - 1):
        raise InvalidArgument(
            f"alignment of {what} is {alignment}: give a power of two, 1 to {page_size} (a page)",
            errno=errno.EINVAL,
        )
    stride = element_size + -element_size % alignment
    capacity = check_length(capacity, f"capacity of {what}")
    if capacity < stride:
        raise InvalidArgument(
            f"capacity of {what} is {capacity:,} bytes, one element takes {stride:,} "
            f"({element_size:,} at an alignment of {alignment}): give at least that",
            errno=errno.EINVAL,
        )
    max_elements = capacity // stride
    length = _chunk_length(stride, max_elements)
    return Layout(element_size, stride, max_elements, length, length // stride)


def _chunk_length(stride: int, max_elements: int) -> int:
    """Give the pages of a chunk that waste least at its end; the smallest such."""
    least = max(_CHUNK, round_page(stride))
    if stride * max_elements <= least:
        return round_page(stride * max_elements)
    lengths = range(least, 2 * least, page_size)
    return min(lengths, key=lambda length: (length % stride / length, length))


def check_name(name: str) -> str:
    """Give a zone's name back if a table can show it, else raise `InvalidArgument`."""
    if not isinstance(name, str):
        raise InvalidArgument(
            f"a zone's name is of type {type(name).__name__}: give a str", errno=errno.EINVAL
        )
    if not 1 <= len(name) <= _LONGEST_NAME or not name.isprintable():
        raise InvalidArgument(
            f"a zone's name is {name[:80]!r}, of {len(name)} characters: give 1 to "
            f"{_LONGEST_NAME}, all printable",
            errno=errno.EINVAL,
        )
    return name
