"""Pushing: mappings that this side makes in the task at the other end (mapping.Carrier).

What the other side answers is a claim: where its maps may be looked at they are.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket as sockets
from collections.abc import Callable, Sequence
from typing import Any

from memdesc.errors import (
    ClosedError,
    InvalidArgument,
    MappingError,
    MappingReason,
    NotPrivilegedError,
    PeerGoneError,
    ProtocolError,
    SealedError,
    TaskGoneError,
    TimedOutError,
)
from memdesc.handover import close_all, give, travelling
from memdesc.mapping import Extent, Placement, RemoteMemoryMap, has_hole, map_extents
from memdesc.services import protocol
from memdesc.services.requests import Requester
from memdesc.vm.awaiting import in_thread
from memdesc.vm.pages import Access
from memdesc.vm.regions import find_holes, regions, regions_in
from memdesc.vm.task import Task


class Pushing(Requester):
    """What a peer has of it."""

    def __init__(self, sock: sockets.socket, task: Task) -> None:
        super().__init__(sock, task)
        self._in_peer: set[int] = set()

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
        push, fds = self._to_push(extents, access, enforced, placement, offset, owner)
        undo = self._undo_push(push.token)
        try:
            answer, _ = self.request(push, protocol.Mapped, fds, timeout, undo)
        except BaseException as error:
            self._not_pushed(push.token, error)
            raise
        finally:
            close_all(fds)
        try:
            verified = self._check_claim(push.token, answer.address, extents, access)
        except BaseException:
            self.release_in_peer(push.token)
            raise
        return self._pushed_map(push, answer.address, extents, verified, owner)

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
        """As `map_in_peer`, for asyncio. Cancelled, nothing is left mapped there."""
        push, fds = self._to_push(extents, access, enforced, placement, offset, owner)
        undo = self._undo_push(push.token)
        try:
            answer, _ = await self.request_async(push, protocol.Mapped, fds, timeout, undo)
        except BaseException as error:
            self._not_pushed(push.token, error)
            raise
        finally:
            close_all(fds)
        try:  # in a thread: a task can hold up for a while who looks into its maps
            verified = await in_thread(
                lambda: self._check_claim(push.token, answer.address, extents, access)
            )
        except BaseException:
            self.release_in_peer(push.token)
            raise
        return self._pushed_map(push, answer.address, extents, verified, owner)

    def _to_push(
        self,
        extents: Sequence[Extent],
        access: Access,
        enforced: bool,
        placement: Placement,
        offset: int,
        owner: object,
    ) -> tuple[protocol.PushMapping, list[int]]:
        """Note a mapping; make what asks for it: the message, and descriptors to be closed."""
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
        return push, fds

    def _not_pushed(self, token: int, error: BaseException) -> None:
        """Strike a mapping from the books; raise what it means that there is none."""
        self._strike_pushed(token)
        if isinstance(error, TimedOutError):
            raise MappingError(
                f"{error}; nothing is left mapped there when it wakes",
                reason=MappingReason.NOT_ANSWERING,
                errno=errno.ETIMEDOUT,
            ) from error
        if isinstance(error, PeerGoneError | ClosedError | ProtocolError):
            raise MappingError(
                str(error), reason=MappingReason.PEER_GONE, errno=errno.ECONNRESET
            ) from error

    def _pushed_map(
        self,
        push: protocol.PushMapping,
        address: int,
        extents: Sequence[Extent],
        verified: bool | None,
        owner: object,
    ) -> RemoteMemoryMap:
        return RemoteMemoryMap(
            self,
            push.token,
            address=address,
            length=sum(extent.length for extent in extents),
            access=Access.READ_WRITE if push.writable else Access.READ_ONLY,
            offset=push.offset,
            verified=verified,
            owner=owner,
        )

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
            undo = self._unmapped_late(token)
            self.request(pull, protocol.Done, timeout=timeout, undo=undo)
        except (PeerGoneError, ClosedError):
            return  # and its mappings with it
        except TimedOutError as error:
            raise _not_unmapped(error) from error
        self._strike_pushed(token)

    async def unmap_in_peer_async(self, token: int, timeout: float | None) -> None:
        """As `unmap_in_peer`, for asyncio. Cancelled, it is done all the same."""
        try:
            pull = protocol.PullMapping(self.next_id(), token)
            undo = self._unmapped_late(token)
            await self.request_async(pull, protocol.Done, timeout=timeout, undo=undo)
        except (PeerGoneError, ClosedError):
            return
        except TimedOutError as error:
            raise _not_unmapped(error) from error
        self._strike_pushed(token)

    def _unmapped_late(self, token: int) -> Callable[[Any], None]:
        """What is done about an unmapping that was done when no one waited for it any more."""

        def undo(answer: Any) -> None:
            if isinstance(answer, protocol.Done):
                self._strike_pushed(token)

        return undo

    def _strike_pushed(self, token: int) -> None:
        with self._lock:
            self._in_peer.discard(token)

    def release_in_peer(self, token: int) -> None:
        """Tell the other side that the mapping may go when its views do; does not wait."""
        with self._lock:
            known = token in self._in_peer
            self._in_peer.discard(token)
        if known:
            self._send_if_there(protocol.ReleaseMapping(token))


def _not_unmapped(error: TimedOutError) -> MappingError:
    return MappingError(
        f"{error}; the mapping is in the books until it does",
        reason=MappingReason.NOT_ANSWERING,
        errno=errno.ETIMEDOUT,
    )


def _allocate(extents: Sequence[Extent]) -> None:
    """Allocate the pages of memory that is to be faulted in at the other side."""
    for extent in extents:
        if has_hole(extent):
            map_extents([extent], Access.READ_ONLY, Placement(prefault=True))
