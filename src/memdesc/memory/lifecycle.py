"""The state machine of a buffer's memory. It fixes how a memfd is created and sealed.

Seals, grants, snapshots, growth, recycling and fork depend on one another, and seals can never
be undone; so they are decided here and nowhere else. `TABLE` is the whole of it;
`docs/memory-lifecycle.md` shows the same table, and a test holds the two together.

Marks lie across the states: *forked* (a fork child inherited the owner's writable mapping without
any call of ours), *registered* (a device or io_uring pins the pages) and *exposed* (the program
took the owner's own descriptor, and may have duplicated it). Each of them forbids what would
replace pages behind somebody's back.
"""

from __future__ import annotations

import errno
import os
import weakref
from dataclasses import dataclass
from enum import Enum

from memdesc import _core
from memdesc.errors import SealedError
from memdesc.vm.pages import Access


class State(Enum):
    """How far a buffer's memory has travelled. Left to right only; there is no way back."""

    PRIVATE = "private"
    """No other task was ever given it."""
    SHARED_READ = "shared for reading"
    """Granted read-only: the kernel refuses every new way to write it, to root too."""
    SHARED_WRITE = "shared for writing"
    """Granted for reading and writing."""
    FROZEN = "frozen"
    """A snapshot's: nobody can write it, nor ever will."""
    DETACHED = "detached"
    """The source of a snapshot made without copying: its view is private, over a frozen object."""


class Snapshot(Enum):
    """What a snapshot costs."""

    FREE = "no byte is copied"
    CHANGES = "what changed is copied"
    COPY = "the bytes are copied"
    ITSELF = "the memory is its own snapshot"


class Recycling(Enum):
    """What the memory may become once it is freed. A lease must show that no one has it."""

    THIS_PROGRAM = "this program's next buffers"
    TRUSTED = "buffers of the same max_access, if the program trusts its user's tasks"
    NOBODY = "nobody: it goes back to the kernel"


@dataclass(frozen=True, slots=True)
class Row:
    """What holds in one state. `seals` are those the file has; all stay for ever."""

    seals: int
    owner_stores: bool
    peers_get: Access | None
    snapshot: Snapshot
    may_grow: bool
    recycling: Recycling


_SIZE = _core.F_SEAL_GROW | _core.F_SEAL_SHRINK
_LAST = _SIZE | _core.F_SEAL_SEAL
_FUTURE = _core.F_SEAL_FUTURE_WRITE

TABLE: dict[State, Row] = {
    State.PRIVATE: Row(_SIZE, True, None, Snapshot.FREE, True, Recycling.THIS_PROGRAM),
    State.SHARED_READ: Row(
        _LAST | _FUTURE, True, Access.READ_ONLY, Snapshot.COPY, True, Recycling.TRUSTED
    ),
    State.SHARED_WRITE: Row(_LAST, True, Access.READ_WRITE, Snapshot.COPY, True, Recycling.TRUSTED),
    State.FROZEN: Row(
        _LAST | _core.F_SEAL_WRITE,
        False,
        Access.READ_ONLY,
        Snapshot.ITSELF,
        False,
        Recycling.NOBODY,
    ),
    State.DETACHED: Row(
        _LAST | _core.F_SEAL_WRITE, True, None, Snapshot.CHANGES, False, Recycling.NOBODY
    ),
}


class Lifecycle:
    """The state of one memory object, its marks, and the moves that are allowed.

    Parameters
    ----------
    max_access : Access
        What all others get at most, for ever.

    Notes
    -----
    Threads: the object whose memory it is holds its own lock around `grant` and `granted`. Fork:
    `forked` turns true in both the parent and the child, by a count of forks that `os.fork` bumps
    before it divides them, and once more after: another thread can make memory in between.
    """

    def __init__(self, max_access: Access) -> None:
        self.max_access = max_access
        self._registered: list[weakref.ref[object]] = []
        self.exposed = False
        self.grantees: set[int] = set()  # user ids; who may have kept a handle
        self._state = State.PRIVATE
        self._forks_at_birth = _forks()

    @property
    def state(self) -> State:
        """Where the memory stands now."""
        return self._state

    @property
    def row(self) -> Row:
        """What holds there."""
        return TABLE[self._state]

    @property
    def registrations(self) -> int:
        """How many devices have the memory now: a ring of io_uring, or a transfer under way."""
        return sum(1 for token in self._registered if token() is not None)

    def register(self, token: object) -> None:
        """Note that a device has the memory as long as the token lives; the object is locked.

        So it ends by whatever lets go of the token, an interrupt too, without a lock.
        """
        alive = [known for known in self._registered if known() is not None]
        self._registered = [*alive, weakref.ref(token)]

    @property
    def forked(self) -> bool:
        """Whether this process has forked since the memory was made."""
        return _forks() != self._forks_at_birth

    @property
    def _marked(self) -> bool:
        return self.forked or self.exposed or self.registrations > 0

    def grant(self, access: Access, *, enforced: bool, name: str) -> tuple[State, int]:
        """Tell the state that a grant leads to, and the seals that must be there first.

        The caller adds the seals, and then calls `granted`. It holds its lock meanwhile.

        Raises
        ------
        SealedError
            EPERM: more is asked for than the state gives to others, or read-only where only a
            courtesy could be had.
        """
        after = self._state
        if after is State.PRIVATE:
            after = State.SHARED_WRITE if self.max_access.writable else State.SHARED_READ
        most = TABLE[after].peers_get
        if most is None:
            raise SealedError(
                f"what buffer {name!r} shows is this task's private view over the memory of a "
                "snapshot, which nobody else can be given: it has to be moved first",
                errno=errno.EPERM,
            )
        if not access.within(most):
            raise SealedError(
                f"buffer {name!r} ({after.value}) can not be given out {access.value}: its seals "
                f"allow {most.value} at most; make it with max_access=READ_WRITE if others shall "
                "write it",
                errno=errno.EPERM,
            )
        if most.writable and not access.writable and enforced:
            raise SealedError(
                f"buffer {name!r} is max_access=READ_WRITE, so a read-only grant of it could be "
                f"re-opened for writing: make the buffer with max_access=READ_ONLY, or say "
                f"enforced=False if a courtesy is enough",
                errno=errno.EPERM,
            )
        return after, TABLE[after].seals

    def granted(self, state: State, user: int) -> None:
        """Note that the grant was made to a task of that user."""
        self._state = state
        self.grantees.add(user)

    def detach(self) -> None:
        """Note that the memory belongs to a snapshot now, and the owner's view is private."""
        self._state = State.DETACHED

    def rejoin(self) -> None:
        """Note that it does not, after all: the owner's view was never replaced."""
        self._state = State.PRIVATE

    def freeze(self) -> None:
        """Note that the seals against all writing are on."""
        self._state = State.FROZEN

    def snapshot_cost(self) -> Snapshot:
        """Tell what a snapshot would cost now, marks included."""
        cost = self.row.snapshot
        if cost is Snapshot.FREE and self._marked:
            return Snapshot.COPY
        return cost

    def recycling(self) -> Recycling:
        """Tell what the memory may become next, marks included.

        A grantee of another user is never trusted to have let go: he can keep an O_PATH handle,
        which no lease sees (`docs/memory-lifecycle.md`).
        """
        if self._marked or self.grantees - {os.geteuid()}:
            return Recycling.NOBODY
        return self.row.recycling

    def successor(self, max_access: Access) -> Lifecycle:
        """Give the life of the next buffer on the same memory: its seals and grantees stay."""
        next_ = Lifecycle(max_access)
        next_._state, next_.grantees = self._state, set(self.grantees)
        return next_


_fork_count = 0
_watching_forks = False


def _forks() -> int:
    """A count that every os.fork of this process changes, from the first question on."""
    global _watching_forks
    if not _watching_forks:
        _watching_forks = True
        os.register_at_fork(
            before=_count_fork, after_in_parent=_count_fork, after_in_child=_count_fork
        )
    return _fork_count


def _count_fork() -> None:
    global _fork_count
    _fork_count += 1
