"""The two modules side by side: what both promise is tested of both."""

import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing import managers, shared_memory
from pathlib import Path
from typing import Any

from memdesc.interop import shared_memory as ours


@dataclass(frozen=True)
class Kind:
    """One of the two: its classes, and where a program imports them from."""

    module: str
    managers: str
    SharedMemory: Any
    ShareableList: Any
    SharedMemoryManager: Any

    @property
    def ours(self) -> bool:
        return self.SharedMemory is ours.SharedMemory


OURS = Kind(
    ours.__name__,
    ours.__name__,
    ours.SharedMemory,
    ours.ShareableList,
    ours.SharedMemoryManager,
)
THEIRS = Kind(
    shared_memory.__name__,
    managers.__name__,
    shared_memory.SharedMemory,
    shared_memory.ShareableList,
    managers.SharedMemoryManager,
)


def run_python(
    program: str, *arguments: str, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with whatever it left running behind it (a resource tracker)."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def left_in(runtime: Path) -> list[str]:
    """What lies in the folder of names."""
    return sorted(str(path.relative_to(runtime)) for path in runtime.glob("shared-memory-*/*/**/*"))


def memfds_of(pid: int | str, name: str) -> int:
    """How many descriptors of a block a process has."""
    found = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += os.readlink(f"/proc/{pid}/fd/{fd}").startswith(f"/memfd:{name}.")
    return found
