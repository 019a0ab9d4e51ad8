"""Any order of registering, dropping and closing parts of one buffer, against counts of pages."""

from __future__ import annotations

import pytest
from fake_driver import FakeDriver
from hypothesis import HealthCheck, given, settings, strategies as st

from memdesc import BufferMemoryDescriptor, SubMemoryDescriptor
from memdesc.dma import CudaDevice, PinnedMemory
from memdesc.dma.cuda.registrations import books
from memdesc.vm.pages import page_size

PAGES = 12
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("register"), st.integers(0, PAGES * 16 - 1), st.integers(1, PAGES * 16)),
        st.tuples(st.sampled_from(["close", "drop"]), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("fail"), st.integers(0, 1), st.just(0)),
    ),
    max_size=25,
)
GRAIN = page_size // 16


def pages_of(offset: int, nbytes: int) -> set[int]:
    return set(range(offset // page_size, (offset + nbytes - 1) // page_size + 1))


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(STEPS)
def test_what_is_registered_is_what_is_claimed(
    fake: FakeDriver, steps: list[tuple[str, int, int]]
) -> None:
    devices = [CudaDevice(index, driver=fake) for index in (0, 1)]
    fake._faults.clear()
    with BufferMemoryDescriptor(PAGES * page_size, recycle=False) as buffer:
        held: list[tuple[PinnedMemory, set[int]]] = []

        def check() -> None:
            ranges = sorted(
                (start - buffer.address, known.nbytes)
                for start, known in fake.registrations.items()
            )
            covered = [page for start, size in ranges for page in pages_of(start, size)]
            assert len(covered) == len(set(covered))  # CUDA registers none twice
            claimed = set().union(*(pages for _, pages in held))
            assert claimed <= set(covered)
            for start, size in ranges:  # nothing is registered that nobody has any of
                assert claimed & pages_of(start, size)
            assert len(books) == len(ranges)
            assert (buffer.memory.lifecycle.registrations > 0) == bool(held)

        for what, first, second in steps:
            if what == "register":
                offset = first * GRAIN
                nbytes = min(second * GRAIN, buffer.length - offset)
                part = SubMemoryDescriptor(buffer, offset, nbytes)
                try:
                    pinned = devices[first % 2].registered(part)
                except OSError:
                    pinned = None
                if pinned is not None:
                    held.append((pinned, pages_of(offset, nbytes)))
                    assert sum(size for _, size in pinned.device_segments()) == nbytes
                    assert pinned.address == buffer.address + offset
                del pinned, part
            elif what == "fail":
                fake.fail("register", 2, after=first)
            elif held:
                pinned, _ = held.pop(first % len(held))
                if what == "close":
                    pinned.close()
                del pinned
            check()
        held.clear()
        check()
    assert fake.registrations == {}
