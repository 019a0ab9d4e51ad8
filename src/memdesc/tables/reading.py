"""Reading: the table that lies in some memory, which no byte of is copied."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from memdesc import _core
from memdesc.copyio import bytes_of
from memdesc.descriptors.homes import lies_immutable
from memdesc.errors import InvalidArgument, SealedError
from memdesc.tables.messages import FILE_MAGIC, look
from memdesc.tables.validating import validate
from memdesc.vm.telling import needed

if TYPE_CHECKING:
    import pyarrow as pa
    from typing_extensions import Buffer  # collections.abc has it from 3.12 on

when_imported: list[Callable[[], object]] = []
"""Called when PyArrow is used here, for who began when it was not imported yet."""


def import_pyarrow() -> Any:
    """Import PyArrow, or say what to install."""
    with needed("a table of Arrow", "PyArrow", "arrow"):
        import pyarrow
    for call in when_imported:
        call()
    return pyarrow


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
        in place, as it is compressed, in another byte order, or has dictionaries in pieces or
        buffers that overlap (ENOTSUP); to validate it takes reading the same bytes too often, as
        texts have too many views of them (ENOTSUP); it is a path, or no contiguous buffer
        (EINVAL).
    ModuleNotFoundError
        PyArrow is not installed.

    Notes
    -----
    What is checked unless `trusted`: that the memory is sealed against all writing; the stream's
    own metadata; and all of ``Table.validate(full=True)``: that each buffer is long enough, each
    offset and index within what it refers to, text UTF-8, decimals within their precision. It
    reads texts, offsets and indices, and no numbers. Not checked: what the values mean, and
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
    if isinstance(memory, str | os.PathLike):
        raise InvalidArgument(
            f"{str(memory)[:80]!r} is a path, no memory: memdesc.files.load(path).arrays() has the "
            "tables of files that are not compressed, pyarrow reads others",
            errno=errno.EINVAL,
        )
    return table_in(bytes_of(memory).toreadonly(), memory, trusted=trusted)


def table_in(view: memoryview, memory: object, *, trusted: bool = False) -> pa.Table:
    """Give the table that lies in a part of some memory, which it keeps; as `table`."""
    pa = import_pyarrow()
    if not (trusted or type(view.obj) is bytes or lies_immutable(view)):
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
        if view[: len(FILE_MAGIC)] == FILE_MAGIC:
            source = source.slice(len(FILE_MAGIC))
        _check_in_place(pa, source)
        options = pa.ipc.IpcReadOptions(use_threads=False)
        found = pa.ipc.open_stream(source, options=options).read_all()
        if not trusted:
            validate(pa, found, nbytes)
    except (pa.ArrowException, OSError, ValueError) as error:  # NotArrow among these
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(
            f"the memory of {view.nbytes:,} bytes holds no valid Arrow IPC stream or file: {error}",
            errno=errno.EBADMSG,
        ) from error
    return found


def _check_in_place(pa: Any, source: pa.Buffer) -> None:
    """Refuse what Arrow would have to unpack or put together, before it does.

    A few bytes can be unpacked to more than this process can have.
    """
    for message in pa.ipc.MessageReader.open_stream(source):
        why, _, _ = look(bytes(message.metadata))  # verified by Arrow: its tables lie within it
        if why:
            raise InvalidArgument(
                f"the table is written {why}, so it can not be read in place: write it once more "
                "by to_descriptor, or read it by pyarrow.ipc, which copies",
                errno=errno.ENOTSUP,
            )
