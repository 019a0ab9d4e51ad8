"""A stream's slots, registered once for all, on either side."""

from __future__ import annotations

import pytest
from fake_driver import FakeDriver, MemoryOf

import memdesc as md
from memdesc.dma import CudaDevice
from memdesc.streams import Stream, Subscription

SHAPE = (16, 40)
NBYTES = 640


def subscribed(stream: Stream) -> Subscription:
    seat = stream.admit(loans=4)
    return Subscription(stream.memory, seat.memory, stream.form, seat.depth, seat.loans)


def test_all_slots_of_a_publisher_lie_in_what_is_registered_once(
    device: CudaDevice, memory_of: MemoryOf
) -> None:
    pointer = memory_of(NBYTES)
    with Stream(shape=SHAPE, dtype="u1", slots=8) as stream:
        with device.registered(stream.memory) as pinned, subscribed(stream) as video:
            seen = set()
            for value in range(8):
                with stream.loan() as slot:
                    slot.array[:] = value
                    offset = slot.address - pinned.address
                    assert 0 <= offset <= pinned.nbytes - NBYTES
                    pinned.copy_to_device(pointer, offset, NBYTES).wait(10)
                    slot.array[:] = 99
                    pinned.copy_from_device(pointer, offset, NBYTES).wait(10)
                    seen.add(offset)
                with video.take() as taken:
                    assert (taken.array == value).all()
            assert len(seen) > 1


def test_a_subscribers_slots_are_read_in_place(fake: FakeDriver) -> None:
    device = CudaDevice(driver=fake)
    pointer = fake.allocate(NBYTES)
    with Stream(shape=SHAPE, dtype="u1", slots=8) as stream, subscribed(stream) as video:
        with device.registered(video.memory) as pinned:
            assert len(fake.registrations) == 1
            assert pinned.access is md.Access.READ_ONLY
            for value in range(1, 4):
                with stream.loan() as slot:
                    slot.array[:] = value
                with video.take() as taken:
                    offset = taken.address - pinned.address
                    pinned.copy_to_device(pointer, offset, taken.nbytes).wait(10)
                    assert bytes(fake.allocated[pointer]) == bytes([value]) * NBYTES
                    with pytest.raises(md.SealedError):
                        pinned.copy_from_device(pointer, offset, taken.nbytes)
            video.close()
            with pytest.raises(md.ClosedError):
                _ = video.memory
            assert len(fake.registrations) == 1  # the pages are there until this is closed
    fake.free(pointer)
