"""Where zone memory is: given back to the kernel, wired, never shared, and after a fork."""

from __future__ import annotations

import errno
import gc
import threading

import pytest
from children import in_child, limit_locking
from puppets import Puppet
from wired import locked, nothing_wired  # noqa: F401 (a fixture)
from zone_tools import T, balanced, make, poke, present, settled

import memdesc
from memdesc import (
    AllocationError,
    ClosedError,
    Direction,
    MappingError,
    MappingReason,
    MemoryDescriptor,
    NotPrivilegedError,
    Task,
    WiringError,
    WiringReason,
    Zone,
    ZoneExhausted,
    zone_map,
)
from memdesc.testing import failing
from memdesc.vm.pages import page_size
from memdesc.vm.regions import ObjectKind, Region, VMObject

CHUNK = 64 << 10

# --- Collecting -------------------------------------------------------------------------------


def test_pages_of_empty_chunks_go_and_the_zone_goes_on() -> None:
    zone = Zone("collected", 256, 4 * CHUNK)
    elements = [zone.alloc() for _ in range(1024)]
    low = min(element.address for element in elements)
    assert present(low, 4 * CHUNK) == 4 * CHUNK // page_size
    before = settled()
    kept = elements[300]
    memoryview(kept)[:4] = b"kept"
    for element in elements:
        if element is not kept:
            zone.free(element)
    assert zone.collect() == 3 * CHUNK
    assert present(low, 4 * CHUNK) == CHUNK // page_size
    assert bytes(kept)[:4] == b"kept"
    told = zone.statistics()
    assert (told.current_size, told.peak_size, told.collected) == (CHUNK, 4 * CHUNK, 3 * CHUNK)
    assert told.current_elements == 256
    after = settled()
    assert (before.used - after.used, before.addresses_used) == (3 * CHUNK, after.addresses_used)
    assert zone.collect() == 0
    again = [zone.alloc() for _ in range(1023)]
    assert all(bytes(element) == bytes(256) for element in again)
    assert {element.address for element in (*again, kept)} == {e.address for e in elements}
    with pytest.raises(ZoneExhausted):
        zone.alloc()
    assert zone.statistics().current_size == 4 * CHUNK
    assert balanced(zone)


def test_addresses_stay_with_their_zone() -> None:
    zone = Zone("first", 256, 2 * CHUNK)
    element = zone.alloc()
    address = element.address
    zone.free(element)
    zone.collect()
    others = [Zone(f"other {n}", 256, 2 * CHUNK) for n in range(4)]
    taken = [other.alloc().address for other in others]
    assert all(not address <= theirs < address + CHUNK for theirs in taken)
    assert zone.alloc().address == address


def test_addresses_of_a_zone_that_is_gone_are_used_again_and_are_zero() -> None:
    zone = Zone("gone", 256, CHUNK)
    element = zone.alloc()
    address = element.address
    memoryview(element)[:] = b"\xff" * 256
    before = settled()
    del zone, element
    gc.collect()
    assert zone_map.statistics().addresses_used == before.addresses_used - CHUNK
    poke(address + 5)  # of nobody any more: still caught, by whoever gets it
    found = []
    for n in range(1000):
        other = Zone(f"next {n}", 256, CHUNK)
        found.append(other)
        try:
            taken = other.alloc()
        except memdesc.UseAfterFreeError as error:
            assert (error.address, error.offset) == (address, 5)
            break
        assert bytes(taken) == bytes(256)
    else:
        pytest.fail("the addresses were not used again")


def test_a_store_after_free_is_forgotten_by_collecting() -> None:
    zone = make(elements=1)
    element = zone.alloc()
    address = element.address
    zone.free(element)
    poke(address)
    assert zone.collect() > 0
    assert bytes(zone.alloc()) == bytes(256)


def test_a_quarantined_element_keeps_its_chunk() -> None:
    zone = make(elements=2)
    element = zone.alloc()
    zone.free(element)
    poke(element.address)
    with pytest.raises(memdesc.UseAfterFreeError):
        zone.alloc()
    assert zone.collect() == 0
    assert zone.alloc().address != element.address


def test_collect_zones_collects_all() -> None:
    zones = [make(), make()]
    for zone in zones:
        zone.free(zone.alloc())
    assert memdesc.collect_zones() >= 2 * zones[0].statistics().allocation_size
    assert [zone.statistics().current_size for zone in zones] == [0, 0]


def test_memory_that_the_program_locked_itself_stays() -> None:
    zone = make()
    zone.free(zone.alloc())
    size = zone.statistics().current_size
    with failing("madvise", errno.EINVAL) as fault:
        assert zone.collect() == 0
    assert fault.failures == 1
    assert zone.statistics().current_size == size
    zone.free(zone.alloc())
    assert zone.collect() == size


def test_memory_that_can_not_be_had_is_exhaustion_and_nothing_is_taken() -> None:
    for call, number in [("mprotect", errno.ENOMEM), ("madvise", errno.ENOMEM)]:
        zone = make()
        before = settled()
        with failing(call, number, times=None), pytest.raises(ZoneExhausted) as caught:
            zone.alloc()
        assert caught.value.errno == errno.ENOMEM
        assert isinstance(caught.value.__cause__, AllocationError)
        assert zone.statistics().failures == 1
        del caught
        gc.collect()
        assert zone_map.statistics().used == before.used
        zone.alloc()


# --- Wired ------------------------------------------------------------------------------------


def test_a_wired_zone_takes_and_locks_all_at_once() -> None:
    zone = Zone("wired", 256, 3 * CHUNK, wired=True)
    told = zone.statistics()
    assert (told.current_size, told.current_elements, told.flags) == (3 * CHUNK, 768, f"W{T}")
    assert locked() == 3 * CHUNK // page_size
    zone.free(zone.alloc())
    assert zone.collect() == 0
    element = zone.alloc()
    zone.close()  # empty chunks are unlocked, the other when its element is gone
    assert locked() == CHUNK // page_size
    del zone
    gc.collect()
    assert locked() == CHUNK // page_size
    del element
    assert locked() == 0


def _wire_past_the_limit() -> tuple[str, int, int, int]:
    limit_locking(2 * CHUNK)
    before = settled().used
    try:
        Zone("wired", 256, 4 * CHUNK, wired=True)
    except WiringError as error:
        left = locked(), zone_map.statistics().used - before
        return error.reason.name, *left, zone_map.statistics().addresses_used
    raise AssertionError("it was wired past the limit")


def test_wiring_that_fails_leaves_nothing() -> None:
    assert in_child(_wire_past_the_limit)[:3] == (WiringReason.LIMIT.name, 0, 0)
    before = settled()
    with failing("mlock", errno.EAGAIN, after=1), pytest.raises(WiringError) as caught:
        Zone("wired", 256, 3 * CHUNK, wired=True)
    assert (locked(), zone_map.statistics().used) == (0, before.used)
    del caught
    gc.collect()
    assert zone_map.statistics().addresses_used == before.addresses_used
    assert "wired" not in {row.name for row in memdesc.zprint().zones}


# --- Never shared -----------------------------------------------------------------------------


def test_no_descriptor_of_an_element_is_mapped_elsewhere() -> None:
    zone = make()
    element = zone.alloc()
    memoryview(element)[:5] = b"bytes"
    with MemoryDescriptor.with_buffer(element, Direction.OUT_IN) as descriptor:
        with pytest.raises(BufferError):
            zone.free(element)
        with pytest.raises(MappingError) as caught:
            descriptor.map(unique=True)
        assert caught.value.reason is MappingReason.ZONE_MEMORY
        assert "BufferMemoryDescriptor" in str(caught.value)
        assert "io_malloc_aligned" in str(caught.value)
        # In this task an alias of it, as of any private memory.
        alias = descriptor.map()
        assert bytes(alias)[:5] == b"bytes"
        del alias
    zone.free(element)


def test_no_descriptor_of_an_address_in_a_zone_is_mapped_here() -> None:
    zone = make()
    element = zone.alloc()
    for length in (1, 256, page_size):
        within = MemoryDescriptor.with_address_range(element.address, length, Direction.OUT)
        with pytest.raises(MappingError) as caught:
            within.map()
        assert caught.value.reason is MappingReason.ZONE_MEMORY


def test_no_element_is_handed_over() -> None:
    import socket

    zone = make()
    element = zone.alloc()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, MemoryDescriptor.with_buffer(element, Direction.OUT) as descriptor:
        with pytest.raises(MappingError) as caught:
            memdesc.send_descriptor(ours, descriptor)
    assert caught.value.reason is MappingReason.ZONE_MEMORY


@pytest.mark.slow
def test_no_element_is_mapped_into_another_task() -> None:
    zone = make()
    element = zone.alloc()
    within = MemoryDescriptor.with_address_range(element.address, 100, Direction.OUT)
    with (
        memdesc.Service("zones") as service,
        Puppet() as one,
        MemoryDescriptor.with_buffer(element, Direction.OUT_IN) as whole,
    ):
        one.do("c = md.connect('zones')")
        task = service.wait_client(20).task
        for descriptor in (within, whole, memdesc.SubMemoryDescriptor(whole, 8, 16)):
            with pytest.raises(MappingError) as caught:
                descriptor.create_mapping_in_task(task)
            assert caught.value.reason is MappingReason.ZONE_MEMORY
        assert one.do("len(c.mappings())") == 0
        one.do("c.close()")


@pytest.mark.slow
def test_zone_memory_of_another_task_is_copied_not_mapped() -> None:
    with Puppet() as one, Task(one.pid) as task:
        one.do("zone = md.Zone('theirs', 256, 1024); e = zone.alloc()")
        one.do("memoryview(e).__setitem__(slice(0, 6), b'theirs')")
        address = one.do("e.address")
        theirs = MemoryDescriptor.with_address_range(address, 256, Direction.OUT_IN, task)
        with pytest.raises(MappingError) as caught:
            theirs.map()
        if caught.value.reason is MappingReason.NOT_PRIVILEGED:
            pytest.skip(f"the maps of a child can not be read: {caught.value}")
        with open(f"/proc/{one.pid}/maps") as maps:
            named = f"[anon:{zone_map.NAME}]" in maps.read()
        assert caught.value.reason.name == ("ZONE_MEMORY" if named else "PRIVATE_MEMORY")
        try:
            assert memdesc.copyin(task, address, 6) == b"theirs"
        except NotPrivilegedError as error:
            pytest.skip(f"a child can not be read: {error}")


def test_zone_memory_of_another_task_is_known_by_its_name() -> None:
    path = f"[anon:{zone_map.NAME}]"
    object_ = VMObject(ObjectKind.ANONYMOUS, (0, 0), 0, path)
    region = Region(4096, 8192, "rw-p", 0, object_, path)  # type: ignore[arg-type]
    within = MemoryDescriptor.with_address_range(4096, 100, Direction.OUT)
    with pytest.raises(MappingError) as caught:
        within._check_region(region, memdesc.Access.READ_ONLY)  # type: ignore[attr-defined]
    assert caught.value.reason is MappingReason.ZONE_MEMORY


def test_the_kernel_shows_the_name() -> None:
    zone = make()
    element = zone.alloc()
    try:
        memdesc._core.name_memory(element.address // page_size * page_size, page_size, b"probe")
    except OSError as error:
        pytest.skip(f"this kernel can not name memory ({error}): CONFIG_ANON_VMA_NAME is not set")
    from memdesc.vm.regions import regions_in

    other = zone.alloc()
    memdesc._core.name_memory(
        element.address // page_size * page_size, page_size, zone_map.NAME.encode()
    )
    (region, *_) = regions_in(Task.current(), other.address, 1)
    assert region.path == f"[anon:{zone_map.NAME}]"


def test_zone_memory_is_copied_in_and_out() -> None:
    zone = make()
    element = zone.alloc()
    memdesc.copyout(b"copied", Task.current(), element.address + 10)
    assert bytes(element)[10:16] == b"copied"
    assert memdesc.copyin(Task.current(), element.address + 10, 6) == b"copied"


# --- Fork -------------------------------------------------------------------------------------


def _use_in_the_child(zone: Zone, element: memdesc._core.ZoneElement) -> list[str]:
    told = []
    for act in (
        zone.alloc,
        lambda: zone.alloc(timeout=None),
        lambda: zone.free(element),
        zone.collect,
    ):
        try:
            act()
        except ClosedError as error:
            assert "parent" in str(error)
            told.append("closed")
    assert bytes(element)[:6] == b"parent"
    memoryview(element)[:6] = b"child!"
    assert not {zone.name} & {row.name for row in memdesc.zprint().zones}
    mine = Zone("mine", 256, 1024)
    one = mine.alloc()
    assert not zone_map._map().memory.address <= element.address < zone_map._map().end
    assert zone_map.contains(element.address, 1)
    assert zone_map.contains(one.address, 1)
    mine.free(one)
    mine.collect()
    zone.close()
    with zone:
        pass
    gc.collect()
    return told


def test_a_fork_child_is_told_and_the_parent_untouched() -> None:
    zone = make(elements=2)
    element = zone.alloc()
    memoryview(element)[:6] = b"parent"
    before = zone.statistics()
    assert in_child(_use_in_the_child, zone, element) == ["closed"] * 4
    assert bytes(element)[:6] == b"parent"
    assert zone.statistics() == before
    zone.free(element)
    zone.free(zone.alloc())


def _lock_is_new(zone: Zone) -> bool:
    zone.statistics()
    Zone("mine", 256, 1024).alloc()
    return True


@pytest.mark.slow
def test_a_fork_while_another_thread_grows_leaves_no_lock_held() -> None:
    stop = threading.Event()

    def grow() -> None:
        while not stop.is_set():
            with Zone("grows", 4096, 1 << 20) as grows:
                list(iter(lambda: grows.alloc().number, 200))

    zone = make()
    thread = threading.Thread(target=grow)
    thread.start()
    try:
        for _ in range(5):
            assert in_child(_lock_is_new, zone)
    finally:
        stop.set()
        thread.join()


def test_a_grandchild_has_zones_too() -> None:
    def grandchild() -> bytes:
        return bytes(Zone("grand", 16, 1024).alloc())

    def child() -> bytes:
        Zone("child", 16, 1024).alloc()
        return bytes(in_child(grandchild))

    make().alloc()
    assert in_child(child) == bytes(16)
