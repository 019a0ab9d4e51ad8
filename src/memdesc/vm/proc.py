"""Small files that the kernel makes up."""

from __future__ import annotations

import os

_PIECE = 16 << 10
"""Bytes: most are read in one piece, and another read tells that this was all."""


def read_text(path: str | os.PathLike[str]) -> str:
    """Read one whole. Names in it are any bytes, as in `os.fsdecode`."""
    # Not by open(): for files of this kind its layers take as long again as the kernel.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(fd, _PIECE)
        while more := data and os.read(fd, _PIECE):
            data += more
    finally:
        os.close(fd)
    return os.fsdecode(data)
