"""Batches onto a device: slots registered before they are used, and refilled only after the copies.

The driver is one that keeps to CUDA's rules, and the copies are such that run as late as they may.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed in this environment")

import torch
from torch_tools import Failing, Images, check

import memdesc as md
from memdesc.dma.cuda import CudaDevice
from memdesc.interop.torch import SharedDataLoader, tensor
from memdesc.interop.torch.moving import MOST_IN_FLIGHT

sys.path.append(str(Path(__file__).parents[1] / "cuda"))

from fake_driver import FakeDriver


class LateEvent:
    """Copies that run when somebody waits for them. As a device, it keeps no memory alive."""

    def __init__(self, stream: LateStream, copies: list[tuple[torch.Tensor, int]]) -> None:
        self.stream = stream
        self.copies = copies

    def query(self) -> bool:
        return not self.copies

    def synchronize(self) -> None:
        copies, self.copies = self.copies, []
        if copies:
            self.stream.under_way -= 1
        for target, address in copies:
            ctypes.memmove(target.data_ptr(), address, target.nbytes)


class LateStream:
    """A stream whose copies read the batch as late as they may."""

    def __init__(self) -> None:
        self.under_way = self.most = 0
        self.handed_over: list[LateEvent] = []

    def copy(self, batch: dict[str, Any]) -> tuple[dict[str, Any], LateEvent]:
        parts = {"image": batch["image"], "pair": batch["pair"][0], "small": batch["pair"][1]}
        moved = {name: torch.empty_like(part) for name, part in parts.items()}
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        event = LateEvent(self, [(moved[name], part.data_ptr()) for name, part in parts.items()])
        together = {"image": moved["image"], "pair": [moved["pair"], moved["small"]]}
        return {**together, "name": batch["name"]}, event

    def hand_over(self, moved: dict[str, Any], event: LateEvent) -> None:
        self.handed_over.append(event)


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    made = FakeDriver()
    yield made
    assert made.violations == []
    assert made.registrations == {}


def loader_on(driver: FakeDriver, dataset: Images, **options: Any) -> SharedDataLoader:
    loader = SharedDataLoader(dataset, 2, device=CudaDevice(driver=driver), **options)
    loader._stream = LateStream()
    return loader


def test_slots_are_refilled_only_after_the_copies_out_of_them(driver: FakeDriver) -> None:
    loader = loader_on(driver, Images(40), slot_nbytes=1 << 16)
    arrived = list(loader)
    gc.collect()
    assert [number for batch in arrived for number in check(batch)] == list(range(40))
    stream: Any = loader._stream
    assert stream.most == MOST_IN_FLIGHT
    assert len(stream.handed_over) == 20
    told = loader.statistics()
    assert (told.left_out, told.slots) == (0, MOST_IN_FLIGHT + 1)
    assert len(driver.registrations) == told.slots
    del loader, stream
    gc.collect()


@pytest.mark.slow
def test_with_workers_and_an_epoch_that_is_left(driver: FakeDriver) -> None:
    loader = loader_on(driver, Images(40), num_workers=2, slot_nbytes=1 << 16)
    first = next(iter(loader))  # and the iteration is gone: its copies were waited for
    assert check(first) == [0, 1]
    arrived = list(loader)
    assert [number for batch in arrived for number in check(batch)] == list(range(40))
    assert loader.statistics().left_out == 0
    assert len(driver.registrations) == loader.statistics().slots == 7
    # What a worker of the first one had taken was given up: unregistered, and made anew.
    registers = [call for call in driver.calls if call.startswith("register")]
    assert 7 <= len(registers) <= 7 + 4
    del loader
    gc.collect()


def test_an_error_is_raised_in_its_turn(driver: FakeDriver) -> None:
    loader = loader_on(driver, Failing(), slot_nbytes=1 << 16)
    batches = iter(loader)
    seen = [next(batches) for _ in range(4)]
    with pytest.raises(KeyError, match="the ninth"):
        next(batches)
    seen += list(batches)
    with pytest.raises(StopIteration):
        next(batches)
    del batches, loader
    gc.collect()
    assert [check(batch)[0] for batch in seen] == [0, 2, 4, 6, 10, 12, 14, 16, 18, 20]


def test_a_slot_that_can_not_be_registered_leaves_nothing(driver: FakeDriver) -> None:
    driver.fail("register", 2, after=1)  # cudaErrorMemoryAllocation, of the second one
    loader = loader_on(driver, Images(8), slot_nbytes=1 << 16)
    with pytest.raises(md.MemdescError) as caught:
        iter(loader)
    assert caught.value.errno == errno.ENOMEM
    assert loader.statistics().slots == len(driver.registrations) == 1
    del caught
    gc.collect()
    assert [check(batch) for batch in list(loader)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    del loader
    gc.collect()


def test_slots_that_became_too_small_are_unregistered(driver: FakeDriver) -> None:
    loader = loader_on(driver, Images(8), slot_nbytes=4096)
    arrived = list(loader)
    assert [check(batch)[0] for batch in arrived] == [0, 2, 4, 6]
    told = loader.statistics()
    assert told.slot_nbytes > 4096
    assert {entry.nbytes for entry in driver.registrations.values()} == {told.slot_nbytes}
    del loader
    gc.collect()


@pytest.mark.slow
@pytest.mark.leaves("fd", "mapping", "thread", "shm", reason="CUDA keeps what it opened")
def test_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU here")
    device = CudaDevice(0)
    loader = SharedDataLoader(Images(200), 4, num_workers=2, device=device, slot_nbytes=1 << 16)
    numbers = []
    for batch in loader:
        assert batch["image"].is_cuda
        assert batch["pair"][0].is_cuda
        numbers += check(batch)
    assert numbers == list(range(200))
    assert loader.statistics().left_out == 0
    with md.BufferMemoryDescriptor(1 << 20) as buffer, device.registered(buffer):
        assert tensor(buffer).is_pinned()
        assert int(tensor(buffer).to("cuda", non_blocking=True).sum()) == 0
