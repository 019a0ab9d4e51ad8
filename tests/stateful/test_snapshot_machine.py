"""Any history of sources and their snapshots, in several processes, equals byte arrays.

A child maps every snapshot that it is sent, and what it is sent of the source, and tells at any
time what they show. MEMDESC_LONG=1 runs it for longer.
"""

from __future__ import annotations

import gc
import hashlib
import os
import socket
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from memdesc import (
    Access,
    BufferMemoryDescriptor,
    MultiMemoryDescriptor,
    PageKind,
    SnapshotMemoryDescriptor,
    SnapshotReason,
    SubMemoryDescriptor,
    page_size,
    send_descriptor,
)
from memdesc.memory.lifecycle import State

LONG = "MEMDESC_LONG" in os.environ or os.environ.get("MEMDESC_STORM") == "long"
PAGES = 7
SIZE = PAGES * page_size - 50
MOST = 8

OFFSETS = st.one_of(
    st.integers(0, PAGES - 1).map(lambda page: page * page_size), st.integers(0, SIZE - 1)
)
DATA = st.tuples(st.sampled_from([1, 8, page_size, 3 * page_size, SIZE]), st.integers(1, 255)).map(
    lambda pair: bytes([pair[1]]) * pair[0]
)

CHILD = """
import hashlib, socket, sys
from memdesc import receive_descriptor
orders = socket.socket(fileno=int(sys.argv[1]))
carrier = socket.socket(fileno=int(sys.argv[2]))
held = []
while True:
    order = orders.recv(1)
    if order == b"t":
        held.append(receive_descriptor(carrier).map())
        orders.send(b".")
    elif order == b"l":
        for mapping in held:
            orders.send(hashlib.blake2b(mapping, digest_size=16).digest())
    else:
        break
"""


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


class Child:
    """Another process, and what it must see."""

    def __init__(self) -> None:
        self.orders, theirs = socket.socketpair()
        self.carrier, receiving = socket.socketpair()
        fds = (theirs.fileno(), receiving.fileno())
        command = [sys.executable, "-c", CHILD, *map(str, fds)]
        self.process = subprocess.Popen(command, pass_fds=fds)
        theirs.close()
        receiving.close()
        for end in (self.orders, self.carrier):
            end.settimeout(60)
        self.held: list[bytes | None] = []
        """What each mapping shows; None: what the source shows."""

    def give(self, descriptor: Any, shows: bytes | None) -> None:
        self.orders.send(b"t")
        send_descriptor(self.carrier, descriptor)
        assert self.orders.recv(1) == b"."
        self.held.append(shows)

    def check(self, source: bytes) -> None:
        self.orders.send(b"l")
        for shows in self.held:
            wanted = digest(source if shows is None else shows)
            assert self.orders.recv(16, socket.MSG_WAITALL) == wanted

    def end(self) -> None:
        self.orders.close()
        self.carrier.close()
        self.process.wait(60)


class SnapshotMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.child: Child | None = None
        self.snapshots: list[tuple[SnapshotMemoryDescriptor, bytes]] = []
        self.views: list[tuple[memoryview, bytes]] = []
        self.mappings: list[Any] = []

    @initialize(
        max_access=st.sampled_from(Access),
        pages=st.sampled_from([PageKind.BASE, PageKind.AUTO]),
        wired=st.booleans(),
    )
    def begin(self, max_access: Access, pages: PageKind, wired: bool) -> None:
        self.source = BufferMemoryDescriptor(SIZE, max_access=max_access, pages=pages)
        self.model = bytearray(SIZE)
        self.length = SIZE
        self.granted = False
        if wired:
            self.prepare()

    # -- the source ------------------------------------------------------------------------------

    @rule(offset=OFFSETS, data=DATA)
    def write(self, offset: int, data: bytes) -> None:
        data = data[: max(self.length - offset, 0)]
        if data:
            self.source.write_bytes(offset, data)
            self.model[offset : offset + len(data)] = data

    @rule(offset=OFFSETS)
    def write_by_a_view(self, offset: int) -> None:
        if offset < self.length:
            memoryview(self.source)[offset] ^= 255
            self.model[offset] ^= 255

    @precondition(lambda self: self.mappings and self.source.max_access.writable)
    @rule(offset=OFFSETS)
    def write_by_a_mapping(self, offset: int) -> None:
        mapping = memoryview(self.mappings[-1])
        if offset < len(mapping):
            mapping[offset] ^= 255
            self.model[offset] ^= 255

    @rule(length=st.sampled_from([1, page_size, 3 * page_size + 5, SIZE]))
    def set_length(self, length: int) -> None:
        self.source.set_length(length)
        self.length = length

    @rule()
    def prepare(self) -> None:
        self.source.prepare()

    @precondition(lambda self: self.source.prepare_count)
    @rule()
    def complete(self) -> None:
        self.source.complete()

    @precondition(lambda self: len(self.mappings) < MOST)
    @rule()
    def map(self) -> None:
        self.mappings.append(self.source.map(unique=True))

    @precondition(lambda self: self.mappings)
    @rule()
    def unmap(self) -> None:
        self.mappings.pop().unmap()

    # -- snapshots -------------------------------------------------------------------------------

    @precondition(lambda self: len(self.snapshots) < MOST)
    @rule()
    def snapshot(self) -> None:
        state = self.source.memory.lifecycle.state
        frozen = self.source.snapshot()
        self.snapshots.append((frozen, bytes(self.model[: self.length])))
        if state is State.DETACHED:
            assert frozen.reason in (None, SnapshotReason.CHANGED, SnapshotReason.SCATTERED)
        elif self.granted:
            assert frozen.reason is SnapshotReason.SHARED
        elif self.source.prepare_count:
            assert frozen.reason is SnapshotReason.WIRED
        else:
            assert frozen.reason is (SnapshotReason.MAPPED if self.mappings else None)
        assert (frozen.copied_bytes == 0) == (frozen.reason is None)
        assert frozen.copied_bytes <= self.length

    @precondition(lambda self: len(self.snapshots) < MOST)
    @rule(start=OFFSETS)
    def snapshot_of_a_part(self, start: int) -> None:
        if start < self.length:
            with SubMemoryDescriptor(self.source, start) as part:
                self.snapshots.append((part.snapshot(), bytes(self.model[start : self.length])))

    @precondition(lambda self: 0 < len(self.snapshots) < MOST)
    @rule()
    def snapshot_of_several(self) -> None:
        last, shows = self.snapshots[-1]
        with MultiMemoryDescriptor([self.source, last]) as several:
            data = bytes(self.model[: self.length]) + shows
            self.snapshots.append((several.snapshot(), data))

    @precondition(lambda self: 0 < len(self.snapshots) < MOST)
    @rule()
    def snapshot_of_a_snapshot(self) -> None:
        last, shows = self.snapshots[0]
        again = last.snapshot()
        assert again.copied_bytes == 0
        self.snapshots.append((again, shows))

    @precondition(lambda self: self.snapshots)
    @rule(which=st.integers(0, MOST), keep=st.booleans())
    def close_snapshot(self, which: int, keep: bool) -> None:
        frozen, shows = self.snapshots.pop(which % len(self.snapshots))
        if keep:
            self.views.append((memoryview(frozen), shows))
        frozen.close()
        gc.collect(0)

    @precondition(lambda self: self.snapshots)
    @rule()
    def wire_snapshot(self) -> None:
        with self.snapshots[-1][0].prepared():
            pass

    # -- the other process -----------------------------------------------------------------------

    def the_child(self) -> Child:
        self.child = self.child or Child()
        return self.child

    @precondition(lambda self: self.snapshots)
    @rule()
    def send_snapshot(self) -> None:
        frozen, shows = self.snapshots[-1]
        moves = self.source.moves
        self.the_child().give(frozen, shows)
        assert self.source.moves == moves

    @precondition(lambda self: self.length == SIZE)
    @rule(seldom=st.integers(0, 5))
    def send_source(self, seldom: int) -> None:
        if seldom == 3:
            self.the_child().give(self.source, None)
            self.granted = True

    # -- what must hold --------------------------------------------------------------------------

    @invariant()
    def everything_shows_what_it_should(self) -> None:
        if not hasattr(self, "source"):
            return
        assert self.source.read_bytes() == self.model[: self.length]
        for frozen, shows in self.snapshots:
            assert frozen.read_bytes() == shows
        for view, shows in self.views:
            assert view == shows
        for mapping in self.mappings:
            assert memoryview(mapping) == self.model[: mapping.length]
        if self.child is not None:
            self.child.check(bytes(self.model))

    def teardown(self) -> None:
        if not hasattr(self, "source"):
            return
        view = memoryview(self.source)
        self.source.close()
        gc.collect()
        assert view == self.model[: self.length]
        for frozen, shows in self.snapshots:
            assert frozen.read_bytes() == shows
            frozen.close()
        view.release()
        if self.child is not None:
            self.child.check(bytes(self.model))
            self.child.end()


@pytest.mark.slow
@pytest.mark.timeout(1200 if LONG else 120)
def test_snapshots_are_byte_arrays() -> None:
    run_state_machine_as_test(
        SnapshotMachine,
        settings=settings(
            max_examples=400 if LONG else 40,
            stateful_step_count=40 if LONG else 25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
