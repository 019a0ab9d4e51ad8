"""How much the recycler keeps, and that it stands in the way of nobody."""

from __future__ import annotations

import errno
import gc
import os
import resource
from collections.abc import Iterator
from contextlib import suppress

import pytest
from children import in_child
from recycling import GIB, KIB, MIB, ROOM, freed, fresh_recycler, identity_of, statistics

from memdesc import (
    AllocationError,
    BufferMemoryDescriptor,
    InvalidArgument,
    PageKind,
    _core,
    page_size,
    recycler,
)
from memdesc.memory.kept import Refusal, Settings
from memdesc.memory.limits import Available
from memdesc.memory.recycler import MOST_BLOCKS
from memdesc.testing.faults import failing

SIZE = 256 * KIB


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    with fresh_recycler():
        yield


def refused() -> dict[Refusal, int]:
    return dict(statistics().refused)


# ── Bounds ───────────────────────────────────────────────────────────────────────────────────


def test_the_oldest_goes_first() -> None:
    recycler.configure(limit=3 * SIZE)
    buffers = [BufferMemoryDescriptor(SIZE) for _ in range(5)]
    identities = [identity_of(buffer) for buffer in buffers]
    for buffer in buffers:
        buffer.close()
    del buffer, buffers
    assert statistics().kept_bytes == 3 * SIZE
    assert statistics().trimmed_bytes == 2 * SIZE
    assert [block.object.identity for block in recycler._recycler._blocks] == identities[2:]


def test_each_block_is_a_descriptor_so_they_are_few() -> None:
    buffers = [BufferMemoryDescriptor(page_size) for _ in range(MOST_BLOCKS + 5)]
    while buffers:
        buffers.pop().close()
    assert statistics().kept_blocks == MOST_BLOCKS
    paths = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own, closed since
            paths.append(os.readlink(f"/proc/self/fd/{name}"))
    assert paths.count("/memfd:memdesc (deleted)") == MOST_BLOCKS


def test_many_small_ones_do_not_drive_out_a_large_one() -> None:
    freed(MIB)
    buffers = [BufferMemoryDescriptor(page_size) for _ in range(MOST_BLOCKS + 5)]
    while buffers:
        buffers.pop().close()
    assert statistics().sizes == {MIB: 1, page_size: MOST_BLOCKS - 1}


def test_what_is_larger_than_the_limit_does_not_drive_out_the_rest() -> None:
    recycler.configure(limit=MIB)
    freed(SIZE)
    freed(2 * MIB)
    assert statistics().sizes == {SIZE: 1}
    assert refused() == {Refusal.TOO_LARGE: 1}


def test_the_limit_by_default_is_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    assert statistics().limit == min(GIB, ROOM // 8)
    room_is(monkeypatch, 4 * MIB)
    assert statistics().limit == 512 * KIB


def test_never_more_is_kept_than_is_still_available(monkeypatch: pytest.MonkeyPatch) -> None:
    recycler.configure(limit=GIB)
    room_is(monkeypatch, 3 * SIZE)
    assert statistics().limit == 3 * SIZE


def room_is(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(recycler, "available", lambda: Available(nbytes, "a small machine", ""))
    recycler._recycler._measure()


def test_what_can_not_be_measured_is_taken_for_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable() -> object:
        raise FileNotFoundError(errno.ENOENT, "no /proc")

    monkeypatch.setattr(recycler, "available", unreadable)
    recycler._recycler._measure()
    freed()
    assert statistics().kept_blocks == 0


def test_trimmed_on_demand() -> None:
    buffers = [BufferMemoryDescriptor(SIZE) for _ in range(4)]
    for buffer in buffers:
        buffer.close()
    del buffer, buffers
    assert recycler.trim(to_bytes=2 * SIZE) == 2 * SIZE
    assert statistics().kept_bytes == 2 * SIZE
    assert recycler.trim(to_bytes=2 * SIZE) == 0
    assert recycler.trim() == 2 * SIZE
    assert statistics().kept_bytes == 0
    assert statistics().trimmed_bytes == 4 * SIZE


def test_turned_off() -> None:
    freed()
    recycler.configure(limit=0)
    assert statistics().kept_bytes == statistics().limit == 0
    freed()
    assert (statistics().kept_blocks, statistics().misses) == (0, 1)
    recycler.configure(limit=None)
    freed()
    assert statistics().kept_blocks == 1


def test_turned_off_while_a_view_is_left() -> None:
    view = memoryview(BufferMemoryDescriptor(SIZE))
    recycler.configure(limit=0)
    view.release()
    assert statistics().kept_blocks == 0


def test_more_than_the_machine_has_is_refused_with_the_numbers() -> None:
    recycler.configure(limit=MIB, trust_same_user=True)
    freed()
    with pytest.raises(AllocationError) as caught:
        recycler.configure(limit=ROOM + SIZE + 1, trust_same_user=False)
    error = caught.value
    assert (error.errno, error.requested, error.available) == (
        errno.ENOMEM,
        ROOM + SIZE + 1,
        ROOM + SIZE,
    )
    assert recycler._recycler.settings == Settings(MIB, True)  # nothing was changed
    recycler.configure(limit=ROOM + SIZE)
    assert statistics().kept_blocks == 1


@pytest.mark.parametrize("wrong", [-1, 1.5, "1"])
def test_wrong_arguments(wrong: int) -> None:
    with pytest.raises(InvalidArgument):
        recycler.configure(limit=wrong)
    with pytest.raises(InvalidArgument):
        recycler.trim(wrong)
    with pytest.raises(InvalidArgument):
        BufferMemoryDescriptor(SIZE, contents=wrong)  # type: ignore[arg-type]


# ── In the way of nobody ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("call", "error"), [("map_memory", errno.ENOMEM)])
def test_where_there_is_too_little_what_is_kept_goes_first(call: str, error: int) -> None:
    freed()
    with failing(call, error, times=1) as fault:
        with BufferMemoryDescriptor(4 * SIZE, pages=PageKind.BASE):
            assert statistics().kept_bytes == 0
    assert fault.failures == 1


def test_where_nothing_is_kept_the_error_stands() -> None:
    with failing("map_memory", errno.ENOMEM, times=1) as fault:
        with pytest.raises(AllocationError):
            BufferMemoryDescriptor(SIZE, pages=PageKind.BASE)
    assert fault.failures == 1


def test_the_descriptors_that_are_kept_are_there_for_the_next_buffer() -> None:
    def exhausted() -> tuple[int, int]:
        recycler.configure(limit=MIB)
        for name in "ab":
            freed(page_size, name=name)
        kept = statistics().kept_blocks
        taken = []
        try:
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            assert error.errno == errno.EMFILE
        with BufferMemoryDescriptor(SIZE):
            return kept, statistics().kept_blocks

    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))  # noqa: E731
    assert in_child(exhausted, before=limit) == (2, 0)


def test_an_interrupted_clearing_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    identity = freed()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_core, "zero_memory", interrupted)
    with pytest.raises(KeyboardInterrupt):
        BufferMemoryDescriptor(SIZE)
    gc.collect()
    with open("/proc/self/maps") as maps:
        assert f" {identity[1]} " not in maps.read()
