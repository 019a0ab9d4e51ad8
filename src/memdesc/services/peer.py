"""A peer: one end of a connection, the same on both sides, with the mappings pushed over it.

`Connection` (the client's side) and `UserClient` (the service's) are its two kinds. Either side may
map its memory into the other (`create_mapping_in_task`), up to the other's limit.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket as sockets
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from memdesc.copyio import register_copier, unregister_copier
from memdesc.errors import (
    ClosedError,
    InvalidArgument,
    MappingError,
    MappingReason,
    MemdescError,
    NotPrivilegedError,
    PeerGoneError,
    ProtocolError,
    SealedError,
    TaskGoneError,
    TimedOutError,
)
from memdesc.handover import close_all, give, take, travelling
from memdesc.mapping import (
    Extent,
    LocalMemoryMap,
    Placement,
    RemoteMemoryMap,
    add_carrier,
    has_hole,
    map_extents,
    remove_carrier,
)
from memdesc.memory.page_kinds import meminfo
from memdesc.services import protocol
from memdesc.services.copier import PeerCopier, read_own, write_own
from memdesc.services.limits import Limits
from memdesc.services.requests import Requester
from memdesc.services.statistics import PeerStatistics
from memdesc.vm.pages import Access, page_size
from memdesc.vm.regions import find_holes, regions, regions_in
from memdesc.vm.task import Task

_physical = os.sysconf("SC_PHYS_PAGES") * page_size
"""Bytes of memory: no less is refused, so the kernel need not be asked each time."""


class Peer(Requester):
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
        self._in_peer: set[int] = set()
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
        extents = take(push.pieces, taken, access)
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

    # -- mappings that we push into the peer (mapping.Carrier) -----------------------------------

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
        """Have the other side map extents; see `MemoryDescriptor.create_mapping_in_task`."""
        if placement.prefault:
            _allocate(extents)
        pieces, fds = self._give(extents, access, enforced)
        push = protocol.PushMapping(
            id=self.next_id(),
            token=self.next_id(),
            name=travelling(getattr(owner, "name", "")),
            writable=access.writable,
            pieces=tuple(pieces),
            offset=offset,
            at_address=placement.at_address,
            guard_pages=placement.guard_pages,
            prefault=placement.prefault,
        )
        with self._lock:
            self._in_peer.add(push.token)  # now: its end may be told before we see its beginning
        try:
            answer = self._push(push, fds, timeout)
        except BaseException:
            with self._lock:
                self._in_peer.discard(push.token)
            raise
        finally:
            close_all(fds)
        try:
            verified = self._check_claim(push.token, answer.address, extents, access)
        except BaseException:
            self.release_in_peer(push.token)
            raise
        return RemoteMemoryMap(
            self,
            push.token,
            address=answer.address,
            length=sum(extent.length for extent in extents),
            access=access,
            offset=offset,
            verified=verified,
            owner=owner,
        )

    def _push(
        self, push: protocol.PushMapping, fds: Sequence[int], timeout: float | None
    ) -> protocol.Mapped:
        undo = self._undo_push(push.token)
        try:
            return self.request(push, protocol.Mapped, fds, timeout, undo=undo)[0]
        except TimedOutError as error:
            raise MappingError(
                f"{error}; nothing is left mapped there when it wakes",
                reason=MappingReason.NOT_ANSWERING,
                errno=errno.ETIMEDOUT,
            ) from error
        except (PeerGoneError, ClosedError, ProtocolError) as error:
            raise MappingError(
                str(error), reason=MappingReason.PEER_GONE, errno=errno.ECONNRESET
            ) from error

    def _undo_push(self, token: int) -> Callable[[Any], None]:
        """What is done about a mapping that was made when no one waited for it any more."""

        def undo(answer: Any) -> None:
            if isinstance(answer, protocol.Mapped):
                self._send_if_there(protocol.ReleaseMapping(token))

        return undo

    def _give(
        self, extents: Sequence[Extent], access: Access, enforced: bool
    ) -> tuple[list[tuple[int, int, int]], list[int]]:
        try:
            return give(extents, access, enforced=enforced, user=self.task.credentials.uid)
        except SealedError as error:
            reason = MappingReason.ACCESS if access.writable else MappingReason.NOT_ENFORCED
            raise MappingError(str(error), reason=reason, errno=error.errno) from error

    def _check_claim(
        self, token: int, address: int, extents: Sequence[Extent], access: Access
    ) -> bool | None:
        """Look into the task's maps for what it says it did; None where we may not look.

        None too where its program has ended the mapping meanwhile, and said so.
        """
        try:
            return self._compare_claim(address, extents, access)
        except MappingError:
            # What it told us before it unmapped lies in the socket at the latest.
            self._loop.run(lambda: self._ready(selectors.EVENT_READ))
            still_there = self.has_mapping(token) and self._has_memory()
            if still_there:
                raise
            return None

    def _has_memory(self) -> bool:
        """False once the task is ending: its address space goes before it is called dead."""
        try:
            return bool(regions(self.task))
        except (NotPrivilegedError, TaskGoneError):
            return False
        except TimedOutError:
            return True

    def _compare_claim(
        self, address: int, extents: Sequence[Extent], access: Access
    ) -> bool | None:
        at = address
        try:
            for extent in extents:
                shown = regions_in(self.task, at, extent.length)
                if find_holes(shown, at, extent.length):
                    raise self._false_answer(address, "nothing")
                for region in shown:
                    low = max(at, region.start)
                    same_object = extent.object.identity == (
                        os.makedev(*region.object.device),
                        region.object.inode,
                    )
                    same_place = region.offset_of(low) == extent.offset + low - at
                    if not (same_object and same_place and region.access is access):
                        raise self._false_answer(address, region.path)
                at += extent.length
        except (NotPrivilegedError, TaskGoneError):
            return None
        except TimedOutError as error:
            raise MappingError(
                str(error), reason=MappingReason.NOT_ANSWERING, errno=error.errno
            ) from error
        except InvalidArgument as error:
            raise self._false_answer(address, "no address of a task") from error
        return True

    def _false_answer(self, address: int, what: str) -> MappingError:
        return MappingError(
            f"task {self.task.pid} answered that the mapping lies at {address:#x}; its maps show "
            f"{what or 'other memory'} there: do not use that address",
            reason=MappingReason.FALSE_ANSWER,
            errno=errno.EPROTO,
        )

    def has_mapping(self, token: int) -> bool:
        """Whether a mapping that we pushed is still in the books."""
        return not self.closed and token in self._in_peer

    def unmap_in_peer(self, token: int, timeout: float | None) -> None:
        """Have the other side unmap; `BufferError` while its program holds views."""
        try:
            pull = protocol.PullMapping(self.next_id(), token)
            self.request(pull, protocol.Done, timeout=timeout)
        except (PeerGoneError, ClosedError):
            return  # and its mappings with it
        except TimedOutError as error:
            raise MappingError(
                f"{error}; the mapping is still in the books",
                reason=MappingReason.NOT_ANSWERING,
                errno=errno.ETIMEDOUT,
            ) from error
        with self._lock:
            self._in_peer.discard(token)

    def release_in_peer(self, token: int) -> None:
        """Tell the other side that the mapping may go when its views do; does not wait."""
        with self._lock:
            known = token in self._in_peer
            self._in_peer.discard(token)
        if known:
            self._send_if_there(protocol.ReleaseMapping(token))


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


def _allocate(extents: Sequence[Extent]) -> None:
    """Allocate the pages of memory that is to be faulted in at the other side."""
    for extent in extents:
        if has_hole(extent):
            map_extents([extent], Access.READ_ONLY, Placement(prefault=True))


def _memory_size() -> int:
    """Bytes of memory and swap that the machine has now."""
    found = meminfo()
    return found["MemTotal"] + found["SwapTotal"]
