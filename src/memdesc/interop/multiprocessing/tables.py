"""Tables whose buffers lie in descriptors, as handles: PyArrow's, with all that is made of buffers.

PyArrow pickles a table, a batch or an array by its buffers, so what is reduced here is the buffer:
to where it lies, and in what. That is one object for all buffers of a message that lie in one
descriptor, which pickle writes once: one handle, however many columns and chunks. Buffers of other
memory, such as bitmaps that PyArrow computed, go by value beside them.
"""

from __future__ import annotations

import errno
import weakref
from typing import TYPE_CHECKING, Any

from memdesc.descriptors.base import MemoryDescriptor
from memdesc.descriptors.homes import home_at, span_of
from memdesc.errors import ClosedError, MappingError, MappingReason
from memdesc.handover import reducers
from memdesc.handover.reducers import Handle, HandleLostError
from memdesc.interop.multiprocessing import by_value, receive, see_types
from memdesc.vm.pages import Access

if TYPE_CHECKING:
    import pyarrow as pa


class Memory:
    """What buffers of one message lie in: a descriptor, as pickle sees it."""

    def __init__(self, descriptor: MemoryDescriptor) -> None:
        self.descriptor = descriptor
        self._view = memoryview(descriptor)  # whoever closes it meanwhile

    def __reduce__(self) -> Any:
        try:
            # Below what its seals allow, read-only is a courtesy: a family is one program.
            handle = reducers.leave(self.descriptor, Access.READ_ONLY, enforced=False)
        except ClosedError:
            return bytes, (bytes(self._view),)  # another thread did it just now
        except MappingError as error:
            if error.reason in (MappingReason.TOO_MANY_FILES, MappingReason.NOT_ANSWERING):
                raise
            return bytes, (bytes(self._view),)  # a file, and what else nobody can be given
        return _take, tuple(handle)


_memories: weakref.WeakValueDictionary[MemoryDescriptor, Memory] = weakref.WeakValueDictionary()
"""Those of messages that are being pickled: each pickler keeps what it has written."""


def reduce_buffer(buffer: pa.Buffer) -> Any:
    """Give what `multiprocessing` sends of a buffer: where it lies, or its bytes as before."""
    home = home_at(buffer.address, buffer.size) if buffer.is_cpu else None
    if home is None:
        return by_value(buffer)
    memory = _memories.get(home.descriptor)
    if memory is None:
        try:
            memory = _memories[home.descriptor] = Memory(home.descriptor)
        except ClosedError:
            return by_value(buffer)  # another thread did it just now
    return _rebuild, (memory, home.offset, home.length)


def _take(header: bytes, address: bytes, token: bytes) -> tuple[Any, int, int]:
    """Map what came: (what keeps it, the address of its first byte, bytes from there on)."""
    see_types()  # of a process that installed before it had PyArrow
    keeper, start = receive(Handle(header, address, token), "the memory of a table")
    first, nbytes = span_of(keeper)
    return keeper, first + start, nbytes - start


def _rebuild(memory: Any, offset: int, length: int) -> pa.Buffer:
    import pyarrow as pa

    room = len(memory) if isinstance(memory, bytes) else memory[2]
    if length < 0 or not 0 <= offset <= room - length:
        raise HandleLostError(
            f"a buffer of {length:,} bytes at offset {offset:,} is not in the {room:,} that came",
            errno=errno.EPROTO,
        )
    if isinstance(memory, bytes):
        return pa.py_buffer(memory).slice(offset, length)
    keeper, address, _ = memory
    return pa.foreign_buffer(address + offset, length, base=(keeper, memoryview(keeper)))
