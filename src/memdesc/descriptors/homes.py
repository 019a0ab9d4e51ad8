"""Which descriptor the bytes of a buffer lie in: of an array, say, that is a view of one.

Descriptors and mappings of this task note the memory that their views are made of. It is found
again by the exporter at the end of a view's chain, so no map of the address space is read, and a
buffer that lies in none of ours costs nothing; of buffers that tell no exporter (PyArrow's) by
their addresses. Nothing here keeps memory or descriptors alive.
"""

from __future__ import annotations

import sys
import weakref
from bisect import bisect_right
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from memdesc import _core
from memdesc.copyio import bytes_of
from memdesc.mapping import is_immutable
from memdesc.vm import tracing

if TYPE_CHECKING:
    from memdesc.descriptors.base import MemoryDescriptor
    from memdesc.descriptors.mappable import Mappable

_homes: weakref.WeakKeyDictionary[_core.MappedMemory, tuple[weakref.ref[Mappable], int]] = (
    weakref.WeakKeyDictionary()
)
"""By memory: whose bytes it shows, and at which offset of it the first byte of that would lie."""


_noted = object()
"""Another one with each note: `_sorted` was made of the same notes where it has this one."""

_sorted: tuple[object, list[int], list[weakref.ref[_core.MappedMemory]]] = (None, [], [])
"""The memories by address, made anew when somebody asks after a note."""


def note_home(window: object, descriptor: Mappable, offset: int) -> None:
    """Note that a window shows a descriptor's bytes from `offset` on. The latest note holds."""
    global _noted
    if isinstance(window, _core.Window):
        _homes[window.memory] = weakref.ref(descriptor), window.offset - offset
        _noted = object()
        if tracing.books is not None:
            told = partial(_outlived, weakref.ref(descriptor), descriptor.name)
            tracing.books.note(window.memory, told)


def _outlived(
    descriptor: weakref.ref[Mappable], name: str, memory: _core.MappedMemory
) -> tracing.Told:
    """What memory says of itself once its descriptor is gone or closed: views keep it."""
    known = descriptor()
    return (name, memory.length) if known is None or known.closed else None


@dataclass(frozen=True, slots=True)
class Home:
    """Where the bytes of a buffer lie: `length` of them at `offset` of a descriptor."""

    descriptor: MemoryDescriptor
    offset: int
    length: int


def home_of(buffer: Any) -> Home | None:
    """Find where a buffer lies; None as of `descriptor_of`, and for one of no bytes."""
    window = _exporter_of(buffer)
    if not isinstance(window, _core.Window) or window.memory not in _homes:
        return None
    return _home_in(window.memory, *span_of(buffer))


def home_at(address: int, length: int) -> Home | None:
    """Find where bytes of this task lie that the caller keeps there; None as of `home_of`."""
    global _sorted
    noted = _noted
    known, starts, memories = _sorted
    if known is not noted:
        living = [memory for ref in _homes.keyrefs() if (memory := ref()) is not None]
        living.sort(key=lambda memory: memory.address)
        starts = [memory.address for memory in living]
        memories = [weakref.ref(memory) for memory in living]
        _sorted = noted, starts, memories
    at = bisect_right(starts, address) - 1
    memory = memories[at]() if at >= 0 else None
    # Memory that lives is mapped, and no other is at its addresses; others are right behind it,
    # where the rest of the descriptor would lie if all of that were mapped.
    if memory is None or address + length > memory.address + memory.length:
        return None
    return _home_in(memory, address, length)


def _home_in(memory: _core.MappedMemory, address: int, length: int) -> Home | None:
    found = _homes.get(memory)
    descriptor: Any = None if found is None else found[0]()
    if found is None or descriptor is None or descriptor.closed:
        return None
    offset = address - memory.address - found[1]
    if not length or offset < 0 or offset + length > descriptor.length:
        return None  # it was shortened since, or lies behind it
    return Home(descriptor, offset, length)


def descriptor_of(buffer: Any) -> MemoryDescriptor | None:
    """Find the descriptor whose pages a buffer lies in; None where it lies in none of this task.

    Parameters
    ----------
    buffer : buffer
        An array, a memoryview, a mapping, or a slice of one. Of an array with gaps, or in any
        order, it is the bytes from the first to the last one.

    Returns
    -------
    MemoryDescriptor or None
        Of just those bytes: a `SubMemoryDescriptor`, with its `parent`, `offset` and `length`,
        where they are not all that is described. None too where the descriptor that the memory
        came from was closed or collected, and for no bytes.

    Raises
    ------
    InvalidArgument
        It is no array, and not contiguous.

    Examples
    --------
    >>> from memdesc import BufferMemoryDescriptor
    >>> frames = BufferMemoryDescriptor(100)
    >>> descriptor_of(frames.array()) is frames
    True
    >>> part = descriptor_of(frames.array()[10:30:2])
    >>> part.parent is frames, part.offset, part.length
    (True, 10, 19)
    >>> descriptor_of(bytearray(100)) is None
    True
    """
    from memdesc.descriptors.sub import SubMemoryDescriptor

    home = home_of(buffer)
    if home is None:
        return None
    if (home.offset, home.length) == (0, home.descriptor.length):
        return home.descriptor
    return SubMemoryDescriptor(home.descriptor, home.offset, home.length)


def lies_immutable(buffer: Any) -> bool:
    """Tell whether a buffer lies in memory that nobody can change, whoever mapped or made it."""
    window = _exporter_of(buffer)
    return isinstance(window, _core.Window) and is_immutable(window)


def span_of(buffer: Any) -> tuple[int, int]:
    """Tell (address, bytes) of what reaches from the first to the last byte of a buffer."""
    if not _is_array(buffer):
        with bytes_of(buffer) as view:
            address, nbytes, _ = _core.buffer_address(view)
        return address, nbytes
    first: int = buffer.__array_interface__["data"][0]
    if not buffer.size:
        return first, 0
    steps = [(n - 1) * step for n, step in zip(buffer.shape, buffer.strides, strict=True)]
    low = sum(step for step in steps if step < 0)
    high = sum(step for step in steps if step > 0) + buffer.itemsize
    return first + low, high - low


def _is_array(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _exporter_of(buffer: Any) -> object:
    """What the memory of a view belongs to, behind all views of views."""
    pickle = sys.modules.get("pickle")
    found: Any = buffer
    while True:
        if _is_array(found):
            found = found.base
        elif isinstance(found, memoryview):
            found = found.obj
        elif isinstance(found, _core.Exporter):
            found = found._export()
        elif pickle is not None and isinstance(found, pickle.PickleBuffer):
            with memoryview(found) as view:
                found = view.obj
        elif hasattr(found, "__array_interface__"):  # as_strided puts one between
            found = getattr(found, "base", None)
        else:
            return found
