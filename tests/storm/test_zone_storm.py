"""Millions of allocations from four threads, and the books balance.

Ten million pairs with MEMDESC_STORM=long (`make storm`), a few hundred thousand otherwise.
"""

from __future__ import annotations

import os
import random
import struct
import threading
from collections import deque

import pytest

from memdesc import Zone, ZoneExhausted

LONG = os.environ.get("MEMDESC_STORM") == "long"
PAIRS = 10_000_000 if LONG else 200_000
THREADS = 4
STAMP = struct.Struct("<QQ")


class Worker(threading.Thread):
    """Holds up to 32 elements, stamps each, and frees or drops it, in random order."""

    def __init__(self, zone: Zone, number: int, pairs: int) -> None:
        super().__init__(daemon=True)
        self.zone, self.number, self.pairs = zone, number, pairs
        self.frees = self.drops = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.work(random.Random(self.number))
        except BaseException as error:  # noqa: BLE001 (the test shows it)
            self.error = error

    def work(self, rng: random.Random) -> None:
        held: deque[tuple[int, object]] = deque()
        alloc, free, pack, unpack = (
            self.zone.alloc,
            self.zone.free,
            STAMP.pack_into,
            STAMP.unpack_from,
        )
        for index in range(1, self.pairs + 1):
            element = alloc()
            assert unpack(element) == (0, 0), "given out twice, or not cleared"
            pack(element, 0, self.number, index)
            held.append((index, element))
            del element
            if len(held) == 32 or index == self.pairs:
                for _ in range(rng.randrange(1, 33) if index < self.pairs else 32):
                    if not held:
                        break
                    stamp, element = held.popleft()
                    assert unpack(element) == (self.number, stamp), "somebody else wrote here"
                    if stamp % 100:
                        free(element)
                        self.frees += 1
                    else:
                        self.drops += 1
                    del element


@pytest.mark.slow
@pytest.mark.timeout(1800 if LONG else 120)
def test_the_books_balance() -> None:
    zone = Zone("storm", element_size=256, capacity=THREADS * 32 * 256)
    workers = [Worker(zone, number + 1, PAIRS // THREADS) for number in range(THREADS)]
    collected = 0
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        collected += zone.collect()
        told = zone.statistics()
        assert told.allocs == told.frees + told.drops + told.in_use
        workers[0].join(0.05)
    for worker in workers:
        worker.join()
        assert worker.error is None, worker.error
    told = zone.statistics()
    assert told.allocs == PAIRS
    assert told.frees == sum(worker.frees for worker in workers)
    assert told.drops == sum(worker.drops for worker in workers)
    assert told.frees + told.drops == PAIRS
    assert (told.in_use, told.failures, told.quarantined) == (0, 0, 0)
    assert told.collected == collected
    # Every element is there once, and zero.
    everything = [zone.alloc() for _ in range(told.max_elements)]
    assert len({element.address for element in everything}) == THREADS * 32
    assert all(bytes(element) == bytes(256) for element in everything)
    with pytest.raises(ZoneExhausted):
        zone.alloc()
