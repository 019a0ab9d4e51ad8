"""Other processes for the tests of tasks: real ones, ended by pid."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest
from huge_pool import huge_pages
from programs import Start, huge_memfd, start_program

from memdesc.vm.task import Task


@pytest.fixture
def own() -> Iterator[Task]:
    """This process."""
    with Task.current() as task:
        yield task


@pytest.fixture
def huge_page() -> Iterator[int]:
    """The size of a huge page, of which two are free."""
    with huge_pages(2), huge_memfd(0) as fd:
        yield os.fstat(fd).st_blksize


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
