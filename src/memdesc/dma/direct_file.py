"""DirectFile: a file that a device reads into descriptors, and writes from them, with no copy."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, final

from memdesc.descriptors.base import MemoryDescriptor
from memdesc.dma import rings
from memdesc.dma.files import OpenedFile
from memdesc.dma.loops import LoopEngine, carry_without_ring
from memdesc.dma.rings import Engine, open_engine, run_without_ring
from memdesc.dma.targets import Ask, Checked, check_asks, hold
from memdesc.dma.transfers import Part, Progress, Transfer, Transferred
from memdesc.errors import ClosedError, InvalidArgument, RangeError
from memdesc.vm import tracing
from memdesc.vm.forks import lock_for
from memdesc.vm.pages import check_integer, page_size

if TYPE_CHECKING:
    import asyncio

_files: weakref.WeakSet[DirectFile] = weakref.WeakSet()
_hooked = False
_IDLE = 4  # engines kept for the next calls


@dataclass(frozen=True, slots=True)
class DirectFileStatistics:
    """What went through a file since it was opened.

    Attributes
    ----------
    transfers : int
        Calls that ended without an error.
    read_bytes, written_bytes : int
    bounced_bytes, registered_bytes, requests : int
        In all, as of `Transferred`.
    registrations : int
        Descriptors that are registered now.
    """

    transfers: int
    read_bytes: int
    written_bytes: int
    bounced_bytes: int
    registered_bytes: int
    requests: int
    registrations: int


def _told(file: DirectFile) -> tracing.Told:
    return None if file.closed else (os.fsdecode(file.path), 0)


@final
class DirectFile:
    """A file past the page cache: the device itself fills the pages that other tasks see.

    By O_DIRECT through an io_uring of ours. Where one or the other is denied the next best way is
    taken, and the result says which and why; the bytes are the same.

    Parameters
    ----------
    path : str or path-like
        A regular file or a block device.
    mode : {"r", "r+", "w", "x"}
        Read; read and write what is there; empty it, or make it; make it, and fail if it is there.
    queue_depth : int
        Requests in flight at most, for each call that waits and for each event loop: 1 to 1024.
    block_size : int
        Bytes of one request at most: a multiple of the page size, up to 1 GiB.
    register : bool
        Register descriptors with the ring, which pins their pages until they are collected or
        closed, or the file is: each request then saves the pinning. Registered memory has its
        snapshots copied, and is not recycled. What can not be registered is transferred all the
        same.

    Raises
    ------
    OSError
        As `open` raises: FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError.
    InvalidArgument
        No file (a pipe, a folder), or an argument outside its range.

    Notes
    -----
    Alignment: O_DIRECT asks for addresses and offsets that are multiples of `alignment`. Buffers
    begin on pages, so reading at such offsets bounces nothing; edges that lie otherwise go through
    the page cache.

    Threads: safe, and beside one another; each waiting call has a ring of its own. Fork: closed
    in the child; what is in flight goes on in the parent. Signals: handlers run; what they raise
    cancels the transfer.

    Linux: io_uring_setup, O_DIRECT, statx (STATX_DIOALIGN, 6.1). No privilege; registering counts
    against RLIMIT_MEMLOCK. I/O Kit: IODMACommand and a storage driver's doAsyncReadWrite.

    Examples
    --------
    >>> import tempfile
    >>> from memdesc import BufferMemoryDescriptor, dma
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = folder.name + "/frames"
    >>> with BufferMemoryDescriptor(8192) as frames, dma.DirectFile(path, "w") as disk:
    ...     frames.write_bytes(0, b"frames")
    ...     disk.write_from(frames).nbytes
    ...     disk.read_into(frames, length=4096, offset=4096).nbytes
    ...     frames.read_bytes(4096, 6)
    8192
    4096
    b'frames'
    >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        mode: str = "r",
        *,
        queue_depth: int = 32,
        block_size: int = 1 << 20,
        register: bool = False,
    ) -> None:
        self._idle: list[Engine] = []
        self._lock = lock_for(self)
        self._moved = [0, 0]  # bytes read, and written
        self._counts = [0, 0, 0, 0]
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopEngine] = (
            weakref.WeakKeyDictionary()
        )
        if not 1 <= check_integer(queue_depth, "queue_depth") <= 1024:
            raise InvalidArgument(
                f"queue_depth is {queue_depth}: give 1 to 1024", errno=errno.EINVAL
            )
        if not page_size <= check_integer(block_size, "block_size") <= 1 << 30 or (
            block_size % page_size
        ):
            raise InvalidArgument(
                f"block_size is {block_size:,}: give a multiple of {page_size:,} up to 1 GiB",
                errno=errno.EINVAL,
            )
        self.queue_depth = queue_depth
        self.block_size = block_size
        self._register = register
        self.path = os.fspath(path)
        self._file = OpenedFile(self.path, mode)
        _watch_forks()
        _files.add(self)
        if tracing.books is not None:
            tracing.books.note(self, _told)

    # -- what it is ------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes of the file, now."""
        self._check_open()
        return self._file.size()

    @property
    def alignment(self) -> tuple[int, int]:
        """What O_DIRECT asks for: (of addresses, of offsets in the file), in bytes."""
        return self._file.memory_alignment, self._file.offset_alignment

    @property
    def registrations(self) -> int:
        """How many descriptors are registered now, in all rings of this file."""
        engines = [*self._idle, *(known.engine for known in self._loops.values())]
        return sum(engine.registrations for engine in engines)

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or this is a fork child."""
        return self._file.closed

    # -- transfers -------------------------------------------------------------------------------

    def read_into(
        self,
        descriptor: MemoryDescriptor,
        file_offset: int = 0,
        length: int | None = None,
        offset: int = 0,
        *,
        progress: Progress | None = None,
    ) -> Transferred:
        """Read from the file into a descriptor's memory; waits without the GIL.

        Parameters
        ----------
        descriptor : MemoryDescriptor
            Of any kind that this task may write. Kept until the kernel is done with it.
        file_offset : int
            Bytes, at most the file's size.
        length : int, optional
            Bytes; to the descriptor's end by default.
        offset : int
            Of the first byte in the descriptor.
        progress : callable, optional
            Called with (bytes done, bytes in all), in the calling thread. What it raises cancels
            the transfer and is raised here.

        Returns
        -------
        Transferred
            Fewer bytes than asked for only at the end of the file. What lies behind those, up to
            `length`, is undefined then.

        Raises
        ------
        RangeError
            Past the descriptor, or past the end of the file.
        SealedError, WiringError
            The memory is read-only in this task, or prepared for being read only.
        TransferError
            The device failed (EIO, …): `completed` bytes are there. Nothing is in flight any more.
        ClosedError
        """
        return self._wait([(descriptor, file_offset, length, offset)], False, progress)

    def write_from(
        self,
        descriptor: MemoryDescriptor,
        file_offset: int = 0,
        length: int | None = None,
        offset: int = 0,
        *,
        progress: Progress | None = None,
    ) -> Transferred:
        """Write a descriptor's memory to the file, which grows where need be; as `read_into`.

        What is on the device after that is the kernel's word only after `sync`. Two writes at a
        time must not have edges in the same page of the file.

        Raises
        ------
        TransferError
            ENOSPC, EDQUOT, EFBIG, EIO: `completed` bytes were written.
        InvalidArgument
            The file was opened with mode "r" (EBADF).
        """
        return self._wait([(descriptor, file_offset, length, offset)], True, progress)

    def read_many(self, asks: Sequence[Ask], *, progress: Progress | None = None) -> Transferred:
        """Read several ranges in one submission.

        Parameters
        ----------
        asks : sequence of tuple
            (descriptor, file_offset, length, offset), as `read_into` takes them. They are carried
            out in no particular order.
        progress : callable, optional
            As of `read_into`.
        """
        return self._wait(asks, False, progress)

    def write_many(self, asks: Sequence[Ask], *, progress: Progress | None = None) -> Transferred:
        """Write several ranges in one submission; as `read_many`."""
        return self._wait(asks, True, progress)

    async def read_into_async(
        self,
        descriptor: MemoryDescriptor,
        file_offset: int = 0,
        length: int | None = None,
        offset: int = 0,
        *,
        progress: Progress | None = None,
    ) -> Transferred:
        """As `read_into`, in the running asyncio loop, without a thread.

        Cancelled, it asks the kernel to give up what it has, and ends when it did: then nothing
        touches the memory any more. A device finishes what it began.
        """
        return await self._await([(descriptor, file_offset, length, offset)], False, progress)

    async def write_from_async(
        self,
        descriptor: MemoryDescriptor,
        file_offset: int = 0,
        length: int | None = None,
        offset: int = 0,
        *,
        progress: Progress | None = None,
    ) -> Transferred:
        """As `write_from`, in the running asyncio loop."""
        return await self._await([(descriptor, file_offset, length, offset)], True, progress)

    async def read_many_async(
        self, asks: Sequence[Ask], *, progress: Progress | None = None
    ) -> Transferred:
        """As `read_many`, in the running asyncio loop."""
        return await self._await(asks, False, progress)

    async def write_many_async(
        self, asks: Sequence[Ask], *, progress: Progress | None = None
    ) -> Transferred:
        """As `write_many`, in the running asyncio loop."""
        return await self._await(asks, True, progress)

    def sync(self) -> None:
        """Have everything that was written reach the device (fdatasync)."""
        self._check_open()
        self._file.sync()

    # -- how they are carried --------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._file.closed:
            raise ClosedError(f"{self.path!r} was closed, or belongs to the parent process")

    def _prepare(self, asks: Sequence[Ask], writing: bool, progress: Progress | None) -> Transfer:
        self._check_open()
        file = self._file
        if writing and not file.writable:
            raise InvalidArgument(
                f"{file.path!r} was opened for reading: say mode='r+' to write it",
                errno=errno.EBADF,
            )
        checked = check_asks(asks)
        if not writing:
            _check_in_file(file, checked)
        targets = hold(checked, writes_memory=not writing)
        parts = [
            Part(targets[descriptor], offset, at, at + length, at + length)
            for descriptor, at, length, offset in checked
        ]
        return Transfer(file, parts, writing=writing, block_size=self.block_size, progress=progress)

    def _wait(self, asks: Sequence[Ask], writing: bool, progress: Progress | None) -> Transferred:
        transfer = self._prepare(asks, writing, progress)
        engine: Engine | None = None
        try:
            engine, why = self._take()
            if engine is None:
                run_without_ring(transfer)
            else:
                engine.run(transfer)
                why = engine.why_not_registered
        except BaseException:
            if engine is None or engine.close():  # interrupted: what it knows may be incomplete
                transfer.release()
            raise
        try:
            return self._count(
                transfer.outcome(by_ring=engine is not None, why_no_ring=why), writing
            )
        finally:
            transfer.release()
            if engine is not None:
                self._give_back(engine)

    async def _await(
        self, asks: Sequence[Ask], writing: bool, progress: Progress | None
    ) -> Transferred:
        transfer = self._prepare(asks, writing, progress)
        try:
            known, why = self._engine_of_loop()
            if known is None:
                await carry_without_ring(transfer)
                return self._count(transfer.outcome(by_ring=False, why_no_ring=why), writing)
            await known.carry(transfer)
            why = known.engine.why_not_registered
            return self._count(transfer.outcome(by_ring=True, why_no_ring=why), writing)
        finally:
            if not transfer.in_flight:
                transfer.release()

    def _count(self, done: Transferred, writing: bool) -> Transferred:
        way = 1 if writing else 0
        added = (1, done.bounced_bytes, done.registered_bytes, done.requests)
        with self._lock:
            self._moved[way] += done.nbytes
            self._counts = [old + more for old, more in zip(self._counts, added, strict=True)]
        return done

    def statistics(self) -> DirectFileStatistics:
        """Tell what went through the file; of a closed one too."""
        with self._lock:
            transfers, bounced, registered, requests = self._counts
            read, written = self._moved
        return DirectFileStatistics(
            transfers, read, written, bounced, registered, requests, self.registrations
        )

    def _take(self) -> tuple[Engine | None, str]:
        try:
            return self._idle.pop(), ""
        except IndexError:
            return open_engine(self._file, self.queue_depth, registers=self._register)

    def _give_back(self, engine: Engine) -> None:
        if len(self._idle) < _IDLE:
            self._idle.append(engine)
            if not self._file.closed:
                return
        while self._idle:  # closed meanwhile, or there are enough
            self._idle.pop().close()

    def _engine_of_loop(self) -> tuple[LoopEngine | None, str]:
        import asyncio

        loop = asyncio.get_running_loop()
        for other in [other for other in self._loops if other.is_closed()]:
            self._loops.pop(other).close()
        known = self._loops.get(loop)
        if known is not None:
            return known, ""
        engine, why = open_engine(self._file, self.queue_depth, registers=self._register)
        if engine is None:
            return None, why
        try:
            known = self._loops[loop] = LoopEngine(engine)
        except OSError as error:
            engine.close()
            return None, f"no eventfd for io_uring: {error.strerror}"
        return known, ""

    # -- lifetime --------------------------------------------------------------------------------

    def close(self) -> None:
        """Take no more transfers, unregister everything, let go of the file. Again is a no-op.

        Transfers of other threads and loops that are under way go on to their end.
        """
        self._file.close()
        while self._idle:
            self._idle.pop().close()
        for known in list(self._loops.values()):
            known.close()
        self._loops.clear()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"queue depth {self.queue_depth}"
        return f"<DirectFile {self.path!r}: {state}>"

    def _forked(self) -> None:
        self._file.forked()
        self._idle.clear()
        for known in list(self._loops.values()):
            known.forked()
        self._loops.clear()


def _check_in_file(file: OpenedFile, asks: Sequence[Checked]) -> None:
    size, last = file.size(), max((ask[1] for ask in asks), default=0)
    if last > size:
        raise RangeError(
            f"offset {last:,} lies behind the end of {file.path!r}, which has {size:,} bytes",
            errno=errno.EINVAL,
        )


def _watch_forks() -> None:
    global _hooked
    if not _hooked:
        _hooked = True
        os.register_at_fork(after_in_child=_forked)


def _forked() -> None:
    rings.forked()
    for file in list(_files):
        file._forked()
