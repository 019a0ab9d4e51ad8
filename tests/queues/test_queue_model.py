"""A queue against a list, step by step: wrap, full, peek and batches in any order."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import memdesc as md
from memdesc.queues.layout import ENTRY_HEADER, entry_extent
from memdesc.vm.pages import page_size

SIZES = st.one_of(st.integers(0, 40), st.integers(0, page_size), st.just(page_size - ENTRY_HEADER))


class Model(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.memory = md.create_data_queue(page_size)
        self.producer, self.consumer = md.Producer(self.memory), md.Consumer(self.memory)
        self.inside: deque[bytes] = deque()
        self.used = self.serial = 0

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            self.producer.close()
            self.consumer.close()
            self.memory.close()

    def entry(self, size: int) -> bytes:
        self.serial += 1
        stamp = self.serial.to_bytes(4, "little")
        return (stamp * (size // 4 + 1))[:size]

    def put(self, entry: bytes) -> None:
        self.inside.append(entry)
        self.used += entry_extent(len(entry))

    def took(self, entry: bytes) -> None:
        assert entry == self.inside.popleft()
        self.used -= entry_extent(len(entry))

    def fits(self, size: int) -> bool:
        return self.used + entry_extent(size) <= page_size

    @rule(size=SIZES)
    def enqueue(self, size: int) -> None:
        entry = self.entry(size)
        if size > self.producer.largest:
            with pytest.raises(md.RangeError):
                self.producer.try_enqueue(entry)
            return
        fits = self.fits(size)
        assert self.producer.try_enqueue(entry) is fits
        if fits:
            self.put(entry)

    @rule(sizes=st.lists(st.integers(0, 300), max_size=20))
    def enqueue_many(self, sizes: list[int]) -> None:
        entries = [self.entry(size) for size in sizes]
        done = self.producer.enqueue_many(entries, 0)
        for number, entry in enumerate(entries):
            assert self.fits(len(entry)) is (number < done)
            if number == done:
                break
            self.put(entry)

    @rule()
    def dequeue(self) -> None:
        entry = self.consumer.try_dequeue()
        if entry is None:
            assert not self.inside
        else:
            self.took(entry)

    @rule()
    def dequeue_into(self) -> None:
        into = bytearray(page_size)
        if self.inside:
            self.took(bytes(into[: self.consumer.dequeue_into(into)]))
        else:
            with pytest.raises(md.TimedOutError):
                self.consumer.dequeue_into(into, 0)

    @rule(most=st.integers(1, 30))
    def dequeue_many(self, most: int) -> None:
        if not self.inside:
            return
        entries = self.consumer.dequeue_many(most)
        assert len(entries) == min(most, len(self.inside))
        for entry in entries:
            self.took(entry)

    @rule(release=st.booleans())
    def peek(self, release: bool) -> None:
        if not self.inside:
            with pytest.raises(md.TimedOutError):
                self.consumer.peek(0)
            return
        assert self.consumer.peek() == self.inside[0]
        if release:
            self.consumer.release()
            self.took(self.inside[0])

    @rule()
    def take_the_ends_up_anew(self) -> None:
        for end in (self.producer, self.consumer):
            end._inherit()
        self.producer, self.consumer = md.Producer(self.memory), md.Consumer(self.memory)

    @invariant()
    def the_books_agree(self) -> None:
        if hasattr(self, "memory"):
            assert self.consumer.used == self.used
            assert self.producer.free == max(page_size - self.used - ENTRY_HEADER, -1)
            assert self.consumer.wait(0) is bool(self.inside)


TestModel = pytest.mark.slow(Model.TestCase)
TestModel.settings = settings(
    max_examples=60,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
