"""A peer: one end of a connection, the same on both sides, with the mappings pushed over it.

`Connection` (the client's side) and `UserClient` (the service's) are its two kinds. Either side may
map its memory into the other (`create_mapping_in_task`), up to the other's limit: how it asks for
that is in `pushing`, how it is asked here.
"""

from __future__ import annotations

import errno
import os
import socket as sockets
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

from memdesc.copyio import register_copier, unregister_copier
from memdesc.errors import (
    MappingError,
    MappingReason,
    MemdescError,
    ProtocolError,
    TimedOutError,
)
from memdesc.handover import take
from memdesc.mapping import (
    Extent,
    LocalMemoryMap,
    Placement,
    add_carrier,
    has_hole,
    map_extents,
    remove_carrier,
)
from memdesc.memory.page_kinds import meminfo
from memdesc.services import protocol
from memdesc.services.copier import PeerCopier, read_own, write_own
from memdesc.services.limits import Limits
from memdesc.services.pushing import Pushing
from memdesc.services.statistics import PeerStatistics
from memdesc.vm.pages import Access, page_size
from memdesc.vm.task import Task

_physical = os.sysconf("SC_PHYS_PAGES") * page_size
"""Bytes of memory: no less is refused, so the kernel need not be asked each time."""


class Peer(Pushing):
    """One connected task, and the mappings that each side has made in the other.

    Attributes
    ----------
    task : Task
        At the other end, held by pidfd.
    limits : Limits
        What that task may take here at most.
    allow_copy : bool
        Whether that task may copy this one's memory through the connection.
    """

    def __init__(
        self, sock: sockets.socket, task: Task, limits: Limits, *, allow_copy: bool
    ) -> None:
        super().__init__(sock, task)
        self.limits = limits
        self.allow_copy = allow_copy
        self._arrived = self._lock
        self._no_copier: weakref.finalize[..., Any] | None = None  # not started
        self._pushed: dict[int, LocalMemoryMap] = {}
        self._sizes: dict[int, int] = {}  # ranges of each
        self._unseen: deque[LocalMemoryMap] = deque()

    def start(self) -> None:
        """Begin to be served, and to be a way to map into the task and to copy its memory."""
        add_carrier(self)
        copier = PeerCopier(self)
        register_copier(self.task, copier)
        self._no_copier = weakref.finalize(self, unregister_copier, self.task, copier)
        self._no_copier.atexit = False
        super().start()

    def forked(self) -> None:
        """In a fork child: the connection stays the parent's."""
        super().forked()
        self._arrived = self._lock
        self._in_peer.clear()

    def _ended(self, why: MemdescError) -> None:
        super()._ended(why)
        remove_carrier(self)
        if self._no_copier is not None:
            self._no_copier()
        with self._arrived:
            self._in_peer.clear()
            self._pushed.clear()
            self._sizes.clear()
            self._arrived.notify_all()

    def _handle(self, message: Any, fds: list[int], lost: bool) -> None:
        if isinstance(message, protocol.PushMapping):
            self._answer(message.id, lambda: self._map_for_peer(message, fds, lost))
        elif isinstance(message, protocol.PullMapping):
            self._answer(message.id, lambda: self._unmap_for_peer(message))
        elif isinstance(message, protocol.ReleaseMapping):
            self._release_for_peer(message.token)
        elif isinstance(message, protocol.ReadMemory):
            self._answer(message.id, lambda: read_own(message, allowed=self.allow_copy))
        elif isinstance(message, protocol.WriteMemory):
            self._answer(message.id, lambda: write_own(message, allowed=self.allow_copy))
        elif isinstance(message, protocol.MappingEnded):
            with self._lock:
                self._in_peer.discard(message.token)
        else:
            super()._handle(message, fds, lost)

    # -- mappings that the peer pushes into this task --------------------------------------------

    def _map_for_peer(
        self, push: protocol.PushMapping, fds: list[int], lost: bool
    ) -> tuple[protocol.Mapped, list[int]]:
        self._check_push(push, lost)
        access = Access.READ_WRITE if push.writable else Access.READ_ONLY
        taken = list(fds)
        fds.clear()
        extents = take(push.pieces, taken, access, user=self.task.credentials.uid)
        try:
            if push.prefault:
                _check_allocated(extents)
            placement = Placement(push.at_address, push.guard_pages, push.prefault)
            window = map_extents(extents, access, placement)
        finally:
            for extent in extents:
                extent.object.close()  # the mapping holds the pages
        mapping = LocalMemoryMap(
            window,
            offset=push.offset,
            access=access,
            guard_pages=push.guard_pages,
            owner=None,
            ended=_Ended(self, push.token),
        )
        with self._arrived:
            self._pushed[push.token] = mapping
            self._sizes[push.token] = len(extents)
            self._unseen.append(mapping)
            self._arrived.notify_all()
        return protocol.Mapped(push.id, mapping.address), []

    def _check_push(self, push: protocol.PushMapping, lost: bool) -> None:
        if lost:
            raise MappingError(
                f"task {os.getpid()} has no file descriptor left: close some there, or raise "
                "`ulimit -n`",
                reason=MappingReason.TOO_MANY_FILES,
                errno=errno.EMFILE,
            )
        if push.token in self._pushed:
            raise ProtocolError(f"mapping {push.token} is there already")
        ranges = self._ranges + len(push.pieces)
        if ranges > self.limits.mappings:
            raise MappingError(
                f"task {os.getpid()} takes {self.limits.mappings} mapped ranges from one "
                f"connection, these would be {ranges}: unmap some, or let it say "
                "limits=Limits(mappings=…)",
                reason=MappingReason.REFUSED,
                errno=errno.EDQUOT,
            )
        nbytes = sum(length for _, _, length in push.pieces) + sum(
            mapping.length for mapping in list(self._pushed.values())
        )
        most = self.limits.mapped_bytes
        if most is not None and nbytes > most:
            raise MappingError(
                f"task {os.getpid()} takes {most:,} mapped bytes from one connection, these would "
                f"be {nbytes:,}: unmap some, or let it say limits=Limits(mapped_bytes=…)",
                reason=MappingReason.REFUSED,
                errno=errno.EDQUOT,
            )
        if nbytes > _physical and nbytes > _memory_size():
            raise MappingError(
                f"task {os.getpid()} would have {nbytes:,} bytes mapped from one connection, more "
                f"than the {_memory_size():,} that this machine has",
                reason=MappingReason.REFUSED,
                errno=errno.EDQUOT,
            )

    def _unmap_for_peer(self, pull: protocol.PullMapping) -> tuple[protocol.Done, list[int]]:
        mapping = self._pushed.get(pull.token)
        if mapping is not None:
            mapping.unmap()
            self._strike(pull.token)
        return protocol.Done(pull.id), []

    def _release_for_peer(self, token: int) -> None:
        mapping = self._strike(token)
        if mapping is not None:
            mapping._let_go()

    def _strike(self, token: int) -> LocalMemoryMap | None:
        """Strike a mapping that was pushed here from the books; None where it is not in them."""
        with self._lock:
            mapping = self._pushed.pop(token, None)
            self._sizes.pop(token, None)
            if mapping is not None and mapping in self._unseen:
                self._unseen.remove(mapping)
            return mapping

    @property
    def _ranges(self) -> int:
        return sum(self._sizes.values())

    def mappings(self) -> list[LocalMemoryMap]:
        """List the mappings that the other side has made in this task."""
        with self._lock:
            return list(self._pushed.values())

    def statistics(self) -> PeerStatistics:
        """Tell what hangs on the connection now, as this side sees it; of an ended one too."""
        with self._lock:
            mappings = list(self._pushed.values())
            return PeerStatistics(
                mappings=len(mappings),
                mapped_bytes=sum(mapping.length for mapping in mappings),
                remote_mappings=len(self._in_peer),
                requests=len(self._pending),
                unread=len(self._queue),
            )

    def wait_mapping(self, timeout: float | None = None) -> LocalMemoryMap:
        """Wait for the next mapping that the other side makes in this task.

        Raises
        ------
        TimedOutError, PeerGoneError, ClosedError
        """
        return self._arrived.wait_for(
            self._next_mapping, timeout, lambda: self._no_mapping(timeout)
        )

    async def wait_mapping_async(self, timeout: float | None = None) -> LocalMemoryMap:
        """As `wait_mapping`, for asyncio; cancelling it loses no mapping."""
        return await self._arrived.wait_for_async(
            self._next_mapping, timeout, lambda: self._no_mapping(timeout)
        )

    def _next_mapping(self) -> LocalMemoryMap | None:
        if self._unseen:
            return self._unseen.popleft()
        if self._gone is not None:
            raise self._gone_again()
        return None

    def _no_mapping(self, timeout: float | None) -> TimedOutError:
        return TimedOutError(
            f"task {self.task.pid} made no mapping here within {timeout} s", errno=errno.ETIMEDOUT
        )


class _Ended:
    """Tells the other side that this program ended a mapping that it had pushed."""

    def __init__(self, peer: Peer, token: int) -> None:
        self._peer = weakref.ref(peer)
        self._token = token

    def __call__(self) -> None:
        peer = self._peer()
        if peer is None or peer._strike(self._token) is None:
            return
        peer._send_if_there(protocol.MappingEnded(self._token))


def _check_allocated(extents: Sequence[Extent]) -> None:
    """Refuse to fault in pages that their owner has not paid for: they would be charged to us."""
    for extent in extents:
        if has_hole(extent):
            raise MappingError(
                f"prefault of {extent.length:,} bytes in task {os.getpid()}, of which their owner "
                "has not touched all: touch them there first",
                reason=MappingReason.REFUSED,
                errno=errno.EDQUOT,
            )


def _memory_size() -> int:
    """Bytes of memory and swap that the machine has now."""
    found = meminfo()
    return found["MemTotal"] + found["SwapTotal"]
