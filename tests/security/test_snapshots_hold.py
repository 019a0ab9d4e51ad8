"""A snapshot is written by nobody, its source's owner included: every way that there is, tried."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from huge_pool import huge_pages
from privilege import Privilege, own_privilege
from test_readonly_holds import attack, differing, expected, meeting as meeting

from memdesc import BufferMemoryDescriptor, PageKind, SnapshotReason


@contextlib.contextmanager
def pages_for(pages: PageKind) -> Iterator[None]:
    with huge_pages(8) if pages is PageKind.HUGE else contextlib.nullcontext():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("pages", [PageKind.BASE, PageKind.HUGE])
@pytest.mark.parametrize("how", ["free", "copied"])
@pytest.mark.parametrize("client", Privilege)
def test_no_way_writes_a_snapshot(
    client: Privilege, how: str, pages: PageKind, meeting: Path
) -> None:
    with pages_for(pages), BufferMemoryDescriptor(2 * pages.page_size, pages=pages) as buffer:
        content = os.urandom(4096)
        buffer.write_bytes(0, content)
        if how == "copied":
            os.close(buffer.memory.grant(buffer.max_access, user=os.geteuid()))
        with buffer.snapshot() as frozen:
            assert frozen.reason is (SnapshotReason.SHARED if how == "copied" else None)
            found = attack(client, "service", meeting, frozen, pages.page_size)
            same_user = client is not Privilege.USER or own_privilege() is Privilege.USER
            assert differing(found, expected(pages, may_reopen=same_user)) == {}
            assert frozen.read_bytes(0, 4096) == content
            buffer.write_bytes(0, b"the owner goes on storing")
            assert frozen.read_bytes(0, 4096) == content
    del buffer, frozen
