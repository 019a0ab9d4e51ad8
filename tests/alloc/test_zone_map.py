"""The zone map: one budget for all zones, its warning, its addresses; a machine short of memory.

What needs a small map runs in a forked child, which has one of its own.
"""

from __future__ import annotations

import errno
import gc
import resource
import subprocess
import sys
import threading
from typing import Any

import pytest
from children import in_child
from memory_cgroup import ENTER, memory_cgroup
from zone_tools import wait_until

import memdesc
from memdesc import InvalidArgument, Zone, ZoneExhausted, zone_map
from memdesc.memory import limits
from memdesc.memory.limits import Available
from memdesc.testing import failing
from memdesc.vm.pages import page_size

CHUNK = 64 << 10


def fill(zone: Zone) -> list[memdesc._core.ZoneElement]:
    """Allocate until there is no more."""
    elements = []
    while True:
        try:
            elements.append(zone.alloc())
        except ZoneExhausted:
            return elements


# --- Its size ---------------------------------------------------------------------------------


def _configured() -> tuple[int, int, int]:
    zone_map.configure(size=10 * CHUNK - 1)
    zone_map.configure(size=10 * CHUNK + 1)  # again, as no zone was made yet
    told = zone_map.statistics()
    assert told.used == told.peak == told.addresses_used == 0
    with pytest.raises(InvalidArgument) as caught:
        zone_map.configure(size=20 * CHUNK)
    assert caught.value.errno == errno.EBUSY
    assert f"{10 * CHUNK + page_size:,}" in str(caught.value)
    return told.size, told.addresses, zone_map.size()


def test_its_size_is_set_before_the_first_zone_and_fixed_from_then_on() -> None:
    size, addresses, now = in_child(_configured)
    assert size == now == 10 * CHUNK + page_size
    assert addresses == 4 * size


@pytest.mark.parametrize("size", [0, -1, 1 << 62, 1 << 80, "1", None, 1.5])
def test_sizes_that_can_not_be(size: Any) -> None:
    with pytest.raises(InvalidArgument):
        zone_map.configure(size=size)


def _too_large() -> None:
    zone_map.configure(size=4 * CHUNK)
    with pytest.raises(InvalidArgument) as caught:
        Zone("large", 256, 5 * CHUNK)
    assert f"{5 * CHUNK:,}" in str(caught.value)
    assert f"{4 * CHUNK:,}" in str(caught.value)
    Zone("fits", 256, 4 * CHUNK).alloc()


def test_a_zone_larger_than_the_map_is_refused() -> None:
    in_child(_too_large)


def _no_addresses() -> None:
    used = int(open("/proc/self/statm").read().split()[0]) * page_size  # noqa: SIM115
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), hard))
    zone = Zone("none", 256, 1024)
    with pytest.raises(ZoneExhausted, match=r"ulimit -v") as caught:
        zone.alloc()
    assert caught.value.errno == errno.ENOMEM
    zone_map.configure(size=1 << 20)
    zone.alloc()


def test_a_map_that_has_no_room_in_the_address_space() -> None:
    in_child(_no_addresses)


# --- Its budget -------------------------------------------------------------------------------


def _shared() -> None:
    zone_map.configure(size=8 * CHUNK)
    first, second = (Zone(name, 256, 8 * CHUNK) for name in ("first", "second"))
    held = fill(first)
    assert len(held) == 8 * 256
    with pytest.raises(ZoneExhausted) as caught:
        second.alloc()
    error = caught.value
    assert "zone map is full" in str(error)
    assert f"{8 * CHUNK:,} of {8 * CHUNK:,}" in str(error)
    assert error.available == 0
    assert [(row.holder, row.nbytes) for row in error.holders] == [("zone 'first'", 8 * CHUNK)]
    assert "zone 'first'" in str(error)
    # What the first one freed is collected by itself when the second needs it; no address moves.
    gc.disable()
    low, high = min(e.address for e in held), max(e.address for e in held) + 256
    kept = held[:10]
    del held
    others = fill(second)
    assert len(others) == 7 * 256
    assert all(not low <= element.address < high for element in others)
    assert first.statistics().collected == 7 * CHUNK
    with pytest.raises(ZoneExhausted):
        second.alloc()
    # Without the collector: no exception that is gone holds elements in a cycle.
    del others, kept, caught, error
    assert len(fill(first)) == 8 * 256
    assert zone_map.statistics().peak == 8 * CHUNK


def test_all_zones_share_it_and_empty_chunks_are_collected_when_it_is_full() -> None:
    in_child(_shared)


def _addresses_end() -> None:
    zone_map.configure(size=2 * CHUNK)
    zones = []
    for number in range(8):  # each keeps its addresses, all but the last its pages no longer
        zone = Zone(f"zone {number}", 256, CHUNK)
        zone.alloc()
        zones.append(zone)
    told = zone_map.statistics()
    assert told.addresses_used == told.addresses == 8 * CHUNK
    last = Zone("last", 256, CHUNK)
    with pytest.raises(ZoneExhausted, match="addresses"):
        last.alloc()
    del zones[3], zone
    gc.collect()
    last.alloc()
    del zones[4:6]  # neighbours
    gc.collect()
    wide = Zone("wide", 100 << 10, 2 * CHUNK)  # both are one range again
    assert wide.statistics().allocation_size == 2 * CHUNK - (28 << 10)
    wide.alloc()


def test_addresses_of_zones_that_are_gone_are_given_again() -> None:
    in_child(_addresses_end)


def _waits_for_room() -> None:
    zone_map.configure(size=2 * CHUNK)
    first, second = (Zone(name, 256, 2 * CHUNK) for name in ("first", "second"))
    held = fill(first)
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(second.alloc(timeout=60)))
    thread.start()
    wait_until(lambda: second.statistics().waiting == 1)
    held.clear()
    thread.join(60)
    assert len(got) == 1
    with pytest.raises(ZoneExhausted) as caught:
        held = [second.alloc() for _ in range(1000)]
    del caught


def test_an_allocation_waits_for_room_in_the_map_too() -> None:
    in_child(_waits_for_room)


# --- Its warning ------------------------------------------------------------------------------


def _warned(percent: int) -> list[int]:
    zone_map.configure(size=10 * CHUNK)
    told: list[int] = []
    other = Zone("other", 256, CHUNK)

    def note(now: zone_map.ZoneMapStatistics) -> None:
        told.append(now.used // CHUNK)
        # No lock is held: another thread can use the zones, and so can this one.
        thread = threading.Thread(target=lambda: (zone.statistics(), other.statistics()))
        thread.start()
        thread.join(60)
        assert not thread.is_alive()

    zone_map.set_warning(note, percent=percent)
    zone = Zone("zone", 256, 10 * CHUNK)
    held = fill(zone)
    assert len(held) == 10 * 256
    del held[:]
    zone.collect()
    held = fill(zone)
    zone_map.set_warning(None)
    return told


@pytest.mark.parametrize(("percent", "at"), [(50, 5), (95, 10), (91, 10), (100, 10), (1, 1)])
def test_it_is_given_once_each_time_that_use_rises_to_the_percentage(percent: int, at: int) -> None:
    assert in_child(_warned, percent) == [at, at]


def _raising() -> None:
    zone_map.configure(size=2 * CHUNK)
    zone = Zone("zone", 256, 2 * CHUNK)

    def refuse(_: object) -> None:
        raise LookupError("enough")

    zone_map.set_warning(refuse, percent=50)
    with pytest.raises(LookupError):
        zone.alloc()
    assert zone.statistics().in_use == 0
    assert zone.alloc().number == 1
    # Set anew while it is above: told at the next chunk.
    zone_map.set_warning(refuse, percent=10)
    held = [zone.alloc() for _ in range(256)]
    with pytest.raises(LookupError):
        zone.alloc()
    del held


def test_what_the_callback_raises_comes_out_and_nothing_is_lost() -> None:
    in_child(_raising)


@pytest.mark.parametrize("percent", [0, 101, -5, 1.5, "95"])
def test_percentages_that_can_not_be(percent: Any) -> None:
    with pytest.raises(InvalidArgument):
        zone_map.set_warning(lambda _: None, percent=percent)


def test_what_can_not_be_called_is_no_callback() -> None:
    with pytest.raises(InvalidArgument):
        zone_map.set_warning("call me")  # type: ignore[arg-type]


def _callback_frees() -> None:
    zone_map.configure(size=2 * CHUNK)
    zone = Zone("zone", 256, 2 * CHUNK)
    held: list[Any] = []
    zone_map.set_warning(lambda _: (held.clear(), memdesc.collect_zones()), percent=100)
    for _ in range(5_000):
        held.append(zone.alloc())
    assert zone.statistics().failures == 0


def test_a_callback_may_free_and_collect() -> None:
    in_child(_callback_frees)


# --- A machine short of memory ----------------------------------------------------------------


def test_the_machine_is_asked_before_a_chunk_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def short() -> None:
        monkeypatch.setattr(
            limits, "available", lambda *_: Available(CHUNK + 5, "a limit", "a remedy")
        )
        zone = Zone("zone", 256, 4 * CHUNK)
        zone.alloc()
        monkeypatch.setattr(limits, "available", lambda *_: Available(CHUNK - 1, "a limit", "more"))
        with pytest.raises(ZoneExhausted, match="a limit") as caught:
            [zone.alloc() for _ in range(257)]
        assert caught.value.errno == errno.ENOMEM
        assert caught.value.available == CHUNK - 1

    in_child(short)


FLOOD = (
    "import sys\n"
    + ENTER
    + """
import memdesc as md
zone = md.Zone("flood", 4096, 256 << 20)
held = []
try:
    while True:
        held.append(zone.alloc())
        memoryview(held[-1])[0] = 1
except md.ZoneExhausted as error:
    held.clear()
    print(error.errno, "cgroup" in str(error), zone.collect() > 8 << 20, zone.alloc().living)
"""
)


@pytest.mark.slow
def test_past_a_cgroups_limit_it_is_an_exception_and_no_kill() -> None:
    with memory_cgroup(64 << 20) as group:
        done = subprocess.run(
            [sys.executable, "-c", FLOOD, group.folder],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"{errno.ENOMEM} True True True\n",
        "",
    )


def _no_descriptor_left() -> None:
    zone = Zone("zone", 256, 4 * CHUNK)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 64))
    with pytest.raises(ZoneExhausted, match="ulimit -n") as caught:
        zone.alloc()
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    assert caught.value.errno == errno.EMFILE
    zone.alloc()


def test_a_program_without_a_descriptor_left_gets_no_memory_unseen() -> None:
    in_child(_no_descriptor_left)


def test_what_is_short_may_be_there_later() -> None:
    zone = Zone("later", 256, CHUNK)
    with failing("madvise", errno.ENOMEM, times=2) as fault:
        element = zone.alloc(timeout=60)
    assert fault.failures == 2
    assert bytes(element) == bytes(256)
    assert zone.statistics().waits <= 1


# --- contains ---------------------------------------------------------------------------------


def test_it_knows_its_addresses() -> None:
    zone = Zone("known", 256, 1024)
    element = zone.alloc()
    map_ = zone_map._map()
    start, end = map_.memory.address, map_.end
    for address, length, inside in [
        (element.address, 1, True),
        (start, 1, True),
        (start - 1, 1, False),
        (start - 1, 2, True),
        (end, 1, False),
        (end - 1, 5, True),
        (start - 5, 1 << 40, True),
        (id(zone), 8, False),
    ]:
        assert zone_map.contains(address, length) is inside


# --- Signal handlers in the middle ------------------------------------------------------------


def _interrupted_in(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Allocate from a handler that strikes inside a call of the core; tell how that ended."""
    zone, other = Zone("outer", 256, 4 * CHUNK), Zone("inner", 256, 4 * CHUNK)
    told: list[str] = []
    original = getattr(memdesc._core, name)

    def strike(*arguments: Any) -> Any:
        monkeypatch.undo()  # once
        for wanted in (other, zone):
            try:
                held.append(wanted.alloc())
                told.append("had")
            except ZoneExhausted as error:
                assert error.errno == errno.EDEADLK
                told.append("refused")
        zone_map.statistics()
        return original(*arguments)

    held: list[Any] = []
    monkeypatch.setattr(memdesc._core, name, strike)
    held.append(zone.alloc())
    assert len({element.address for element in held}) == len(held)
    for element in held:
        memoryview(element)[:] = b"\xff" * 256
    again = [zone.alloc() for _ in range(4 * 256 - sum(e.zone is zone for e in held))]
    assert all(bytes(element) == bytes(256) for element in again)
    assert zone.statistics().in_use == 4 * 256
    with pytest.raises(ZoneExhausted):
        zone.alloc()
    return len(held), "/".join(told)


def test_a_handler_that_strikes_while_addresses_change_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _interrupted_in("mprotect", monkeypatch) == (1, "refused/refused")


def test_a_handler_that_strikes_while_pages_come_grows_another_zone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _interrupted_in("madvise", monkeypatch) == (2, "had/refused")
