"""Loading: all arrays of some files into one descriptor, which is one version.

It is a snapshot: once all is read nobody can store to it, this process neither. So what a reader
checked of it holds, whoever serves it.
"""

from __future__ import annotations

import errno
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.descriptors.snapshot import SnapshotMemoryDescriptor
from memdesc.dma import DirectFile, Transferred, Way
from memdesc.errors import InvalidArgument, RangeError, TransferError
from memdesc.files.formats import StoredArray, find_arrays
from memdesc.files.placing import Place, Run, pages_of, place
from memdesc.files.sources import Files, FileSource, Identity, OpenFile, as_sources, identify
from memdesc.memory.page_kinds import PageKind
from memdesc.services.arrays import ALL, MOST_ENTRIES, ArrayEntry, Arrays, encode

Progress = Callable[[int, int], object]

_STEP = 1 << 20


@dataclass(frozen=True, slots=True)
class Loaded:
    """Arrays of files, in memory; made by `load`.

    Attributes
    ----------
    descriptor : SnapshotMemoryDescriptor
        Has all of them. Nobody can change it.
    version : int
    entries : tuple of ArrayEntry
        What is known of each array, in the order of the files.
    sources : tuple of FileSource
        What was loaded, and
    identities : tuple of Identity
        as what it was found.
    nbytes : int
        Bytes that were read from the files: with headers, packed as they are.
    bounced_bytes : int
        Of them, those that went through the page cache.
    way : memdesc.dma.Way or None
        The best way that any went; None where all was unpacked.
    reasons : tuple of str
        Why no better way was taken, or all was copied once more to become immutable.
    seconds : float
        From the first byte that was read to the last.
    page_kind, huge_bytes
        What the memory is made of, as of `BufferMemoryDescriptor`.
    """

    descriptor: SnapshotMemoryDescriptor
    version: int
    entries: tuple[ArrayEntry, ...]
    sources: tuple[FileSource, ...]
    identities: tuple[Identity, ...]
    nbytes: int
    bounced_bytes: int
    way: Way | None
    reasons: tuple[str, ...]
    seconds: float
    page_kind: PageKind
    huge_bytes: int

    def arrays(self) -> Arrays:
        """View the arrays, read-only; a view keeps the memory."""
        return Arrays(self.descriptor)


def load(
    files: Files,
    *,
    pages: PageKind = PageKind.AUTO,
    wired: bool = False,
    progress: Progress | None = None,
    version: int = 1,
) -> Loaded:
    """Load the arrays of files into one descriptor, which nobody can change.

    Parameters
    ----------
    files : path-like, FileSource, or several
        Suffixes tell the format: .npy, .npz, .safetensors, .arrow, .arrows, .feather; all else
        is raw bytes.
    pages : PageKind
        As of `BufferMemoryDescriptor`.
    wired : bool
        Keep it resident.
    progress : callable, optional
        Called with (bytes done, bytes in all) in this thread. What it raises ends the loading.
    version : int
        What the catalogue says.

    Returns
    -------
    Loaded
        Owned by the caller; the memory goes when nothing holds it any more.

    Raises
    ------
    OSError
        As `open` raises: FileNotFoundError, PermissionError, …
    InvalidArgument
        No regular file (EINVAL, EISDIR), an empty one (ENODATA), two arrays of one name (EEXIST),
        or contents that can not be (EBADMSG): named with what was found and where.
    TransferError
        The device failed (EIO, …), or a file was changed, shortened or replaced meanwhile
        (ESTALE). Nothing is left allocated, whatever is raised.
    AllocationError, PageKindError, WiringError

    Notes
    -----
    Bytes that a file has packed are unpacked into the memory, and what an archive has a checksum
    of is checked. All else is read by `DirectFile`: O_DIRECT through io_uring where that is to be
    had. That a file changed is told by its size and its time of change, when all files are read;
    stores through a mapping of it may not show.

    Linux: openat, statx, O_DIRECT, io_uring. No privilege.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from memdesc import files
    >>> folder = tempfile.TemporaryDirectory()
    >>> np.save(folder.name + "/weights.npy", np.arange(6.0).reshape(2, 3))
    >>> float(files.load(folder.name + "/weights.npy").arrays()["weights"].sum())
    15.0
    >>> folder.cleanup()
    """
    sources = as_sources(files)
    with ExitStack() as stack:
        opened = []
        for source in sources:
            opened.append(OpenFile(source))
            stack.callback(opened[-1].close)
        contents = [find_arrays(file) for file in opened]
        places, end = [], 0
        for arrays in contents:
            placed, end = place(arrays, end)
            places.append(placed)
        entries = _entries(opened, contents, places)
        catalogue = encode(version, entries)
        buffer = BufferMemoryDescriptor(
            end + len(catalogue), pages=pages, wired=wired, recycle=False, name="memdesc-files"
        )
        stack.callback(buffer.close)  # unless all is well
        buffer.write_bytes(end, catalogue)
        reading = _Reading(buffer, opened, contents, places, progress)
        begun = time.perf_counter()
        reading.read_all()
        seconds = time.perf_counter() - begun
        for file in opened:
            file.check_unchanged()
        identities = tuple(file.identity for file in opened)
        kind, huge_bytes = buffer.page_kind, buffer.huge_bytes
        frozen = _freeze(buffer, wired=wired)
        if frozen.reason is not None:
            reading.reasons.append(
                f"{frozen.copied_bytes:,} bytes were copied to be immutable: {frozen.reason.value}"
            )
        buffer.close()
        stack.pop_all()
        for file in opened:
            file.close()
        return Loaded(
            frozen,
            version,
            entries,
            sources,
            identities,
            reading.done,
            reading.bounced,
            reading.way,
            tuple(dict.fromkeys(reading.reasons)),
            seconds,
            kind,
            huge_bytes,
        )


def _freeze(buffer: BufferMemoryDescriptor, *, wired: bool) -> SnapshotMemoryDescriptor:
    """Make what was loaded immutable, and wire that in the place of the buffer."""
    if not wired:
        return buffer.snapshot()
    buffer.complete()  # of wired memory a snapshot is a copy
    frozen = buffer.snapshot()
    try:
        frozen.prepare()
    except BaseException:
        frozen.close()
        raise
    return frozen


def _entries(
    files: Sequence[OpenFile], contents: Sequence[list[StoredArray]], places: Sequence[Place]
) -> tuple[ArrayEntry, ...]:
    """Tell of all arrays; refuse two of one name."""
    seen: dict[str, OpenFile] = {}
    entries = []
    for file, arrays, placed in zip(files, contents, places, strict=True):
        # A name of a file need not be text that can travel.
        path = os.fsencode(file.path).decode(errors="backslashreplace")
        for array, offset in zip(arrays, placed.offsets, strict=True):
            other = seen.setdefault(array.name, file)
            if other is not file or array.name == ALL:
                why = "all arrays together are" if array.name == ALL else f"one of {other.path} is"
                raise InvalidArgument(
                    f"array {array.name[:80]!r} of {file.path} can not be called that, as {why}: "
                    "give a file another name: NAME=FILE on the command line, `name` of a "
                    "FileSource in Python",
                    errno=errno.EEXIST,
                )
            entries.append(
                ArrayEntry(
                    array.name,
                    array.dtype,
                    array.shape,
                    array.column_major,
                    offset,
                    array.nbytes,
                    path,
                    array.stored_as,
                    array.content,
                )
            )
        if len({array.name for array in arrays}) != len(arrays):
            raise InvalidArgument(f"{file.path} has two arrays of one name", errno=errno.EEXIST)
    if len(entries) > MOST_ENTRIES:
        raise InvalidArgument(
            f"{len(entries):,} arrays; at most {MOST_ENTRIES:,} are shared together",
            errno=errno.E2BIG,
        )
    return tuple(entries)


class _Reading:
    """The reading of all files into a buffer, and what came of it."""

    def __init__(
        self,
        buffer: BufferMemoryDescriptor,
        files: Sequence[OpenFile],
        contents: Sequence[list[StoredArray]],
        places: Sequence[Place],
        progress: Progress | None,
    ) -> None:
        self._buffer = buffer
        self._all = list(zip(files, contents, places, strict=True))
        self._progress = progress
        self._total = sum(
            sum(min(pages_of(run)[1], file.size - pages_of(run)[0]) for run in placed.runs)
            + sum(array.nbytes for array in arrays if array.deflated)
            for file, arrays, placed in self._all
        )
        self._told = 0
        self.done = self.bounced = 0
        self.way: Way | None = None
        self.reasons: list[str] = []

    def read_all(self) -> None:
        """Read everything."""
        for file, arrays, placed in self._all:
            if placed.runs:
                self._read_runs(file, placed.runs)
            members = [one for one in zip(arrays, placed.offsets, strict=True) if one[0].member]
            if members:
                self._unpack(file, members)

    def _tell(self, nbytes: int) -> None:
        self._told += nbytes
        if self._progress is not None:
            self._progress(min(self._told, self._total), self._total)

    def _read_runs(self, file: OpenFile, runs: Sequence[Run]) -> None:
        """Have the device put the runs where they go."""
        asks, before = [], self._told
        for run in runs:
            file_offset, nbytes, offset = pages_of(run)
            asks.append((self._buffer, file_offset, nbytes, offset))

        def progress(done: int, _: int) -> None:
            self._tell(before + done - self._told)

        name = f"/proc/self/fd/{file.fd}"  # the same file for certain, whatever lies at its path
        try:
            with DirectFile(name) as disk:
                result = disk.read_many(asks, progress=progress)
        except TransferError as error:
            raise TransferError(
                str(error).replace(repr(name), str(file.path)),
                errno=error.errno,
                expected=error.expected,
                completed=error.completed,
                file_offset=error.file_offset,
            ) from error
        except RangeError as error:  # it ends before one of them
            raise file.changed() from error
        for run, count in zip(runs, result.counts, strict=True):
            if count < run.file_offset + run.nbytes - pages_of(run)[0]:
                raise file.changed()
        self._note(file, name, result)

    def _note(self, file: OpenFile, name: str, result: Transferred) -> None:
        self.done += result.nbytes
        self.bounced += result.bounced_bytes
        self.reasons += [one.replace(repr(name), str(file.path)) for one in result.reasons]
        ways = list(Way)
        if self.way is None or ways.index(result.way) < ways.index(self.way):
            self.way = result.way

    def _unpack(self, file: OpenFile, members: Sequence[tuple[StoredArray, int]]) -> None:
        """Put what is packed where it goes, and hold everything against its checksum."""
        from memdesc.files import npz

        archived = npz.open_archive(file)
        with npz.explained(file), archived as archive, memoryview(self._buffer) as memory:
            for array, offset in members:
                assert array.member is not None
                entry, header = array.member.entry, array.member.header
                into = memory[offset : offset + array.nbytes]
                if not array.deflated:
                    self._check_sum(file, array, into)
                    continue
                with archive.open(entry) as unpacked:
                    unpacked.read(len(header))
                    at = 0
                    while at < array.nbytes:
                        step = unpacked.read(min(_STEP, array.nbytes - at))
                        if not step:
                            raise file.wrong(
                                f"entry {entry.filename[:80]!r} ends early", entry.header_offset
                            )
                        into[at : at + len(step)] = step
                        at += len(step)
                        self._tell(len(step))
                    unpacked.read(1)  # has the checksum checked
                self.done += entry.compress_size

    def _check_sum(self, file: OpenFile, array: StoredArray, memory: memoryview) -> None:
        assert array.member is not None
        entry = array.member.entry
        found = zlib.crc32(memory, zlib.crc32(array.member.header))
        if found != entry.CRC:
            raise file.wrong(
                f"entry {entry.filename[:80]!r} has the checksum {found:08x}, the archive says "
                f"{entry.CRC:08x}: it is damaged",
                array.offset,
            )


def changed(loaded: Loaded) -> Iterator[FileSource]:
    """Give the sources that are no longer what was loaded."""
    for source, identity in zip(loaded.sources, loaded.identities, strict=True):
        if identify(source.path) != identity:
            yield source
