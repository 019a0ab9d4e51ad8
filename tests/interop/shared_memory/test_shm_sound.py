"""What ours adds and does otherwise: exact size, seals, read-only, growth, views that stay."""

import ctypes
import errno
import fcntl
import gc
import mmap
import os
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children import in_child
from shm_both import left_in, memfds_of

import memdesc as md
from memdesc import _core, page_size
from memdesc.interop.shared_memory import SharedMemory, keeping
from memdesc.testing.faults import failing

Closing = Callable[[Any], Any]


@pytest.mark.parametrize("size", [1, 10, page_size - 1, page_size, page_size + 1, 100_003])
def test_the_size_is_the_one_asked_for(closing: Closing, size: int) -> None:
    block = closing(SharedMemory(create=True, size=size))
    other = SharedMemory(block.name)
    for shm in (block, other):
        assert shm.size == len(shm.buf) == size
    other.close()


def test_nobody_takes_a_byte_away(closing: Closing) -> None:
    block = closing(SharedMemory(create=True, size=10))
    block.buf[:] = b"0123456789"
    other = SharedMemory(block.name)
    for shm in (block, other):
        for size in (0, page_size * 2):
            with pytest.raises(PermissionError):
                os.ftruncate(shm.fileno(), size)
        wanted = _core.F_SEAL_GROW | _core.F_SEAL_SHRINK | _core.F_SEAL_SEAL
        assert fcntl.fcntl(shm.fileno(), fcntl.F_GET_SEALS) & wanted == wanted
    other.close()
    assert bytes(block.buf) == b"0123456789"


def test_the_pages_are_there_from_the_start_or_at_the_first_touch(closing: Closing) -> None:
    eager = closing(SharedMemory(create=True, size=50 * page_size))
    lazy = closing(SharedMemory(create=True, size=50 * page_size, lazy=True))
    assert os.fstat(eager.fileno()).st_blocks * 512 >= 50 * page_size
    assert os.fstat(lazy.fileno()).st_blocks == 0
    lazy.buf[0] = 1
    assert os.fstat(lazy.fileno()).st_blocks * 512 > 0


def test_too_much_is_a_memory_error_and_leaves_nothing() -> None:
    for size in (1 << 50, 1 << 62):
        for kind in (MemoryError, OSError, md.AllocationError):
            with pytest.raises(kind) as caught:
                SharedMemory("large", create=True, size=size)
            assert caught.value.errno in (errno.ENOMEM, errno.EFBIG, errno.EINVAL)
    with pytest.raises(FileNotFoundError):
        SharedMemory("large")


def test_much_more_than_is_used(closing: Closing) -> None:
    block = closing(SharedMemory(create=True, size=1 << 36, lazy=True))
    block.buf[-1] = 1
    other = SharedMemory(block.name)
    assert other.buf[-1] == 1 and other.size == 1 << 36
    other.close()


@pytest.mark.parametrize("call", ["memfd_create", "ftruncate"])
def test_a_failure_at_creation_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, call: str, closing: Closing
) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError) as caught:
            SharedMemory("frames", create=True, size=10)
    assert caught.value.errno == errno.ENOSPC
    closing(SharedMemory("frames", create=True, size=10))


def test_a_mapping_that_fails_leaves_nothing(closing: Closing) -> None:
    block = closing(SharedMemory(create=True, size=10))
    before = memfds_of("self", block.name)
    with failing("map_memory", errno.ENOMEM), pytest.raises(md.MappingError):
        SharedMemory(block.name)
    assert memfds_of("self", block.name) == before


@pytest.mark.parametrize("create", [True, False])
def test_an_object_that_can_not_be_finished_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, closing: Closing, runtime_dir: Path, create: bool
) -> None:
    block = closing(SharedMemory("frames", create=True, size=10))
    name = "new" if create else "frames"
    before, descriptors = left_in(runtime_dir), memfds_of("self", name)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(keeping, "keep", fail)
        with pytest.raises(KeyboardInterrupt):
            SharedMemory(name, create=create, size=10)
    gc.collect()
    assert (left_in(runtime_dir), memfds_of("self", name)) == (before, descriptors)
    assert block.size == 10


# -- read-only -------------------------------------------------------------------------------------


def test_read_only_is_read_only(closing: Closing) -> None:
    block = closing(SharedMemory(create=True, size=10))
    block.buf[:3] = b"abc"
    reader = SharedMemory(block.name, readonly=True)
    assert reader.readonly and not block.readonly
    assert reader.buf.readonly and bytes(reader.buf[:3]) == b"abc"
    with pytest.raises(TypeError):
        reader.buf[0] = 1
    array = np.frombuffer(reader.buf, "u1")
    with pytest.raises(ValueError):
        array.flags.writeable = True
    with pytest.raises(PermissionError):
        mmap.mmap(reader.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    block.buf[:3] = b"new"
    again = pickle.loads(pickle.dumps(reader))
    assert again.readonly and bytes(again.buf[:3]) == b"new"
    del array
    again.close()
    reader.close()


def test_the_kernel_itself_does_not_store_into_read_only_memory(closing: Closing) -> None:
    block = closing(SharedMemory(create=True, size=10))
    reader = SharedMemory(block.name, readonly=True)
    address = _core.buffer_address(reader.buf)[0]
    with pytest.raises(OSError) as caught:
        _core.process_vm_writev(os.getpid(), b"x", address)
    assert caught.value.errno == errno.EFAULT
    reader.close()


def test_a_block_is_not_made_read_only() -> None:
    with pytest.raises(md.InvalidArgument):
        SharedMemory(create=True, size=1, readonly=True)


# -- views and closing -----------------------------------------------------------------------------


def test_after_close_there_is_no_buffer_and_that_is_said(closing: Closing) -> None:
    block = closing(SharedMemory(create=True, size=10))
    block.close()
    for use in (
        lambda: block.buf,
        block.fileno,
        block.as_descriptor,
        lambda: block.grow(20),
        lambda: np.ndarray((3,), "u1", buffer=block.buf),
    ):
        with pytest.raises(md.ClosedError):
            use()


def test_views_outlive_close_and_the_block(closing: Closing) -> None:
    block = closing(SharedMemory(create=True, size=page_size))
    views = [
        np.ndarray((4,), "u1", buffer=block.buf),
        np.frombuffer(block.buf, "u1")[:4],
        block.buf[:4],
        (ctypes.c_char * 4).from_buffer(block.buf),
    ]
    block.close()
    block.unlink()
    gc.collect()
    views[0][0] = 65
    assert [bytes(view)[:1] for view in views] == [b"A"] * 4


def test_the_memory_goes_with_the_last_view() -> None:
    block = SharedMemory(create=True, size=page_size)
    memory = weakref.ref(block._window.memory)
    array = np.ndarray((4,), "u1", buffer=block.buf)
    held = block.buf
    block.close()
    block.unlink()
    assert memory() is not None
    del array
    assert memory() is not None, "others than NumPy keep no more than the memoryview"
    del held
    assert memory() is None


def test_an_array_outlives_a_block_that_nobody_keeps(closing: Closing) -> None:
    def make() -> np.ndarray[Any, Any]:
        block = SharedMemory("frames", create=True, size=800)
        return np.ndarray((100,), "f8", buffer=block.buf)

    array = make()
    gc.collect()
    array[:] = 1.5
    other = closing(SharedMemory("frames"))
    assert np.ndarray((100,), "f8", buffer=other.buf).sum() == 150


def test_a_block_in_a_cycle_is_collected_without_a_word(
    capfd: pytest.CaptureFixture[str],
) -> None:
    block = SharedMemory(create=True, size=10)
    name = block.name
    ring: list[Any] = [block, block.buf[:5]]
    ring.append(ring)
    del block, ring
    gc.collect()
    SharedMemory(name).unlink()
    gc.collect()
    assert capfd.readouterr().err == ""


# -- growth ----------------------------------------------------------------------------------------


def test_it_grows_in_place_while_arrays_are_alive(closing: Closing) -> None:
    block = closing(SharedMemory(create=True, size=100, reserve=10 * page_size))
    assert block.reserve == 10 * page_size
    other = SharedMemory(block.name)
    reader = SharedMemory(block.name, readonly=True)
    array = np.ndarray((100,), "u1", buffer=block.buf)
    with pytest.raises(md.SealedError) as caught:
        reader.grow(5 * page_size)
    assert caught.value.errno == errno.EACCES
    block.grow(5 * page_size)
    assert len(block.buf) == block.size == 5 * page_size
    assert os.fstat(block.fileno()).st_blocks * 512 >= 5 * page_size
    for shm in (other, reader):
        assert shm.size == 100
        shm.grow(5 * page_size)
    later = SharedMemory(block.name)
    assert later.size == 5 * page_size
    array[0] = 7
    block.buf[-1] = 8
    for shm in (block, other, reader, later):
        assert (shm.buf[0], shm.buf[-1]) == (7, 8)
    block.grow(5 * page_size)
    for size in (5 * page_size - 1, 10 * page_size + 1):
        with pytest.raises(md.RangeError):
            block.grow(size)
    for shm in (other, reader, later):
        shm.close()


def test_growth_that_finds_no_memory_changes_nothing(closing: Closing) -> None:
    block = closing(SharedMemory(create=True, size=100, reserve=1 << 40))
    with failing("fallocate", errno.ENOSPC), pytest.raises(md.AllocationError) as caught:
        block.grow(2 * page_size)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(MemoryError):
        block.grow(1 << 40)
    assert block.size == len(block.buf) == 100
    assert SharedMemory(block.name).size == 100
    block.grow(1 << 40, lazy=True)
    block.buf[-1] = 1


def test_growth_after_unlink_is_of_who_does_it(closing: Closing) -> None:
    block = closing(SharedMemory(create=True, size=100, reserve=3 * page_size))
    reader = SharedMemory(block.name, readonly=True)
    block.unlink()
    following = closing(SharedMemory(block.name, create=True, size=5))
    block.grow(2 * page_size)
    assert block.size == 2 * page_size
    with pytest.raises(md.SealedError):
        reader.grow(2 * page_size)
    again = SharedMemory(following.name)
    assert again.size == 5
    again.close()
    reader.close()


# -- with the rest of the house --------------------------------------------------------------------


def test_it_is_a_descriptor_to_be_mapped_and_handed_over(closing: Closing) -> None:
    block = closing(SharedMemory(create=True, size=page_size))
    with block.as_descriptor() as descriptor:
        assert descriptor.length == page_size and descriptor.max_access is md.Access.READ_WRITE
        descriptor.write_bytes(0, b"by descriptor")
        with descriptor.prepared():
            assert descriptor.page_counts().resident == 1
    assert bytes(block.buf[:13]) == b"by descriptor"
    reader = SharedMemory(block.name, readonly=True)
    with reader.as_descriptor() as descriptor, pytest.raises(md.SealedError):
        descriptor.write_bytes(0, b"no")
    reader.close()


def test_a_child_that_lost_its_rights_still_finds_the_name_of_its_user(closing: Closing) -> None:
    block = closing(SharedMemory(create=True, size=10))
    block.buf[:3] = b"abc"

    def look() -> bytes:
        other = SharedMemory(block.name)
        found = bytes(other.buf[:3])
        other.close()
        return found

    assert in_child(look) == b"abc"
