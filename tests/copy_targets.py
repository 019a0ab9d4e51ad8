"""The tasks that copies are tried on: the own one, and a C program that knows nothing of us."""

from __future__ import annotations

import ctypes
import errno
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from memdesc import _core
from memdesc.copyio import (
    route,
)
from memdesc.errors import (
    CopyError,
    NotPrivilegedError,
    UnsupportedError,
)
from memdesc.vm.pages import page_size
from memdesc.vm.task import Task

PAGES = 16
SIZE = PAGES * page_size
PATTERN = bytes((i * 7 + i // 251) % 256 for i in range(SIZE))
NONE, READ, WRITE = _core.PROT_NONE, _core.PROT_READ, _core.PROT_WRITE
CAP_SYS_PTRACE = 19
NS_LAST_PID = Path("/proc/sys/kernel/ns_last_pid")

libc = ctypes.CDLL(None, use_errno=True)


class Target(Protocol):
    """A task with SIZE bytes at `address`, PATTERN in them, and nothing on either side."""

    task: Task
    address: int

    def read(self, offset: int, nbytes: int) -> bytes:
        """What the task itself sees."""

    def protect(self, page: int, prot: int) -> None: ...

    def unmap(self, page: int) -> None: ...

    def close(self) -> None: ...


class OwnTask:
    def __init__(self) -> None:
        self.task = Task.current()
        self._room = _core.reserve_memory(SIZE + 2 * page_size)
        flags = _core.MAP_PRIVATE | _core.MAP_ANONYMOUS
        _core.place_memory(self._room, page_size, SIZE, READ | WRITE, flags, -1, 0)
        self.address = self._room.address + page_size
        ctypes.memmove(self.address, PATTERN, SIZE)

    def read(self, offset: int, nbytes: int) -> bytes:
        return ctypes.string_at(self.address + offset, nbytes)

    def protect(self, page: int, prot: int) -> None:
        _core.mprotect(self.address + page * page_size, page_size, prot)

    def unmap(self, page: int) -> None:
        at = ctypes.c_void_p(self.address + page * page_size)
        assert libc.munmap(at, ctypes.c_size_t(page_size)) == 0

    def close(self) -> None:
        self.task.close()


class Program:
    def __init__(self, program: Path) -> None:
        self.process = subprocess.Popen(
            [program, str(PAGES)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.address = int(self.process.stdout.readline())
        self.task = Task(self.process.pid)

    def ask(self, command: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(command, file=self.process.stdin, flush=True)
        return self.process.stdout.readline()

    def read(self, offset: int, nbytes: int) -> bytes:
        count, _, text = self.ask(f"r {self.address + offset} {nbytes}").partition(" ")
        assert int(count) == nbytes
        return bytes.fromhex(text)

    def protect(self, page: int, prot: int) -> None:
        at = self.address + page * page_size
        assert self.ask(f"p {at} {page_size} {prot}") == "0\n"

    def unmap(self, page: int) -> None:
        assert self.ask(f"u {self.address + page * page_size} {page_size}") == "0\n"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=30)
        self.task.close()


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    made = tmp_path_factory.mktemp("copy") / "target"
    source = Path(__file__).with_name("copy_target.c")
    subprocess.run([compiler, "-O1", "-Wall", "-o", made, source], check=True, timeout=60)
    return made


@pytest.fixture
def child(program: Path) -> Iterator[Program]:
    started = Program(program)
    yield started
    started.close()


@pytest.fixture(params=["own task", "C program"])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    own = request.param == "own task"
    made: Target = OwnTask() if own else Program(request.getfixturevalue("program"))
    try:
        route(made.task)
    except (NotPrivilegedError, UnsupportedError) as error:
        made.close()
        pytest.skip(f"this process may not copy from a child of its own: {error}")
    yield made
    made.close()


def faults(call: Callable[[], Any], expected: int, completed: int) -> None:
    with pytest.raises(CopyError) as caught:
        call()
    error = caught.value
    assert (error.errno, error.expected, error.completed) == (errno.EFAULT, expected, completed)
