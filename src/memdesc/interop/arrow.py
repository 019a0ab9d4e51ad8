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
from typing import TYPE_CHECKING, Any

from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.descriptors.snapshot import SnapshotMemoryDescriptor
from memdesc.errors import InvalidArgument
from memdesc.memory.kept import Contents
from memdesc.memory.page_kinds import PageKind
from memdesc.tables.reading import import_pyarrow, table as table
from memdesc.vm.telling import bare

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["table", "to_descriptor"]


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
    pa = import_pyarrow()
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
