"""Huge pages for a test: the pool is filled, and put back to what it was.

The pool is the machine's, and `pages=AUTO` takes of it. So a test that fills it has it to itself:
it waits until the tests in other processes have ended, and theirs wait for it.
"""

from __future__ import annotations

import fcntl
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from memdesc.memory.page_kinds import meminfo

POOL = Path("/proc/sys/vm/nr_hugepages")


def free_pages() -> int:
    """Huge pages of the default size that no one has, nor was promised."""
    info = meminfo()
    return info.get("HugePages_Free", 0) - info.get("HugePages_Rsvd", 0)


@functools.cache
def _lock_file() -> int:
    return os.open(POOL, os.O_RDONLY | os.O_CLOEXEC)  # never closed: it goes with the process


@contextmanager
def pool_as_it_is() -> Iterator[None]:
    """No other test changes the pool meanwhile; around every test."""
    try:
        fd = _lock_file()
    except OSError:  # no pool on this system, so none to be changed
        yield
        return
    fcntl.flock(fd, fcntl.LOCK_SH)
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)


@contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """Have that many huge pages free, or skip with the reason."""
    if not POOL.exists():
        pytest.skip("this kernel has no pool of huge pages")
    fcntl.flock(_lock_file(), fcntl.LOCK_EX)
    try:
        missing = count - free_pages()
        if missing <= 0:
            yield
            return
        before = int(POOL.read_text())
        try:
            POOL.write_text(str(before + missing))
        except OSError as error:
            pytest.skip(f"{missing} more huge pages are needed, and {POOL} says {error.strerror}")
        try:
            if free_pages() < count:
                pytest.skip(f"the kernel found only {free_pages()} of {count} huge pages")
            yield
        finally:
            POOL.write_text(str(before))
    finally:
        fcntl.flock(_lock_file(), fcntl.LOCK_SH)
