"""Huge pages for a test: the pool is filled, and put back to what it was.

The pool is the machine's, and `pages=AUTO` takes of it. So a test that fills it has it to itself:
it waits until the tests in other processes have ended, and theirs wait for it.
"""

from __future__ import annotations

import fcntl
import functools
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from memdesc.memory.page_kinds import meminfo

POOL = Path("/proc/sys/vm/nr_hugepages")
TURN = POOL.with_name("nr_overcommit_hugepages")
"""Locked by who waits for the pool to be alone with it."""

PATIENCE = 60.0
"""Seconds: half of what a test may take."""

COURTESY = 2.0
"""Seconds that others wait then before they begin. Else somebody would always have the pool."""


def free_pages() -> int:
    """Huge pages of the default size that no one has, nor was promised."""
    info = meminfo()
    return info.get("HugePages_Free", 0) - info.get("HugePages_Rsvd", 0)


@functools.cache
def _locks() -> tuple[int, int]:
    """The pool, and the turn; never closed: they go with the process."""
    return os.open(POOL, os.O_RDONLY | os.O_CLOEXEC), os.open(TURN, os.O_RDONLY | os.O_CLOEXEC)


@contextmanager
def pool_as_it_is() -> Iterator[None]:
    """No other test changes the pool meanwhile; around every test."""
    try:
        pool, turn = _locks()
    except OSError:  # no pool on this system, so none to be changed
        yield
        return
    if _lock(turn, fcntl.LOCK_SH, COURTESY):
        fcntl.flock(turn, fcntl.LOCK_UN)
    fcntl.flock(pool, fcntl.LOCK_SH)
    try:
        yield
    finally:
        fcntl.flock(pool, fcntl.LOCK_UN)


def _lock(file: int, how: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.005)
        else:
            return True


def _have_alone(pool: int, turn: int) -> None:
    fcntl.flock(pool, fcntl.LOCK_UN)
    had = _lock(turn, fcntl.LOCK_EX, PATIENCE / 2) and _lock(pool, fcntl.LOCK_EX, PATIENCE / 2)
    fcntl.flock(turn, fcntl.LOCK_UN)
    if not had:
        pytest.skip(f"other tests held on to the pool of huge pages for {PATIENCE / 2} s")


@contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """Have that many huge pages free, or skip with the reason."""
    if not POOL.exists():
        pytest.skip("this kernel has no pool of huge pages")
    pool, turn = _locks()
    try:
        _have_alone(pool, turn)
        missing = count - free_pages()
        if missing <= 0:
            yield
            return
        with _filled(missing, pool):
            if free_pages() < count:
                pytest.skip(f"the kernel found only {free_pages()} of {count} huge pages")
            yield
    finally:
        fcntl.flock(pool, fcntl.LOCK_SH)


@contextmanager
def _filled(missing: int, pool: int) -> Iterator[None]:
    """Add pages to the pool. A child puts it back, whatever becomes of this process meanwhile.

    It has the lock until then, too.
    """
    before = POOL.read_text().strip()
    try:
        POOL.write_text(before)
    except OSError as error:
        pytest.skip(f"{missing} more huge pages are needed, and {POOL} says {error.strerror}")
    command = ["sh", "-c", f"read _; echo {before} > {POOL}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[pool]) as child:
        assert child.stdin is not None
        try:
            POOL.write_text(str(int(before) + missing))
            yield
        finally:
            child.stdin.close()
            child.wait()
