"""Which descriptor the bytes of a buffer lie in: of an array, say, that is a view of one.

Descriptors and mappings of this task note the memory that their views are made of. It is found
again by the exporter at the end of a view's chain, so no map of the address space is read, and a
buffer that lies in none of ours costs nothing. Nothing here keeps memory or descriptors alive.
"""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any

from memdesc import _core
from memdesc.copyio import bytes_of

if TYPE_CHECKING:
    from memdesc.descriptors.base import MemoryDescriptor
    from memdesc.descriptors.mappable import Mappable

_homes: weakref.WeakKeyDictionary[_core.MappedMemory, tuple[weakref.ref[Mappable], int]] = (
    weakref.WeakKeyDictionary()
)
"""By memory: whose bytes it shows, and at which offset of it the first byte of that would lie."""


def note_home(window: object, descriptor: Mappable, offset: int) -> None:
    """Note that a window shows a descriptor's bytes from `offset` on. The latest note holds."""
    if isinstance(window, _core.Window):
        _homes[window.memory] = weakref.ref(descriptor), window.offset - offset


def descriptor_of(buffer: Any) -> MemoryDescriptor | None:
    """Find the descriptor whose pages a buffer lies in; None where it lies in none of this task.

    Parameters
    ----------
    buffer : buffer
        Contiguous: an array, a memoryview, a mapping, or a slice of one.

    Returns
    -------
    MemoryDescriptor or None
        Of just those bytes: a `SubMemoryDescriptor` where they are not all that is described.
        None too where the descriptor that the memory came from was closed or collected.

    Examples
    --------
    >>> from memdesc import BufferMemoryDescriptor
    >>> frames = BufferMemoryDescriptor(100)
    >>> descriptor_of(frames.array()) is frames
    True
    >>> descriptor_of(frames.array()[10:]).offset
    10
    >>> descriptor_of(bytearray(100)) is None
    True
    """
    window = _exporter_of(buffer)
    if not isinstance(window, _core.Window):
        return None
    found = _homes.get(window.memory)
    descriptor = None if found is None else found[0]()
    if found is None or descriptor is None or descriptor.closed:
        return None
    with bytes_of(buffer) as view:
        address, nbytes, _ = _core.buffer_address(view)
    offset = address - window.memory.address - found[1]
    return _part(descriptor, offset, nbytes)


def _exporter_of(buffer: Any) -> object:
    """What the memory of a view belongs to, behind all views of views."""
    numpy = sys.modules.get("numpy")
    found: Any = buffer
    while True:
        if numpy is not None and isinstance(found, numpy.ndarray):
            found = found.base
        elif isinstance(found, memoryview):
            found = found.obj
        elif isinstance(found, _core.Exporter):
            found = found._export()
        else:
            return found


def _part(descriptor: Any, offset: int, nbytes: int) -> MemoryDescriptor | None:
    from memdesc.descriptors.sub import SubMemoryDescriptor

    if offset < 0 or offset + nbytes > descriptor.length:
        return None  # it was shortened since
    if (offset, nbytes) == (0, descriptor.length):
        whole: MemoryDescriptor = descriptor
        return whole
    return SubMemoryDescriptor(descriptor, offset, nbytes)
