"""Any history of a zone equals the model: elements as byte arrays, in a dict."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from memdesc import DoubleFreeError, InvalidArgument, UseAfterFreeError, Zone, ZoneExhausted

LONG = "MEMDESC_LONG" in os.environ or os.environ.get("MEMDESC_STORM") == "long"


class Machine(RuleBasedStateMachine):
    elements = Bundle("elements")

    @initialize(
        size=st.sampled_from([1, 8, 40, 100, 256, 5000]),
        count=st.integers(1, 40),
        alignment=st.sampled_from([1, 16, 64, 4096]),
    )
    def begin(self, size: int, count: int, alignment: int) -> None:
        stride = size + -size % alignment
        self.zone = Zone("machine", size, count * stride, alignment=alignment)
        self.count = count
        self.size = size
        self.living: dict[int, tuple[Any, bytearray]] = {}  # by address
        self.views: dict[int, list[memoryview]] = {}
        self.freed: set[int] = set()
        self.changed: dict[int, int] = {}  # free elements that were stored to: first offset
        self.forgotten: dict[int, int] = {}  # the same, where a collection may have cleared them
        self.quarantined: set[int] = set()
        self.allocs = self.frees = self.drops = 0

    @rule(target=elements)
    def alloc(self) -> Any:
        try:
            element = self.zone.alloc()
        except ZoneExhausted:
            assert len(self.living) + len(self.quarantined) == self.count
            return None
        except UseAfterFreeError as error:
            changed = self.changed | self.forgotten
            assert changed[error.address] == error.offset
            assert error.value == 0xCD
            self.changed.pop(error.address, None)
            self.forgotten.pop(error.address, None)
            self.freed.discard(error.address)
            self.quarantined.add(error.address)
            return None
        assert element.address not in self.living
        assert element.address not in self.quarantined
        assert element.address not in self.changed, "a store after free was not found"
        assert bytes(element) == bytes(self.size)
        self.freed.discard(element.address)
        self.forgotten.pop(element.address, None)
        self.allocs += 1
        self.living[element.address] = element, bytearray(self.size)
        return element.address

    @rule(address=elements, at=st.integers(0, 4999), data=st.binary(min_size=1, max_size=9))
    def write(self, address: int | None, at: int, data: bytes) -> None:
        if address in self.living:
            element, model = self.living[address]
            at %= self.size
            data = data[: self.size - at]
            memoryview(element)[at : at + len(data)] = data
            model[at : at + len(data)] = data

    @rule(address=elements)
    def view(self, address: int | None) -> None:
        if address in self.living:
            self.views.setdefault(address, []).append(memoryview(self.living[address][0]))

    @rule(address=elements)
    def release(self, address: int | None) -> None:
        if self.views.get(address or 0):
            self.views[address or 0].pop().release()

    @rule(address=consumes(elements))
    def free(self, address: int | None) -> None:
        if address not in self.living:
            return
        element, _ = self.living[address]
        if self.views.get(address):
            try:
                self.zone.free(element)
            except BufferError:
                return
            raise AssertionError("an element with views was freed")
        self.zone.free(element)
        del self.living[address]
        self.freed.add(address)
        self.frees += 1
        try:
            self.zone.free(element)
        except DoubleFreeError:
            return
        raise AssertionError("an element was freed twice")

    @rule(address=consumes(elements))
    def drop(self, address: int | None) -> None:
        if address in self.living:
            for view in self.views.pop(address, []):
                view.release()
            del self.living[address]
            self.freed.add(address)
            self.drops += 1

    @rule(which=st.integers(0, 100), at=st.integers(0, 4999))
    def store_after_free(self, which: int, at: int) -> None:
        if self.freed:
            address = sorted(self.freed)[which % len(self.freed)]
            if address not in self.forgotten:
                at = min(at % self.size, self.changed.get(address, self.size))
                ctypes.memset(address + at, 0xCD, 1)
                self.changed[address] = at

    @rule()
    def collect(self) -> None:
        self.zone.collect()
        self.forgotten |= self.changed
        self.changed.clear()

    @rule(address=elements, start=st.integers(-2, 5001), length=st.integers(1, 5001))
    def require(self, address: int | None, start: int, length: int) -> None:
        if address is None:
            return
        inside = address in self.living and start >= 0 and start + length <= self.size
        if not inside and start not in range(self.size):
            return  # in a neighbour, perhaps
        data = (ctypes.c_char * length).from_address(address + start)
        try:
            self.zone.require(data)
        except (InvalidArgument, IndexError):
            assert not inside
        else:
            assert inside

    @invariant()
    def bytes_and_books_are_the_models(self) -> None:
        if not hasattr(self, "zone"):
            return
        for element, model in self.living.values():
            assert bytes(element) == model
        told = self.zone.statistics()
        assert (told.allocs, told.frees, told.drops) == (self.allocs, self.frees, self.drops)
        assert (told.in_use, told.quarantined) == (len(self.living), len(self.quarantined))
        assert told.in_use <= told.current_elements <= told.max_elements == self.count

    def teardown(self) -> None:
        for views in getattr(self, "views", {}).values():
            for view in views:
                view.release()


@pytest.mark.slow
@pytest.mark.timeout(1800 if LONG else 120)
def test_any_history_of_a_zone() -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=2000 if LONG else 200,
            stateful_step_count=100 if LONG else 40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
