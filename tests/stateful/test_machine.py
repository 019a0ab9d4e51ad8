"""Any history of descriptors, with a real client that is killed now and then, equals the model.

After each step the kernel is asked: bytes by /proc/self/mem, VmLck, descriptors, and the memory
that is mapped here and in the client. MEMDESC_LONG=1 (and `make storm`) runs it for longer.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from model import Mapped, Memory, Node, Outcome, Refused
from puppets import wait_until
from world import NAME, World, becomes, kinds_of_fds, locked_bytes, mapped_bytes

from memdesc import (
    Access,
    BufferMemoryDescriptor,
    Direction,
    MappingError,
    MemdescError,
    MultiMemoryDescriptor,
    SubMemoryDescriptor,
    page_size,
    recycler,
)
from memdesc.vm.pages import page_span

LONG = "MEMDESC_LONG" in os.environ or os.environ.get("MEMDESC_STORM") == "long"
P = page_size
MOST_REMOTE = 16

OFFSETS = st.one_of(st.sampled_from([0, 1, P - 1, P, P + 1, 2 * P]), st.integers(-1, 3 * P))
LENGTHS = st.one_of(st.sampled_from([0, 1, P, 2 * P]), st.integers(0, 4 * P))
RANGES = st.tuples(OFFSETS, LENGTHS)
SELDOM = st.integers(0, 7)
"""For what would otherwise end most histories before anything happened: done at 5."""

DIRECTIONS = st.sampled_from([Direction.OUT, Direction.OUT_IN])
DATA = st.tuples(st.sampled_from([0, 1, 7, P, P + 3]), st.binary(min_size=1, max_size=4)).map(
    lambda pair: (pair[1] * (pair[0] // len(pair[1]) + 1))[: pair[0]]
)


def fit(node: Node, span: tuple[int, int]) -> tuple[int, int]:
    """Move most ranges into the node, so that more than their errors is tried."""
    offset, length = span
    if offset < 0 or length % 8 == 7:
        return span
    offset = offset % node.length if node.length else 0
    return offset, min(length, node.length - offset)


def ends(act: Callable[[], Any]) -> tuple[Outcome, Any]:
    """How a call ends, and what it gave."""
    try:
        return None, act()
    except Refused as refused:
        return str(refused), None
    except MappingError as error:
        return error.reason.name, None
    except (MemdescError, BufferError) as error:
        return type(error).__name__, None


world: World


class Machine(RuleBasedStateMachine):
    nodes = Bundle("nodes")
    maps = Bundle("maps")
    remotes = Bundle("remotes")

    @initialize(target=nodes)
    def begin(self) -> Any:
        gc.collect()
        self.reals: dict[Node, Any] = {}
        self.mapped: list[Mapped] = []
        self.remote: list[Mapped] = []
        recycler.trim()
        self.base = mapped_bytes("self"), locked_bytes()
        self.steps = 0
        first = self.create(2 * P, writable=True, lazy=False)
        return multiple(first, self.create(2 * P + 9, writable=False, lazy=True))

    # -- making ----------------------------------------------------------------------------------

    @rule(
        target=nodes,
        capacity=st.one_of(st.sampled_from([1, P, 2 * P, 2 * P + 9]), st.integers(1, 3 * P)),
        writable=st.booleans(),
        lazy=st.booleans(),
    )
    def create(self, capacity: int, writable: bool, lazy: bool) -> Node:
        access = Access.READ_WRITE if writable else Access.READ_ONLY
        node = Node("buffer", writable, data=bytearray(capacity), size=capacity)
        self.reals[node] = BufferMemoryDescriptor(capacity, max_access=access, lazy=lazy, name=NAME)
        return node

    @rule(target=nodes, parent=nodes, span=RANGES)
    def make_part(self, parent: Node, span: tuple[int, int]) -> Any:
        offset, length = fit(parent, span)

        def model() -> Node:
            parent.check_range(offset, length)
            return Node("sub", False, members=[parent], offset=offset, size=length)

        outcome, node = ends(model)
        real = ends(lambda: SubMemoryDescriptor(self.reals[parent], offset, length))
        assert real[0] == outcome
        if node is None:
            return multiple()
        self.reals[node] = real[1]
        return node

    @rule(target=nodes, members=st.lists(nodes, min_size=1, max_size=3))
    def make_several(self, members: list[Node]) -> Any:
        if sum(len(list(leaves(member))) for member in members) > 12:
            return multiple()
        node = Node("multi", False, members=members)
        self.reals[node] = MultiMemoryDescriptor([self.reals[member] for member in members])
        return node

    # -- bytes -----------------------------------------------------------------------------------

    @rule(node=nodes, offset=OFFSETS, data=DATA)
    def write(self, node: Node, offset: int, data: bytes) -> None:
        offset, _ = fit(node, (offset, 0))
        data = data[: max(node.length - offset, 0)] if len(data) % 8 != 7 else data
        expected, _ = ends(lambda: node.write(offset, data))
        assert ends(lambda: self.reals[node].write_bytes(offset, data))[0] == expected

    @rule(node=nodes, span=RANGES)
    def read(self, node: Node, span: tuple[int, int]) -> None:
        offset, length = fit(node, span)
        assert ends(lambda: self.reals[node].read_bytes(offset, length)) == ends(
            lambda: node.read(offset, length)
        )

    # -- preparing and closing -------------------------------------------------------------------

    @rule(node=nodes, direction=DIRECTIONS)
    def prepare(self, node: Node, direction: Direction) -> None:
        expected, _ = ends(lambda: node.prepare(direction))
        assert ends(lambda: self.reals[node].prepare(direction))[0] == expected

    @rule(node=nodes)
    def complete(self, node: Node) -> None:
        expected, _ = ends(node.complete)
        assert ends(self.reals[node].complete)[0] == expected

    @rule(node=nodes, sure=SELDOM)
    def close(self, node: Node, sure: int) -> None:
        if sure == 5:
            node.close()
            self.reals[node].close()

    # -- mapping here ----------------------------------------------------------------------------

    @rule(
        target=maps,
        node=nodes,
        span=RANGES,
        writable=st.sampled_from([None, False, True]),
        guards=st.sampled_from([0, 0, 1]),
        unique=st.booleans(),
    )
    def map(
        self,
        node: Node,
        span: tuple[int, int],
        writable: bool | None,
        guards: int,
        unique: bool,
    ) -> Any:
        offset, length = fit(node, span)
        lenders: list[Mapped] = []

        def model() -> tuple[bool, int]:
            access = node.check_map(offset, length, writable)
            lenders.extend(
                m
                for m in ([] if unique else self.mapped)
                if m.live
                and m.node is node
                and (m.guards, m.writable) == (guards, access)
                and m.offset <= offset
                and offset + length <= m.offset + m.length
            )
            return access, 0 if lenders else node.check_congruent(offset, length)[1]

        expected, answer = ends(model)
        how = {None: None, False: Access.READ_ONLY, True: Access.READ_WRITE}[writable]
        outcome, real = ends(
            lambda: self.reals[node].map(
                offset=offset, length=length, access=how, guard_pages=guards, unique=unique
            )
        )
        assert outcome == expected
        if real is None:
            return multiple()
        memory = Memory(answer[1])
        if lenders:
            same = [m for m in lenders if m.real.address + offset - m.offset == real.address]
            assert same, "not at an address of a mapping that could lend it"
            memory = same[0].memory
        mapped = Mapped(real, node, offset, length, answer[0], memory, guards)
        self.mapped.append(mapped)
        return mapped

    @rule(mapped=maps, at=st.integers(0, 3 * P), data=DATA)
    def store_through(self, mapped: Mapped, at: int, data: bytes) -> None:
        at %= mapped.length
        if mapped.live and mapped.writable and at + len(data) <= mapped.length:
            mapped.node.store(mapped.offset + at, data)
            memoryview(mapped.real)[at : at + len(data)] = data

    @rule(mapped=maps)
    def hold_a_view(self, mapped: Mapped) -> None:
        view = memoryview(mapped.real)
        assert view.readonly is not mapped.writable
        mapped.views.append(view)

    @rule(mapped=maps)
    def drop_the_views(self, mapped: Mapped) -> None:
        while mapped.views:
            mapped.views.pop().release()

    @rule(target=maps, mapped=consumes(maps))
    def unmap(self, mapped: Mapped) -> Any:
        expected = "BufferError" if mapped.views else None
        assert ends(mapped.real.unmap)[0] == expected
        if expected:
            return mapped
        self.forget(mapped)
        return multiple()

    @rule(mapped=consumes(maps))
    def leave_the_block(self, mapped: Mapped) -> None:
        with mapped.real:
            pass
        self.forget(mapped)

    def forget(self, mapped: Mapped) -> None:
        mapped.live = False
        mapped.wires.clear()

    @rule(mapped=maps, at=st.integers(0, 3 * P), length=st.integers(1, 2 * P))
    def wire_a_part(self, mapped: Mapped, at: int, length: int) -> None:
        at %= mapped.length
        length = min(length, mapped.length - at)
        token = mapped.real.wire(at, length)
        mapped.wires.append((token, page_span(mapped.real.address + at, length)))

    @rule(mapped=maps)
    def release_a_wire(self, mapped: Mapped) -> None:
        if mapped.wires:
            mapped.wires.pop()[0].release()

    # -- the client ------------------------------------------------------------------------------

    @rule(
        target=remotes,
        node=nodes,
        span=RANGES,
        writable=st.sampled_from([None, False, True]),
    )
    def map_in_client(self, node: Node, span: tuple[int, int], writable: bool | None) -> Any:
        offset, length = fit(node, span)
        if sum(m.live for m in self.remote) >= MOST_REMOTE:
            return multiple()

        def model() -> tuple[bool, int]:
            access = node.check_map(offset, length, writable)
            node.check_grant(offset, length, access)
            return access, node.check_congruent(offset, length)[1]

        expected, answer = ends(model)
        how = {None: None, False: Access.READ_ONLY, True: Access.READ_WRITE}[writable]
        outcome, real = ends(
            lambda: self.reals[node].create_mapping_in_task(
                world.client.task, offset=offset, length=length, access=how, timeout=30
            )
        )
        assert outcome == expected
        if real is None:
            return multiple()
        assert real.verified in (True, None)
        world.puppet.do("maps.append(c.wait_mapping(30))")
        number = world.puppet.do("len(maps) - 1")
        assert world.puppet.do(f"maps[{number}].address") == real.address
        mapped = Mapped(real, node, offset, length, answer[0], Memory(answer[1]), number=number)
        self.remote.append(mapped)
        return mapped

    @rule(mapped=remotes, at=st.integers(0, 3 * P), data=DATA)
    def client_stores(self, mapped: Mapped, at: int, data: bytes) -> None:
        at %= mapped.length
        if mapped.live and mapped.writable and at + len(data) <= mapped.length:
            mapped.node.store(mapped.offset + at, data)
            view = f"memoryview(maps[{mapped.number}])[{at}:{at + len(data)}]"
            world.puppet.do(f"{view} = bytes.fromhex('{data.hex()}')")

    @rule(mapped=remotes)
    def client_holds_a_view(self, mapped: Mapped) -> None:
        if mapped.live and not mapped.viewed:
            world.puppet.do(f"views[{mapped.number}] = memoryview(maps[{mapped.number}])")
            mapped.viewed = True

    @rule(mapped=remotes)
    def client_drops_its_view(self, mapped: Mapped) -> None:
        if mapped.viewed:
            world.puppet.do(f"views.pop({mapped.number}).release()")
            mapped.viewed = False

    @rule(target=remotes, mapped=consumes(remotes))
    def unmap_in_client(self, mapped: Mapped) -> Any:
        if mapped not in self.remote:
            return multiple()  # its client was killed
        expected = "BufferError" if mapped.live and mapped.viewed else None
        assert ends(lambda: mapped.real.unmap(30))[0] == expected
        if expected:
            return mapped
        mapped.live = False
        return multiple()

    @rule(mapped=remotes)
    def client_unmaps(self, mapped: Mapped) -> None:
        if mapped.live and not mapped.viewed:
            world.puppet.do(f"maps[{mapped.number}].unmap()")
            wait_until(lambda: not mapped.real.is_mapped)
            mapped.live = False

    @rule(node=nodes)
    def share_by_name(self, node: Node) -> None:
        def model() -> bytes:
            access = node.check_map(0, node.length, None)
            node.check_grant(0, node.length, access)
            node.check_congruent(0, node.length)
            return node.bytes_at(0, node.length)

        expected, data = ends(model)
        outcome, _ = ends(lambda: world.service.share("node", self.reals[node]))
        if outcome is None:
            try:
                if expected is None:
                    world.puppet.do("m = c.map('node')")
                    assert world.puppet.do("bytes(m).hex()") == data.hex()
                    world.puppet.do("m.unmap(); del m")
            finally:
                world.service.unshare("node")
        else:
            assert expected is not None

    @rule(sure=st.booleans())
    def kill_the_client(self, sure: bool) -> None:
        if sure and any(mapped.live for mapped in self.remote):
            world.replace_client()
            for mapped in self.remote:
                mapped.live = mapped.viewed = False
                assert not mapped.real.is_mapped
                mapped.real.unmap()  # of a task that has ended: nothing is left to do
                mapped.real = None  # a handle holds its task, and that a pidfd
            self.remote.clear()

    # -- what must hold --------------------------------------------------------------------------

    @invariant()
    def bytes_are_the_models(self) -> None:
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            for node, real in self.reals.items():
                if node.kind == "buffer" and not node.closed:
                    assert os.pread(memory.fileno(), node.size, real.address) == node.data
            for mapped in self.mapped:
                if mapped.live or mapped.views:
                    shown = os.pread(memory.fileno(), mapped.length, mapped.real.address)
                    assert shown == mapped.expected
        for mapped in self.remote:
            assert mapped.real.is_mapped is mapped.live
        live = [mapped for mapped in self.remote if mapped.live]
        if live:
            mapped = live[self.steps % len(live)]
            shown = world.puppet.do(f"bytes(maps[{mapped.number}]).hex()")
            assert bytes.fromhex(shown) == mapped.expected
        self.steps += 1

    @invariant()
    def counts_are_the_models(self) -> None:
        for node, real in self.reals.items():
            assert (real.prepare_count, real.closed) == (len(node.prepared), node.closed)
        pages: Counter[int] = Counter()
        spans = [
            page_span(real.address, node.size)
            for node, real in self.reals.items()
            if node.kind == "buffer" and node.prepared
        ]
        spans += [span for mapped in self.mapped for _, span in mapped.wires]
        for start, nbytes in spans:
            pages.update(range(start, start + nbytes, P))
        assert locked_bytes() - self.base[1] == len(pages) * P

    @invariant()
    def nothing_is_left_over(self) -> None:
        recycler.trim()
        buffers = [n for n in self.reals if n.kind == "buffer" and not n.closed]
        memfds = Counter({f"/memfd:{NAME} (deleted)": len(buffers)} if buffers else {})
        becomes(kinds_of_fds, world.fds + memfds)
        here = {m.memory for m in self.mapped if m.live or m.views}
        expected = sum(-(-node.size // P) * P for node in buffers)
        expected += sum(memory.nbytes for memory in here)
        assert mapped_bytes("self") - self.base[0] == expected
        # A mapping that was ended while its program holds a view goes with the view.
        there = sum(m.memory.nbytes for m in self.remote if m.live or m.viewed)
        becomes(lambda: mapped_bytes(world.puppet.pid), there)
        becomes(lambda: kinds_of_fds(world.puppet.pid), world.client_fds)

    def teardown(self) -> None:
        if not hasattr(self, "reals"):
            return
        for mapped in self.mapped:
            self.drop_the_views(mapped)
            mapped.real.unmap()
        for mapped in self.remote:
            self.client_drops_its_view(mapped)
            mapped.real.unmap()
            mapped.real = None  # the machine itself goes only when the collector comes
        for real in self.reals.values():
            real.close()
        world.puppet.do("maps.clear()")
        recycler.trim()
        assert (mapped_bytes("self"), locked_bytes()) == self.base
        becomes(kinds_of_fds, world.fds)
        wait_until(lambda: mapped_bytes(world.puppet.pid) == 0)


def leaves(node: Node) -> Iterator[Node]:
    if not node.members:
        yield node
    for member in node.members:
        yield from leaves(member)


@contextmanager
def living_world() -> Iterator[None]:
    global world
    world = World()
    try:
        yield
    finally:
        world.close()
        del world


@pytest.mark.slow
@pytest.mark.timeout(7200 if LONG else 900)  # a failure is made smaller for minutes
def test_any_history_equals_the_model() -> None:
    how = settings(
        max_examples=500 if LONG else 40,
        stateful_step_count=100 if LONG else 50,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    with living_world():
        run_state_machine_as_test(Machine, settings=how)
