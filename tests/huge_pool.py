"""Huge pages for a test: the pool is filled, and put back to what it was."""

from __future__ import annotations

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


@contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """Have that many huge pages free, or skip with the reason."""
    missing = count - free_pages()
    if missing <= 0:
        yield
        return
    try:
        before = int(POOL.read_text())
        POOL.write_text(str(before + missing))
    except OSError as error:
        pytest.skip(f"{missing} more huge pages are needed, and {POOL} says {error.strerror}")
    try:
        if free_pages() < count:
            pytest.skip(f"the kernel found only {free_pages()} of {count} huge pages")
        yield
    finally:
        POOL.write_text(str(before))
