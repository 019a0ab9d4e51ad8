"""A real memory cgroup for a test: made below our own, limited, and removed again."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from memdesc.vm.cgroups import memory_cgroups

ENTER = "open(sys.argv[1] + '/cgroup.procs', 'w').write('0')\n"
"""A program's first statement: go into the cgroup whose folder is its first argument."""


@dataclass(frozen=True)
class Cgroup:
    """A memory cgroup and the names that its files have in its version."""

    folder: Path
    version: int

    def limit(self, nbytes: int) -> None:
        """Set its limit; below what it holds the kernel first reclaims."""
        name = "memory.limit_in_bytes" if self.version == 1 else "memory.max"
        (self.folder / name).write_text(str(nbytes))

    def squeeze(self, nbytes: int) -> None:
        """Make about `nbytes` leave, in steps that the kernel can follow; the limit ends lower."""
        goal = self.used() - nbytes
        for _ in range(200):
            if self.used() <= goal:
                return
            (self.folder / "memory.stat").read_text()  # or reclaim goes by counts 2 s old
            with suppress(OSError):  # EBUSY, EAGAIN: it could not reclaim that much at once
                if self.version == 1:
                    self.limit(max(self.used() - (4 << 20), goal))
                else:  # lowering the limit could kill there
                    (self.folder / "memory.reclaim").write_text(str(4 << 20))

    def forbid_swap(self) -> None:
        """Let nothing of it go to swap, where the kernel counts that."""
        name = "memory.swappiness" if self.version == 1 else "memory.swap.max"
        if (self.folder / name).exists():
            (self.folder / name).write_text("0")

    def used(self) -> int:
        """Bytes charged to it."""
        name = "memory.usage_in_bytes" if self.version == 1 else "memory.current"
        return int((self.folder / name).read_text())


@contextmanager
def memory_cgroup(nbytes: int, *, swap: bool = False) -> Iterator[Cgroup]:
    """A cgroup of at most `nbytes`, without swap unless asked for; skip where it is denied."""
    denied = ["this process sees no memory cgroup of its own"]
    for folder in _candidates():
        try:
            made = _make(folder / f"memdesc-test-{os.getpid()}")
        except OSError as error:
            denied.append(f"a memory cgroup can not be made: {error.strerror}")
            continue
        try:
            made.limit(nbytes)
            if not swap:
                made.forbid_swap()
            yield made
        finally:
            _remove(made.folder)
        return
    pytest.skip(denied[-1])


def _candidates() -> list[Path]:
    found = [Path(group.folder) for group in memory_cgroups()]
    # The root has no limit, so it is in no list; below it one may be allowed to make one.
    return [*found, *dict.fromkeys(folder.parent for folder in found if folder.parent not in found)]


def _make(folder: Path) -> Cgroup:
    folder.mkdir()
    for version, name in [(1, "memory.limit_in_bytes"), (2, "memory.max")]:
        if (folder / name).exists():
            return Cgroup(folder, version)
    folder.rmdir()
    raise OSError(errno.ENODEV, f"{folder.parent} does not delegate its memory controller")


def _remove(folder: Path) -> None:
    """A cgroup can go once the kernel has done away with its last process."""
    for _ in range(200):
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            time.sleep(0.01)
        else:
            return
    raise AssertionError(f"processes remain in {folder}")
