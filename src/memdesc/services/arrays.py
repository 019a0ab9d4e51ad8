"""Arrays of one version: several arrays in one descriptor that tells itself what is in it.

A program that shares arrays which belong together puts them into one descriptor and shares that
under the name `ALL`. What the arrays are stands in the same memory, so whoever opens it has arrays
and catalogue of one version, whatever is shared a moment later:

======================  =========  ====================================================
offset                  bytes      what
======================  =========  ====================================================
anywhere before         as told    the arrays' elements
length - 16 - N         N          the `Catalogue`, as MessagePack
length - 16             8          N, little-endian
length - 8              8          the bytes ``MDARRAYS``
======================  =========  ====================================================

The owner writes all of it before the first grant, and nothing after it; the grant, a message, is
what orders the two. A reader copies the catalogue once and checks the copy.
"""

from __future__ import annotations

import errno
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, final

import msgspec

from memdesc.descriptors.base import MemoryDescriptor
from memdesc.errors import InvalidArgument, ProtocolError, ShareNotFoundError
from memdesc.mapping import Elements, LocalMemoryMap, elements_of, view_as_array
from memdesc.portable import UNREADABLE, Natural
from memdesc.services.protocol.basics import ALL as ALL, Name, Shape
from memdesc.services.shared import SharedWith, mapped
from memdesc.tables import ARROW

if TYPE_CHECKING:
    import numpy.typing as npt

TRAILER = struct.Struct("<Q8s")
MAGIC = b"MDARRAYS"
MOST_ENTRIES = (1 << 16) - 1
"""Arrays that are shared together at most: with `ALL`, as many as a client lists."""
MOST_DIMENSIONS = 32
"""Of an array: what every NumPy has that there is today."""


class ArrayEntry(msgspec.Struct, frozen=True):
    """What a catalogue tells of one array.

    Attributes
    ----------
    name : str
    dtype : str
        NumPy's string for it.
    shape : tuple of int
    column_major : bool
        Whether the first index varies fastest (NumPy's order "F").
    offset, nbytes : int
        Where its elements lie in the version's memory.
    file : str
        Where it is from.
    stored_as : str
        What its file says that an element is, where NumPy has no dtype for that ("BF16"); `dtype`
        is then unsigned integers of the same size.
    content : str
        "arrow" where its bytes are an Arrow file, which is looked at as a table.
    """

    name: Name
    dtype: Name
    shape: Shape
    column_major: bool
    offset: Natural
    nbytes: Natural
    file: Annotated[str, msgspec.Meta(max_length=1 << 16)] = ""
    stored_as: Name = ""
    content: Name = ""


class Catalogue(msgspec.Struct, frozen=True):
    """What is in one version's memory."""

    version: Natural
    arrays: tuple[ArrayEntry, ...]


def check_form(dtype: npt.DTypeLike, shape: tuple[int, ...]) -> tuple[Elements, int]:
    """Check what somebody says that an array is: (its elements, its bytes).

    Raises
    ------
    InvalidArgument
        The dtype has fields, Python objects or no size, or no array can be of that shape.
    """
    kind = elements_of(dtype)
    extents = 1 << 63
    if len(shape) <= MOST_DIMENSIONS and min(shape, default=0) >= 0:  # a million take hours
        # A dimension of 0 makes the array empty; NumPy multiplies the others all the same.
        extents = math.prod(extent for extent in shape if extent)
    if extents * kind.itemsize >= 1 << 63:
        told = str(shape[: MOST_DIMENSIONS + 1])[:200]
        raise InvalidArgument(
            f"no array of {kind} can have the {len(shape):,} dimensions {told}", errno=errno.EINVAL
        )
    return kind, 0 if 0 in shape else extents * kind.itemsize


def encode(version: int, arrays: Iterable[ArrayEntry]) -> bytes:
    """Make the end of a version's memory: the catalogue and its trailer."""
    text = msgspec.msgpack.encode(Catalogue(version, tuple(arrays)))
    return text + TRAILER.pack(len(text), MAGIC)


def read_catalogue(memory: LocalMemoryMap | MemoryDescriptor) -> Catalogue:
    """Read and check what is said of the arrays in some memory.

    Raises
    ------
    ProtocolError
        It is no such memory, or something of it can not be (EPROTO).
    """
    with memoryview(memory) as view:
        room = len(view) - TRAILER.size
        if room < 0:
            raise _wrong(f"{len(view):,} bytes have no room for a catalogue")
        nbytes, magic = TRAILER.unpack(view[room:])
        if magic != MAGIC or nbytes > room:
            raise _wrong(f"no catalogue of arrays ends at byte {len(view):,}")
        data = bytes(view[room - nbytes : room])
    try:
        catalogue = msgspec.msgpack.decode(data, type=Catalogue)
    except UNREADABLE as error:
        raise _wrong(f"its {nbytes:,} bytes can not be read: {error}") from error
    for entry in catalogue.arrays:
        _check_entry(entry, room - nbytes)
    if len({entry.name for entry in catalogue.arrays}) != len(catalogue.arrays):
        raise _wrong("two arrays have one name")
    return catalogue


def _check_entry(entry: ArrayEntry, room: int) -> None:
    try:
        _, nbytes = check_form(entry.dtype, entry.shape)
    except InvalidArgument as error:
        raise _wrong(f"{entry.name[:80]!r}: {error}") from error
    if entry.nbytes != nbytes or entry.offset > room or nbytes > room - entry.offset:
        raise _wrong(
            f"{entry.name[:80]!r} takes {nbytes:,} bytes, and is said to have {entry.nbytes:,} at "
            f"offset {entry.offset:,} of {room:,}"
        )


def _wrong(what: str) -> ProtocolError:
    return ProtocolError(f"the catalogue of arrays is wrong: {what}", errno=errno.EPROTO)


@final
class Arrays(Mapping[str, Any]):
    """Arrays of one version, by name: read-only, in place. Made by `Connection.arrays`.

    A mapping that never changes. Each array keeps the version's memory alive, as this does;
    looking one up makes a view, and copies nothing. Of an Arrow file that is a `pyarrow.Table`,
    validated each time that it is looked up (`memdesc.interop.arrow.table`).

    Attributes
    ----------
    version : int
        Which it is: the service counts them from 1.
    entries : tuple of ArrayEntry
        What is known of each array.
    nbytes : int
        Of all arrays together.

    Notes
    -----
    Threads: safe. Fork: the child inherits it (the same trust domain).
    """

    def __init__(self, memory: LocalMemoryMap | MemoryDescriptor) -> None:
        catalogue = read_catalogue(memory)
        self._memory = memory
        self.version = catalogue.version
        self.entries = catalogue.arrays
        self.nbytes = sum(entry.nbytes for entry in catalogue.arrays)
        self._by_name = {entry.name: entry for entry in catalogue.arrays}

    def entry(self, name: str) -> ArrayEntry:
        """Tell of one array; `ShareNotFoundError` (a KeyError) where there is none."""
        found = self._by_name.get(name)
        if found is None:
            some = ", ".join(repr(one[:80]) for one in islice(self._by_name, 5)) or "none"
            raise ShareNotFoundError(
                f"version {self.version} has no array {str(name)[:80]!r}; of its {len(self):,} "
                f"there is {some}",
                errno=errno.ENOENT,
            )
        return found

    def __getitem__(self, name: str) -> Any:
        """View an array, or read a table.

        Raises
        ------
        ShareNotFoundError
            There is none; a KeyError too.
        InvalidArgument, ModuleNotFoundError
            Of tables, as of `memdesc.interop.arrow.table`.
        """
        entry = self.entry(name)
        if entry.content == ARROW:
            from memdesc.tables.reading import table_in

            part = memoryview(self._memory)[entry.offset : entry.offset + entry.nbytes]
            return table_in(part.toreadonly(), self._memory)
        array = view_as_array(
            self._memory,
            self._memory.length,
            entry.shape,
            entry.dtype,
            order="F" if entry.column_major else "C",
            offset=entry.offset,
        )
        array.flags.writeable = False  # of the owner's own view; others have it from the kernel
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __repr__(self) -> str:
        return f"<Arrays version {self.version}: {len(self)} of {self.nbytes:,} bytes>"


class ArraysOf(SharedWith):
    """What a connection has of it."""

    def __getitem__(self, name: str) -> Any:
        """Map what is shared under a name and view it as it was shared: ``map(name).array()``.

        Of an Arrow table (``share(content="arrow")``, ``memdesc serve trades.arrow``) it is a
        `pyarrow.Table`, as of `memdesc.interop.arrow.table`. It keeps the mapping alive, and
        outlives the connection. Waits up to 5 s until it is shared. What was shared without a
        dtype comes as bytes.

        Raises
        ------
        ShareNotFoundError
            A KeyError too.
        MappingError, TimedOutError, PeerGoneError, ClosedError
        SealedError, InvalidArgument, ModuleNotFoundError
            Of tables, as of `memdesc.interop.arrow.table`; their bytes are had by `map`.

        Examples
        --------
        >>> import memdesc as md
        >>> with md.Service("camera") as camera:
        ...     camera.share("frames", md.BufferMemoryDescriptor(64), shape=(4, 4), dtype="f4")
        ...     md.connect("camera")["frames"].shape
        (4, 4)
        """
        descriptor, share = self._open(name, 5.0)
        mapping = mapped(descriptor, share)
        if share.content != ARROW:
            return mapping.array()
        from memdesc.tables.reading import table

        return table(mapping)

    def arrays(self, name: str = ALL, timeout: float | None = 5.0) -> Arrays:
        """Map arrays that belong together: all of one version, whatever is shared a moment later.

        Parameters
        ----------
        name : str
            What they are shared under. `FileServer` and ``memdesc serve`` use the default.
        timeout : float, optional
            Seconds to wait for the service to share it and to answer; None waits for ever.

        Returns
        -------
        Arrays
            One mapping for all. It outlives the connection.

        Raises
        ------
        ShareNotFoundError
            This service shares no such arrays (ENOENT).
        ProtocolError
            What it shares is none (EPROTO).
        MappingError, TimedOutError, PeerGoneError, ClosedError
        """
        return Arrays(self.map(name, timeout=timeout))

    async def arrays_async(self, name: str = ALL, timeout: float | None = 5.0) -> Arrays:
        """As `arrays`, for asyncio. Cancelled, nothing is mapped."""
        return Arrays(await self.map_async(name, timeout=timeout))
