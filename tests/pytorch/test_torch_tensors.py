"""Tensors over memory of ours: the same pages, alive as long as they, and never a way to die."""

from __future__ import annotations

import errno
import faulthandler
import gc
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed in this environment")

import torch
from children import finish, start

import memdesc as md
from memdesc import Access, BufferMemoryDescriptor, MultiMemoryDescriptor
from memdesc.interop.torch import tensor
from memdesc.testing import failing
from memdesc.vm.pages import page_size


def region_of(address: int) -> dict[str, str]:
    """What /proc/self/smaps says of the region that an address lies in."""
    found: dict[str, str] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \S+ *(.*)", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
            if inside:
                found.update(rights=bounds[3], name=bounds[4])
        elif inside:
            name, _, value = line.partition(":")
            found[name] = value.strip()
    return found


def test_a_tensor_lies_over_the_pages_themselves() -> None:
    with BufferMemoryDescriptor(8 * page_size, name="weights") as buffer:
        given = tensor(buffer, (4, 5), torch.float32, offset=64)
        given.copy_(torch.arange(20).view(4, 5))
        assert buffer.array((4, 5), "f4", offset=64).tolist() == given.tolist()
        assert given.data_ptr() == buffer.address + 64
        assert region_of(given.data_ptr())["rights"] == "rw-s"
        assert tensor(buffer).shape == (8 * page_size,)
        assert tensor(buffer, dtype="f8", offset=8).shape == (page_size - 1,)
        assert tensor(buffer, 3, "int16").tolist() == [0, 0, 0]
        assert tensor(buffer, (0, 7), "int16").shape == (0, 7)
        assert tensor(buffer, (), "int64").shape == ()


def test_every_dtype_of_plain_elements() -> None:
    kinds = {
        value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype) and not re.match(r"qu?int|bits|u?int[1-7]$", name)
    }
    assert {torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64} <= kinds
    with BufferMemoryDescriptor(page_size) as buffer:
        for kind in kinds:
            given = tensor(buffer, (2, 3), kind)
            assert (given.dtype, given.shape) == (kind, (2, 3))
        tensor(buffer, 4, torch.bfloat16)[:] = 1.5
        assert buffer.array(4, "u2").tolist() == [0x3FC0] * 4
        # By its own name, and by what NumPy calls it.
        assert tensor(buffer, 4, "bfloat16").tolist() == [1.5] * 4
        assert tensor(buffer, 4, np.dtype("?")).dtype == torch.bool
        assert tensor(buffer, 4, np.complex64).dtype == torch.complex64


def test_what_it_was_shared_as_and_the_arrays_own_form() -> None:
    with BufferMemoryDescriptor(page_size) as buffer:
        column_major = buffer.array((2, 3), "i4", order="F")
        column_major[:] = [[1, 2, 3], [4, 5, 6]]
        given = tensor(column_major)
        assert (given.tolist(), given.stride()) == (column_major.tolist(), (1, 2))
        given[1, 2] = 9
        assert column_major[1, 2] == 9
        assert tensor(buffer.array(6, "i4")[2:4]).tolist() == [2, 5]
        with md.Service("weights") as service:
            service.share("w", buffer, shape=(2, 3), dtype="<i4")
            with md.connect("weights") as weights, weights.map("w") as mapping:
                shared = tensor(mapping)
                assert (shared.shape, shared.dtype) == ((2, 3), torch.int32)
                shared += 1  # read-only: stays here
                assert shared[0, 0] == 2
                assert column_major[0, 0] == 1
                assert tensor(mapping.array()).tolist() == mapping.array().tolist()


def test_the_memory_lives_as_long_as_a_view_of_the_tensor() -> None:
    buffer = BufferMemoryDescriptor(page_size, name="outlived", recycle=False)
    part = tensor(buffer, 100, "int32")[10:20]
    part[:] = 7
    address = part.data_ptr()
    buffer.close()
    del buffer
    gc.collect()
    assert part.tolist() == [7] * 10
    assert "outlived" in region_of(address)["name"]
    del part
    assert "outlived" not in region_of(address).get("name", "")


def test_unmap_refuses_while_a_tensor_is_there() -> None:
    with BufferMemoryDescriptor(page_size) as buffer:
        mapping = buffer.map(access=Access.READ_ONLY)
        private = tensor(mapping)  # which has a mapping of its own
        mapping.unmap()
        assert private[0] == 0
        with BufferMemoryDescriptor(page_size, max_access=Access.READ_WRITE) as other:
            mapping = other.map()
            given = tensor(mapping)
            with pytest.raises(BufferError):
                mapping.unmap()
            del given
            mapping.unmap()


def test_stores_to_read_only_memory_stay_private() -> None:
    with BufferMemoryDescriptor(64 * page_size, name="frozen") as buffer:
        words = buffer.array(dtype="i8")
        words[:] = 1
        mapping = buffer.map(access=Access.READ_ONLY)
        one, other = tensor(mapping, dtype="int64"), tensor(mapping, dtype="int64")
        step = page_size // 8
        one[0] = one[10 * step] = one[63 * step] = 5
        assert one[0] == 5
        assert other[0] == 1
        assert words[0] == mapping.array(dtype="i8")[0] == 1
        # Three pages were copied; of the others there is still one.
        seen = region_of(one.data_ptr())
        assert seen["rights"] == "rw-p"
        assert seen["Anonymous"] == f"{3 * page_size // 1024} kB"
        assert region_of(other.data_ptr())["Anonymous"] == "0 kB"
        # The pages that were not follow the owner, those that were do not.
        words[:] = 2
        assert (one[1], one[step]) == (1, 2)
        frozen = tensor(buffer.snapshot(), dtype="int64")
        words[:] = 3
        assert frozen.unique().tolist() == [2]


def test_copy_on_write_of_writable_memory_of_parts_and_of_several() -> None:
    with (
        BufferMemoryDescriptor(2 * page_size) as first,
        BufferMemoryDescriptor(page_size) as second,
    ):
        both = MultiMemoryDescriptor([first, second])
        own = tensor(both, copy_on_write=True)
        own[:] = 4
        assert not any(both.read_bytes())
        assert own.unique().tolist() == [4]
        first.write_bytes(100, b"abc")
        part = md.SubMemoryDescriptor(first, 100, 50)
        given = tensor(part, copy_on_write=True)
        assert bytes(given[:3].tolist()) == b"abc"
        assert tensor(first.array()[100:103], copy_on_write=True).tolist() == [97, 98, 99]


def test_a_private_mapping_that_can_not_be_had_is_an_error() -> None:
    """As of huge pages where the pool has none left for copies: mmap answers ENOMEM."""
    with BufferMemoryDescriptor(page_size) as buffer:
        mapping = buffer.map(access=Access.READ_ONLY)
        with failing("map_memory", errno.ENOMEM), pytest.raises(md.MappingError) as caught:
            tensor(mapping)
        assert caught.value.errno == errno.ENOMEM
        assert tensor(mapping).sum() == 0


def store_as_torch_does(array: np.ndarray) -> None:
    faulthandler.disable()
    import warnings

    warnings.simplefilter("ignore")  # "The given NumPy array is not writable"
    torch.from_numpy(array)[0] = 1


def store_as_we_do(mapping: md.MemoryMap) -> None:
    given = tensor(mapping)
    given[0] = 1
    assert given[0] == 1


@pytest.mark.slow
def test_torch_dies_of_a_store_to_read_only_memory_and_we_do_not() -> None:
    with BufferMemoryDescriptor(page_size) as buffer:
        mapping = buffer.map(access=Access.READ_ONLY)
        assert finish(start(store_as_torch_does, mapping.array())) == -signal.SIGSEGV
        assert finish(start(store_as_we_do, mapping)) == 0
        assert buffer.read_bytes(0, 1) == b"\0"
        with pytest.raises(md.SealedError) as caught:
            tensor(mapping, copy_on_write=False)
        assert caught.value.errno == errno.EACCES


def test_what_can_not_be_a_tensor() -> None:
    with BufferMemoryDescriptor(page_size) as buffer:
        for dtype in (">f4", "O", "V8", "no such", "S5", torch.qint8, "M8[s]", 7):
            with pytest.raises(md.InvalidArgument) as caught:
                tensor(buffer, 1, dtype)
            assert caught.value.errno == errno.EINVAL, dtype
        for memory in (buffer.array((8, 8))[:, 1:5], b"bytes", [1, 2]):
            with pytest.raises(md.InvalidArgument) as caught:
                tensor(memory)  # type: ignore[arg-type]
            assert caught.value.errno == errno.EINVAL
        strangers = np.zeros(5)
        strangers.flags.writeable = False
        with pytest.raises(md.InvalidArgument):
            tensor(strangers)
        with pytest.raises(md.InvalidArgument):
            tensor(buffer, (-1, 2))
        with pytest.raises(md.InvalidArgument):
            tensor(buffer, 4, "float32", offset=2)
        for shape, offset in (((page_size + 1,), 0), ((1,), page_size), (None, -1)):
            with pytest.raises(md.RangeError) as ranged:
                tensor(buffer, shape, "uint8", offset=offset)
            assert ranged.value.errno == errno.EINVAL
    with pytest.raises(md.ClosedError):
        tensor(buffer)


def test_torch_multiprocessing_moves_what_it_sends() -> None:
    """So the documentation says; it is what its queues do to every tensor."""
    with BufferMemoryDescriptor(page_size) as buffer:
        given = tensor(buffer)
        given.share_memory_()
        given[0] = 1
        assert buffer.read_bytes(0, 1) == b"\0"
        assert given.data_ptr() != buffer.address


@pytest.mark.slow
def test_without_torch_the_error_says_what_to_install() -> None:
    program = """
import sys
import memdesc.interop.torch as ours
assert "torch" not in sys.modules and "numpy" not in sys.modules
sys.modules["torch"] = None
for name in ours.__all__:
    try:
        getattr(ours, name)
    except ModuleNotFoundError as error:
        assert error.name == "torch" and "memdesc[torch]" in str(error), error
    else:
        raise AssertionError(name)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
