"""Arrow tables that lie in descriptors: written once, read in place by any process.

The form is an Arrow IPC stream, which every Arrow library reads. It is written into a buffer that
is then made immutable (`MemoryDescriptor.snapshot`, which copies nothing here): an Arrow table
never changes, so neither does its memory. For a reader that is more than convenience. What Arrow's
validation found of bytes that somebody may write again says nothing about the next moment.

PyArrow is imported when a function here is called; without it that is a `ModuleNotFoundError` which
says what to install.
"""

from __future__ import annotations

import errno
import struct
import sys
from typing import TYPE_CHECKING, Any

from memdesc import _core
from memdesc.copyio import bytes_of
from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.descriptors.homes import lies_immutable
from memdesc.descriptors.snapshot import SnapshotMemoryDescriptor
from memdesc.errors import InvalidArgument, SealedError
from memdesc.memory.kept import Contents
from memdesc.memory.page_kinds import PageKind
from memdesc.vm.telling import bare

if TYPE_CHECKING:
    import pyarrow as pa
    from typing_extensions import Buffer  # collections.abc has it from 3.12 on

__all__ = ["table", "to_descriptor"]

_FILE_MAGIC = b"ARROW1\0\0"
"""How an Arrow file begins; behind it stands a stream (and behind that an index, not read here)."""

# Fields of tables in Arrow's Message.fbs and Schema.fbs, counted from 0.
_HEADER = 2
_SCHEMA_ENDIANNESS = 0
_BATCH_COMPRESSION = 3
_DICTIONARY_BATCH, _DICTIONARY_IS_DELTA = 1, 2


def to_descriptor(
    data: pa.Table | pa.RecordBatch | Any,
    *,
    name: str = "table",
    pages: PageKind = PageKind.AUTO,
) -> SnapshotMemoryDescriptor:
    """Write a table into memory that can be shared, once; nobody can change it afterwards.

    Parameters
    ----------
    data : pyarrow.Table, pyarrow.RecordBatch, or what pyarrow.table takes
        Such as a data frame of Polars or pandas, or a dict of columns.
    name : str
        Shows in every task's maps file as ``/memfd:name``.
    pages : PageKind
        As of `BufferMemoryDescriptor`.

    Returns
    -------
    SnapshotMemoryDescriptor
        Of an Arrow IPC stream, neither compressed nor with gaps; owned by the caller. Share it
        (`Service.share`), send it (`send_descriptor`, `multiprocessing`), or read it by `table`.

    Raises
    ------
    InvalidArgument
        PyArrow makes no table of it, or can not write it (EINVAL).
    AllocationError, PageKindError
        There is no memory for it. Nothing is left allocated.
    ModuleNotFoundError
        PyArrow is not installed.

    Notes
    -----
    Costs one copy of the columns; of slices what they show. The chunks stay as they are
    (``data.combine_chunks()`` first makes them one). Values of null elements are copied as they
    are: where they are none of the readers' business, clear them first.

    Linux: as `BufferMemoryDescriptor` and `snapshot`; no privilege. Threads: safe.

    Examples
    --------
    >>> from memdesc.interop import arrow
    >>> trades = arrow.to_descriptor({"price": [99.5, 101.0], "symbol": ["A", "B"]})
    >>> arrow.table(trades).column("price").to_pylist()
    [99.5, 101.0]
    """
    pa = _pyarrow()
    try:
        columns = data if isinstance(data, pa.Table) else pa.table(data)
        measured = pa.MockOutputStream()
        _write(pa, columns, measured)
    except (pa.ArrowException, TypeError, ValueError) as error:
        kind = f"{type(data).__module__.partition('.')[0]}.{type(data).__qualname__}"
        raise InvalidArgument(
            f"{kind.removeprefix('builtins.')} can not be written as a table: {_instead(data)} "
            f"(PyArrow says: {error})",
            errno=errno.EINVAL,
        ) from error
    with BufferMemoryDescriptor(
        measured.size(), pages=pages, contents=Contents.UNDEFINED, name=name
    ) as buffer:
        _fill(pa, columns, buffer)
        return buffer.snapshot()


def table(memory: Buffer, *, trusted: bool = False) -> pa.Table:
    """Give the table that lies in some memory. No byte of it is copied.

    Parameters
    ----------
    memory : MemoryDescriptor, LocalMemoryMap, numpy.ndarray or other buffer
        With an Arrow IPC stream, as `to_descriptor` makes one, or an Arrow file. Such as
        ``connection[name]``, a descriptor that was received, a stream's ``slot.array``; or a copy
        of this task's own, ``bytes(slot.array)``.
    trusted : bool
        Whoever wrote the memory, or still may, is trusted as this program's own code is: nothing
        is validated, and the memory need not be immutable.

    Returns
    -------
    pyarrow.Table
        Its buffers are read-only, and lie in the memory. It, and every array made of it without a
        copy, keeps the memory alive; `unmap` of the mapping refuses meanwhile.

    Raises
    ------
    SealedError
        Not `trusted`, and somebody may still change the memory (EPERM).
    InvalidArgument
        It is no Arrow stream, or its contents do not hold together (EBADMSG); it can not be read
        in place, as it is compressed, in another byte order, or has dictionaries in pieces
        (ENOTSUP); it is no contiguous buffer.
    ModuleNotFoundError
        PyArrow is not installed.

    Notes
    -----
    What is checked unless `trusted`: that the memory is sealed against all writing; the stream's
    own metadata; and all of ``Table.validate(full=True)``: that each buffer is long enough, each
    offset and index within what it refers to, text UTF-8, decimals within their precision. It
    reads texts, offsets and indices once, and no numbers. Not checked: what the values mean, and
    what the schema's metadata says. Extension types that this program registered with Arrow get
    to see a stranger's parameters.

    Fork: the child inherits the memory. Threads: safe; as any `pyarrow.Table`.

    Examples
    --------
    >>> import memdesc as md
    >>> from memdesc.interop import arrow
    >>> with md.Service("market") as market:
    ...     market.share("trades", arrow.to_descriptor({"price": [99.5, 101.0]}))
    ...     trades = arrow.table(md.connect("market")["trades"])
    >>> trades.column("price").to_pylist()
    [99.5, 101.0]
    """
    pa = _pyarrow()
    view = bytes_of(memory).toreadonly()
    if not (trusted or type(memory) is bytes or lies_immutable(memory)):
        raise SealedError(
            f"the memory of {view.nbytes:,} bytes can still be changed, so what is checked of it "
            "now proves nothing later: have its owner share to_descriptor(...) or a snapshot(), "
            "or say trusted=True if whoever may write it is trusted",
            errno=errno.EPERM,
        )
    try:
        address, nbytes, _ = _core.buffer_address(view)
        # Holding what it was made of: a descriptor must stay open to be sent on.
        source = pa.foreign_buffer(address, nbytes, base=(view, memory))
        if view[: len(_FILE_MAGIC)] == _FILE_MAGIC:
            source = source.slice(len(_FILE_MAGIC))
        _check_in_place(pa, source)
        options = pa.ipc.IpcReadOptions(use_threads=False)
        found = pa.ipc.open_stream(source, options=options).read_all()
        if not trusted:
            found.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, struct.error, IndexError) as error:
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(
            f"the memory of {view.nbytes:,} bytes holds no valid Arrow IPC stream or file: {error}",
            errno=errno.EBADMSG,
        ) from error
    return found


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"memdesc.interop.arrow needs PyArrow ({error}): pip install 'memdesc[arrow]'",
            name=error.name,
        ) from error
    handles = sys.modules.get("memdesc.interop.multiprocessing")
    if handles is not None:
        handles.see_types()
    return pyarrow


def _instead(data: Any) -> str:
    """Say what to give in the place of what PyArrow makes no table of."""
    for method, why in (
        ("collect", "it is a query and no result yet"),  # of Polars
        ("compute", "it is a graph and no result yet"),  # of Dask
        ("to_frame", "it is one column"),  # a Series of Polars or pandas, an Index
    ):
        if callable(getattr(data, method, None)):
            return f"{why}; give its .{method}()"
    if hasattr(data, "columns") or isinstance(data, dict):
        return "give it columns of one length, each of one type and with a name of its own"
    is_column = hasattr(data, "__array__") or hasattr(data, "__arrow_c_array__")
    if is_column and getattr(data, "ndim", 1) == 1:
        return 'it has no column names; give {"values": it}'
    return "give a Table or RecordBatch of PyArrow, a data frame, or a dict of columns"


def _write(pa: Any, columns: pa.Table, sink: Any) -> None:
    options = pa.ipc.IpcWriteOptions(allow_64bit=True, use_threads=False)
    with pa.ipc.new_stream(sink, columns.schema, options=options) as writer:
        writer.write_table(columns)


def _fill(pa: Any, columns: pa.Table, buffer: BufferMemoryDescriptor) -> None:
    sink = pa.FixedSizeBufferWriter(pa.py_buffer(buffer))
    cause = None
    try:
        _write(pa, columns, sink)
    except (pa.ArrowException, OSError) as error:
        cause = bare(error)
    if cause or sink.tell() != buffer.length:  # it would end in what the memory held before
        raise InvalidArgument(
            f"the table took {buffer.length:,} bytes a moment before, and now another number: "
            "whoever has memory that its columns lie in changed them meanwhile",
            errno=errno.EAGAIN,
        ) from cause


def _check_in_place(pa: Any, source: pa.Buffer) -> None:
    """Refuse what Arrow would have to unpack or put together, before it does.

    A few bytes can be unpacked to more than this process can have.
    """
    for message in pa.ipc.MessageReader.open_stream(source):
        metadata = bytes(message.metadata)  # verified by Arrow: its tables lie within it
        (root,) = struct.unpack_from("<I", metadata)
        header = _follow(metadata, _field(metadata, root, _HEADER))
        why = ""
        if message.type == "schema":
            at = _field(metadata, header, _SCHEMA_ENDIANNESS)
            is_big = bool(at and metadata[at])
            why = "in the other byte order" if is_big != (sys.byteorder == "big") else ""
        elif message.type == "dictionary":
            delta = _field(metadata, header, _DICTIONARY_IS_DELTA)
            why = "with a dictionary in pieces" if delta and metadata[delta] else ""
            header = _follow(metadata, _field(metadata, header, _DICTIONARY_BATCH))
        if message.type in ("record batch", "dictionary"):
            compressed = _field(metadata, header, _BATCH_COMPRESSION)
            why = "compressed" if compressed else why
        if why:
            raise InvalidArgument(
                f"the table is written {why}, so it can not be read in place: write it once more "
                "by to_descriptor, or read it by pyarrow.ipc, which copies",
                errno=errno.ENOTSUP,
            )


def _field(metadata: bytes, at: int, number: int) -> int:
    """Find a field of a FlatBuffers table; 0 where the table has none."""
    vtable = at - struct.unpack_from("<i", metadata, at)[0]
    if vtable < 0:
        raise ValueError(f"a table of its metadata is described at offset {vtable}")
    (size,) = struct.unpack_from("<H", metadata, vtable)
    place = 4 + 2 * number
    offset = struct.unpack_from("<H", metadata, vtable + place)[0] if place < size else 0
    return at + int(offset) if offset else 0


def _follow(metadata: bytes, at: int) -> int:
    """Give where the table lies that a field refers to."""
    return at + int(struct.unpack_from("<I", metadata, at)[0])
