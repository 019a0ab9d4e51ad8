"""The state machine of a buffer's memory, held to the page that documents it and to the kernel."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from children import NOBODY, in_child

from memdesc import Access, BufferMemoryDescriptor, SealedError, _core
from memdesc.memory.lifecycle import TABLE, Lifecycle, Recycling, Snapshot, State

PAGE = Path(__file__).parents[2] / "docs" / "memory-lifecycle.md"

SEALS = {
    "GROW": _core.F_SEAL_GROW,
    "SHRINK": _core.F_SEAL_SHRINK,
    "WRITE": _core.F_SEAL_WRITE,
    "SEAL": _core.F_SEAL_SEAL,
    "FUTURE_WRITE": _core.F_SEAL_FUTURE_WRITE,
}
GRANTS = {
    "read-only": (Access.READ_ONLY, True),
    "read-only, a courtesy": (Access.READ_ONLY, False),
    "read-write": (Access.READ_WRITE, True),
}


def tables() -> Iterator[list[dict[str, str]]]:
    """Each table of the page, as a list of rows by column."""
    rows: list[list[str]] = []
    for line in [*PAGE.read_text().splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            head, _, *body = rows
            yield [dict(zip(head, row, strict=True)) for row in body]
            rows = []


STATES, GRANT_ROWS, MARKS = tables()


# ── The page and the module ──────────────────────────────────────────────────────────────────


def as_documented(state: State) -> dict[str, str]:
    row = TABLE[state]
    return {
        "state": state.value,
        "seals": ", ".join(name for name, bit in SEALS.items() if row.seals & bit),
        "owner stores": "yes" if row.owner_stores else "no",
        "peers get": row.peers_get.value if row.peers_get else "nothing",
        "snapshot": row.snapshot.value,
        "may grow": "yes" if row.may_grow else "no",
        "recycled for": row.recycling.value,
    }


def test_the_page_shows_the_table() -> None:
    assert [as_documented(state) for state in State] == STATES


def test_no_seal_is_left_out_of_the_page() -> None:
    every = sum(SEALS.values())
    assert all(row.seals & ~every == 0 for row in TABLE.values())


def test_the_page_shows_every_grant() -> None:
    reachable = {(row["state"], row["max_access"]) for row in GRANT_ROWS}
    impossible = {("shared for reading", "READ_WRITE"), ("shared for writing", "READ_ONLY")}
    every = {(state.value, access.name) for state in State for access in Access}
    assert reachable == every - impossible


def a_life(state: str, max_access: str) -> Lifecycle:
    life = Lifecycle(Access[max_access])
    life._state = State(state)
    return life


@pytest.mark.parametrize("how", GRANTS)
@pytest.mark.parametrize("row", GRANT_ROWS, ids=lambda row: f"{row['state']}-{row['max_access']}")
def test_each_grant_does_what_the_page_says(row: dict[str, str], how: str) -> None:
    life = a_life(row["state"], row["max_access"])
    before = life.state
    access, enforced = GRANTS[how]
    if row[how] == "moved, then as private":  # who owns it sees to that: test_snapshot_moves.py
        with pytest.raises(SealedError):
            life.grant(access, enforced=enforced, name="frames")
        return
    if row[how].startswith("SealedError"):
        with pytest.raises(SealedError) as caught:
            life.grant(access, enforced=enforced, name="frames")
        assert errno.errorcode[caught.value.errno or 0] == row[how].split()[1]
        assert life.state is before
        return
    after, seals = life.grant(access, enforced=enforced, name="frames")
    assert after.value == row[how]
    assert seals == TABLE[after].seals
    assert life.state is before  # until the seals are on
    life.granted(after, os.geteuid())
    assert life.state is after


@pytest.mark.parametrize("row", MARKS, ids=lambda row: row["mark"])
@pytest.mark.parametrize("state", State)
def test_each_mark_only_takes_away(row: dict[str, str], state: State) -> None:
    life = a_life(state.value, "READ_ONLY")
    assert (life.snapshot_cost(), life.recycling()) == (life.row.snapshot, life.row.recycling)
    if row["mark"] == "forked":
        in_child(lambda: None)
    elif row["mark"] == "registered":
        life.register(State)
    elif row["mark"] == "exposed":
        life.exposed = True
    else:
        life.grantees.add(os.geteuid() + 1)
    assert life.recycling() is Recycling(row["recycled for"]) is Recycling.NOBODY
    if row["snapshot"] == "as the state says" or life.row.snapshot is not Snapshot.FREE:
        assert life.snapshot_cost() is life.row.snapshot
    else:
        assert life.snapshot_cost() is Snapshot(row["snapshot"])


def test_the_seals_of_a_state_contain_those_of_the_states_before_it() -> None:
    ways = [(State.PRIVATE, state) for state in State]
    assert all(TABLE[before].seals & ~TABLE[after].seals == 0 for before, after in ways)


def test_no_one_is_given_more_than_the_seals_hold() -> None:
    for row in TABLE.values():
        if row.peers_get is Access.READ_ONLY:
            assert row.seals & (_core.F_SEAL_WRITE | _core.F_SEAL_FUTURE_WRITE)
        if row.peers_get is not None:
            assert row.seals & _core.F_SEAL_SEAL  # no peer adds a seal


# ── The kernel ───────────────────────────────────────────────────────────────────────────────


def kernel_seals(buffer: BufferMemoryDescriptor) -> int:
    return fcntl.fcntl(buffer.memory.fileno(), fcntl.F_GET_SEALS) & ~_core.F_SEAL_EXEC


@pytest.mark.parametrize(
    ("max_access", "state"),
    [(Access.READ_ONLY, State.SHARED_READ), (Access.READ_WRITE, State.SHARED_WRITE)],
)
def test_the_kernel_holds_the_seals_of_the_state(max_access: Access, state: State) -> None:
    with BufferMemoryDescriptor(100, max_access=max_access) as buffer:
        memory = buffer.memory
        assert memory.lifecycle.state is State.PRIVATE
        assert kernel_seals(buffer) == TABLE[State.PRIVATE].seals
        for _ in range(2):  # the second grant finds them on
            os.close(memory.grant(max_access, user=os.geteuid()))
            assert memory.lifecycle.state is state
            assert kernel_seals(buffer) == TABLE[state].seals
        with pytest.raises(PermissionError):
            fcntl.fcntl(memory.fileno(), fcntl.F_ADD_SEALS, _core.F_SEAL_WRITE)
        buffer.write_bytes(0, b"the owner stores")
        assert memory.lifecycle.grantees == {os.geteuid()}


def test_a_refused_grant_changes_nothing() -> None:
    with BufferMemoryDescriptor(100) as buffer:
        with pytest.raises(SealedError):
            buffer.memory.grant(Access.READ_WRITE, user=os.geteuid())
        assert buffer.memory.lifecycle.state is State.PRIVATE
        assert kernel_seals(buffer) == TABLE[State.PRIVATE].seals
        assert buffer.memory.lifecycle.grantees == set()


def test_a_grant_without_a_descriptor_left_seals_nothing() -> None:
    def without_descriptors() -> tuple[int | None, State, int]:
        with BufferMemoryDescriptor(100) as buffer:
            taken = []
            try:
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                pass
            try:
                with pytest.raises(OSError) as caught:
                    buffer.memory.grant(Access.READ_ONLY, user=os.geteuid())
            finally:
                for fd in taken:
                    os.close(fd)
            return caught.value.errno, buffer.memory.lifecycle.state, kernel_seals(buffer)

    limit = (64, 64)
    outcome = in_child(
        without_descriptors, before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    )
    assert outcome == (errno.EMFILE, State.PRIVATE, TABLE[State.PRIVATE].seals)


def test_a_fork_marks_the_memory_in_parent_and_child() -> None:
    life = Lifecycle(Access.READ_ONLY)
    assert not life.forked
    assert in_child(lambda: (life.forked, Lifecycle(Access.READ_ONLY).forked)) == (True, False)
    assert life.forked
    assert not Lifecycle(Access.READ_ONLY).forked  # what is made after the fork is not


def test_a_fork_child_grants_under_the_same_seals() -> None:
    with BufferMemoryDescriptor(100) as buffer:

        def child() -> tuple[State, int]:
            os.close(buffer.memory.grant(Access.READ_ONLY, user=NOBODY))
            return buffer.memory.lifecycle.state, kernel_seals(buffer)

        seals = TABLE[State.SHARED_READ].seals
        assert in_child(child) == (State.SHARED_READ, seals)
        assert kernel_seals(buffer) == seals  # one file; our books do not know of it
        os.close(buffer.memory.grant(Access.READ_ONLY, user=os.geteuid()))
        buffer.write_bytes(0, b"the owner stores")
