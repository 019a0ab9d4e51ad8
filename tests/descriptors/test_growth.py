"""Growth in place: addresses and views stay, what fails changes nothing, peers harm themselves."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
from children import in_child
from huge_pool import free_pages, huge_pages
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from memory_cgroup import ENTER, memory_cgroup

from memdesc import (
    Access,
    AllocationError,
    BufferMemoryDescriptor,
    ClosedError,
    InvalidArgument,
    MultiMemoryDescriptor,
    PageKind,
    PageKindError,
    RangeError,
    SubMemoryDescriptor,
    WiringError,
    _core,
    page_size,
)
from memdesc.memory.page_kinds import huge_page_size, transparent_page_size
from memdesc.testing._kind import locked_pages
from memdesc.testing.faults import failing

MIB = 1 << 20
P = page_size
KINDS = [PageKind.AUTO, PageKind.BASE, PageKind.TRANSPARENT_HUGE]


def blocks(buffer: BufferMemoryDescriptor) -> int:
    """Bytes that the file has taken."""
    return os.stat(f"/proc/self/fd/{buffer.memory.own_fd()}").st_blocks * 512


def made(capacity: int, pages: PageKind = PageKind.AUTO, **options: Any) -> BufferMemoryDescriptor:
    try:
        return BufferMemoryDescriptor(capacity, pages=pages, **options)
    except PageKindError as error:
        pytest.skip(str(error))


# ── What stays and what comes ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pages", KINDS)
@pytest.mark.parametrize("max_access", Access)
def test_addresses_views_and_bytes_stay(pages: PageKind, max_access: Access) -> None:
    huge = transparent_page_size() or 2 * MIB
    with made(100, pages, reserve=5 * huge, max_access=max_access) as buffer:
        assert (buffer.capacity, buffer.reserve, buffer.length) == (100, 5 * huge, 100)
        assert blocks(buffer) == P
        view, array, address = memoryview(buffer), buffer.array(), buffer.address
        array[:] = 7
        for capacity in (101, P, P + 1, 3 * huge - 1, 4 * huge + 5, 5 * huge):
            buffer.grow(capacity)
            assert (buffer.capacity, buffer.length, buffer.address) == (capacity,) * 2 + (address,)
            counts = buffer.page_counts()
            assert counts.resident == counts.total == -(-capacity // P)
            assert blocks(buffer) == counts.total * P
        assert bytes(view) == bytes([7] * 100)
        view[0] = 8
        assert buffer.read_bytes(0, 101) == bytes([8] + [7] * 99 + [0])
        assert not any(buffer.read_bytes(100))
        if pages is PageKind.TRANSPARENT_HUGE:  # also those that began in an earlier part
            assert buffer.huge_bytes == 5 * huge
        view.release()


def test_the_length_follows_where_it_was_the_capacity() -> None:
    with BufferMemoryDescriptor(10, reserve=1000) as buffer:
        buffer.grow(20)
        assert (buffer.capacity, buffer.length) == (20, 20)
        buffer.set_length(5)
        buffer.grow(30)
        assert (buffer.capacity, buffer.length) == (30, 5)
        buffer.append_bytes(b"x" * 25)
        assert buffer.length == 30
        with pytest.raises(RangeError):
            buffer.append_bytes(b"x")
        buffer.grow(31)
        buffer.set_length(0)
        buffer.grow(1000)
        assert buffer.length == 0


def test_without_a_reserve_only_what_it_has() -> None:
    with BufferMemoryDescriptor(10) as buffer:
        assert buffer.reserve == 10
        buffer.grow(10)
        with pytest.raises(RangeError):
            buffer.grow(11)
    with BufferMemoryDescriptor(10, reserve=1) as buffer:
        assert buffer.reserve == 10


@pytest.mark.parametrize("capacity", [1001, 9, 0, -1, 2**62])
def test_past_the_reserve_or_back(capacity: int) -> None:
    with BufferMemoryDescriptor(10, reserve=1000) as buffer:
        with pytest.raises(RangeError) as caught:
            buffer.grow(capacity)
        assert caught.value.errno == errno.EINVAL
        assert (buffer.capacity, buffer.length) == (10, 10)


def test_what_is_no_size() -> None:
    with BufferMemoryDescriptor(10, reserve=1000) as buffer:
        for wrong in (1.5, None, "11", 2**63):
            with pytest.raises(InvalidArgument):
                buffer.grow(wrong)  # type: ignore[arg-type]
        for wrong in (0, -5, 1.5, 2**63):
            with pytest.raises(InvalidArgument):
                BufferMemoryDescriptor(1, reserve=wrong)  # type: ignore[arg-type]
    with pytest.raises(ClosedError):
        buffer.grow(11)


def test_addresses_that_can_not_be_had() -> None:
    with pytest.raises(AllocationError):
        BufferMemoryDescriptor(10, reserve=1 << 60)
    with BufferMemoryDescriptor(10, reserve=1 << 40) as buffer:  # addresses alone cost nothing
        buffer.grow(2 * P)
        assert blocks(buffer) == 2 * P


def test_lazy_growth_takes_no_page() -> None:
    with BufferMemoryDescriptor(P, reserve=9 * P, lazy=True) as buffer:
        buffer.grow(9 * P)
        assert (buffer.length, blocks(buffer)) == (9 * P, 0)
        buffer.write_bytes(8 * P, b"!")
        assert blocks(buffer) == P


def test_parts_and_wholes_see_what_they_described() -> None:
    with BufferMemoryDescriptor(P, reserve=3 * P) as buffer:
        part = SubMemoryDescriptor(buffer, 5, 10)
        mapping = buffer.map(unique=True)
        buffer.grow(3 * P)
        assert (part.length, len(mapping)) == (10, P)
        rest = SubMemoryDescriptor(buffer, P, 2 * P)
        with MultiMemoryDescriptor([rest, part]) as both:
            buffer.write_bytes(P, b"new")
            assert both.read_bytes(0, 3) == b"new"
        with buffer.map(unique=True) as whole:
            assert bytes(memoryview(whole)[P : P + 3]) == b"new"
        mapping.unmap()


# ── In each state of its life ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("max_access", Access)
def test_a_buffer_that_was_granted_grows(max_access: Access) -> None:
    with BufferMemoryDescriptor(P, reserve=4 * P, max_access=max_access) as buffer:
        os.close(buffer.memory.grant(max_access, user=os.geteuid()))
        seals = buffer.memory.seals()
        assert seals & _core.F_SEAL_SEAL
        buffer.grow(4 * P)
        buffer.write_bytes(4 * P - 1, b"!")
        assert (blocks(buffer), buffer.memory.seals()) == (4 * P, seals)


def test_the_source_of_a_snapshot_moves_to_grow() -> None:
    with BufferMemoryDescriptor(P, reserve=4 * P) as buffer:
        buffer.write_bytes(0, b"then")
        view = memoryview(buffer)
        with buffer.snapshot() as frozen:
            assert frozen.copied_bytes == 0
            buffer.write_bytes(0, b"now ")
            buffer.grow(3 * P)
            assert (buffer.capacity, buffer.length, buffer.moves) == (3 * P, 3 * P, 1)
            assert (blocks(buffer), buffer.moved_bytes) == (3 * P, P)
            buffer.write_bytes(3 * P - 1, b"!")
            view[4] = 33
            assert buffer.read_bytes() == b"now !" + bytes(3 * P - 6) + b"!"
            with buffer.snapshot() as later:
                assert (later.copied_bytes, later.length) == (0, 3 * P)
                buffer.map(unique=True).unmap()
                assert (blocks(buffer), later.read_bytes()) == (3 * P, buffer.read_bytes())
            assert (frozen.length, frozen.read_bytes(0, 5)) == (P, b"then\0")


def test_a_fork_child_grows_its_own_idea_of_it() -> None:
    with BufferMemoryDescriptor(P, reserve=4 * P) as buffer:

        def child() -> int:
            buffer.grow(3 * P)
            buffer.write_bytes(2 * P, b"child")
            return buffer.capacity

        assert in_child(child) == 3 * P
        assert (buffer.capacity, buffer.length) == (P, P)
        buffer.grow(3 * P)
        assert buffer.read_bytes(2 * P, 5) == b"child"  # the same pages: the same trust domain


# ── What fails changes nothing ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("call", "number"), [("fallocate", errno.ENOSPC), ("madvise", errno.ENOMEM)]
)
def test_too_little_memory(call: str, number: int) -> None:
    with BufferMemoryDescriptor(P, reserve=9 * P, pages=PageKind.BASE) as buffer:
        for _ in range(2):
            with failing(call, number), pytest.raises(AllocationError) as caught:
                buffer.grow(9 * P)
            assert caught.value.errno == number
            assert (buffer.capacity, buffer.length, blocks(buffer)) == (P, P, P)
        buffer.grow(9 * P)
        assert blocks(buffer) == 9 * P


def test_what_the_seals_keep_waits_for_the_next_growth() -> None:
    with BufferMemoryDescriptor(P, reserve=9 * P, pages=PageKind.BASE) as buffer:
        os.close(buffer.memory.grant(Access.READ_ONLY, user=os.geteuid()))
        with failing("madvise", errno.ENOMEM), pytest.raises(AllocationError):
            buffer.grow(9 * P)
        assert (buffer.capacity, blocks(buffer)) == (P, 9 * P)
        buffer.grow(9 * P)
        assert blocks(buffer) == 9 * P


def test_more_than_the_machine_has() -> None:
    with BufferMemoryDescriptor(P, reserve=1 << 45) as buffer:
        with pytest.raises(AllocationError) as caught:
            buffer.grow(1 << 45)
        assert caught.value.errno == errno.ENOMEM
        assert caught.value.available is not None
        assert (buffer.capacity, blocks(buffer)) == (P, P)


def test_an_interrupt_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    original = _core.madvise

    def madvise(address: int, length: int, what: int) -> None:
        original(address, length, what)
        signal.raise_signal(signal.SIGINT)

    with BufferMemoryDescriptor(P, reserve=9 * P, pages=PageKind.BASE) as buffer:
        with monkeypatch.context() as patch:
            patch.setattr(_core, "madvise", madvise)
            with pytest.raises(KeyboardInterrupt):
                buffer.grow(9 * P)
        assert (buffer.capacity, blocks(buffer)) == (P, P)
        buffer.grow(2 * P)


# ── Wired ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", ["wired", "prepared"])
def test_what_is_wired_stays_wired_whole(how: str) -> None:
    before = locked_pages()
    buffer = BufferMemoryDescriptor(P, reserve=9 * P, wired=how == "wired")
    if how == "prepared":
        buffer.prepare()
    for capacity in (P + 1, 2 * P, 7 * P):
        buffer.grow(capacity)
        assert locked_pages() - before == -(-capacity // P)
    if how == "prepared":
        buffer.complete()
        assert locked_pages() == before
        buffer.grow(9 * P)
        assert locked_pages() == before
        with buffer.prepared():
            assert locked_pages() - before == 9
    buffer.close()
    del buffer
    gc.collect()
    assert locked_pages() == before


def test_what_can_not_be_wired_does_not_grow() -> None:
    before = locked_pages()
    with BufferMemoryDescriptor(P, reserve=9 * P, wired=True) as buffer:
        with failing("mlock", errno.ENOMEM), pytest.raises(WiringError):
            buffer.grow(9 * P)
        assert (buffer.capacity, buffer.length, blocks(buffer)) == (P, P, P)
        assert locked_pages() - before == 1
        buffer.grow(9 * P)
        assert locked_pages() - before == 9
    assert locked_pages() == before


# ── Huge pages ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.alone
def test_the_pool_promises_all_of_the_reserve_at_once() -> None:
    huge = huge_page_size()
    with huge_pages(4):
        before = free_pages()
        how: Any = {"pages": PageKind.HUGE, "recycle": False}
        with BufferMemoryDescriptor(1, reserve=3 * huge, **how) as buffer:
            assert free_pages() == before - 3
            with pytest.raises(PageKindError):
                BufferMemoryDescriptor((before - 2) * huge, **how)
            buffer.grow(huge + 1)
            buffer.write_bytes(huge, b"!")
            assert (buffer.page_kind, buffer.huge_bytes) == (PageKind.HUGE, 2 * huge)
            buffer.grow(3 * huge)
            assert free_pages() == before - 3
            assert buffer.huge_bytes == 3 * huge
        del buffer
        assert free_pages() == before


# ── A peer that reads past the length ────────────────────────────────────────────────────────

READ_PAST = """
import mmap, os, sys
fd, nbytes = int(sys.argv[2]), int(sys.argv[3])
whole = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
print(sum(whole[at] for at in range(0, nbytes, mmap.PAGESIZE)))
print("done", flush=True)
sys.stdin.read()
"""


def reader(fd: int, nbytes: int, folder: str, *prefix: str) -> subprocess.Popen[str]:
    program = (
        *prefix,
        sys.executable,
        "-c",
        "import sys\n" + (ENTER if folder else "") + READ_PAST,
    )
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*program, folder, str(fd), str(nbytes)], pass_fds=[fd], stdin=pipe, stdout=pipe, text=True
    )


def test_a_peer_that_reads_past_the_length_gets_zeros_and_the_owner_goes_on() -> None:
    """It takes pages of its own accord: they are the file's, and are there for the growth."""
    with BufferMemoryDescriptor(P, reserve=64 * P, pages=PageKind.BASE) as buffer:
        buffer.write_bytes(0, b"\x05")
        fd = buffer.memory.grant(Access.READ_ONLY, user=os.geteuid())
        with reader(fd, 64 * P, "") as peer:
            assert peer.communicate(timeout=30)[0].split() == ["5", "done"]
        os.close(fd)
        assert blocks(buffer) == 64 * P  # and stays so: no one may punch it out
        assert (buffer.capacity, buffer.length) == (P, P)
        buffer.grow(64 * P)
        assert not any(buffer.read_bytes(1))
        buffer.write_bytes(64 * P - 1, b"!")


def test_who_may_write_may_write_what_is_to_come() -> None:
    with BufferMemoryDescriptor(P, reserve=2 * P, max_access=Access.READ_WRITE) as buffer:
        fd = buffer.memory.grant(Access.READ_WRITE, user=os.geteuid())
        assert os.pwrite(fd, b"early", P) == 5
        os.close(fd)
        buffer.grow(2 * P)
        assert buffer.read_bytes(P, 5) == b"early"


@pytest.mark.slow
def test_what_it_takes_so_is_charged_to_it() -> None:
    size = 32 * MIB
    with (
        memory_cgroup(256 * MIB) as group,
        BufferMemoryDescriptor(P, reserve=size, pages=PageKind.BASE) as buffer,
    ):  # the buffer goes first: its pages are charged to the group
        fd = buffer.memory.grant(Access.READ_ONLY, user=os.geteuid())
        with reader(fd, size, str(group.folder)) as peer:
            os.close(fd)
            assert peer.stdout is not None
            assert peer.stdout.readline() + peer.stdout.readline() == "0\ndone\n"
            assert group.used() >= size - MIB
            peer.communicate(timeout=30)
        assert blocks(buffer) == size


# ── Any history ──────────────────────────────────────────────────────────────────────────────


class Growing(RuleBasedStateMachine):
    """A buffer that grows, is wired, shared and written, against a bytearray."""

    RESERVE = 20 * P + 7

    @initialize(
        capacity=st.integers(1, 5 * P),
        pages=st.sampled_from([PageKind.AUTO, PageKind.BASE]),
        wired=st.booleans(),
        lazy=st.booleans(),
    )
    def make(self, capacity: int, pages: PageKind, wired: bool, lazy: bool) -> None:
        self.locked = locked_pages()
        self.buffer = BufferMemoryDescriptor(
            capacity, reserve=self.RESERVE, pages=pages, wired=wired, lazy=lazy
        )
        self.capacity, self.length = capacity, capacity
        self.model = bytearray(self.RESERVE)
        self.address = self.buffer.address
        self.prepared = int(wired)
        self.views: list[tuple[memoryview, int]] = []

    @rule(capacity=st.integers(-1, RESERVE + 100))
    def grow(self, capacity: int) -> None:
        if not self.capacity <= capacity <= self.RESERVE:
            with pytest.raises(RangeError):
                self.buffer.grow(capacity)
            return
        self.buffer.grow(capacity)
        if self.length == self.capacity:
            self.length = capacity
        self.capacity = capacity

    @rule(capacity=st.integers(0, RESERVE))
    def fail_to_grow(self, capacity: int) -> None:
        if capacity < self.capacity:
            return
        with failing("fallocate", errno.ENOSPC) as fault:
            try:
                self.buffer.grow(capacity)
            except AllocationError:
                assert fault.failures == 1
                return
        if self.length == self.capacity:
            self.length = capacity
        self.capacity = capacity

    @rule(share=st.floats(0, 1))
    def set_length(self, share: float) -> None:
        self.length = int(self.capacity * share)
        self.buffer.set_length(self.length)

    @rule(share=st.floats(0, 1), data=st.binary(min_size=1, max_size=3 * P))
    def write(self, share: float, data: bytes) -> None:
        at = int(self.length * share)
        data = data[: self.length - at]
        self.buffer.write_bytes(at, data)
        self.model[at : at + len(data)] = data

    @rule()
    def look(self) -> None:
        self.views.append((memoryview(self.buffer), self.length))

    @rule()
    def prepare(self) -> None:
        self.buffer.prepare()
        self.prepared += 1

    @rule()
    def complete(self) -> None:
        if self.prepared:
            self.buffer.complete()
            self.prepared -= 1

    @rule()
    def grant(self) -> None:
        os.close(self.buffer.memory.grant(Access.READ_ONLY, user=os.geteuid()))

    @invariant()
    def is_as_the_model(self) -> None:
        if not hasattr(self, "buffer"):
            return
        assert (self.buffer.capacity, self.buffer.length) == (self.capacity, self.length)
        assert self.buffer.address == self.address
        assert self.buffer.read_bytes() == self.model[: self.length]
        for view, length in self.views:
            assert view == self.model[:length]
        wired = -(-self.capacity // P) if self.prepared else 0
        assert locked_pages() - self.locked == wired

    def teardown(self) -> None:
        if hasattr(self, "buffer"):
            for view, _ in self.views:
                view.release()
            self.buffer.close()
            del self.buffer
            gc.collect()
            assert locked_pages() == self.locked


TestGrowing = pytest.mark.slow(Growing.TestCase)
TestGrowing.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
