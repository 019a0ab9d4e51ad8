"""The form of Arrow's streams and files: messages, of which the metadata says what can be done.

A stream is a row of messages, each a prefix of 8 bytes (-1, and how long the metadata is), the
metadata, a FlatBuffers table, and a body; a length of 0 ends it. A file is a magic number, a
stream, and an index of that, which is not read here: readers of ours read the stream.

What is read here is a stranger's: each offset is held against what there is, and a wrong one is an
error. That what the metadata tells of the body holds together is for PyArrow to say, which whoever
reads the table has.
"""

from __future__ import annotations

import errno
import struct
import sys
from collections.abc import Callable

FILE_MAGIC = b"ARROW1\0\0"
"""How a file begins; without its zeros it is how it ends, too, behind the index and its length."""

_PREFIX = struct.Struct("<Ii")
_END = struct.Struct("<i6s")
_CONTINUES = 0xFFFFFFFF
_MOST_METADATA = 64 << 20
"""Bytes of one message's: some 100,000 columns."""

# Fields of tables in Arrow's Message.fbs and Schema.fbs, counted from 0.
_VERSION, _KIND, _HEADER, _BODY, _CUSTOM = 0, 1, 2, 3, 4
_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3  # kinds of messages
_SCHEMA_ENDIANNESS = 0
_BATCH_BUFFERS, _BATCH_COMPRESSION = 2, 3
_DICTIONARY_BATCH, _DICTIONARY_IS_DELTA = 1, 2
_V5 = 4
_COMPRESSED = b"ARROW:experimental_compression"
"""The key by which batches of version 4 say it, and PyArrow believes them."""

Read = Callable[[int, int, str], bytes]
"""Gives so many bytes from an offset on, that must be there; the text says what they are."""


class NotArrow(ValueError):
    """It can not be read in place: `errno` EBADMSG where it is no Arrow stream, else ENOTSUP.

    Of ENOTSUP the message says how it is written; `offset` is where that stands.
    """

    def __init__(self, message: str, offset: int = 0, number: int = errno.EBADMSG) -> None:
        super().__init__(message)
        self.offset = offset
        self.errno = number


def check_stream(read: Read, size: int) -> None:
    """Check that `size` bytes are a stream or file that can be read in place; else `NotArrow`.

    Reads the metadata alone. Nothing is allocated for what it says.
    """
    head = read(0, min(size, len(FILE_MAGIC)), "the beginning")
    at, end = 0, size
    if head == FILE_MAGIC:
        at, end = len(FILE_MAGIC), _end_of_stream(read, size)
    elif head[:4] == b"FEA1":
        raise NotArrow("as Feather, version 1", 0, errno.ENOTSUP)
    is_first = True
    while True:
        if at == end and not is_first and head != FILE_MAGIC:
            return  # streams may end without saying so
        if end - at < _PREFIX.size:
            raise NotArrow("a message should begin here, or the stream be ended", at)
        prefix, nbytes = _PREFIX.unpack(read(at, _PREFIX.size, "a message"))
        if prefix != _CONTINUES or not 0 <= nbytes <= min(_MOST_METADATA, end - at - _PREFIX.size):
            raise NotArrow(f"no message that fits begins here: {prefix:#x}, {nbytes:,} bytes", at)
        if not nbytes:
            if is_first:
                raise NotArrow("the stream has no schema", at)
            return
        metadata = read(at + _PREFIX.size, nbytes, "a message's metadata")
        why, kind, body = look(metadata, at)
        if why:
            raise NotArrow(why, at, errno.ENOTSUP)
        if is_first is not (kind == _SCHEMA):
            raise NotArrow(f"a message of kind {kind}; a schema comes first, and once", at)
        at += _PREFIX.size + nbytes
        if not 0 <= body <= end - at:
            raise NotArrow(f"a message's body of {body:,} bytes does not fit", at)
        at += body
        is_first = False


def _end_of_stream(read: Read, size: int) -> int:
    """Find where in a file the index begins."""
    tail = size - _END.size
    if tail < len(FILE_MAGIC):
        raise NotArrow(f"{size:,} bytes are too few for an Arrow file", size)
    nbytes, magic = _END.unpack(read(tail, _END.size, "the end"))
    if magic != FILE_MAGIC[: len(magic)] or not 0 < nbytes <= tail - len(FILE_MAGIC):
        raise NotArrow(f"it ends with {magic!r} and an index of {nbytes:,} bytes: cut off?", tail)
    return int(tail - nbytes)


def look(metadata: bytes, at: int = 0) -> tuple[str, int, int]:
    """Look at a message's metadata, which stands at an offset.

    Returns
    -------
    tuple
        How it is written, if it can not be read in place, else ""; its kind; its body's length.
    """
    try:
        (root,) = struct.unpack_from("<I", metadata)
        kind = _byte(metadata, root, _KIND)
        where = _field(metadata, root, _BODY)
        body = struct.unpack_from("<q", metadata, where)[0] if where else 0
        header = _follow(metadata, _field(metadata, root, _HEADER))
        why = _why_not(metadata, kind, header, body)
        if not why and _field(metadata, root, _CUSTOM) and _COMPRESSED in metadata:
            why = "compressed" if _byte(metadata, root, _VERSION) < _V5 else ""
        return why, kind, body
    except (struct.error, IndexError, ValueError) as error:
        raise NotArrow(f"a message's metadata of {len(metadata):,} bytes: {error}", at) from error


def _why_not(metadata: bytes, kind: int, header: int, body: int) -> str:
    """Say how a message is written, where Arrow would have to unpack it or put it together."""
    if kind == _SCHEMA:
        at = _field(metadata, header, _SCHEMA_ENDIANNESS)
        is_big = bool(at and metadata[at])
        return "in the other byte order" if is_big != (sys.byteorder == "big") else ""
    if kind == _DICTIONARY:
        if _byte(metadata, header, _DICTIONARY_IS_DELTA):
            return "with a dictionary in pieces"
        header = _follow(metadata, _field(metadata, header, _DICTIONARY_BATCH))
    if kind in (_BATCH, _DICTIONARY):
        if _field(metadata, header, _BATCH_COMPRESSION):
            return "compressed"
        if _sum_of_buffers(metadata, header) > body:
            return "with buffers that overlap"  # each would be validated: more work than bytes
    return ""


def _sum_of_buffers(metadata: bytes, batch: int) -> int:
    """Add up what the buffers of a batch are long: pairs of an offset in the body and a length."""
    at = _field(metadata, batch, _BATCH_BUFFERS)
    if not at:
        return 0
    at = _follow(metadata, at)
    (count,) = struct.unpack_from("<I", metadata, at)
    lengths = [length for _, length in struct.iter_unpack("<qq", metadata[at + 4 :][: 16 * count])]
    if len(lengths) < count or min(lengths, default=0) < 0:
        raise ValueError(f"{count:,} buffers do not stand there, or one is of negative length")
    return sum(lengths)


def _byte(metadata: bytes, table: int, number: int) -> int:
    at = _field(metadata, table, number)
    return metadata[at] if at else 0


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
