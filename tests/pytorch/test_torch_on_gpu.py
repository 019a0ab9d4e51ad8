"""What the pages say of torch and registered memory, asked of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed in this environment")

import numpy as np
import torch

import memdesc as md
from memdesc.dma import CudaDevice
from memdesc.interop.torch import tensor

NBYTES = 8 << 20
LONG = 1_000_000_000
"""Cycles of a GPU that take about half a second: time enough to look at what waits for them."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.leaves("fd", "mapping", "thread", "shm", reason="CUDA keeps what it opened"),
]


@pytest.fixture
def device() -> CudaDevice:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU here")
    torch.cuda.init()
    return CudaDevice(torch.cuda.current_device())


@pytest.fixture
def buffer() -> Iterator[md.BufferMemoryDescriptor]:
    with md.BufferMemoryDescriptor(NBYTES, recycle=False) as made:
        made.array(dtype="i4")[:] = np.arange(NBYTES // 4)
        yield made


def test_torch_finds_registered_memory_pinned(
    device: CudaDevice, buffer: md.BufferMemoryDescriptor
) -> None:
    host = tensor(buffer, dtype=torch.int32)
    assert not host.is_pinned()
    with device.registered(buffer) as pinned:
        assert host.is_pinned()
        assert host[1000:].is_pinned()
        assert torch.from_numpy(pinned.array(dtype="i4")).is_pinned()
        assert host.pin_memory().data_ptr() == host.data_ptr()  # no copy is made
    assert not host.is_pinned()


def test_its_copies_are_asynchronous(device: CudaDevice, buffer: md.BufferMemoryDescriptor) -> None:
    """They return while the stream does what it was given before."""
    host = tensor(buffer, dtype=torch.int32)
    stream = torch.cuda.current_stream()
    with device.registered(buffer) as pinned:
        host.to("cuda", non_blocking=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(LONG)
        there = host.to("cuda", non_blocking=True)
        event = stream.record_event()
        assert not event.query()
        held = pinned.hold_for(stream.cuda_stream)
        assert not held.done
        with pytest.raises(md.InvalidArgument):
            pinned.close()
    assert held.done
    assert event.query()  # leaving the block waited for the stream
    assert torch.equal(there.cpu(), host)


def test_copies_of_ours_take_their_turn_in_torchs_streams(
    device: CudaDevice, buffer: md.BufferMemoryDescriptor
) -> None:
    host = tensor(buffer, dtype=torch.int32)
    expected = host + 3
    there = torch.zeros_like(host, device="cuda")
    there += 3  # loads the kernel, which may wait for the device
    torch.cuda.synchronize()
    with device.registered(buffer) as pinned:
        for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
            before = host.clone()
            with torch.cuda.stream(stream):
                pinned.copy_to_device(there.data_ptr(), stream=stream.cuda_stream)
                torch.cuda._sleep(LONG)
                there += 3
                back = pinned.copy_from_device(there.data_ptr(), stream=stream.cuda_stream)
            assert not back.done
            back.wait(60)
            assert torch.equal(host, before + 3)
    assert torch.equal(host, expected + 3)


class OnTheBus:
    """Registered memory as a kernel sees it, in the form that CUDA's libraries take."""

    def __init__(self, pinned: md.dma.PinnedMemory) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (pinned.nbytes // 4,),
            "typestr": "<i4",
            "data": (pinned.device_pointer, False),
            "version": 3,
        }


def test_kernels_read_and_write_it_in_place(
    device: CudaDevice, buffer: md.BufferMemoryDescriptor
) -> None:
    words = buffer.array(dtype="i4")
    total = int(words.sum(dtype="i8"))
    with device.registered(buffer) as pinned:
        seen = torch.as_tensor(OnTheBus(pinned), device=f"cuda:{device.index}")
        assert int(seen.sum(dtype=torch.int64)) == total
        seen += 1
        torch.cuda.synchronize()
        assert int(words.sum(dtype="i8")) == total + words.size
