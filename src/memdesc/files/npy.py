"""NumPy's .npy: one array behind a header in Python's notation. Versions 1.0, 2.0 and 3.0."""

from __future__ import annotations

import ast
import struct
from collections.abc import Callable
from typing import NamedTuple

from memdesc.files.formats import Member, StoredArray, stored
from memdesc.files.sources import OpenFile

MAGIC = b"\x93NUMPY"
_FORMS = {(1, 0): ("<H", "latin1"), (2, 0): ("<I", "latin1"), (3, 0): ("<I", "utf8")}
_MOST_HEADER = 10_000
"""Bytes; what NumPy reads too: Python's parser is not made for more of a stranger's text."""

Read = Callable[[int, int, str], bytes]
"""Gives so many bytes from an offset on, that must be there; the text says what they are."""


class Header(NamedTuple):
    """What the header says; `length` is its own, in bytes, with all that stands before it."""

    length: int
    dtype: str
    shape: tuple[int, ...]
    column_major: bool


class NotNumPy(ValueError):
    """It is no header; says why."""


def find_arrays(file: OpenFile) -> list[StoredArray]:
    """Find the array of a .npy file."""
    try:
        header = read_header(file.read)
    except NotNumPy as error:
        raise file.wrong(str(error), 0) from error
    name = file.source.name or file.path.stem
    array = make_array(file, name, header, header.length)
    if array.nbytes != file.size - header.length:
        raise file.wrong(
            f"the header tells of {array.dtype} {array.shape}, {array.nbytes:,} bytes, but "
            f"{file.size - header.length:,} follow",
            header.length,
        )
    return [array]


def make_array(
    file: OpenFile, name: str, header: Header, offset: int, member: Member | None = None
) -> StoredArray:
    """Make the array that a header tells of."""
    return stored(
        file,
        name,
        header.dtype,
        header.shape,
        offset,
        column_major=header.column_major,
        member=member,
    )


def read_header(read: Read) -> Header:
    """Read a header and check its form; `NotNumPy` where it has none."""
    head = read(0, len(MAGIC) + 2, "this is no .npy: its magic number")
    if head[: len(MAGIC)] != MAGIC:
        raise NotNumPy(f"it begins with {head!r}, not with {MAGIC!r}: this is no .npy")
    version = (head[-2], head[-1])
    form = _FORMS.get(version)
    if form is None:
        raise NotNumPy(f"version {version[0]}.{version[1]} of .npy: 1.0, 2.0 and 3.0 are known")
    size = struct.calcsize(form[0])
    (nbytes,) = struct.unpack(form[0], read(len(head), size, "the header's length"))
    if nbytes > _MOST_HEADER:
        raise NotNumPy(f"a header of {nbytes:,} bytes; at most {_MOST_HEADER:,} are read")
    start = len(head) + size
    text = read(start, nbytes, "the header")
    try:
        fields = ast.literal_eval(text.decode(form[1]))
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
        raise NotNumPy(f"its header can not be read: {error}") from error
    return Header(start + nbytes, *_checked(fields))


def _checked(fields: object) -> tuple[str, tuple[int, ...], bool]:
    if not isinstance(fields, dict) or set(fields) != {"descr", "fortran_order", "shape"}:
        raise NotNumPy(f"its header is no dict of descr, fortran_order, shape: {fields!r:.200}")
    dtype, shape, order = fields["descr"], fields["shape"], fields["fortran_order"]
    if not isinstance(dtype, str):
        raise NotNumPy(
            f"its dtype has fields ({dtype!r:.200}): only arrays of plain elements are served"
        )
    if not isinstance(shape, tuple) or any(type(extent) is not int for extent in shape):
        raise NotNumPy(f"its shape is {shape!r:.200}")
    if not isinstance(order, bool):
        raise NotNumPy(f"its fortran_order is {order!r:.200}")
    return dtype, shape, order
