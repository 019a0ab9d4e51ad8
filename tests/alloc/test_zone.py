"""Zone: elements, what is checked when they are freed and given out again, and what it tells."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import pickle
import struct
import subprocess
import sys
import threading
from itertools import pairwise

import pytest
from zone_tools import T, balanced, make, poke, settled

import memdesc
from memdesc import (
    ClosedError,
    DoubleFreeError,
    InvalidArgument,
    MemdescError,
    RangeError,
    UseAfterFreeError,
    Zone,
    ZoneExhausted,
)
from memdesc.vm.pages import page_size

# --- Elements ---------------------------------------------------------------------------------


def test_an_element_is_a_writable_buffer_of_zeros() -> None:
    zone = make(100)
    element = zone.alloc()
    view = memoryview(element)
    assert (view.nbytes, view.readonly, view.format, view.contiguous) == (100, False, "B", True)
    assert bytes(view) == bytes(100)
    view[:] = bytes(range(100))
    assert bytes(element) == bytes(range(100))
    struct.pack_into("<Q", element, 8, 77)
    assert ctypes.c_uint64.from_address(element.address + 8).value == 77
    assert len(element) == zone.element_size == 100
    assert (element.zone, element.number, element.living) == (zone, 1, True)


def test_elements_do_not_overlap_and_are_aligned() -> None:
    for size, alignment in [(1, 1), (24, 8), (100, 16), (100, 128), (3000, page_size), (7, 1)]:
        zone = make(size, 300, alignment=alignment)
        elements = [zone.alloc() for _ in range(300)]
        for index, element in enumerate(elements):
            memoryview(element)[:] = bytes([index % 255 + 1]) * size
        for index, element in enumerate(elements):
            assert bytes(element) == bytes([index % 255 + 1]) * size
            assert element.address % alignment == 0
        ranges = sorted((element.address, element.address + size) for element in elements)
        assert all(left[1] <= right[0] for left, right in pairwise(ranges))


def test_an_element_aligned_to_its_size_crosses_no_page() -> None:
    zone = make(512, 100, alignment=512)
    for element in [zone.alloc() for _ in range(100)]:
        assert element.address // page_size == (element.address + 511) // page_size


def test_the_last_freed_is_the_next_given_and_is_zero() -> None:
    zone = make()
    element = zone.alloc()
    address = element.address
    memoryview(element)[:] = b"\xff" * 256
    zone.free(element)
    again = zone.alloc()
    assert again.address == address
    assert bytes(again) == bytes(256)
    assert again.number == 2


def test_the_largest_element_and_the_smallest() -> None:
    large = make(1 << 20, 3)
    elements = [large.alloc() for _ in range(3)]
    for element in elements:
        memoryview(element)[-1] = 1
    with pytest.raises(ZoneExhausted):
        large.alloc()
    small = make(1, 5, alignment=1)
    assert len({small.alloc().address for _ in range(5)}) >= 1
    assert small.statistics().drops == 5


@pytest.mark.parametrize(
    "bad",
    [
        {"element_size": 0},
        {"element_size": -1},
        {"element_size": (1 << 20) + 1},
        {"element_size": 1 << 200},
        {"element_size": 1.5},
        {"element_size": "256"},
        {"capacity": 0},
        {"capacity": 255},
        {"capacity": -1},
        {"capacity": 1 << 62},
        {"capacity": None},
        {"element_size": 100, "capacity": 111},  # a stride of 112
        {"alignment": 0},
        {"alignment": 3},
        {"alignment": -16},
        {"alignment": 2 * page_size},
        {"alignment": "16"},
        {"name": ""},
        {"name": "x" * 64},
        {"name": "a\nb"},
        {"name": b"bytes"},
        {"name": None},
    ],
    ids=str,
)
def test_what_can_be_no_zone(bad: dict[str, object]) -> None:
    good: dict[str, object] = {"name": "bad", "element_size": 256, "capacity": 1 << 20}
    before = settled()
    with pytest.raises(InvalidArgument) as caught:
        Zone(**(good | bad))  # type: ignore[arg-type]
    value = list(bad.values())[-1]
    if isinstance(value, int) and abs(value) < 1 << 40:
        assert f"{value:,}" in str(caught.value) or str(value) in str(caught.value)
    assert memdesc.zone_map.statistics() == before
    assert "bad" not in {row.name for row in memdesc.zprint().zones}


# --- Freeing ----------------------------------------------------------------------------------


def test_a_second_free_is_told_and_changes_nothing() -> None:
    zone = make(elements=2)
    element = zone.alloc()
    zone.free(element)
    other = zone.alloc()  # the same memory, somebody else's by now
    memoryview(other)[:5] = b"other"
    for _ in range(2):
        with pytest.raises(DoubleFreeError):
            zone.free(element)
    assert bytes(other)[:5] == b"other"
    assert zone.statistics().in_use == 1
    assert balanced(zone)


def test_what_is_not_of_the_zone_is_not_freed() -> None:
    zone, other = make(), make()
    theirs = other.alloc()
    mine = zone.alloc()
    gone = make().alloc()
    for wrong in (theirs, gone, memoryview(mine), bytearray(256), None, mine.address):
        with pytest.raises(InvalidArgument):
            zone.free(wrong)  # type: ignore[arg-type]
    assert mine.living
    assert theirs.living
    assert (zone.statistics().frees, other.statistics().frees) == (0, 0)


def test_an_element_with_views_is_not_freed() -> None:
    zone = make()
    element = zone.alloc()
    first, second = memoryview(element), memoryview(element)
    part = first[3:7]
    for view in (first, part):
        assert element.exports >= 1
        with pytest.raises(BufferError):
            zone.free(element)
        view.release()
    second[0] = 7
    second.release()
    assert element.exports == 0
    zone.free(element)
    with pytest.raises(BufferError):
        memoryview(element)


def test_a_numpy_array_is_a_view() -> None:
    np = pytest.importorskip("numpy")
    zone = make()
    element = zone.alloc()
    array = np.frombuffer(element, "u4")
    array[:] = 9
    with pytest.raises(BufferError):
        zone.free(element)
    address = element.address
    del element
    gc.collect()
    assert zone.statistics().in_use == 1  # the array keeps it
    assert array.sum() == 9 * 64
    del array
    assert zone.statistics().drops == 1
    assert zone.alloc().address == address


def test_what_is_dropped_goes_back_by_itself() -> None:
    zone = make(elements=1)
    for _ in range(3):
        element = zone.alloc()
        memoryview(element)[:] = b"\xff" * 256
        del element
    told = zone.statistics()
    assert (told.allocs, told.frees, told.drops, told.in_use) == (3, 0, 3, 0)
    assert bytes(zone.alloc()) == bytes(256)


def test_what_is_dropped_in_a_cycle_goes_back_with_the_collector() -> None:
    zone = make(elements=1)
    cycle: list[object] = [zone.alloc()]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert zone.statistics().drops == 1
    zone.alloc()


def test_an_element_outlives_its_zone() -> None:
    zone = make()
    element = zone.alloc()
    memoryview(element)[:4] = b"kept"
    used = settled().used
    del zone
    gc.collect()
    assert element.zone is None
    assert "gone" in repr(element)
    assert bytes(element)[:4] == b"kept"
    assert memdesc.zone_map.statistics().used == used
    del element
    assert memdesc.zone_map.statistics().used < used


def test_the_block_of_an_element() -> None:
    zone = make(elements=1)
    with zone.element() as element:
        memoryview(element)[:2] = b"in"
        with pytest.raises(ZoneExhausted), zone.element():
            pass
    assert not element.living
    assert zone.statistics().frees == 1
    with pytest.raises(DoubleFreeError):
        zone.free(element)


def test_leaving_the_block_raises_nothing_for_views() -> None:
    zone = make(elements=1)
    with zone.element() as element:
        view = memoryview(element)
        view[:4] = b"kept"
    assert bytes(view[:4]) == b"kept"
    with pytest.raises(BufferError):
        memoryview(element)  # no new ones
    with pytest.raises(DoubleFreeError):
        zone.free(element)
    with pytest.raises(ZoneExhausted):
        zone.alloc()
    view.release()
    told = zone.statistics()
    assert (told.in_use, told.frees, told.drops) == (0, 1, 0)
    zone.alloc()


def test_leaving_the_block_by_an_exception_frees_and_freeing_inside_is_fine() -> None:
    zone = make(elements=1)
    with pytest.raises(KeyError), zone.element():
        raise KeyError
    with zone.element() as element:
        zone.free(element)
    assert zone.statistics().frees == 2


# --- Use after free ---------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 7, 63, 64, 100, 255])
def test_a_store_after_free_is_found_when_the_element_is_reused(offset: int) -> None:
    zone = make(elements=3)
    element = zone.alloc()
    address = element.address
    zone.free(element)
    poke(address + offset, 0x5A)
    with pytest.raises(UseAfterFreeError) as caught:
        zone.alloc()
    error = caught.value
    assert (error.address, error.offset, error.value) == (address, offset, 0x5A)
    assert f"offset {offset}" in str(error)
    assert "0x5a" in str(error)
    # It is quarantined, and the zone goes on.
    left = [zone.alloc() for _ in range(2)]
    assert address not in {element.address for element in left}
    with pytest.raises(ZoneExhausted) as exhausted:
        zone.alloc()
    assert "1 quarantined" in str(exhausted.value)
    told = zone.statistics()
    assert (told.quarantined, told.in_use, told.allocs) == (1, 2, 3)
    assert told.flags == f"C{T}Q"


def test_a_store_past_the_end_is_found_too() -> None:
    zone = make(100, 3)  # a stride of 112
    element = zone.alloc()
    poke(element.address + 103)
    zone.free(element)
    with pytest.raises(UseAfterFreeError, match="3 bytes past the end"):
        zone.alloc()


def test_an_exception_of_use_after_free_leaks_no_element_object() -> None:
    zone = make(elements=2)
    element = zone.alloc()
    zone.free(element)
    poke(element.address)
    with pytest.raises(UseAfterFreeError):
        zone.alloc()
    gc.collect()
    assert balanced(zone)
    assert zone.statistics().in_use == 0


# --- require ----------------------------------------------------------------------------------


def test_require_passes_what_lies_in_one_living_element() -> None:
    zone = make(100)
    element = zone.alloc()
    whole = memoryview(element)
    for part in (element, whole, whole[:1], whole[99:], whole[10:20]):
        zone.require(part)
    zone.require((ctypes.c_char * 100).from_address(element.address))


def test_require_refuses_everything_else() -> None:
    zone, other = make(100, 4), make(100, 4)
    element, theirs = zone.alloc(), other.alloc()
    address = element.address

    def at(start: int, length: int) -> object:
        return (ctypes.c_char * length).from_address(start)

    for wrong in (theirs, memoryview(theirs), bytes(10), at(address + 112, 1), at(address - 1, 1)):
        with pytest.raises(InvalidArgument):
            zone.require(wrong)  # type: ignore[arg-type]
    for crossing in (at(address, 101), at(address + 99, 2), at(address + 100, 1)):
        with pytest.raises(RangeError):
            zone.require(crossing)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument):
        zone.require(5)  # type: ignore[arg-type]
    zone.free(element)
    for freed in (element, at(address, 10)):
        with pytest.raises(InvalidArgument, match="free"):
            zone.require(freed)  # type: ignore[arg-type]
    poke(address)
    with pytest.raises(UseAfterFreeError):
        zone.alloc()
    with pytest.raises(InvalidArgument, match="quarantined"):
        zone.require(at(address, 10))  # type: ignore[arg-type]


# --- Closing ----------------------------------------------------------------------------------


def test_a_closed_zone_gives_nothing_and_takes_back() -> None:
    zone = make()
    kept, freed = zone.alloc(), zone.alloc()
    zone.close()
    zone.close()
    for call in (zone.alloc, lambda: zone.alloc(timeout=None), lambda: zone.alloc(0.01)):
        with pytest.raises(ClosedError):
            call()
    zone.free(freed)
    memoryview(kept)[:4] = b"kept"
    zone.require(kept)
    assert bytes(kept)[:4] == b"kept"
    told = zone.statistics()
    assert (told.closed, told.in_use, told.frees) == (True, 1, 1)
    assert "X" in told.flags
    assert zone.closed


def test_the_block_of_a_zone_closes_it_and_its_memory_goes() -> None:
    before = settled().used
    with make() as zone:
        zone.free(zone.alloc())
    assert zone.closed
    assert zone.statistics().current_size == 0
    assert memdesc.zone_map.statistics().used == before


# --- What it is not ---------------------------------------------------------------------------


def test_neither_zone_nor_element_is_copied_or_pickled() -> None:
    zone = make()
    element = zone.alloc()
    for thing in (zone, element):
        for act in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError):
                act(thing)
    assert zone.statistics().allocs == 1


def test_elements_are_made_by_zones_only() -> None:
    with pytest.raises(TypeError):
        memdesc._core.ZoneElement()
    bare = memdesc._core.ElementList()
    assert bare._take() is None
    assert bare._add_chunk(page_size, 1, None) == 0
    zone = make()
    element = zone.alloc()
    before = zone.statistics()
    with pytest.raises(TypeError):
        Zone.__init__(zone, "again", 16, 1024)
    assert zone.statistics() == before
    zone.free(element)
    assert zone.collect() == before.current_size


def test_an_element_made_past_its_init_is_of_no_zone() -> None:
    bare = memdesc._core.ZoneElement.__new__(memdesc._core.ZoneElement)
    zone = make()
    with pytest.raises(BufferError):
        memoryview(bare)
    with pytest.raises(InvalidArgument):
        zone.require(bare)
    for use in (len, repr, zone.free, memdesc.io_free, lambda element: element.zone):
        with pytest.raises(AttributeError):
            use(bare)
    assert not bare.living
    assert balanced(zone)


def test_wrong_types_in_the_core_do_not_crash() -> None:
    zone = make()
    with pytest.raises(TypeError):
        zone._let_go(None)  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        zone._revive(99)
    zone.free(zone.alloc())
    assert not zone._revive(0)


# --- What it tells ----------------------------------------------------------------------------


def test_statistics_of_a_life() -> None:
    zone = Zone("life", 256, 1 << 20)
    elements = [zone.alloc() for _ in range(300)]
    for element in elements[:100]:
        zone.free(element)
    told = zone.statistics()
    assert (told.element_size, told.stride, told.allocation_size) == (256, 256, 65536)
    assert (told.current_size, told.peak_size, told.max_size) == (131072, 131072, 1 << 20)
    assert (told.current_elements, told.max_elements) == (512, 4096)
    assert (told.in_use, told.peak_in_use) == (200, 300)
    assert (told.allocs, told.frees, told.drops) == (300, 100, 0)
    assert (told.failures, told.waits, told.waiting, told.quarantined) == (0, 0, 0, 0)
    assert (told.wired, told.tracked, told.closed, told.flags) == (False, bool(T), False, f"C{T}")


def test_zprint_tells_of_all_zones_in_columns() -> None:
    zones = [Zone(f"zprint {letter}", 64, 4096) for letter in "ba"]
    element = zones[0].alloc()
    table = memdesc.zprint()
    assert [row for row in table.zones if row.name == "zprint b"] == [zones[0].statistics()]
    assert sorted(row.name for row in table.zones) == [row.name for row in table.zones]
    lines = str(table).splitlines()
    head = next(line for line in lines if line.startswith("zone name"))
    assert head.split()[2:] == ["size", "size", "size", "#elts", "#elts", "inuse", "size",
                                "allocs", "fails"]  # fmt: skip
    row = next(line for line in lines if line.startswith("zprint b"))
    assert row.split()[2:] == ["64", "4K", "4K", "64", "64", "1", "4K", "1", "0", f"C{T}"]
    assert table.zone_map == memdesc.zone_map.statistics()
    assert "zone map:" in lines[-1]
    del element, zones
    gc.collect()
    assert not {"zprint a", "zprint b"} & {row.name for row in memdesc.zprint().zones}


@pytest.mark.skipif(bool(T), reason="MEMDESC_DEBUG has tracking in all zones")
def test_holders_of_a_zone_that_does_not_track() -> None:
    zone = make()
    assert zone.holders() == ()
    elements = [zone.alloc() for _ in range(3)]
    zone.free(elements[0])
    (row,) = zone.holders()
    assert (row.elements, row.nbytes, row.oldest, row.newest) == (2, 512, 2, 3)
    assert "track=True" in row.holder


def _one_place(zone: Zone) -> list[object]:
    return [zone.alloc() for _ in range(3)]


def _another_place(zone: Zone) -> object:
    with zone.element() as element:
        return [zone.alloc(), zone.holders(), element]


def test_a_tracking_zone_tells_where_its_elements_were_allocated() -> None:
    zone = make(elements=5, track=True)
    three = _one_place(zone)
    one, holders, _ = _another_place(zone)  # type: ignore[misc]
    assert [row.elements for row in holders] == [3, 1, 1]
    assert "in _one_place" in holders[0].holder
    assert all("in _another_place" in row.holder for row in holders[1:])
    assert all(f"{__file__}:" in row.holder for row in holders)
    zone.free(three.pop())  # type: ignore[arg-type]
    assert [row.elements for row in zone.holders()] == [2, 1]
    keep = [zone.alloc(timeout=1) for _ in range(2)]
    with pytest.raises(ZoneExhausted) as caught:
        zone.alloc()
    assert caught.value.holders == zone.holders()
    assert "in _one_place" in str(caught.value)
    del keep, three, one, holders, _
    assert zone.holders() == ()
    assert zone._sites == {}
    assert zone.statistics().flags == "CT"


def test_the_exception_of_exhaustion_tells_all() -> None:
    zone = Zone("small", 256, 1024)
    elements = [zone.alloc() for _ in range(4)]
    with pytest.raises(ZoneExhausted) as caught:
        zone.alloc()
    error = caught.value
    assert isinstance(error, MemdescError | MemoryError)
    assert error.zone == "small"
    assert (error.requested, error.available) == (256, 0)
    assert error.errno == 12
    assert [row.elements for row in error.holders] == [4]
    assert "4 of 4 elements of 256 bytes" in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (again.zone, again.holders) == (error.zone, error.holders)
    zone.free(elements[0])
    zone.alloc()
    assert zone.statistics().failures == 1


def test_zones_are_listed_while_other_threads_make_them() -> None:
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            [make() for _ in range(10)]

    interval = sys.getswitchinterval()
    threads = [threading.Thread(target=work) for _ in range(2)]
    try:
        sys.setswitchinterval(1e-5)
        for thread in threads:
            thread.start()
        for _ in range(50):
            memdesc.zprint()
            memdesc.collect_zones()
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        for thread in threads:
            thread.join()


def test_the_interpreter_ends_in_peace_with_elements_alive() -> None:
    code = """
import memdesc as md
class Keeps:
    def __init__(self):
        self.zone = md.Zone("kept", 256, 1 << 17, wired=True)
        self.elements = [self.zone.alloc() for _ in range(300)]
        self.view = memoryview(self.elements[0])
        self.me = self
    def __del__(self):
        self.view.release()
        self.zone.free(self.elements[0])
keeps = Keeps()
cycle = [Keeps()]
cycle.append(cycle)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MEMDESC_DEBUG": ""},  # which tells of what is open at the end
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_elements_are_viewed_as_arrays() -> None:
    zone = Zone("arrays", element_size=64, capacity=1 << 16)
    element = zone.alloc()
    array = element.array((2, 4), "f8", order="F")
    array[:] = 1.5
    assert (array.shape, array.flags.f_contiguous, array.flags.writeable) == ((2, 4), True, True)
    assert element.array().sum() == sum(memoryview(element))
    assert element.array(1, "f8", offset=56)[0] == array[1, 3]
    with pytest.raises(memdesc.RangeError):
        element.array(9, "f8")
    with pytest.raises(BufferError):
        zone.free(element)
    del array
    zone.free(element)
    with pytest.raises(BufferError):
        element.array()
