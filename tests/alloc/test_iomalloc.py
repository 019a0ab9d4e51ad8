"""The IOMalloc family: where each block comes from, who may have it, and how it goes back."""

from __future__ import annotations

import contextlib
import gc
import resource
import threading

import pytest
from children import in_child
from huge_pool import free_pages, huge_pages
from hypothesis import given, settings, strategies as st

import memdesc as md
from memdesc import _core
from memdesc.alloc.iomalloc import SIZE_CLASSES
from memdesc.errors import DoubleFreeError
from memdesc.memory.limits import Available
from memdesc.memory.page_kinds import huge_page_size
from memdesc.testing import failing
from memdesc.vm.pages import page_size
from memdesc.vm.physical import frames
from memdesc.vm.regions import regions_in

ALL = [
    md.io_malloc,
    lambda n: md.io_malloc_aligned(n, 64),
    md.io_malloc_contiguous,
    md.io_malloc_pageable,
]


def describe(block):
    return md.MemoryDescriptor.with_buffer(block, md.Direction.OUT_IN)


def map_anew(descriptor):
    with descriptor.map(access=md.Access.READ_ONLY, unique=True) as mapping:
        return bytes(mapping)


# ── Sizes ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("allocate", ALL)
@pytest.mark.parametrize("nbytes", [1, 100, page_size, page_size + 1, 100_000])
def test_blocks_are_writable_and_zero(allocate, nbytes):
    try:
        block = allocate(nbytes)
    except (md.AllocationError, md.WiringError) as error:
        assert allocate is md.io_malloc_contiguous
        pytest.skip(f"no contiguous memory: {error}")
    view = memoryview(block)
    assert view.nbytes >= nbytes
    assert not any(view)
    view[:nbytes] = b"x" * nbytes
    assert bytes(block)[:nbytes] == b"x" * nbytes
    assert _core.buffer_address(view)[0] == block.address
    view.release()
    md.io_free(block)


@pytest.mark.parametrize("size", SIZE_CLASSES)
def test_small_blocks_are_elements_of_the_least_size_that_holds_them(size):
    block = md.io_malloc(size)
    assert len(block) == size
    assert block.zone.name == f"io_malloc.{size}"
    md.io_free(block)
    larger = md.io_malloc(size + 1)
    assert len(larger) > size
    assert isinstance(larger, _core.ZoneElement) is (size < SIZE_CLASSES[-1])
    md.io_free(larger)


@given(st.integers(1, 1 << 16), st.integers(0, 16))
@settings(max_examples=100, deadline=None)
def test_aligned_blocks_lie_at_multiples_of_it(nbytes, power):
    block = md.io_malloc_aligned(nbytes, 1 << power)
    assert block.address % (1 << power) == 0
    assert len(block) >= nbytes
    md.io_free(block)
    pageable = md.io_malloc_pageable(nbytes, 1 << power)
    assert pageable.address % (1 << power) == 0
    assert pageable.address % page_size == 0


def test_pageable_memory_is_taken_at_the_first_touch_and_other_memory_at_once():
    lazy, eager = md.io_malloc_pageable(64 * page_size), md.io_malloc(64 * page_size)
    with md.Task.current() as task:
        assert frames_present(lazy) == 0
        assert frames_present(eager) == 64
        memoryview(lazy)[5 * page_size] = 1
        assert frames_present(lazy) == 1
        (region, *_) = regions_in(task, eager.address, eager.nbytes)
        assert not region.shared


def frames_present(block):
    return sum(flag & 1 for flag in _core.mincore(block.address, len(block)))


@pytest.mark.parametrize("nbytes", [0, -1, 1 << 64, 1.5, "1"])
@pytest.mark.parametrize("allocate", ALL)
def test_sizes_that_are_none(allocate, nbytes):
    with pytest.raises(md.InvalidArgument):
        allocate(nbytes)


@pytest.mark.parametrize("alignment", [0, -8, 3, 100, 1 << 41, "8"])
def test_alignments_that_are_none(alignment):
    for allocate in (md.io_malloc_aligned, md.io_malloc_pageable, md.io_malloc_contiguous):
        with pytest.raises(md.InvalidArgument):
            allocate(100, alignment)


@pytest.mark.parametrize("allocate", [md.io_malloc, md.io_malloc_pageable])
def test_what_can_not_be_had(allocate):
    with pytest.raises(md.AllocationError) as caught:
        allocate(1 << 55)
    assert caught.value.requested >= 1 << 55
    with failing("place_memory", errno=12):
        with pytest.raises(md.AllocationError):
            allocate(100_000)


def test_the_limits_are_asked_before_a_page_is_taken(monkeypatch):
    little = Available(100_000, "a limit of this test", "none")
    monkeypatch.setattr("memdesc.memory.limits.available", lambda *_: little)
    with failing("madvise", errno=12) as population:
        with pytest.raises(md.AllocationError) as caught:
            md.io_malloc(1 << 20)
        assert (caught.value.requested, caught.value.available) == (1 << 20, 100_000)
        assert population.calls == 0
    md.io_free(md.io_malloc_pageable(1 << 20))


def test_a_population_that_fails_leaves_nothing():
    before = resident()
    with failing("madvise", errno=12, after=0):
        with pytest.raises(md.AllocationError) as caught:
            md.io_malloc(1 << 24)
    assert caught.value.errno == 12
    gc.collect()
    assert resident() - before < 1 << 23


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * page_size


# ── Who may have it ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("allocate", [md.io_malloc, lambda n: md.io_malloc_aligned(n, 8)])
def test_zone_memory_is_never_shared(allocate):
    block = allocate(100)
    with describe(block) as descriptor:
        with pytest.raises(md.MappingError) as caught:
            map_anew(descriptor)
    assert caught.value.reason is md.MappingReason.ZONE_MEMORY
    assert "io_malloc_aligned" in str(caught.value)


@pytest.mark.parametrize("allocate", [md.io_malloc, md.io_malloc_pageable])
def test_private_pages_are_never_shared(allocate):
    with describe(allocate(4 * page_size)) as descriptor:
        with pytest.raises(md.MappingError) as caught:
            map_anew(descriptor)
    assert caught.value.reason is md.MappingReason.PRIVATE_MEMORY


@pytest.mark.slow
@pytest.mark.parametrize("nbytes", [page_size, 3 * page_size, 5 * page_size + 7])
def test_aligned_pages_are_mapped_by_another_process(nbytes):
    block = md.io_malloc_aligned(nbytes, page_size)
    memoryview(block)[:6] = b"shared"
    with md.Service("driver") as service:
        service.share("block", describe(block))
        service.share("itself", block.descriptor)

        def child():
            with md.connect("driver") as connection:
                return [bytes(connection.map(name))[:6] for name in ("block", "itself")]

        assert in_child(child) == [b"shared"] * 2


def test_a_range_of_addresses_of_aligned_pages_is_mapped():
    block = md.io_malloc_aligned(2 * page_size, page_size)
    memoryview(block)[page_size : page_size + 4] = b"here"
    by_address = md.MemoryDescriptor.with_address_range(
        block.address + page_size, 4, md.Direction.OUT
    )
    assert map_anew(by_address) == b"here"


# ── Contiguous ───────────────────────────────────────────────────────────────────────────────


def contiguous_or_skip(nbytes, alignment=1):
    try:
        return md.io_malloc_contiguous(nbytes, alignment)
    except (md.AllocationError, md.WiringError) as error:
        pytest.skip(f"no {nbytes} contiguous bytes: {error}")


def physical_or_skip(block):
    try:
        return block.physical_address
    except md.NotPrivilegedError as error:
        pytest.skip(str(error))


def check_frames(block):
    first = physical_or_skip(block)
    assert first % page_size == block.address % page_size == 0
    with md.Task.current() as task:
        found = frames(task, block.address, len(block))
    count = -(-len(block) // page_size)
    assert found == list(range(first // page_size, first // page_size + count))


SIZES = [1, page_size, *(page_size << n for n in range(1, 12) if page_size << n <= 2 << 20)]


@pytest.mark.parametrize("nbytes", SIZES)
def test_frames_are_consecutive_for_each_size_up_to_the_huge_page(nbytes):
    with huge_pages(1):
        block = contiguous_or_skip(nbytes)
        memoryview(block)[-1] = 1
        check_frames(block)
        if nbytes > page_size:
            assert block.descriptor.page_kind is md.PageKind.HUGE
        md.io_free(block)
        with pytest.raises(md.ClosedError):
            _ = block.physical_address


@pytest.mark.parametrize("nbytes", [2 * page_size, 100_000, 2 << 20])
def test_without_a_pool_the_kernel_puts_a_huge_page_together(nbytes):
    left = free_pages() * huge_page_size()
    with contextlib.ExitStack() as stack:
        if left:
            stack.enter_context(md.BufferMemoryDescriptor(left, pages=md.PageKind.HUGE))
        block = contiguous_or_skip(nbytes)
        assert block.descriptor.page_kind is md.PageKind.TRANSPARENT_HUGE
        check_frames(block)
        md.io_free(block)


def test_both_addresses_are_aligned():
    with huge_pages(1):
        block = contiguous_or_skip(page_size, 1 << 16)
        assert block.address % (1 << 16) == 0
        assert physical_or_skip(block) % (1 << 16) == 0
    with pytest.raises(md.InvalidArgument):
        md.io_malloc_contiguous(page_size, 2 * huge_page_size())


def test_more_than_a_huge_page_is_contiguous_or_refused():
    with huge_pages(2):
        try:
            block = md.io_malloc_contiguous(2 * huge_page_size())
        except md.AllocationError as error:
            assert error.requested == 2 * huge_page_size()
        else:
            check_frames(block)


def test_other_blocks_have_no_physical_address():
    with pytest.raises(md.UnsupportedError):
        _ = md.io_malloc_aligned(page_size, page_size).physical_address


def test_a_small_contiguous_block_is_wired_or_refused():
    def child():
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        try:
            block = md.io_malloc_contiguous(100)
        except md.WiringError as error:
            return error.reason
        return block.descriptor.prepare_count

    assert in_child(child) in (1, md.WiringReason.LIMIT, md.WiringReason.NOT_PRIVILEGED)


# ── Giving back ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("nbytes", [100, 100_000])
@pytest.mark.parametrize("allocate", [*ALL[:2], ALL[3]])
def test_twice_is_an_error_and_harms_nobody(allocate, nbytes):
    block = allocate(nbytes)
    md.io_free(block)
    with pytest.raises(DoubleFreeError):
        md.io_free(block)
    other = allocate(nbytes)
    memoryview(other)[:1] = b"o"
    with pytest.raises(DoubleFreeError):
        md.io_free(block)
    assert bytes(other)[:1] == b"o"


@pytest.mark.parametrize("nbytes", [100, 100_000])
def test_with_a_view_it_stays(nbytes):
    block = md.io_malloc(nbytes)
    view = memoryview(block)
    with pytest.raises(BufferError):
        md.io_free(block)
    view[0] = 5
    view.release()
    md.io_free(block)
    with pytest.raises((BufferError, md.ClosedError)):
        memoryview(block)


def test_what_is_not_ours_is_refused():
    zone = md.Zone("others", element_size=64, capacity=1 << 16)
    for foreign in (zone.alloc(), bytearray(8), None, md.BufferMemoryDescriptor(8)):
        with pytest.raises(md.InvalidArgument):
            md.io_free(foreign)


def test_a_fork_child_frees_nothing_of_its_parent_and_has_blocks_of_its_own():
    blocks = [md.io_malloc(100), md.io_malloc(100_000), md.io_malloc_aligned(page_size, page_size)]
    for block in blocks:
        memoryview(block)[:4] = b"mine"

    def child():
        refused = []
        for block in blocks:
            try:
                md.io_free(block)
            except md.ClosedError:
                refused.append(bytes(block)[:4])
        own = [md.io_malloc(100), md.io_malloc(100_000)]
        for block in own:
            md.io_free(block)
        return refused

    assert in_child(child) == [b"mine"] * 3
    for block in blocks:
        assert bytes(block)[:4] == b"mine"
        md.io_free(block)


def test_dropped_blocks_go_back():
    zone = md.io_malloc(100).zone
    gc.collect()
    living = zone.statistics().in_use
    blocks = [md.io_malloc(100) for _ in range(100)]
    assert zone.statistics().in_use == living + 100
    del blocks
    assert zone.statistics().in_use == living


@pytest.mark.slow
def test_many_threads():
    failures = []

    def work(seed):
        held = []
        for turn in range(2000):
            block = md.io_malloc(1 + (turn * 37 + seed) % 9000)
            tag = (turn + seed) % 256
            with memoryview(block) as view:
                view[0] = tag
            held.append((block, tag))
            if len(held) > 20:
                block, tag = held.pop(0)
                if bytes(block)[0] != tag:
                    failures.append(block)
                md.io_free(block)
        for block, _ in held:
            md.io_free(block)

    threads = [threading.Thread(target=work, args=(n * 101,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
