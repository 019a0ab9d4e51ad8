"""What the tests of transfers share: files of known bytes, and what this machine's disk takes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memdesc import _core
from memdesc.dma import DirectFile, Way

KIB = 1 << 10
MIB = 1 << 20


def known(nbytes: int, seed: int = 1) -> bytes:
    """Bytes in which no two blocks are alike, without a generator's time."""
    block = bytes((seed + 7 * at) % 251 for at in range(4099))  # a prime: no block boundary
    return (block * (nbytes // len(block) + 1))[:nbytes]


def a_file(folder: Path, nbytes: int, seed: int = 1) -> Path:
    path = folder / f"file{seed}"
    path.write_bytes(known(nbytes, seed))
    return path


def has_uring() -> bool:
    try:
        _core.open_uring(1, 1, 0).close()
    except OSError:
        return False
    return True


def needs_direct(disk: DirectFile) -> None:
    """Skip where the folder's file system takes no O_DIRECT."""
    if disk._file.direct < 0:
        pytest.skip(f"no O_DIRECT here: {disk._file.why_buffered}")


def needs_uring() -> None:
    if not has_uring():
        pytest.skip("no io_uring here")


def best_way(disk: DirectFile) -> Way:
    direct = disk._file.direct >= 0
    if has_uring():
        return Way.URING_DIRECT if direct else Way.URING_BUFFERED
    return Way.PREAD_DIRECT if direct else Way.PREAD_BUFFERED


def open_files() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            pass
    return found
