"""Listing 2's C program, compiled and running: a stranger that knows nothing of us."""

from __future__ import annotations

import re
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "listing2"
LENGTH = 54321


@dataclass
class Program:
    """It, and where its memory lies."""

    process: subprocess.Popen[bytes]
    buffer: int
    malloced: int
    two_objects: int

    def says(self) -> str:
        """What the program itself reads in its buffer now."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return read_line(self.process).removeprefix("buffer says: ")


def read_line(process: subprocess.Popen[bytes]) -> str:
    """A line of an unbuffered program's output, or fail within 20 seconds."""
    assert process.stdout
    line = bytearray()
    while not line.endswith(b"\n"):
        assert select.select([process.stdout], [], [], 20)[0], f"nothing after {bytes(line)!r}"
        byte = process.stdout.read(1)
        assert byte, f"the program ended after {bytes(line)!r}"
        line += byte
    return line.decode().rstrip("\n")


def compiler() -> str:
    found = shutil.which("gcc") or shutil.which("cc")
    if found is None:
        pytest.skip("no C compiler is installed")
    return found


@contextmanager
def compiled() -> Iterator[Path]:
    """Give the program, in a folder that every user may read."""
    with tempfile.TemporaryDirectory(prefix="memdesc-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        program = folder / "listing2"
        options = ["-std=gnu11", "-Wall", "-Wextra", "-Werror"]
        command = [compiler(), *options, "-o", program, EXAMPLE / "listing2.c"]
        subprocess.run(command, check=True, timeout=60)
        program.chmod(0o755)
        yield program


@contextmanager
def running(program: Path) -> Iterator[Program]:
    """Start it; end it afterwards, by its pid."""
    process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    with process:
        try:
            addresses = [_address(read_line(process)) for _ in range(3)]
            assert read_line(process) == f"pid is {process.pid}"
            yield Program(process, *addresses)
        finally:
            process.kill()


def _address(line: str) -> int:
    found = re.search(r"@ (0x[0-9a-f]+)$", line)
    assert found, line
    return int(found[1], 16)
