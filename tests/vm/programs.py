"""What the tests of tasks look at: programs, and mappings of this process."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from memdesc import _core

Start = Callable[..., "subprocess.Popen[str]"]

_STAY = "\nprint('ready', flush=True)\nimport sys; sys.stdin.read()"


def start_program(code: str = "", *arguments: str) -> subprocess.Popen[str]:
    """Start a Python that runs some code, says so, and stays until it is killed."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-I", "-S", "-c", code + _STAY, *arguments]
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    if not child.stdout or child.stdout.readline() != "ready\n":
        child.kill()
        child.communicate()
        raise AssertionError("the program did not get ready")
    return child


@contextmanager
def mapped(
    length: int, flags: int, fd: int = -1, prot: int = mmap.PROT_READ | mmap.PROT_WRITE
) -> Iterator[int]:
    """Give the address of a mapping of this process."""
    memory = _core.map_memory(0, length, prot, flags, fd, 0)
    try:
        yield memory.address
    finally:
        del memory


@contextmanager
def memfd(length: int, flags: int = 0, name: str = "test") -> Iterator[int]:
    """Give a memfd of that length."""
    fd = os.memfd_create(name, flags | os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, length)
        yield fd
    finally:
        os.close(fd)


def huge_memfd(length: int) -> AbstractContextManager[int]:
    """Give a memfd of huge pages."""
    return memfd(length, os.MFD_HUGETLB, "huge")
