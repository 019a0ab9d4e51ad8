"""What arrives with a call or its result, as values: checked, and mapped or copied.

Memory that came with descriptors is mapped read-only, or read where a copy is asked for; memory
that the caller lent is copied from its task. Nothing of a record is believed: types are checked by
msgspec, places, shapes and lengths here.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import typing
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

import msgspec

from memdesc.descriptors.address_range import AddressRangeDescriptor
from memdesc.descriptors.base import MemoryDescriptor
from memdesc.descriptors.received import ReceivedMemoryDescriptor
from memdesc.errors import InvalidArgument, MemdescError, ProtocolError
from memdesc.handover import MAX_PIECES, discard, unpack
from memdesc.mapping import LocalMemoryMap, view_as_array
from memdesc.memory.limits import check_available
from memdesc.portable import UNREADABLE
from memdesc.services.protocol.calls import (
    EXT_ARRAY,
    EXT_BYTES,
    EXT_DESCRIPTOR,
    EXT_VIEW,
    MAX_RECORD,
    ArrayForm,
    Call,
    Given,
    Lent,
)
from memdesc.vm.pages import Access, Direction
from memdesc.vm.task import Task

if TYPE_CHECKING:
    import numpy as np

_WORTH_ASKING = 1 << 20
"""Bytes of a copy from which on the memory limits are asked, which takes some 10 us."""

_read_place = msgspec.msgpack.Decoder(int).decode
_read_array = msgspec.msgpack.Decoder(ArrayForm).decode


def count_files(memory: Sequence[Given | Lent]) -> int:
    """Tell how many file descriptors belong to it."""
    return sum(one.files for one in memory if isinstance(one, Given))


def count_bytes(call: Call) -> int:
    """Tell how many bytes of arguments a call has: in its message, and beside it as it says."""
    return len(call.arguments) + sum(
        one.length if isinstance(one, Lent) else sum(length for _, _, length in one.portable.pieces)
        for one in call.memory
    )


def count_ranges(memory: Sequence[Given | Lent]) -> int:
    """Tell how many ranges of the address space it would take when mapped."""
    return sum(len(one.portable.pieces) for one in memory if isinstance(one, Given))


class Incoming:
    """The memory that came beside one record. Takes the file descriptors over.

    Raises
    ------
    ProtocolError, MappingError
        It is not what it is said to be; nothing is left open.
    """

    def __init__(self, memory: Sequence[Given | Lent], fds: Sequence[int], task: Task) -> None:
        self._task = task
        self._memory: list[MemoryDescriptor] = []
        # A record of a few bytes can name one place ten thousand times.
        self._copies: dict[int, bytes] = {}
        self._maps: dict[int, LocalMemoryMap] = {}
        left = list(fds)
        try:
            if count_ranges(memory) > MAX_PIECES:
                raise ProtocolError(
                    f"memory in more than {MAX_PIECES:,} ranges came with one record",
                    errno=errno.EPROTO,
                )
            for one in memory:
                if isinstance(one, Given):
                    own, left = left[: one.files], left[one.files :]
                    self._memory.append(unpack(one.portable, own, user=task.credentials.uid))
                else:
                    self._memory.append(
                        AddressRangeDescriptor(
                            one.address, one.length, Direction(one.direction), task
                        )
                    )
        except BaseException:
            discard(left, task.credentials.uid)
            raise

    def descriptor(self, place: int) -> MemoryDescriptor:
        """Give memory itself."""
        if not 0 <= place < len(self._memory):
            raise ProtocolError(
                f"memory {place} of {len(self._memory)} was named", errno=errno.EPROTO
            )
        return self._memory[place]

    def record(self, place: int) -> bytes:
        """Copy a record that is too large for the message."""
        found = self.descriptor(place)
        if found.length > MAX_RECORD:
            raise InvalidArgument(
                f"a record of {found.length:,} bytes is more than {MAX_RECORD:,}",
                errno=errno.E2BIG,
            )
        return found.read_bytes()

    def bytes(self, place: int) -> bytes:
        """Copy memory, once. A stranger may say that there is a lot: there must be room for it."""
        found = self._copies.get(place)
        if found is None:
            memory = self.descriptor(place)
            if memory.length > _WORTH_ASKING:
                check_available(memory.length, "copying memory that came with a call")
            found = self._copies[place] = memory.read_bytes()
        return found

    def view(self, place: int) -> memoryview:
        """Give a read-only view: of the pages themselves, or of a copy of lent memory."""
        found = self.descriptor(place)
        if not isinstance(found, ReceivedMemoryDescriptor):
            return memoryview(self.bytes(place))
        mapped = self._maps.get(place)
        if mapped is None:
            mapped = self._maps[place] = found.map(access=Access.READ_ONLY)
        return memoryview(mapped)

    def array(self, form: ArrayForm) -> np.ndarray[Any, Any]:
        """Give a read-only array."""
        source = form.source if isinstance(form.source, bytes) else self.view(form.source)
        return view_as_array(source, len(source), form.shape, form.dtype)


_decoding = threading.local()
"""Of this thread: the `Incoming` whose record is being decoded, as `memory`."""


@contextlib.contextmanager
def decoding(memory: Incoming) -> Iterator[None]:
    """Have the places in records that are read inside mean this memory."""
    # A type of the program's, or a signal handler, may make a call in the middle of it.
    before = getattr(_decoding, "memory", None)
    _decoding.memory = memory
    try:
        yield
    finally:
        _decoding.memory = before


class _Place(msgspec.Struct, frozen=True):
    """Bytes beside the record, not looked at yet."""

    place: int


def _extended(code: int, data: memoryview) -> Any:
    """What an extension type stands for."""
    memory: Incoming = _decoding.memory
    if code == EXT_ARRAY:
        return memory.array(_read_array(data))
    if code not in (EXT_BYTES, EXT_VIEW, EXT_DESCRIPTOR):
        raise ProtocolError(f"an extension type {code} is not known here", errno=errno.EPROTO)
    place = _read_place(data)
    if code == EXT_BYTES:
        return memory.bytes(place)
    return memory.view(place) if code == EXT_VIEW else memory.descriptor(place)


def _placed(code: int, data: memoryview) -> Any:
    """As `_extended`, but bytes stay where they are."""
    return _Place(_read_place(data)) if code in (EXT_BYTES, EXT_VIEW) else _extended(code, data)


_read_bytes = msgspec.msgpack.Decoder(ext_hook=_placed).decode


class _Kind(Enum):
    """What a type is for us: bytes that are asked for by themselves need not be in the record."""

    BYTES = bytes
    VIEW = memoryview
    OTHER = object


class Form:
    """A type that values which arrive are checked against.

    Raises
    ------
    InvalidArgument
        Values of that type do not travel.
    """

    def __init__(self, annotation: Any) -> None:
        self.annotation = annotation
        plain, self._optional = _without_none(annotation)
        self._kind = _Kind(plain) if plain in (bytes, memoryview) else _Kind.OTHER
        try:
            if self._kind is _Kind.OTHER:
                _check_known(msgspec.inspect.type_info(annotation))
            self._decode = msgspec.msgpack.Decoder(
                annotation, dec_hook=_checked, ext_hook=_extended
            ).decode
        except (TypeError, NotImplementedError) as error:
            raise InvalidArgument(
                f"values of type {_name(annotation)} do not travel: {error}", errno=errno.EINVAL
            ) from error

    def read(self, raw: bytes | msgspec.Raw) -> Any:
        """Decode and check a value, inside `decoding`.

        Raises
        ------
        InvalidArgument
            It is of another type; the message says which.
        MemdescError
            The memory that it names can not be had.
        """
        try:
            if self._kind is _Kind.OTHER:
                return self._decode(raw)
            return self._read_bytes(raw)
        except UNREADABLE as error:
            if isinstance(error.__cause__, MemdescError):  # msgspec takes them for its own
                raise error.__cause__ from None
            raise InvalidArgument(str(error), errno=errno.EINVAL) from error

    def _read_bytes(self, raw: bytes | msgspec.Raw) -> Any:
        value = _read_bytes(raw)
        as_bytes = self._kind is _Kind.BYTES
        if isinstance(value, _Place):
            memory: Incoming = _decoding.memory
            return memory.bytes(value.place) if as_bytes else memory.view(value.place)
        if isinstance(value, bytes):
            return value if as_bytes else memoryview(value)
        if value is None and self._optional:
            return None
        raise InvalidArgument(
            f"Expected `{'bytes' if as_bytes else 'memoryview'}`, got `{_name(type(value))}`",
            errno=errno.EINVAL,
        )


def _without_none(annotation: Any) -> tuple[Any, bool]:
    """Give the type of an optional one, and whether it was one."""
    arguments = typing.get_args(annotation)
    others = [one for one in arguments if one is not type(None)]
    if len(others) == 1 and len(arguments) == 2 and type(None) in arguments:
        return others[0], True
    return annotation, False


def _is_array(kind: Any) -> bool:
    origin = typing.get_origin(kind) or kind
    return (origin.__module__, origin.__name__) == ("numpy", "ndarray")


def _checked(kind: Any, value: Any) -> Any:
    """What msgspec asks about types that it does not know: arrays and descriptors."""
    if not _is_array(kind):
        if isinstance(value, kind):
            return value
    elif type(value).__name__ == "ndarray":
        wanted = _dtype_of(kind)
        import numpy as np

        if wanted is None or np.issubdtype(value.dtype, wanted):
            return value
        raise InvalidArgument(
            f"Expected an array of {np.dtype(wanted)}, got one of {value.dtype}",
            errno=errno.EINVAL,
        )
    raise InvalidArgument(
        f"Expected `{_name(kind)}`, got `{_name(type(value))}`", errno=errno.EINVAL
    )


def _dtype_of(kind: Any) -> Any:
    """The element type that `numpy.typing.NDArray[…]` names; None where any will do."""
    arguments = typing.get_args(kind)
    inner = typing.get_args(arguments[1]) if len(arguments) == 2 else ()
    found = inner[0] if inner else None
    return found if isinstance(found, type) else None


def _check_known(info: Any) -> None:
    """Raise `TypeError` where a type has a part that nothing here makes of a record."""
    if isinstance(info, (list, tuple)):
        for one in info:
            _check_known(one)
    elif isinstance(info, msgspec.inspect.CustomType):
        if not _is_array(info.cls) and info.cls not in (MemoryDescriptor, object):
            raise TypeError(f"{_name(info.cls)} is none that travels")
    elif isinstance(info, (msgspec.inspect.Type, msgspec.inspect.Field)) and not isinstance(
        info, msgspec.inspect.AnyType
    ):
        for name in info.__struct_fields__:
            if name not in ("default", "default_factory", "cls"):
                _check_known(getattr(info, name))


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)
