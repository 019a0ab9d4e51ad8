"""Other processes for the tests of tasks: real ones, ended by pid."""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import Start, huge_memfd, mapped, start_program

from memdesc.vm.task import Task

_POOL = Path("/proc/sys/vm/nr_hugepages")


@pytest.fixture
def own() -> Iterator[Task]:
    """This process."""
    with Task.current() as task:
        yield task


@pytest.fixture
def huge_page() -> Iterator[int]:
    """The size of a huge page of which at least one is free: the pool grows by it, and back."""
    before = _POOL.read_text()
    try:
        _POOL.write_text(str(int(before) + 2))
    except OSError as error:
        if not _one_is_free():
            pytest.skip(f"no huge page is free, and the pool can not grow: {error}")
    try:
        if not _one_is_free():
            pytest.skip("no huge page is free: the machine's memory is too fragmented")
        with huge_memfd(0) as fd:
            size = os.fstat(fd).st_blksize
        yield size
    finally:
        if _POOL.read_text() != before:
            _POOL.write_text(before)


def _one_is_free() -> bool:
    with huge_memfd(0) as fd:
        size = os.fstat(fd).st_blksize
        os.ftruncate(fd, size)
        try:
            with mapped(size, mmap.MAP_SHARED, fd):
                return True
        except OSError:
            return False


@pytest.fixture
def start() -> Iterator[Start]:
    """Start programs as `start_program` does, and end them with the test."""
    started: list[subprocess.Popen[str]] = []

    def start_one(code: str = "", *arguments: str) -> subprocess.Popen[str]:
        started.append(start_program(code, *arguments))
        return started[-1]

    yield start_one
    for child in started:
        child.kill()
        child.communicate()
