"""Page kinds: what AUTO takes, in each case by really having the pages or not; what is refused."""

from __future__ import annotations

import ctypes
import errno
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from children import NOBODY, become, in_child
from huge_pool import free_pages, huge_pages
from memory_cgroup import ENTER, memory_cgroup

from memdesc import (
    Access,
    AllocationError,
    BufferMemoryDescriptor,
    InvalidArgument,
    PageKind,
    PageKindError,
    _core,
    page_size,
)
from memdesc.memory import transparent
from memdesc.memory.made_of import look
from memdesc.memory.page_kinds import huge_page_size, transparent_page_size

MIB = 1 << 20
THP = transparent_page_size()
SIZE = 3 * THP + page_size + 1
FRESH: Any = {"recycle": False}
SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
PR_SET_THP_DISABLE = 41  # linux/prctl.h

pytestmark = pytest.mark.skipif(not THP, reason="this kernel has no transparent huge pages")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """AUTO as it is at first, but in no hurry: a busy machine is no reason to give up here."""
    monkeypatch.setattr(transparent, "_books", transparent._Books(base_cost=1.0))


@pytest.fixture
def collapsing() -> None:
    """Skip where the kernel puts no huge pages together."""
    try:
        BufferMemoryDescriptor(SIZE, pages=PageKind.TRANSPARENT_HUGE, **FRESH).close()
    except PageKindError as error:
        pytest.skip(str(error))


@contextmanager
def advice(
    monkeypatch: pytest.MonkeyPatch, refuse: int = -1, number: int = 0, after: int = 0
) -> Iterator[Counter[int]]:
    """Count calls of madvise by what they advise; all of one kind fail after the first few."""
    original = _core.madvise
    counts: Counter[int] = Counter()

    def madvise(address: int, length: int, what: int) -> None:
        counts[what] += 1
        if what == refuse and counts[what] > after:
            raise OSError(number, "madvise: refused by the test")
        original(address, length, what)

    with monkeypatch.context() as patch:
        patch.setattr(_core, "madvise", madvise)
        yield counts


@contextmanager
def shmem_enabled(value: str) -> Iterator[None]:
    """Have the system's setting so for a while, or skip."""
    before = SHMEM_ENABLED.read_text().partition("[")[2].partition("]")[0]
    try:
        SHMEM_ENABLED.write_text(value)
    except OSError as error:
        pytest.skip(f"{SHMEM_ENABLED} can not be set: {error.strerror}")
    try:
        yield
    finally:
        SHMEM_ENABLED.write_text(before)


def is_mapped(name: str) -> bool:
    return f"/memfd:{name}" in Path("/proc/self/maps").read_text()


# ── What is asked for ────────────────────────────────────────────────────────────────────────


def test_auto_is_the_default_and_says_what_it_took() -> None:
    with BufferMemoryDescriptor(1) as buffer:
        assert (buffer.pages, buffer.page_kind) == (PageKind.AUTO, PageKind.BASE)


@pytest.mark.parametrize("wrong", [None, 2, "large", "HUGE"])
def test_what_is_no_kind_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidArgument):
        BufferMemoryDescriptor(1, pages=wrong)


def test_huge_pages_are_not_for_others_to_write() -> None:
    with pytest.raises(InvalidArgument):
        BufferMemoryDescriptor(1, pages=PageKind.HUGE, max_access=Access.READ_WRITE)
    for pages in (PageKind.AUTO, PageKind.TRANSPARENT_HUGE):
        BufferMemoryDescriptor(1, pages=pages, max_access=Access.READ_WRITE).close()


@pytest.mark.parametrize("size", [1, page_size, THP - page_size])
def test_small_buffers_look_for_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with advice(monkeypatch) as counts:
        buffer = BufferMemoryDescriptor(size, **FRESH)
    assert set(counts) == {_core.MADV_POPULATE_WRITE}
    assert (buffer.page_kind, buffer.huge_bytes) == (PageKind.BASE, 0)
    buffer.close()


def test_a_file_is_as_large_as_its_pages() -> None:
    for pages in (PageKind.AUTO, PageKind.BASE):
        with BufferMemoryDescriptor(SIZE, pages=pages, lazy=True) as buffer:
            assert buffer.memory.size == 3 * THP + 2 * page_size


@pytest.mark.parametrize("alignment", [page_size, THP, 8 * THP])
def test_its_view_lies_where_huge_pages_fit(alignment: int) -> None:
    held = []
    for shift in (0, page_size, 7 * page_size):  # what the kernel would put next to it
        held.append(_core.reserve_memory(page_size + shift))
        buffer = BufferMemoryDescriptor(SIZE, lazy=True, alignment=alignment, **FRESH)
        assert buffer.address % max(alignment, THP) == 0
        with buffer.map(unique=True) as mapping:
            assert mapping.address % THP == 0
        with buffer.map(unique=True, offset=THP + page_size + 5) as mapping:
            assert mapping.address % THP == page_size + 5
        buffer.close()


# ── The rungs of AUTO ────────────────────────────────────────────────────────────────────────


@pytest.mark.alone
def test_auto_takes_reserved_pages_where_little_is_wasted() -> None:
    huge = huge_page_size()
    with huge_pages(9):
        for size in (huge, 8 * huge, 8 * huge - huge // 2):
            before = free_pages()
            with BufferMemoryDescriptor(size, **FRESH) as buffer:
                assert buffer.page_kind is PageKind.HUGE
                assert buffer.huge_bytes == -(-size // huge) * huge
                assert free_pages() == before + -(-size // huge) * -1
                assert buffer.pages is PageKind.AUTO
            del buffer
            assert free_pages() == before


@pytest.mark.alone
def test_auto_leaves_the_pool_alone_where_it_does_not_suit() -> None:
    huge = huge_page_size()
    with huge_pages(4):
        before = free_pages()
        for how in (
            {"capacity": huge + 1},  # wastes nearly all of a page
            {"capacity": huge - 1},
            {"capacity": huge, "max_access": Access.READ_WRITE},
            {"capacity": huge, "lazy": True},
            {"capacity": huge, "reserve": 2 * huge},
        ):
            with BufferMemoryDescriptor(**how, **FRESH) as buffer:
                assert buffer.page_kind is not PageKind.HUGE
                assert free_pages() == before


@pytest.mark.alone
def test_a_pool_that_is_too_small_is_no_failure_of_auto() -> None:
    huge = huge_page_size()
    with huge_pages(2):
        size = (free_pages() + 1) * huge
        if size > 1 << 28:
            pytest.skip("the pool is too large to exceed it in a test")
        with BufferMemoryDescriptor(size, **FRESH) as buffer:
            assert buffer.page_kind is not PageKind.HUGE
            assert buffer.page_counts().resident == buffer.page_counts().total


def test_auto_has_free_memory_put_together(collapsing: None) -> None:
    with BufferMemoryDescriptor(SIZE, max_access=Access.READ_WRITE, **FRESH) as buffer:
        assert buffer.page_kind is PageKind.TRANSPARENT_HUGE
        assert buffer.huge_bytes == 3 * THP
        assert buffer.page_counts().resident == buffer.page_counts().total
        buffer.write_bytes(SIZE - 1, b"!")
        assert buffer.read_bytes(SIZE - 2, 2) == b"\0!"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOMEM, errno.EAGAIN, errno.EBUSY])
@pytest.mark.parametrize("after", [0, 2])
def test_auto_goes_on_with_base_pages_where_that_fails(
    monkeypatch: pytest.MonkeyPatch, number: int, after: int, collapsing: None
) -> None:
    with advice(monkeypatch, _core.MADV_COLLAPSE, number, after) as counts:
        buffer = BufferMemoryDescriptor(SIZE, max_access=Access.READ_WRITE, **FRESH)
    assert counts[_core.MADV_COLLAPSE] == after + 1
    assert (buffer.page_kind, buffer.huge_bytes) == (PageKind.BASE, after * THP)
    assert buffer.page_counts().resident == buffer.page_counts().total
    buffer.close()


def test_auto_stops_where_base_pages_are_quicker_and_remembers(
    monkeypatch: pytest.MonkeyPatch, collapsing: None
) -> None:
    books = transparent._Books(base_cost=0.0)  # base pages that cost nothing
    monkeypatch.setattr(transparent, "_books", books)
    how: Any = {"max_access": Access.READ_WRITE, **FRESH}
    with advice(monkeypatch) as counts, BufferMemoryDescriptor(SIZE, **how) as buffer:
        assert buffer.huge_bytes == THP * counts[_core.MADV_COLLAPSE] == THP
    books.debt, books.base_cost = 1000.0, 1.0
    with advice(monkeypatch) as counts, BufferMemoryDescriptor(SIZE, **how) as buffer:
        assert (buffer.huge_bytes, counts[_core.MADV_COLLAPSE]) == (0, 0)
    books.seen = time.monotonic() - 1e9  # long ago: that is forgiven
    with advice(monkeypatch) as counts, BufferMemoryDescriptor(SIZE, **how) as buffer:
        assert (buffer.huge_bytes, counts[_core.MADV_COLLAPSE]) == (3 * THP, 3)


def test_what_is_lost_is_paid_by_base_pages_by_time_and_by_success() -> None:
    books = transparent._Books(base_cost=1e-9)
    books.may_try()
    books.tried(0.5)
    assert not books.may_try()
    books.populated(THP, 25 * 0.5)
    assert books.may_try()
    books.tried(0.5)
    books.tried(-0.5)
    assert books.may_try()
    books.tried(0.5)
    books.seen -= 1 + 0.5 / transparent._FORGIVEN
    assert books.may_try()


def without_huge_pages() -> None:
    assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0


def test_a_process_that_may_have_no_huge_pages() -> None:
    def child() -> tuple[str, int | None, int]:
        with BufferMemoryDescriptor(SIZE, max_access=Access.READ_WRITE) as buffer:
            kind, resident = buffer.page_kind.name, buffer.page_counts().resident
        try:
            BufferMemoryDescriptor(SIZE, pages=PageKind.TRANSPARENT_HUGE)
        except PageKindError as error:
            return kind, error.errno, resident
        return kind, None, resident

    kind, number, resident = in_child(child, before=without_huge_pages)
    assert (kind, resident) == ("BASE", -(-SIZE // page_size))
    assert number == errno.EINVAL


def test_an_ordinary_user_gets_them_too(collapsing: None) -> None:
    def child() -> tuple[str, int]:
        with BufferMemoryDescriptor(SIZE, max_access=Access.READ_WRITE) as buffer:
            return buffer.page_kind.name, buffer.huge_bytes

    assert in_child(child, before=lambda: become(NOBODY)) == ("TRANSPARENT_HUGE", 3 * THP)


@pytest.mark.alone
def test_faults_make_them_where_the_system_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on kernels before 6.1, which can not collapse: MADV_HUGEPAGE, and the faults."""
    with shmem_enabled("advise"):
        for pages in (PageKind.AUTO, PageKind.TRANSPARENT_HUGE):
            how: Any = {"pages": pages, "max_access": Access.READ_WRITE, **FRESH}
            with (
                advice(monkeypatch, _core.MADV_COLLAPSE, errno.EINVAL) as counts,
                BufferMemoryDescriptor(SIZE, **how) as buffer,
            ):
                assert counts[_core.MADV_COLLAPSE] == 1
                assert (buffer.page_kind, buffer.huge_bytes) == (
                    PageKind.TRANSPARENT_HUGE,
                    3 * THP,
                )
        with BufferMemoryDescriptor(SIZE, pages=PageKind.TRANSPARENT_HUGE, lazy=True) as buffer:
            assert buffer.page_kind is PageKind.BASE
            buffer.write_bytes(THP, b"!")
            assert (buffer.page_kind, buffer.huge_bytes) == (PageKind.BASE, THP)


@pytest.mark.slow
@pytest.mark.parametrize("pages", [PageKind.AUTO, PageKind.TRANSPARENT_HUGE])
def test_a_full_cgroup_is_an_error_and_no_kill(pages: PageKind) -> None:
    program = (
        "import sys\n" + ENTER + "import memdesc as md\n"
        "try:\n"
        f"    md.BufferMemoryDescriptor(256 << 20, pages=md.PageKind.{pages.name},"
        " max_access=md.Access.READ_WRITE)\n"
        "except md.AllocationError as error:\n"
        "    print(type(error).__name__, error.errno)\n"
    )
    with memory_cgroup(128 * MIB) as group:
        done = subprocess.run(
            [sys.executable, "-c", program, str(group.folder)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stdout) == (0, f"AllocationError {errno.ENOMEM}\n"), done.stderr


# ── By name ──────────────────────────────────────────────────────────────────────────────────


def test_transparent_pages_by_name(collapsing: None) -> None:
    for size, huge in ((1, 0), (THP - page_size, 0), (THP - 1, THP), (THP, THP), (SIZE, 3 * THP)):
        with BufferMemoryDescriptor(size, pages=PageKind.TRANSPARENT_HUGE, **FRESH) as buffer:
            assert (buffer.pages, buffer.huge_bytes) == (PageKind.TRANSPARENT_HUGE, huge)
            kind = PageKind.TRANSPARENT_HUGE if huge else PageKind.BASE
            assert buffer.page_kind is kind
            assert buffer.page_counts().resident == buffer.page_counts().total


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOMEM])
def test_less_than_all_of_them_is_an_error(
    monkeypatch: pytest.MonkeyPatch, number: int, collapsing: None
) -> None:
    if transparent._faults_may_be_huge():
        pytest.skip(f"{SHMEM_ENABLED} lets faults make huge pages here")
    with advice(monkeypatch, _core.MADV_COLLAPSE, number, after=2):
        with pytest.raises(PageKindError) as caught:
            BufferMemoryDescriptor(SIZE, pages=PageKind.TRANSPARENT_HUGE, name="some", **FRESH)
    assert isinstance(caught.value, AllocationError)
    assert (caught.value.errno, caught.value.requested, caught.value.available) == (
        number,
        3 * THP,
        2 * THP,
    )
    del caught
    assert not is_mapped("some")


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EBUSY])
def test_what_passes_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, number: int, collapsing: None
) -> None:
    original, calls = _core.madvise, Counter[int]()

    def madvise(address: int, length: int, what: int) -> None:
        calls[what] += 1
        if what == _core.MADV_COLLAPSE and calls[what] % 2:
            raise OSError(number, "madvise: not now")
        original(address, length, what)

    monkeypatch.setattr(_core, "madvise", madvise)
    with BufferMemoryDescriptor(SIZE, pages=PageKind.TRANSPARENT_HUGE, **FRESH) as buffer:
        assert buffer.huge_bytes == 3 * THP
    assert calls[_core.MADV_COLLAPSE] == 6


def test_lazy_transparent_pages_need_the_system_to_say_so() -> None:
    if transparent._faults_may_be_huge():
        pytest.skip(f"{SHMEM_ENABLED} lets faults make huge pages here")
    with pytest.raises(PageKindError) as caught:
        BufferMemoryDescriptor(SIZE, pages=PageKind.TRANSPARENT_HUGE, lazy=True)
    assert caught.value.errno == errno.EINVAL
    BufferMemoryDescriptor(SIZE, pages=PageKind.AUTO, lazy=True).close()


def test_huge_pages_that_are_not_there() -> None:
    huge = huge_page_size()
    if not huge:
        pytest.skip("this kernel has no huge pages")
    there = free_pages() * huge
    with pytest.raises(PageKindError) as caught:
        BufferMemoryDescriptor(there + 1, pages=PageKind.HUGE)
    assert (caught.value.errno, caught.value.requested, caught.value.available) == (
        errno.ENOMEM,
        there + huge,
        there,
    )
    assert "vm.nr_hugepages" in str(caught.value)


def test_a_kernel_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memdesc.memory.page_kinds.huge_page_size", lambda: 0)
    monkeypatch.setattr("memdesc.memory.allocation.huge_page_size", lambda: 0)
    for place in ("page_kinds", "allocation", "transparent", "made_of"):
        monkeypatch.setattr(f"memdesc.memory.{place}.transparent_page_size", lambda: 0)
    monkeypatch.setattr("memdesc.descriptors.buffer.transparent_page_size", lambda: 0)
    for pages in (PageKind.HUGE, PageKind.TRANSPARENT_HUGE):
        with pytest.raises(PageKindError) as caught:
            BufferMemoryDescriptor(SIZE, pages=pages)
        assert caught.value.errno == errno.EINVAL
    with BufferMemoryDescriptor(SIZE, **FRESH) as buffer:
        assert (buffer.page_kind, buffer.huge_bytes) == (PageKind.BASE, 0)


def test_without_proc_no_huge_page_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memdesc.memory.page_kinds._MEMINFO", Path("/nowhere/meminfo"))
    assert huge_page_size.__wrapped__() == 0


# ── What it is made of, as the kernel shows it ───────────────────────────────────────────────


def test_a_page_that_was_split_is_told(collapsing: None) -> None:
    with BufferMemoryDescriptor(SIZE, pages=PageKind.TRANSPARENT_HUGE, **FRESH) as buffer:
        before = buffer.page_kind, buffer.huge_bytes
        _core.mprotect(buffer.address + THP, page_size, _core.PROT_READ)
        assert before == (PageKind.TRANSPARENT_HUGE, 3 * THP)
        assert (buffer.page_kind, buffer.huge_bytes) == (PageKind.BASE, 2 * THP)
        both = _core.PROT_READ | _core.PROT_WRITE
        _core.mprotect(buffer.address + THP, page_size, both)


def test_a_reader_gets_them_whole(collapsing: None) -> None:
    with BufferMemoryDescriptor(SIZE, pages=PageKind.TRANSPARENT_HUGE, **FRESH) as buffer:
        with buffer.map(unique=True, prefault=True) as mapping:
            assert look(mapping.address, SIZE).huge_bytes == 3 * THP


def test_a_closed_buffer_tells_nothing() -> None:
    use: list[Callable[[BufferMemoryDescriptor], object]] = [
        lambda buffer: buffer.page_kind,
        lambda buffer: buffer.huge_bytes,
    ]
    for ask in use:
        buffer = BufferMemoryDescriptor(1)
        ask(buffer)
        buffer.close()
        with pytest.raises(ValueError, match="closed"):
            ask(buffer)
