"""What is in a file: its arrays, found without reading them. A file's word is checked, all of it.

Suffixes tell the format. Nothing is allocated for what a file says of itself before that was held
against the file's size.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from memdesc.errors import InvalidArgument
from memdesc.files.sources import OpenFile
from memdesc.services.arrays import check_form
from memdesc.services.protocol.basics import check_name

if TYPE_CHECKING:
    from zipfile import ZipInfo


_READERS = {
    ".npy": "npy",
    ".npz": "npz",
    ".safetensors": "safetensors",
    ".arrow": "arrow",
    ".arrows": "arrow",
    ".feather": "arrow",
}
"""By suffix: the module whose `find_arrays` knows the format."""


@dataclass(frozen=True, slots=True)
class Member:
    """An entry of a zip archive that an array's bytes come from.

    Attributes
    ----------
    entry : ZipInfo
    header : bytes
        What stands before the elements in it.
    """

    entry: ZipInfo
    header: bytes

    @property
    def deflated(self) -> bool:
        """Whether its bytes must be decompressed."""
        return self.entry.compress_type != 0


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array as it lies in a file.

    Attributes
    ----------
    name : str
    dtype : str
        NumPy's string for it.
    alignment : int
        Bytes, that its address should be a multiple of.
    shape : tuple of int
    column_major : bool
    offset : int
        Of its first element in the file; of a deflated one, 0.
    nbytes : int
    stored_as : str
        As of `ArrayEntry`.
    member : Member, optional
        Of a zip archive.
    content : str
        As of `ArrayEntry`.
    """

    name: str
    dtype: str
    alignment: int
    shape: tuple[int, ...]
    column_major: bool
    offset: int
    nbytes: int
    stored_as: str = ""
    member: Member | None = None
    content: str = ""

    @property
    def deflated(self) -> bool:
        """Whether its bytes do not stand in the file as they are."""
        return self.member is not None and self.member.deflated


def stored(
    file: OpenFile,
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    offset: int,
    *,
    column_major: bool = False,
    stored_as: str = "",
    member: Member | None = None,
    content: str = "",
) -> StoredArray:
    """Make a `StoredArray` of what a file says; the size is for the caller to check."""
    try:
        check_name(name, "an array")
        kind, nbytes = check_form(dtype, shape)
    except InvalidArgument as error:
        raise file.wrong(f"array {name[:80]!r}: {error}", offset) from error
    return StoredArray(
        name,
        kind.dtype,
        kind.alignment,
        shape,
        column_major and len(shape) > 1,
        offset,
        nbytes,
        stored_as,
        member,
        content,
    )


def find_arrays(file: OpenFile) -> list[StoredArray]:
    """Tell which arrays are in a file.

    Raises
    ------
    InvalidArgument
        The file is not what its suffix says (EBADMSG), or its dtype was given though it tells it
        itself (EINVAL).
    """
    name = _READERS.get(file.path.suffix.lower())
    if name is None:
        return [_raw(file)]
    if file.source.dtype is not None:
        raise InvalidArgument(
            f"{file.path} tells its dtype and shape itself: give them for raw files only",
            errno=errno.EINVAL,
        )
    reader = import_module(f"memdesc.files.{name}")  # zip archives take others' modules along
    arrays: list[StoredArray] = reader.find_arrays(file)
    return arrays


def _raw(file: OpenFile) -> StoredArray:
    source = file.source
    dtype = "u1" if source.dtype is None else source.dtype
    try:
        kind, _ = check_form(dtype, ())
    except InvalidArgument as error:
        raise InvalidArgument(f"{file.path}: {error}", errno=error.errno) from error
    shape = source.shape
    if shape is None:
        if file.size % kind.itemsize:
            raise file.wrong(
                f"{file.size:,} bytes are no multiple of {kind.itemsize}, an element of {kind}", 0
            )
        shape = (file.size // kind.itemsize,)
    array = stored(file, source.name or file.path.stem, dtype, shape, 0)
    if array.nbytes != file.size:
        raise file.wrong(
            f"an array of {kind} and shape {shape} has {array.nbytes:,} bytes", array.nbytes
        )
    return array
