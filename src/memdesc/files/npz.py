"""NumPy's .npz: a zip archive of .npy files. What is stored is read in place, the rest unpacked."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from memdesc.errors import MemdescError, TransferError
from memdesc.files import npy
from memdesc.files.formats import Member, StoredArray, stored
from memdesc.files.sources import OpenFile
from memdesc.services.arrays import MOST_ENTRIES
from memdesc.vm.telling import explains

_LOCAL = struct.Struct("<4s22xHH")  # signature, …, bytes of the name and of the extra field
_MOST_RATIO = 1040
"""Deflate makes at most 1032 bytes of one (zlib's documentation), and a little at the ends."""

_MOST_DIRECTORY = 64 << 20
"""Bytes: a kilobyte for each of the entries that are read at most."""

BAD_ZIP = (zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, EOFError, struct.error)
"""What zipfile raises for archives that it can not, or will not, read."""


def find_arrays(file: OpenFile) -> list[StoredArray]:
    """Find the arrays of an archive; entries that are not called .npy are bytes."""
    with explained(file), open_archive(file) as archive:
        # Not is_dir(), which has an IndexError for an entry without a name (Python 3.11).
        entries = [entry for entry in archive.infolist() if not entry.filename.endswith("/")]
        if not 0 < len(entries) <= MOST_ENTRIES:
            raise file.wrong(f"{len(entries):,} entries; 1 to {MOST_ENTRIES:,} are read", 0)
        _check_places(file, entries)
        return [_find(file, archive, entry) for entry in entries]


class _Opening(io.BufferedReader):
    """A file that `zipfile` opens: it reads the directory whole, and makes an object per entry."""

    opening = True

    def read(self, size: int | None = -1, /) -> bytes:
        """Read; of a directory none that would take gigabytes of memory."""
        if self.opening and size is not None and size > _MOST_DIRECTORY:
            raise zipfile.BadZipFile(
                f"a directory of {size:,} bytes; at most {_MOST_DIRECTORY:,} are read"
            )
        data = super().read(size)
        if self.opening and (entries := data.count(b"PK\1\2")) > MOST_ENTRIES:
            raise zipfile.BadZipFile(f"{entries:,} entries; at most {MOST_ENTRIES:,} are read")
        return data


@contextmanager
def open_archive(file: OpenFile) -> Iterator[zipfile.ZipFile]:
    """Open the archive by the descriptor that is open already; what it raises is `explained`."""
    with _Opening(io.FileIO(os.dup(file.fd))) as raw, zipfile.ZipFile(raw) as archive:
        raw.opening = False
        yield archive


@explains
def explained(error: Exception, file: OpenFile) -> None:
    """Say what is the matter with an archive."""
    if isinstance(error, MemdescError):
        return
    if isinstance(error, OSError):
        raise TransferError(
            f"reading {file.path}: {error.strerror}", errno=error.errno, expected=file.size
        ) from error
    if isinstance(error, BAD_ZIP):
        raise file.wrong(f"as a zip archive: {type(error).__name__}: {error}", 0) from error


def _check_places(file: OpenFile, entries: list[zipfile.ZipInfo]) -> None:
    """Check that entries lie in the file beside one another, and unpack to what they can."""
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        name, at = entry.filename[:80], entry.header_offset
        if at < end:
            raise file.wrong(f"entry {name!r} overlaps the one before it", at)
        end = at + _LOCAL.size + entry.compress_size
        if end > file.size:
            raise file.wrong(f"entry {name!r} of {entry.compress_size:,} bytes does not fit", at)
        if entry.flag_bits & 1:
            raise file.wrong(f"entry {name!r} is encrypted", at)
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise file.wrong(f"entry {name!r} is packed by method {entry.compress_type}", at)
        least = most = entry.compress_size
        if entry.compress_type == zipfile.ZIP_DEFLATED:
            least, most = 0, most * _MOST_RATIO + 64
        if not least <= entry.file_size <= most:
            raise file.wrong(
                f"entry {name!r} claims that {entry.compress_size:,} bytes unpack to "
                f"{entry.file_size:,}",
                at,
            )


def _find(file: OpenFile, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> StoredArray:
    """Find the array of one entry."""
    deflated = entry.compress_type == zipfile.ZIP_DEFLATED
    start = 0 if deflated else _start_of(file, entry)
    name = entry.filename.removesuffix(".npy")
    if file.source.name is not None:
        name = f"{file.source.name}.{name}"
    if name.endswith(entry.filename):  # no .npy
        return stored(file, name, "u1", (entry.file_size,), start, member=Member(entry, b""))
    with archive.open(entry) as unpacked:
        head = bytearray()

        def read(offset: int, nbytes: int, what: str) -> bytes:
            while len(head) < offset + nbytes:
                more = unpacked.read(offset + nbytes - len(head))
                if not more:
                    raise npy.NotNumPy(f"entry {entry.filename[:80]!r} ends in {what}")
                head.extend(more)
            return bytes(head[offset : offset + nbytes])

        try:
            header = npy.read_header(read)
        except npy.NotNumPy as error:
            raise npy.NotNumPy(f"entry {entry.filename[:80]!r}: {error}") from error
    array = npy.make_array(
        file, name, header, start + (0 if deflated else header.length), Member(entry, bytes(head))
    )
    if array.nbytes != entry.file_size - header.length:
        raise file.wrong(
            f"entry {entry.filename[:80]!r} tells of {array.dtype} {array.shape}, "
            f"{array.nbytes:,} bytes, but {entry.file_size - header.length:,} follow",
            entry.header_offset,
        )
    return array


def _start_of(file: OpenFile, entry: zipfile.ZipInfo) -> int:
    """Give the offset in the file of the first byte of a stored entry."""
    at = entry.header_offset
    signature, name, extra = _LOCAL.unpack(file.read(at, _LOCAL.size, "the header of an entry"))
    start = at + _LOCAL.size + name + extra
    if signature != b"PK\3\4" or start + entry.compress_size > file.size:
        raise file.wrong(f"no entry {entry.filename[:80]!r} that fits begins there", at)
    return int(start)
