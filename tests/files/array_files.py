"""What the tests of files share: a writer of safetensors of our own, and what fails to load."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memdesc as md
from memdesc import files

DTYPES = {
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


def safetensors(tensors: Mapping[str, tuple[str, Any]], **metadata: str) -> bytes:
    """A file of tensors: each (the format's name of the dtype, the array of its bytes)."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, (dtype, array) in tensors.items():
        piece = array.tobytes()
        offsets = [len(data), len(data) + len(piece)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        data += piece
    text = json.dumps(header).encode()
    return with_header(text + b" " * (-len(text) % 8), data)  # as the format's own writer


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def old(path: Path) -> Path:
    """A file as if it had been written long ago: one of this very moment is waited for."""
    os.utime(path, (0, 0))
    return path


def loaded(path: Path | files.FileSource | list[Path], **options: Any) -> dict[str, np.ndarray]:
    """The arrays of files, copied; the memory is gone."""
    found = files.load(path, **options)
    try:
        return {name: array.copy(order="K") for name, array in found.arrays().items()}
    finally:
        found.descriptor.close()


def check_same(found: np.ndarray, array: np.ndarray) -> None:
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes() == array.tobytes()  # NaNs too


def refused(path: Path, content: bytes | None = None, number: int = errno.EBADMSG) -> str:
    """What a file is refused with: it names the file."""
    if content is not None:
        path.write_bytes(content)
    old(path)
    with pytest.raises(md.InvalidArgument) as caught:
        files.load(path)
    assert caught.value.errno == number, caught.value
    assert str(path) in str(caught.value)
    return str(caught.value)
