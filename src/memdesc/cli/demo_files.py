"""The files of the demo: those named, or large ones found; and what is true of them.

What is true of a file (its SHA-256, how often each byte occurs) is worked out here from the file
itself, apart from any shared memory, for the clients' results to be checked against.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_LARGE = 4 << 20
_MOST_FILES = 6
_CHUNK = 1 << 18


class UnusableFile(Exception):
    """A file can not be used; the text says which, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file, and what is true of it."""

    path: Path
    nbytes: int
    sha256: str
    histogram: tuple[int, ...]


def check_files(paths: Sequence[Path]) -> list[Path]:
    """Give the files if each can be used, or raise `UnusableFile`."""
    for path in paths:
        try:
            status = path.stat()
            if stat.S_ISDIR(status.st_mode):
                raise UnusableFile(f"{path} is a directory: name the files in it")
            if not stat.S_ISREG(status.st_mode):
                raise UnusableFile(f"{path} is no regular file: name regular files")
            if status.st_size == 0:
                raise UnusableFile(f"{path} is empty: a descriptor has at least one byte")
            with path.open("rb"):
                continue
        except OSError as error:
            raise UnusableFile(
                f"{path} can not be read ({error.strerror}): name files that this user may read"
            ) from error
    return list(paths)


def find_files(most: int, seconds: float = 1.0) -> list[Path]:
    """Find a few large files of `most` bytes together, looking around for so many seconds."""
    found = _look_around(
        [Path(sys.base_prefix), Path("/usr")], most // 2, time.monotonic() + seconds
    )
    chosen: list[Path] = []
    left = most
    for nbytes, path in sorted(found.values(), reverse=True):
        if nbytes <= left and len(chosen) < _MOST_FILES:
            chosen.append(path)
            left -= nbytes
    return chosen or [Path(sys.executable).resolve()]


def _look_around(
    roots: list[Path], largest: int, until: float
) -> dict[tuple[int, int], tuple[int, Path]]:
    """Give readable files up to a size, by device and inode; the nearest folders first."""
    folders = deque(roots)
    found: dict[tuple[int, int], tuple[int, Path]] = {}
    while folders and time.monotonic() < until:
        try:
            entries = list(os.scandir(folders.popleft()))
        except OSError:  # not this user's to look into, or gone
            continue
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                    continue
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            fits = stat.S_ISREG(status.st_mode) and _LARGE <= status.st_size <= largest
            if fits and os.access(entry.path, os.R_OK):
                found[status.st_dev, status.st_ino] = (status.st_size, Path(entry.path))
    return found


def examine(path: Path) -> Source:
    """Work out what is true of a file, by reading it."""
    import numpy as np

    digest = hashlib.sha256()
    counts = np.zeros(256, np.int64)
    nbytes = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            counts += np.bincount(np.frombuffer(chunk, "u1"), minlength=256)
            nbytes += len(chunk)
    return Source(path, nbytes, digest.hexdigest(), tuple(counts.tolist()))
