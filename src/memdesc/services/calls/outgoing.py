"""What a call, or its result, is made of: its record and the memory that travels beside it.

Small values are in the record. Larger memory goes by the way that `memdesc.crossing` tells: what
lies in a descriptor already as those very pages, private memory by its address where the receiver
may copy from this task, all else through a buffer made for it, into which it is copied once.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import msgspec

from memdesc import _core
from memdesc.copyio import bytes_of
from memdesc.descriptors.address_range import AddressRangeDescriptor, PythonBufferDescriptor
from memdesc.descriptors.base import MemoryDescriptor
from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.descriptors.homes import descriptor_of
from memdesc.descriptors.sub import SubMemoryDescriptor
from memdesc.errors import InvalidArgument, MemdescError
from memdesc.handover import close_all, pack
from memdesc.portable import UNENCODABLE
from memdesc.services import protocol
from memdesc.services.protocol.calls import (
    EXT_ARRAY,
    EXT_BYTES,
    EXT_DESCRIPTOR,
    EXT_VIEW,
    MAX_MEMORY,
    MAX_RECORD,
    NOTHING,
    ArrayForm,
    Given,
    Lent,
)
from memdesc.vm.pages import Access, Direction
from memdesc.vm.task import Task

if TYPE_CHECKING:
    import numpy as np

_encode = msgspec.msgpack.Encoder().encode
_Ext = msgspec.msgpack.Ext
_MOST_INLINE = protocol.MAX_MESSAGE // 2


class Outgoing:
    """The memory beside one record.

    Parameters
    ----------
    user : int
        Of the receiver.
    lends : bool
        Whether private memory may go by its address: of a call, which keeps it until answered.
    readable : bool
        Whether the receiver may copy from this task's memory.

    Attributes
    ----------
    memory, fds
        What goes with the message. The descriptors are closed by `close`, after it was sent.
    lent : list of Lent
        Private memory that the receiver reaches by its address.
    kept : list
        What must stay as it is until the call was answered.
    """

    def __init__(self, user: int, *, lends: bool, readable: bool) -> None:
        self.memory: list[Given | Lent] = []
        self.fds: list[int] = []
        self.lent: list[Lent] = []
        self.kept: list[object] = []
        self._user = user
        self._lends = lends
        self._readable = lends and readable
        from memdesc.crossing import thresholds  # here and below, as who connects need not call

        self._inline = min(thresholds().inline, _MOST_INLINE)

    def close(self) -> None:
        """Close the descriptors: they were sent, or will not be."""
        close_all(self.fds)
        self.fds.clear()

    def arguments(
        self, positional: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[msgspec.Raw, int | None]:
        """Make the record of a call: (the record, or its place in `memory` where it is large)."""
        top = [self._top(value) for value in positional]
        return self._record((top, {key: self._top(value) for key, value in named.items()}))

    def value(self, value: Any) -> tuple[msgspec.Raw, int | None]:
        """Make the record of a result."""
        return self._record(self._top(value))

    def into(self, target: Any) -> int:
        """Add memory that the receiver is to fill; give its place."""
        descriptor = target
        if not isinstance(target, MemoryDescriptor):
            view = bytes_of(target)
            if view.readonly:
                raise InvalidArgument(
                    "into= is read-only: give a writable buffer or descriptor", errno=errno.EINVAL
                )
            if not view.nbytes:
                raise InvalidArgument(
                    "into= has no bytes: give a buffer of at least one", errno=errno.EINVAL
                )
            descriptor = PythonBufferDescriptor(view, Direction.IN)
        if isinstance(descriptor, (PythonBufferDescriptor, AddressRangeDescriptor)):
            return self._describe(descriptor, Direction.IN)
        if isinstance(descriptor, BufferMemoryDescriptor | SubMemoryDescriptor) and not (
            descriptor.max_access.writable
        ):  # nobody else may map it writable; this task's own view of it can be filled
            view = memoryview(descriptor)
            return self._lend(view, Direction.IN)
        return self._give(descriptor, Access.READ_WRITE, Direction.IN)

    def _record(self, value: Any) -> tuple[msgspec.Raw, int | None]:
        try:
            record = msgspec.msgpack.encode(value, enc_hook=self._extend)
        except UNENCODABLE as error:
            if isinstance(error, MemdescError):
                raise
            raise InvalidArgument(f"this can not travel: {error}", errno=errno.EINVAL) from error
        if len(record) <= self._inline:
            return msgspec.Raw(record), None
        if len(record) > MAX_RECORD:
            raise InvalidArgument(
                f"a record of {len(record):,} bytes is more than {MAX_RECORD:,}: give what is "
                "large as arrays or bytes, each for itself, or in several calls",
                errno=errno.E2BIG,
            )
        return NOTHING, self._place(record)

    def _top(self, value: Any) -> Any:
        """Take large bytes, given for themselves, out of the record."""
        if isinstance(value, (bytes, bytearray, memoryview)):
            view = bytes_of(value)
            if view.nbytes > self._inline:
                code = EXT_BYTES if isinstance(value, bytes) else EXT_VIEW
                return _Ext(code, _encode(self._place(value)))
            return value if view.c_contiguous else bytes(view)
        return value

    def _extend(self, value: Any) -> Any:
        """Encode what MessagePack has no type for."""
        if isinstance(value, MemoryDescriptor):
            return _Ext(EXT_DESCRIPTOR, _encode(self._describe(value, value.direction)))
        if isinstance(value, _core.Exporter):
            with memoryview(value) as view:
                if view.nbytes <= self._inline:
                    return bytes(view)
            return _Ext(EXT_VIEW, _encode(self._place(value)))
        import numpy as np

        if isinstance(value, np.ndarray):
            return _Ext(EXT_ARRAY, _encode(self._array(value)))
        if isinstance(value, np.generic):
            return value.item()
        raise InvalidArgument(
            f"what is of type {type(value).__name__} can not travel: give scalars, text, bytes, "
            "lists, dicts, dataclasses, Structs, arrays or descriptors",
            errno=errno.EINVAL,
        )

    def _array(self, array: np.ndarray[Any, Any]) -> ArrayForm:
        import numpy as np

        kind = array.dtype
        if kind.hasobject or kind.names or not kind.itemsize:
            raise InvalidArgument(
                f"an array of dtype {kind} can not travel: give its bytes", errno=errno.EINVAL
            )
        source: int | bytes
        if array.nbytes <= self._inline:
            source = array.tobytes()
        elif array.flags.c_contiguous:
            source = self._place(array)
        else:  # the one copy that there is brings it in order
            buffer = _fresh(array.nbytes)
            np.copyto(buffer.array(array.shape, kind), array)
            source = self._give(buffer, Access.READ_ONLY, Direction.OUT)
        return ArrayForm(kind.str, array.shape, source)

    # -- memory ----------------------------------------------------------------------------------

    def _place(self, buffer: Any) -> int:
        """Have the receiver read the bytes of a contiguous buffer; give their place."""
        from memdesc.crossing import Way, way_for

        home = descriptor_of(buffer)
        view = bytes_of(buffer)
        choice = way_for(
            view.nbytes,
            direction=Direction.OUT,
            shareable=home is not None,
            readable=self._readable,
        )
        if choice.way is Way.PROCESS_VM:
            return self._lend(view, Direction.OUT)
        if home is None:
            home = _fresh(view.nbytes)
            home.write_bytes(0, view)
        return self._give(home, Access.READ_ONLY, Direction.OUT)

    def _describe(self, descriptor: MemoryDescriptor, direction: Direction) -> int:
        """Have the receiver use described memory as its direction says; give its place."""
        if isinstance(descriptor, PythonBufferDescriptor):
            view = memoryview(descriptor)
            home = descriptor_of(view)
            if home is not None and (home.max_access.writable or not direction.writes_memory):
                return self._give(home, None, direction)
            if self._lends:
                return self._lend(view, direction)
            descriptor = _fresh(view.nbytes)
            descriptor.write_bytes(0, view)
        if isinstance(descriptor, AddressRangeDescriptor) and self._may_lend(descriptor.task):
            self.kept.append(descriptor)
            return self._add_lent(descriptor.address, descriptor.length, direction)
        return self._give(descriptor, None, direction)

    def _may_lend(self, task: Task) -> bool:
        return self._lends and task.is_current

    def _lend(self, view: memoryview, direction: Direction) -> int:
        if direction.writes_memory and view.readonly:
            raise InvalidArgument(
                f"{view.nbytes:,} read-only bytes can not be filled", errno=errno.EINVAL
            )
        self.kept.append(view)
        return self._add_lent(_core.buffer_address(view)[0], view.nbytes, direction)

    def _add_lent(self, address: int, length: int, direction: Direction) -> int:
        if direction is Direction.NONE:
            raise InvalidArgument(
                f"{length:,} bytes of direction NONE can not be lent: say IN, OUT or OUT_IN",
                errno=errno.EINVAL,
            )
        lent = Lent(address, length, direction.value)
        self.lent.append(lent)
        return self._add(lent)

    def _give(
        self, descriptor: MemoryDescriptor, access: Access | None, direction: Direction
    ) -> int:
        """Give descriptors of the memory: read-only where nothing else is wanted."""
        most = descriptor.max_access
        if access is None:
            access = most if direction.writes_memory else Access.READ_ONLY
        if descriptor.direction is not direction:
            descriptor = SubMemoryDescriptor(descriptor, 0, direction=direction)
        # Who made it READ_WRITE for others lets them write it, also where they need not.
        portable, fds = pack(
            descriptor, access, enforced=access.writable or not most.writable, user=self._user
        )
        self.fds += fds
        return self._add(Given(len(fds), portable))

    def _add(self, one: Given | Lent) -> int:
        self.memory.append(one)
        if len(self.memory) > MAX_MEMORY or len(self.fds) > MAX_MEMORY:
            raise InvalidArgument(
                f"more than {MAX_MEMORY} blocks of memory, or VM objects, in one call: put them "
                "into one buffer, or make several calls",
                errno=errno.E2BIG,
            )
        return len(self.memory) - 1


def _fresh(nbytes: int) -> BufferMemoryDescriptor:
    """Make the buffer that private memory crosses in. Nothing of an earlier one shows in it."""
    return BufferMemoryDescriptor(nbytes, name="memdesc-call")
