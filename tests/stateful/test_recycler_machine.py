"""Any history of buffers, views, handles and trims, held to a model of byte arrays."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
    run_state_machine_as_test,
)

from memdesc import Access, BufferMemoryDescriptor, Contents, PageKind, recycler

sys.path.append(str(Path(__file__).parents[1] / "memory"))
from recycling import KIB, fresh_recycler, statistics

SIZES = [100 * KIB, 100 * KIB, 90 * KIB, 256 * KIB]
LIMIT = 512 * KIB


class Made:
    """A buffer, its view, and what the model says that it holds (one sign all over)."""

    def __init__(self, buffer: BufferMemoryDescriptor) -> None:
        self.buffer = buffer
        self.identity = buffer.memory.identity
        self.view = memoryview(buffer)
        self.sign = 0
        self.granted = False


class Recycling(RuleBasedStateMachine):
    """Buffers come and go; the memory of one is never another's while anything still sees it."""

    made = Bundle("made")
    handles = Bundle("handles")

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.stack.enter_context(fresh_recycler(limit=LIMIT))
        self.living: list[Made] = []
        self.barred: dict[tuple[int, int], int] = {}  # identity: handles on it
        self.opened: set[int] = set()
        self.never: set[tuple[int, int]] = set()  # granted, or exposed

    @rule(
        target=made,
        nbytes=st.sampled_from(SIZES),
        contents=st.sampled_from(Contents),
        name=st.sampled_from("aaab"),
        max_access=st.sampled_from([Access.READ_ONLY] * 3 + [Access.READ_WRITE]),
    )
    def make(self, nbytes: int, contents: Contents, name: str, max_access: Access) -> Made:
        made = Made(
            BufferMemoryDescriptor(
                nbytes,
                contents=contents,
                name=name,
                max_access=max_access,
                pages=PageKind.BASE,
            )
        )
        assert made.identity not in [other.identity for other in self.living]
        assert not self.barred.get(made.identity)
        assert made.identity not in self.never
        memory = made.buffer.memory
        assert os.readlink(f"/proc/self/fd/{memory.own_fd()}") == f"/memfd:{name} (deleted)"
        whole = os.pread(memory.own_fd(), memory.size, 0)
        seen = whole[: 0 if contents is Contents.ZEROED else nbytes]
        assert whole[len(seen) :] == bytes(memory.size - len(seen))
        self.living.append(made)
        made.view[:] = b"\xff" * nbytes
        made.sign = 0xFF
        return made

    @rule(made=made, sign=st.integers(1, 255))
    def fill(self, made: Made, sign: int) -> None:
        if made in self.living:
            made.view[:] = bytes([sign]) * len(made.view)
            made.sign = sign

    @rule(nbytes=st.sampled_from(SIZES))
    def make_and_free(self, nbytes: int) -> None:
        self.let_go(self.make(nbytes, Contents.ZEROED, "a", Access.READ_ONLY))

    @rule(made=made)
    def close(self, made: Made) -> None:
        made.buffer.close()

    @rule(made=consumes(made))
    def let_go(self, made: Made) -> None:
        self.living.remove(made)
        made.view.release()
        made.buffer.close()

    @rule(made=made)
    def grant(self, made: Made) -> None:
        if not made.buffer.closed:
            memory = made.buffer.memory
            os.close(memory.grant(memory.max_access, user=os.geteuid()))
            self.never.add(made.identity)

    @rule(made=made)
    def expose(self, made: Made) -> None:
        if not made.buffer.closed:
            made.buffer.memory.fileno()
            self.never.add(made.identity)

    @rule(target=handles, made=made)
    def open(self, made: Made) -> tuple[int, tuple[int, int]] | None:
        if made.buffer.closed:
            return None
        self.barred[made.identity] = self.barred.get(made.identity, 0) + 1
        fd = made.buffer.memory.open(Access.READ_ONLY)
        self.opened.add(fd)
        return fd, made.identity

    @rule(handle=consumes(handles))
    def shut(self, handle: tuple[int, tuple[int, int]] | None) -> None:
        if handle is not None:
            os.close(handle[0])
            self.opened.remove(handle[0])
            self.barred[handle[1]] -= 1

    @rule(to_bytes=st.sampled_from([0, 64 * KIB, 200 * KIB]))
    def trim(self, to_bytes: int) -> None:
        recycler.trim(to_bytes)
        assert statistics().kept_bytes <= to_bytes

    @rule(trust=st.booleans())
    def configure(self, trust: bool) -> None:
        recycler.configure(limit=LIMIT if trust else None)
        recycler.configure(limit=LIMIT)

    @invariant()
    def nobody_s_bytes_change(self) -> None:
        for made in self.living:
            if made.sign:
                assert made.view[0] == made.view[-1] == made.view[len(made.view) // 2] == made.sign

    @invariant()
    def the_books_balance(self) -> None:
        seen = statistics()
        assert seen.kept_bytes <= LIMIT
        assert seen.kept_bytes == sum(size * blocks for size, blocks in seen.sizes.items())
        assert seen.kept_blocks == sum(seen.sizes.values())
        kept = {block.object.identity for block in recycler._recycler._blocks}
        assert kept.isdisjoint(made.identity for made in self.living)

    def teardown(self) -> None:
        for made in self.living:
            made.view.release()
            made.buffer.close()
        for fd in self.opened:
            os.close(fd)
        self.living.clear()
        self.stack.close()


@pytest.mark.slow
def test_recycling_held_to_the_model() -> None:
    how = settings(max_examples=80, stateful_step_count=50, deadline=None, database=None)
    run_state_machine_as_test(Recycling, settings=how)
