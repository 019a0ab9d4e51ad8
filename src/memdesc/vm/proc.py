"""Small files that the kernel makes up."""

from __future__ import annotations

import os


def read_text(path: str | os.PathLike[str]) -> str:
    """Read one whole. Names in it are any bytes, as in `os.fsdecode`."""
    with open(path, errors="surrogateescape") as file:
        return file.read()
