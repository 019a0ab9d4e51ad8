"""Memory that a client's calls lend to the service: who may copy it, and how long it must stay.

The service may copy what was lent through the connection, in the direction said, while the call is
in flight. By the kernel's leave it may do so at any time before it has answered, or its task ends:
so what it may store to is kept until then, also where nobody waits for the call any more, or the
connection is gone. Else it would store into whatever that memory became.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from memdesc.services.protocol.calls import Lent
from memdesc.vm.forks import lock_for
from memdesc.vm.pages import Direction
from memdesc.vm.task import Task

if TYPE_CHECKING:
    from memdesc.services.calls.outgoing import Outgoing

_FILL = (Direction.IN.value, Direction.OUT_IN.value)
_READ = (Direction.OUT.value, Direction.OUT_IN.value)

_orphans: list[tuple[Task, list[object]]] = []
"""What a service may still store to, whose connection ended first."""


class LentMemory:
    """The books of one connection, by the number of the call."""

    def __init__(self) -> None:
        # Reentrant, as the collector may end a connection at any moment.
        self._lock = lock_for(self)
        self._lent: dict[int, list[Lent]] = {}
        self._kept: dict[int, list[object]] = {}
        self._filled: set[int] = set()

    def hold(self, number: int, outgoing: Outgoing) -> None:
        """Note what a call lends, before it is sent."""
        if not outgoing.kept:
            return
        with self._lock:
            self._kept[number] = outgoing.kept
            self._lent[number] = outgoing.lent
            if any(one.direction in _FILL for one in outgoing.lent):
                self._filled.add(number)

    def revoke(self, number: int) -> None:
        """Note that nobody waits for a call any more: nothing is copied for it."""
        with self._lock:
            self._lent.pop(number, None)

    def let_go(self, number: int) -> None:
        """Note that a call was answered, or never sent: the service stores to nothing of it."""
        if number in self._kept:
            with self._lock:
                self._lent.pop(number, None)
                self._kept.pop(number, None)
                self._filled.discard(number)

    def copy(self, address: int, nbytes: int, *, fill: bool, work: Callable[[bool], None]) -> None:
        """Call `work` with whether a range is lent in that direction; it stays so meanwhile."""
        wanted = _FILL if fill else _READ
        with self._lock:
            work(
                any(
                    one.direction in wanted
                    and one.address <= address
                    and address + nbytes <= one.address + one.length
                    for ranges in self._lent.values()
                    for one in ranges
                )
            )

    def abandon(self, task: Task) -> None:
        """After the end of the connection: keep what the service may store to while it lives."""
        with self._lock:
            left = [self._kept[number] for number in self._filled]
            self._kept.clear()
            self._lent.clear()
            self._filled.clear()
        _orphans[:] = [one for one in _orphans if one[0].alive]
        if left and task.alive:
            _orphans.extend((task, one) for one in left)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is lent or kept."""
        return not self._kept
