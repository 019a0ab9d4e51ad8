"""The core's mappings and the views of them: who keeps the memory, and for how long."""

import copy
import gc
import os
import pickle
import weakref
from pathlib import Path

import numpy as np
import pytest
from core_tools import ANYWHERE, READ_WRITE, is_mapped, memfd, shared
from hypothesis import given, strategies as st

from memdesc import _core
from memdesc.vm.pages import page_size

# --- Mappings ---------------------------------------------------------------------------------


def test_memory_is_unmapped_when_the_last_holder_lets_go() -> None:
    memory = shared()
    address = memory.address
    window = _core.Window(memory, 0, page_size, True)
    del memory
    assert is_mapped(address)
    del window
    assert not is_mapped(address)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_owns_memory_is_never_copied(protocol: int) -> None:
    """A copy would unmap it once more: under its views, or what lies there by then."""
    memory = shared()
    ring = _core.Uring.__new__(_core.Uring)
    for one in (memory, _core.Window(memory, 0, page_size, True), ring):
        for copied in (copy.copy, copy.deepcopy, lambda it: pickle.dumps(it, protocol)):
            with pytest.raises(TypeError):
                copied(one)
    for kind in vars(_core).values():
        assert not hasattr(kind, "__setstate__"), kind


def test_a_ring_that_was_never_made_is_none() -> None:
    ring = _core.Uring.__new__(_core.Uring)
    with pytest.raises(ValueError, match="closed"):
        ring.pending
    ring.close()
    os.fstat(0)


def test_memory_in_a_cycle_is_unmapped_by_the_collector() -> None:
    class Holder:
        pass

    holder = Holder()
    holder.me, holder.memory = holder, shared()  # type: ignore[attr-defined]
    address = holder.memory.address  # type: ignore[attr-defined]
    del holder
    gc.collect()
    assert not is_mapped(address)


def test_memory_is_shared_or_private_as_asked() -> None:
    fd = memfd()
    try:
        one = _core.map_memory(0, page_size, READ_WRITE, _core.MAP_SHARED, fd, 0)
        two = _core.map_memory(0, page_size, READ_WRITE, _core.MAP_SHARED, fd, 0)
        own = _core.map_memory(0, page_size, READ_WRITE, _core.MAP_PRIVATE, fd, 0)
        views = [memoryview(_core.Window(memory, 0, page_size, True)) for memory in (one, two, own)]
        views[2][0] = 7  # copied here
        views[0][0] = 9
        assert [view[0] for view in views] == [9, 9, 7]
        assert os.pread(fd, 1, 0) == b"\x09"
    finally:
        os.close(fd)


def test_a_duplicate_is_the_same_memory_and_outlives_the_first() -> None:
    first = shared()
    second = _core.duplicate_memory(first.address, page_size)
    assert second.address != first.address
    memoryview(_core.Window(first, 0, page_size, True))[5] = 55
    del first
    gc.collect()
    assert memoryview(_core.Window(second, 0, page_size, False))[5] == 55


def test_reserved_memory_takes_no_memory_and_what_is_placed_there() -> None:
    reserved = _core.reserve_memory(1 << 40)  # a tebibyte of addresses
    fd = memfd(page_size)
    try:
        at = 3 * page_size
        _core.place_memory(reserved, at, page_size, READ_WRITE, _core.MAP_SHARED, fd, 0)
        memoryview(_core.Window(reserved, at, page_size, True))[:5] = b"hello"
        assert os.pread(fd, 5, 0) == b"hello"
    finally:
        os.close(fd)
    address = reserved.address
    del reserved
    assert not is_mapped(address) and not is_mapped(address + at)


@pytest.mark.parametrize(
    ("at", "length"),
    [
        (0, 3 * page_size),
        (page_size, 2 * page_size),
        (2 * page_size, page_size),
        (3 * page_size, page_size),
        (2**64 - page_size, page_size),
        (page_size, 2**64 - page_size),
    ],
)
def test_nothing_is_placed_outside_the_reserved_range(at: int, length: int) -> None:
    reserved = _core.reserve_memory(2 * page_size)
    before = Path("/proc/self/maps").read_text()
    with pytest.raises(ValueError):
        _core.place_memory(reserved, at, length, READ_WRITE, *ANYWHERE)
    assert Path("/proc/self/maps").read_text() == before


def test_mincore_tells_the_pages_that_are_resident() -> None:
    memory = shared(4 * page_size)
    memoryview(_core.Window(memory, 0, 4 * page_size, True))[2 * page_size] = 1
    resident = _core.mincore(memory.address, 3 * page_size + 1)
    assert [page & 1 for page in resident] == [0, 0, 1, 0]


# --- Windows: the exporter of buffers ---------------------------------------------------------


def test_a_window_is_made_once_and_never_without_memory() -> None:
    window = _core.Window(shared(), 0, page_size, True)
    view, address = memoryview(window), window.address
    window.__init__(shared(), 0, 1, False)  # type: ignore[misc]
    assert (window.address, window.nbytes, window.writable) == (address, page_size, True)
    view[-1] = 7  # would be SIGSEGV, were the memory another
    assert is_mapped(address)
    with pytest.raises(TypeError):
        _core.Window.__new__(_core.Window)


def test_exports_are_counted() -> None:
    window = _core.Window(shared(), 0, 100, True)
    assert window.exports == 0
    view = memoryview(window)
    part = view[10:20]  # a part of a view is the same export
    other = memoryview(window)
    assert window.exports == 2
    other.release()
    assert window.exports == 1
    view.release()
    assert window.exports == 1  # held by the part
    part.release()
    assert window.exports == 0


def test_a_view_is_of_its_bytes_and_nothing_else() -> None:
    memory = shared(2 * page_size)
    window = _core.Window(memory, page_size - 2, 4, True)
    view = memoryview(window)
    assert (view.format, view.itemsize, view.shape, view.strides) == ("B", 1, (4,), (1,))
    assert (view.nbytes, len(window), view.c_contiguous) == (4, 4, True)
    assert _core.buffer_address(view) == (memory.address + page_size - 2, 4, False)
    assert window.address == memory.address + page_size - 2
    view[:] = b"abcd"
    whole = bytes(memoryview(_core.Window(memory, 0, 2 * page_size, False)))
    assert whole == bytes(page_size - 2) + b"abcd" + bytes(page_size - 2)


def test_a_read_only_window_gives_no_writable_view() -> None:
    window = _core.Window(shared(), 0, 8, False)
    view = memoryview(window)
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 1
    with pytest.raises(BufferError):
        _core.copy_memory(window, bytes(8))
    del view
    assert window.exports == 0  # the refused one is not counted


def test_an_empty_window_at_the_end() -> None:
    assert bytes(memoryview(_core.Window(shared(), page_size, 0, True))) == b""


def test_views_keep_the_memory_when_all_else_is_gone() -> None:
    memory = shared(16 * page_size)
    address = memory.address
    window = _core.Window(memory, 0, 16 * page_size, True)
    view = memoryview(window).cast("Q")
    part = view[100:200]
    del memory, window, view
    gc.collect()
    noise = [shared(16 * page_size) for _ in range(20)]  # would take the addresses
    part[7] = 0x0123_4567_89AB_CDEF
    assert part[7] == 0x0123_4567_89AB_CDEF
    assert all(mapped.address != address for mapped in noise)
    del part
    assert not is_mapped(address)


def test_numpy_arrays_keep_the_memory() -> None:
    window = _core.Window(shared(), 0, page_size, True)
    address = window.address
    array = np.frombuffer(window, "u4")[1::2]
    del window
    gc.collect()
    array[:] = 0xFFFF_FFFF
    assert int(array.sum(dtype="u8")) == 0xFFFF_FFFF * len(array)
    del array
    assert not is_mapped(address)


@given(
    offset=st.integers(-(2**70), 2**70) | st.integers(-2, 4 * page_size + 2),
    nbytes=st.integers(-(2**70), 2**70) | st.integers(-2, 4 * page_size + 2),
    writable=st.booleans(),
)
def test_a_window_lies_inside_its_memory_or_is_refused(
    offset: int, nbytes: int, writable: bool
) -> None:
    memory = shared(4 * page_size)
    if not (0 <= offset < 2**64 and 0 <= nbytes < 2**64):
        with pytest.raises(OverflowError):
            _core.Window(memory, offset, nbytes, writable)
    elif offset + nbytes > memory.length:
        with pytest.raises(ValueError):
            _core.Window(memory, offset, nbytes, writable)
    else:
        window = _core.Window(memory, offset, nbytes, writable)
        assert (window.offset, window.nbytes, window.writable) == (offset, nbytes, writable)
        assert len(bytes(memoryview(window))) == nbytes


@pytest.mark.parametrize("memory", [None, b"bytes", 0])
def test_a_window_needs_memory(memory: object) -> None:
    with pytest.raises(TypeError):
        _core.Window(memory, 0, 0, False)  # type: ignore[arg-type]


# --- Exporters: subclasses whose views are a window's -----------------------------------------


class Holder(_core.Exporter):
    def __init__(self, answer: object) -> None:
        self.answer = answer

    def _export(self) -> _core.Window:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[return-value]


def test_the_views_of_an_exporter_are_its_windows() -> None:
    window = _core.Window(shared(), 0, 4, True)
    holder = Holder(window)
    view = memoryview(holder)
    assert window.exports == 1
    assert view.obj is window
    gone = weakref.ref(holder)
    del holder
    assert gone() is None
    view[:] = b"view"
    assert bytes(view) == b"view"


def test_an_array_over_an_exporter_is_a_view_like_any_other() -> None:
    window = _core.Window(shared(), 0, 4, True)
    holder = Holder(window)
    array = np.frombuffer(holder, "u1")
    assert window.exports == 1
    holder.answer = ValueError("closed")
    address = window.address
    del window, holder
    gc.collect()
    assert is_mapped(address)
    array[:] = 7
    assert array.tolist() == [7] * 4
    del array
    assert not is_mapped(address)


@pytest.mark.parametrize("answer", [None, 5, "text", ValueError("closed")])
def test_an_exporter_with_nothing_to_give_raises(answer: object) -> None:
    with pytest.raises(type(answer) if isinstance(answer, Exception) else TypeError):
        memoryview(Holder(answer))
    with pytest.raises((TypeError, AttributeError)):
        memoryview(_core.Exporter())


def test_an_heir_gets_the_range_when_the_last_holder_lets_go() -> None:
    left: list[_core.MappedMemory] = []
    memory = shared()
    memory.leave_to(left.append)
    address, window = memory.address, _core.Window(memory, 0, page_size, True)
    view = memoryview(window)
    view[:4] = b"kept"
    del memory, window
    assert left == []
    del view
    (heir,) = left
    assert (heir.address, heir.length) == (address, page_size)
    assert bytes(memoryview(_core.Window(heir, 0, 4, False))) == b"kept"
    left.clear()
    del heir
    assert not is_mapped(address)


def test_an_heir_in_a_cycle_gets_the_range_from_the_collector() -> None:
    left: list[_core.MappedMemory] = []
    memory = shared()
    cycle: list[object] = [memory]
    cycle.append(cycle)
    memory.leave_to(lambda heir, cycle=cycle: left.append(heir))
    address = memory.address
    del memory, cycle
    gc.collect()
    assert [heir.address for heir in left] == [address]


def test_an_heir_that_raises_is_told_of_and_the_range_unmapped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lambda unraisable: told.append(unraisable.exc_value))

    def refuse(_: _core.MappedMemory) -> None:
        raise ValueError("not wanted")

    memory = shared()
    memory.leave_to(refuse)
    address = memory.address
    del memory
    assert [type(error) for error in told] == [ValueError]
    told.clear()
    gc.collect()
    assert not is_mapped(address)


def test_an_heir_can_be_disinherited() -> None:
    left: list[_core.MappedMemory] = []
    memory = shared()
    memory.leave_to(left.append)
    memory.leave_to(None)
    address = memory.address
    del memory
    assert left == []
    assert not is_mapped(address)
