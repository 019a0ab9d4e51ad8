"""What Dask's messages carry of arrays and descriptors: handles, or bytes as before.

A handle goes where the recipient, in the handshake of the connection, has named an inbox of this
very host and user, and where the memory can be given read-only, enforced by the kernel. In all
other cases (no context: spilling, shuffling, graphs) it is bytes. What comes in is checked in full;
no pickle.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from memdesc.descriptors.base import MemoryDescriptor
from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.descriptors.homes import home_of, span_of
from memdesc.descriptors.received import ReceivedMemoryDescriptor
from memdesc.descriptors.sub import SubMemoryDescriptor
from memdesc.errors import AllocationError, MappingError, PeerGoneError, ProtocolError
from memdesc.handover import pack, unpack
from memdesc.interop.arrays import asarray, keeper_of, placed
from memdesc.interop.dask.ends import REFUSED, ends
from memdesc.interop.dask.needed import dask_deserialize, dask_serialize, plain, sizeof
from memdesc.portable import Natural, Portable
from memdesc.services.arrays import check_form
from memdesc.vm.pages import Access, Direction
from memdesc.vm.telling import explains

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]
    Frames = list[Any]

KEY = "memdesc"
"""What ours is called in handshakes and headers."""
LEAST = 256 << 10
"""Bytes of an array from which on a handle is the lesser effort."""
PART = 4
"""An array is at least the 4th part of the memory that its handle keeps, else it goes as bytes."""

Name = Annotated[str, msgspec.Meta(min_length=32, max_length=32, pattern="^[0-9a-f]{32}$")]
Token = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Step = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class Advert(msgspec.Struct, frozen=True):
    """What a process that receives handles says of itself in a handshake."""

    version: Literal[1]
    host: Name
    inbox: Name


class Form(msgspec.Struct, frozen=True):
    """How an array lies in what came: `first` is where its first element does, in bytes."""

    dtype: Annotated[str, msgspec.Meta(max_length=64)]
    shape: Annotated[tuple[Natural, ...], msgspec.Meta(max_length=64)]
    strides: Annotated[tuple[Step, ...], msgspec.Meta(max_length=64)]
    first: Natural


class Handle(msgspec.Struct, frozen=True):
    """A descriptor, and where its VM objects were left; of an array too how it lies there."""

    portable: Portable
    token: Token
    form: Form | None = None


@dataclass(frozen=True, slots=True)
class Transfers:
    """What this process has sent and received since it began.

    Attributes
    ----------
    sent, received : int
        Handles.
    nbytes_sent, nbytes_received : int
        Bytes of what they stand for.
    as_bytes, nbytes_as_bytes : int
        Arrays and descriptors that were sent as bytes, and how many: of small arrays (less than
        256 KiB), of private memory, and what went where no handle can go. Not what was spilled.
    copied, nbytes_copied : int
        Arrays that were copied into descriptors, to be sent (``Plugin(copy=True)``).
    refused : int
        Handles that could not be left with the recipient, which got bytes.
    lost : int
        Handles that could not be opened here; Dask asked again, and got bytes.
    waiting : int
        Descriptors that came, and whose messages have not been read yet.
    """

    sent: int = 0
    received: int = 0
    nbytes_sent: int = 0
    nbytes_received: int = 0
    as_bytes: int = 0
    nbytes_as_bytes: int = 0
    copied: int = 0
    nbytes_copied: int = 0
    refused: int = 0
    lost: int = 0
    waiting: int = 0


_counts = {field.name: 0 for field in fields(Transfers)}
_counting = threading.Lock()


def _count(name: str, nbytes: int | None = None) -> None:
    with _counting:
        _counts[name] += 1
        if nbytes is not None:
            _counts[f"nbytes_{name}"] += nbytes


def _count_bytes(context: Mapping[str, Any] | None, nbytes: int) -> None:
    """Count what is sent as bytes; what has no recipient is spilled, or goes into a graph."""
    if context and "recipient" in context:
        _count("as_bytes", nbytes)


def statistics() -> Transfers:
    """Tell what this process has sent and received; of the workers: ``client.run(statistics)``."""
    with _counting:
        return Transfers(**{**_counts, "waiting": ends.waiting()})


# -- sending ---------------------------------------------------------------------------------------


class Copies:
    """Arrays that lie in no descriptor, copied into one when they are first sent to this host."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[weakref.ref[Array], Array]] = {}

    def of(self, array: Array) -> Array:
        """Give the copy, which lives as long as the array. `AllocationError`."""
        number = id(array)
        known = self._copies.get(number)
        if known is not None and known[0]() is array:
            return known[1]
        made = asarray(array, name="dask copy")
        made.flags.writeable = False
        _count("copied", array.nbytes)
        gone = weakref.ref(array, lambda _: self._copies.pop(number, None))
        self._copies[number] = gone, made
        return made


copies: Copies | None = None
"""Where arrays of private memory are copied; None: they go as bytes."""


def _inbox_of(context: Mapping[str, Any] | None) -> str | None:
    """Name the recipient's inbox, where it is one of this host and user."""
    told = ((context or {}).get("recipient") or {}).get(KEY)
    if told is None or ends.host is None:
        return None
    try:
        advert = msgspec.convert(told, Advert)
    except msgspec.ValidationError:  # a stranger, or of another version
        return None
    return advert.inbox if advert.host == ends.host else None


def _leave(inbox: str, descriptor: MemoryDescriptor, form: Form | None = None) -> bytes | None:
    """Leave a descriptor's objects with the recipient; give what the message is to say of it.

    None where that can not be: the memory is private or may be written by others (a read-only
    grant of it were a courtesy), or the inbox takes nothing.
    """
    try:
        portable, fds = pack(descriptor, Access.READ_ONLY, enforced=True, user=os.geteuid())
        token = ends.leave(inbox, fds)
    except REFUSED:
        _count("refused")
        return None
    return msgspec.msgpack.encode(Handle(portable, token, form))


def dump_array(array: Array, context: Mapping[str, Any] | None = None) -> tuple[Any, Frames]:
    """Serialize an array for Dask."""
    inbox = _inbox_of(context)
    frame = None if inbox is None else _array_frame(array, inbox)
    if frame is None:
        header, frames = plain.serialize_numpy_ndarray(array, context=context)
        _count_bytes(context, array.nbytes)
        return header, frames
    _count("sent", array.nbytes)
    return {KEY: "handle"}, [frame]


def _array_frame(array: Array, inbox: str) -> bytes | None:
    import numpy as np

    if type(array) is not np.ndarray or array.nbytes < LEAST or not _is_plain(array.dtype):
        return None
    home = home_of(array)
    if home is None and copies is not None and 0 not in array.strides:
        try:
            array = copies.of(array)
        except AllocationError:
            _count("refused")
            return None
        home = home_of(array)
    # A broadcast array has fewer bytes than it says.
    if home is None or min(array.nbytes, home.length) < max(LEAST, home.descriptor.length // PART):
        return None
    part = SubMemoryDescriptor(home.descriptor, home.offset, home.length)
    return _leave(inbox, part, _form(array))


def _is_plain(dtype: np.dtype[Any]) -> bool:
    """Whether its name says all of it: no fields, objects, texts on the heap, other libraries'."""
    import numpy as np

    try:
        return dtype.kind in "biufcmMSU" and np.dtype(dtype.str) == dtype
    except TypeError:
        return False


def _form(array: Array) -> Form:
    first = array.__array_interface__["data"][0] - span_of(array)[0]
    return Form(array.dtype.str, array.shape, array.strides, first)


def dump_descriptor(
    descriptor: MemoryDescriptor, context: Mapping[str, Any] | None = None
) -> tuple[Any, Frames]:
    """Serialize a descriptor for Dask."""
    inbox = _inbox_of(context)
    frame = None if inbox is None else _leave(inbox, descriptor)
    if frame is not None:
        _count("sent", descriptor.length)
        return {KEY: "handle"}, [frame]
    header = {KEY: "bytes", "name": descriptor.name, "direction": descriptor.direction.value}
    try:
        data = _bytes_of(descriptor)
    except REFUSED as error:
        # With what is raised here Dask sends an error, for which the recipient waits for ever.
        return {**header, KEY: "closed", "name": f"{descriptor.name} ({error})"}, []
    _count_bytes(context, descriptor.length)
    return header, [data]


def _bytes_of(descriptor: MemoryDescriptor) -> memoryview | bytes:
    try:
        return memoryview(descriptor).toreadonly()
    except MappingError:  # it is in pieces, or private to another task
        return descriptor.read_bytes()


# -- receiving -------------------------------------------------------------------------------------


@explains
def _opening(error: Exception, what: str) -> None:
    """Say of whatever is the matter with a message that it is lost, as Dask understands it.

    An OSError it takes for a failure of the network: it drops the connection and asks again. With
    any other, the connection goes back into use while the sender still waits on it, and the task
    waits for ever (distributed, `Worker.gather_dep`: "this will deadlock the cluster").
    """
    ends.rest()
    _count("lost")
    raise PeerGoneError(
        f"{what} that was sent to task {os.getpid()} can not be opened here: {error}; asked for "
        "again, it comes as bytes",
        errno=getattr(error, "errno", None) or errno.EPROTO,
    ) from error


def load_array(header: Mapping[str, Any], frames: Frames) -> Array:
    """Make an array of what came."""
    import numpy as np

    if KEY not in header:
        return plain.deserialize_numpy_ndarray(header, frames)  # type: ignore[no-any-return]
    with _opening("an array"):
        received, form = _take(frames)
        if form is None:
            raise ProtocolError("it is not said how it lies there", errno=errno.EPROTO)
        keeper, start = keeper_of(received)
        check_form(form.dtype, form.shape)
        dtype, offset = np.dtype(form.dtype), start + form.first
        array = placed(keeper, form.shape, dtype, offset=offset, strides=form.strides)
    _count("received", array.nbytes)
    return array


def load_descriptor(header: Mapping[str, Any], frames: Frames) -> ReceivedMemoryDescriptor:
    """Make a descriptor of what came: read-only, whether it came as a handle or as bytes."""
    with _opening("a descriptor"):
        if header[KEY] != "handle":
            return _received(header, frames)
        received, _ = _take(frames)
    _count("received", received.length)
    return received


def _take(frames: Frames) -> tuple[ReceivedMemoryDescriptor, Form | None]:
    (frame,) = frames
    handle = msgspec.msgpack.decode(frame, type=Handle)
    return unpack(handle.portable, ends.take(handle.token), user=os.geteuid()), handle.form


def _received(header: Mapping[str, Any], frames: Frames) -> ReceivedMemoryDescriptor:
    """Make a descriptor of bytes; a closed one of one that could not be read."""
    data = memoryview(frames[0] if header[KEY] == "bytes" else b"\0")
    name, direction = str(header["name"]), Direction(header["direction"])
    with BufferMemoryDescriptor(data.nbytes, direction=direction, name=name) as buffer:
        buffer.write_bytes(0, data)
        user = os.geteuid()
        received = unpack(*pack(buffer, Access.READ_ONLY, enforced=True, user=user), user=user)
    if header[KEY] != "bytes":
        received.close()
    return received


# -- registration ----------------------------------------------------------------------------------


def length_of(descriptor: MemoryDescriptor) -> int:
    """Tell Dask's accounting of a descriptor: the bytes that it describes."""
    return descriptor.length


def register() -> None:
    """Have Dask use all this, in this process, for good: what is on its way can still come."""
    import numpy as np

    dask_serialize.register(np.ndarray, dump_array)
    dask_deserialize.register(np.ndarray, load_array)
    dask_serialize.register(MemoryDescriptor, dump_descriptor)
    dask_deserialize.register(MemoryDescriptor, load_descriptor)
    sizeof.register(MemoryDescriptor, length_of)
