"""Safetensors: a length, a header in JSON, and the tensors' bytes without a gap.

What is checked is what the format's own implementation checks (`Metadata::validate` and
`read_metadata` of its Rust crate): the bytes of all tensors follow one another, from the header's
end to the file's; and names occur once, which the format's description asks for.
"""

from __future__ import annotations

import json
import struct
from typing import Any

from memdesc.files.formats import StoredArray, stored
from memdesc.files.sources import OpenFile
from memdesc.services.arrays import MOST_ENTRIES

_MOST_HEADER = 100_000_000
_MOST_VALUES = 64 * MOST_ENTRIES
"""In a header: Python takes up to 30 times as much memory for them as the file."""
_LENGTH = struct.Struct("<Q")
_DTYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "C64": "<c8",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}
_AS_INTEGERS = {
    "BF16": "<u2",
    "F8_E5M2": "u1",
    "F8_E4M3": "u1",
    "F8_E8M0": "u1",
    "F8_E4M3FNUZ": "u1",
    "F8_E5M2FNUZ": "u1",
}
"""What NumPy has no dtype for."""


class _NotThat(ValueError):
    """What JSON allows, and the format does not."""


def find_arrays(file: OpenFile) -> list[StoredArray]:
    """Find the tensors of a file."""
    (nbytes,) = _LENGTH.unpack(file.read(0, _LENGTH.size, "the header's length"))
    if nbytes > _MOST_HEADER:
        raise file.wrong(f"a header of {nbytes:,} bytes; the format allows {_MOST_HEADER:,}", 0)
    tensors = _parse(file, file.read(_LENGTH.size, nbytes, "the header"))
    metadata = tensors.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise file.wrong("its __metadata__ is no object of texts", _LENGTH.size)
    if not tensors:
        raise file.wrong("no tensor is in it", _LENGTH.size)
    if len(tensors) > MOST_ENTRIES:
        raise file.wrong(f"{len(tensors):,} tensors; at most {MOST_ENTRIES:,} are read", 8)
    base = end = _LENGTH.size + nbytes
    found = [(name, *_checked(file, name, tensor)) for name, tensor in tensors.items()]
    arrays = []
    for name, kind, shape, start, stop in sorted(found, key=lambda one: one[3:]):
        array = _tensor(file, name, kind, shape, base + start)
        if base + start != end or array.nbytes != stop - start:
            raise file.wrong(
                f"tensor {name[:80]!r}, {kind} {shape} of {array.nbytes:,} bytes, is said to lie "
                f"at {start:,} to {stop:,} of the tensors' bytes, the one before it ends at "
                f"{end - base:,}",
                end,
            )
        end += array.nbytes
        arrays.append(array)
    if end != file.size:
        raise file.wrong(f"the tensors end here, and {file.size - end:,} bytes follow", end)
    return arrays


def _parse(file: OpenFile, header: bytes) -> dict[str, Any]:
    values = sum(map(header.count, (b",", b"[", b"{")))  # or more: texts have commas too
    if values > _MOST_VALUES:
        raise file.wrong(f"{values:,} values in its header; at most {_MOST_VALUES:,} are read", 8)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in pairs:
            if name in fields:
                raise _NotThat(f"{name[:80]!r} occurs twice")
            fields[name] = value
        return fields

    try:
        # ASCII's brace first: the JSON reader would also take another encoding's.
        if header[:1] != b"{":
            raise _NotThat(f"it begins with {header[:1]!r}, not with a brace")
        fields = json.loads(header.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise file.wrong(f"its header can not be read: {error}", _LENGTH.size) from error
    return dict(fields)


def _checked(file: OpenFile, name: str, tensor: object) -> tuple[str, tuple[int, ...], int, int]:
    """Check the types of what is said of a tensor: (dtype, shape, begin, end)."""
    fields = tensor if isinstance(tensor, dict) else {}
    kind = fields.get("dtype")
    shape, offsets = _naturals(fields.get("shape")), _naturals(fields.get("data_offsets"))
    if not isinstance(kind, str) or shape is None or offsets is None or len(offsets) != 2:
        raise file.wrong(f"tensor {name[:80]!r} is {str(tensor)[:200]}", _LENGTH.size)
    return kind, shape, offsets[0], offsets[1]


def _naturals(value: object) -> tuple[int, ...] | None:
    """Give a list of numbers that sizes can be; None where it is none."""
    if not isinstance(value, list):
        return None
    if any(type(one) is not int or not 0 <= one < 1 << 63 for one in value):
        return None
    return tuple(value)


def _tensor(
    file: OpenFile, name: str, kind: str, shape: tuple[int, ...], offset: int
) -> StoredArray:
    dtype = _DTYPES.get(kind) or _AS_INTEGERS.get(kind)
    if dtype is None:
        raise file.wrong(
            f"tensor {name[:80]!r} is of {kind[:80]!r}, of which no element has bytes of its own, "
            "or which is not known",
            offset,
        )
    if file.source.name is not None:
        name = f"{file.source.name}.{name}"
    stored_as = kind if kind in _AS_INTEGERS else ""
    return stored(file, name, dtype, shape, offset, stored_as=stored_as)
