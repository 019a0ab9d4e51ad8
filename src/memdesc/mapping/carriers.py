"""The ways to make mappings in other tasks: one for each connection, registered by services."""

from __future__ import annotations

import errno
import threading
import weakref
from collections.abc import Sequence
from typing import Protocol

from memdesc.errors import MappingError, MappingReason
from memdesc.mapping.maps import RemoteMemoryMap, Unmapper
from memdesc.mapping.place import Extent, Placement
from memdesc.vm.pages import Access
from memdesc.vm.task import Task, key_of


class Carrier(Unmapper, Protocol):
    """One connection, as the way to make mappings in the task at its other end."""

    def map_in_peer(
        self,
        extents: Sequence[Extent],
        *,
        access: Access,
        enforced: bool,
        placement: Placement,
        offset: int,
        owner: object,
        timeout: float | None,
    ) -> RemoteMemoryMap:
        """Make a mapping there."""

    async def map_in_peer_async(
        self,
        extents: Sequence[Extent],
        *,
        access: Access,
        enforced: bool,
        placement: Placement,
        offset: int,
        owner: object,
        timeout: float | None,
    ) -> RemoteMemoryMap:
        """Make a mapping there, without stopping the event loop."""


# Weak: a connection that its program dropped ends, and reaches no one.
_carriers: dict[tuple[int, int], weakref.WeakSet[Carrier]] = {}
_carriers_lock = threading.Lock()


def add_carrier(carrier: Carrier) -> None:
    """Make a connection known as a way to its task."""
    with _carriers_lock:
        for key in [key for key, known in _carriers.items() if not known]:
            del _carriers[key]  # of connections that were dropped, not closed
        _carriers.setdefault(key_of(carrier.task), weakref.WeakSet()).add(carrier)


def remove_carrier(carrier: Carrier) -> None:
    """Forget it; a no-op where it is not known."""
    with _carriers_lock:
        known = _carriers.get(key_of(carrier.task))
        if known is not None:
            known.discard(carrier)
            if not known:
                del _carriers[key_of(carrier.task)]


def forget_carriers() -> None:
    """Drop all, after a fork in the child: its connections are its parent's."""
    global _carriers_lock
    _carriers_lock = threading.Lock()  # another thread of the parent may have held it
    _carriers.clear()


def carrier_to(task: Task, connection: object | None) -> Carrier:
    """Find the one connection to a task, or the one that the caller names.

    Raises
    ------
    MappingError
        NOT_CONNECTED (ENOTCONN), SEVERAL_CONNECTIONS (EINVAL).
    """
    with _carriers_lock:
        known = list(_carriers.get(key_of(task), ()))
    if connection is not None:
        known = [carrier for carrier in known if carrier is connection]
    if len(known) == 1:
        return known[0]
    if known:
        raise MappingError(
            f"{len(known)} connections to task {task.pid} exist: say connection=…",
            reason=MappingReason.SEVERAL_CONNECTIONS,
            errno=errno.EINVAL,
        )
    which = "the connection given is none to" if connection is not None else "no connection to"
    raise MappingError(
        f"{which} task {task.pid} exists, and Linux lets a mapping be made only by the task "
        "itself: let it connect to a Service of this process, or connect to its own",
        reason=MappingReason.NOT_CONNECTED,
        errno=errno.ENOTCONN,
    )
