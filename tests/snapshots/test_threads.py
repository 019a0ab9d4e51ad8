"""Snapshots while threads store: each store lands wholly on one side, and none is lost.

Each thread counts up: it stores the same number to all of its cells in turn, spread over the pages,
and then the next one. So at one instant its cells hold n, up to some place, and n - 1 behind it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from children import in_child

from memdesc import BufferMemoryDescriptor, PageKind, SnapshotReason, _core, page_size

PAGES = 256
STORERS = 2
WIDE = 0x0001_0001_0001_0001
"""A number times this has the same 16 bits four times: a torn store shows."""


class Storer(threading.Thread):
    """Stores to a cell of every page of a view, again and again."""

    def __init__(self, view: memoryview, number: int) -> None:
        super().__init__()
        self.cells = view.cast("Q")
        self.places = range(number, len(self.cells), page_size // 8)
        self.count = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.is_set():
            self.count = self.count % 0xFFFF + 1
            for place in self.places:
                self.cells[place] = self.count * WIDE


@contextmanager
def stored_to(buffer: BufferMemoryDescriptor) -> Iterator[list[Storer]]:
    view = memoryview(buffer)
    storers = [Storer(view, number) for number in range(STORERS)]
    for storer in storers:
        storer.start()
    try:
        yield storers
    finally:
        for storer in storers:
            storer.stopped.set()
        for storer in storers:
            storer.join()


def seen(descriptor: Any, storer: Storer) -> list[int]:
    """What a thread's cells hold; each whole."""
    cells = memoryview(descriptor).cast("Q")
    values = [cells[place] for place in storer.places]
    assert all(value == (value & 0xFFFF) * WIDE for value in values), "a torn store"
    return [value & 0xFFFF for value in values]


def is_of_one_instant(values: list[int]) -> bool:
    steps = [(a, b) for a, b in pairwise(values) if a != b]
    return not steps or (len(steps) == 1 and steps[0][0] == steps[0][1] % 0xFFFF + 1)


def check_nothing_lost(buffer: BufferMemoryDescriptor, storers: list[Storer]) -> None:
    for storer in storers:
        assert set(seen(buffer, storer)) == {storer.count}


@pytest.mark.slow
def test_a_free_snapshot_is_of_one_instant_and_loses_nothing() -> None:
    taken = 0
    for _ in range(25):
        with BufferMemoryDescriptor(PAGES * page_size) as buffer:
            with stored_to(buffer) as storers, buffer.snapshot() as frozen:
                assert frozen.reason is None
                taken += 1
                first = [seen(frozen, storer) for storer in storers]
                assert all(map(is_of_one_instant, first))
                assert first == [seen(frozen, storer) for storer in storers]
            check_nothing_lost(buffer, storers)
    assert taken == 25


@pytest.mark.slow
@pytest.mark.parametrize("grants", [False, True])
def test_a_copying_snapshot_tears_no_store(grants: bool) -> None:
    with BufferMemoryDescriptor(PAGES * page_size) as buffer:
        if grants:
            mapping = buffer.map(unique=True)
        with stored_to(buffer) as storers:
            for number in range(20):
                with buffer.snapshot() as frozen:
                    wanted = SnapshotReason.MAPPED if grants else frozen.reason if number else None
                    assert frozen.reason is wanted
                    first = [seen(frozen, storer) for storer in storers]
                    assert first == [seen(frozen, storer) for storer in storers]
        check_nothing_lost(buffer, storers)
        if grants:
            for storer in storers:
                assert set(seen(mapping, storer)) == {storer.count}


@pytest.mark.slow
@pytest.mark.parametrize("pages", [PageKind.BASE, PageKind.AUTO])
def test_a_move_loses_no_store_where_stores_can_be_held_up(pages: PageKind) -> None:
    with BufferMemoryDescriptor(PAGES * page_size, pages=pages) as buffer:
        try:
            watch = _core.watch_stores(buffer.address, PAGES * page_size)
        except OSError as error:
            pytest.skip(f"no userfaultfd for stores here: {error.strerror}")
        import os

        os.close(watch)
        with stored_to(buffer) as storers:
            for number in range(20):
                buffer.snapshot().close()
                with buffer.map(unique=True) as mapping:
                    assert buffer.moves == number + 1
                    for storer in storers:
                        seen(mapping, storer)
        check_nothing_lost(buffer, storers)


@pytest.mark.slow
def test_many_threads_take_snapshots_and_grants_at_once() -> None:
    failures: list[BaseException] = []
    with BufferMemoryDescriptor(64 * page_size) as buffer:
        stop = threading.Event()

        def use(grants: bool) -> None:
            try:
                while not stop.is_set():
                    if grants:
                        buffer.map(unique=True).unmap()
                    else:
                        with buffer.snapshot() as frozen:
                            assert frozen.read_bytes() == frozen.read_bytes()
            except BaseException as error:  # noqa: BLE001 (raised below)
                failures.append(error)

        threads = [threading.Thread(target=use, args=(number % 2 == 0,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for number in range(200):
            buffer.write_bytes(0, number.to_bytes(8, "little"))
            assert buffer.read_bytes(0, 8) == number.to_bytes(8, "little")
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures


@pytest.mark.slow
def test_forks_of_another_thread_fall_before_or_after() -> None:
    """A child that inherits the mapping in the middle would hold up the seal, or lose the owner."""
    stop = threading.Event()
    forks = []

    def fork() -> None:
        while not stop.is_set():
            forks.append(in_child(lambda: True))

    thread = threading.Thread(target=fork)
    thread.start()
    try:
        for _ in range(200):
            with BufferMemoryDescriptor(page_size) as buffer:
                buffer.write_bytes(0, b"then")
                with buffer.snapshot() as frozen:
                    buffer.write_bytes(0, b"now ")
                    assert frozen.reason in (None, SnapshotReason.FORKED)
                    assert frozen.read_bytes(0, 4) == b"then"
    finally:
        stop.set()
        thread.join()
    assert all(forks)
