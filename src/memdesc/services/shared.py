"""Sharing: what a connection has of what its service shares."""

from __future__ import annotations

import errno
import socket as sockets
import time
from typing import Any

from memdesc.descriptors.received import ReceivedMemoryDescriptor
from memdesc.errors import ProtocolError, TimedOutError
from memdesc.handover import unpack
from memdesc.mapping import LocalMemoryMap
from memdesc.services import protocol
from memdesc.services.limits import Limits
from memdesc.services.link import Link
from memdesc.vm.pages import Access
from memdesc.vm.task import Task
from memdesc.vm.timeouts import deadline_of

_MOST_SHARES = 1 << 16
"""Entries of a list that are read: a service could go on until this process has no memory left."""


class SharedWith(Link):
    """What a connection has of it."""

    def __init__(
        self, name: str, sock: sockets.socket, task: Task, limits: Limits, *, allow_copy: bool
    ) -> None:
        super().__init__(name, sock, task, limits, allow_copy=allow_copy)
        self._lengths: dict[str, int] = {}  # of what is watched, as last told
        self._watched: set[str] = set()

    def shares(self, timeout: float | None = 5.0) -> list[protocol.Share]:
        """List what the service shares with this client.

        Raises
        ------
        TimedOutError, PeerGoneError, ClosedError, ProtocolError
        """
        found: list[protocol.Share] = []
        until = deadline_of(timeout)
        while True:
            request = protocol.ListShares(self.next_id(), len(found))
            answer, _ = self.request(request, protocol.Shares, timeout=_left(until))
            if self._is_last(answer, found):
                return found

    async def shares_async(self, timeout: float | None = 5.0) -> list[protocol.Share]:
        """As `shares`, for asyncio."""
        found: list[protocol.Share] = []
        until = deadline_of(timeout)
        while True:
            request = protocol.ListShares(self.next_id(), len(found))
            answer, _ = await self.request_async(request, protocol.Shares, timeout=_left(until))
            if self._is_last(answer, found):
                return found

    def _is_last(self, answer: protocol.Shares, found: list[protocol.Share]) -> bool:
        """Add a page of the list to what was found; whether it was the last."""
        found += answer.shares
        if answer.more and answer.shares and len(found) > _MOST_SHARES:
            raise ProtocolError(
                f"service {self.name!r} lists more than {_MOST_SHARES:,} shares, without end",
                errno=errno.EPROTO,
            )
        return not (answer.more and answer.shares)

    def descriptor(self, name: str, timeout: float | None = 5.0) -> ReceivedMemoryDescriptor:
        """Get a descriptor of what is shared under a name, waiting for it. Owned by the caller.

        Raises
        ------
        ShareNotFoundError
            Nothing was in that time, or not with this client (ENOENT).
        TimedOutError, PeerGoneError, ClosedError
        """
        return self._open(name, timeout)[0]

    async def descriptor_async(
        self, name: str, timeout: float | None = 5.0
    ) -> ReceivedMemoryDescriptor:
        """As `descriptor`, for asyncio. Cancelled, what came is closed."""
        return (await self._open_async(name, timeout))[0]

    def wait_length(self, name: str, known: int, timeout: float | None = None) -> int:
        """Wait until what is shared under a name has another length than `known`; give that.

        The service's buffer was lengthened, grown or shortened (`BufferMemoryDescriptor.grow`,
        `set_length`), or another descriptor is shared under the name. Descriptors and mappings that
        are here already stay as they are; `map` again gives the new length.

        Parameters
        ----------
        name : str
            As the service shares it.
        known : int
            Bytes: the length of the mapping, say, that this program has.
        timeout : float, optional
            Seconds; None waits for ever.

        Returns
        -------
        int
            The latest length that the service has told, in bytes. Those in between are not told.

        Raises
        ------
        TimedOutError, ShareNotFoundError, PeerGoneError, ClosedError
        """
        until = deadline_of(timeout)
        if name not in self._lengths:
            self._watch(name)
            self._ask_about(protocol.WatchLength, name, protocol.Length, timeout)
        return self._arrived.wait_for(
            lambda: self._other_length(name, known),
            _left(until),
            lambda: self._same_length(name, known, timeout),
        )

    async def wait_length_async(self, name: str, known: int, timeout: float | None = None) -> int:
        """As `wait_length`, for asyncio."""
        until = deadline_of(timeout)
        if name not in self._lengths:
            self._watch(name)
            await self._ask_about_async(protocol.WatchLength, name, protocol.Length, timeout)
        return await self._arrived.wait_for_async(
            lambda: self._other_length(name, known),
            _left(until),
            lambda: self._same_length(name, known, timeout),
        )

    def _other_length(self, name: str, known: int) -> int | None:
        if (nbytes := self._lengths.get(name, known)) != known:
            return nbytes
        if self._gone is not None:
            raise self._gone_again()
        return None

    def _same_length(self, name: str, known: int, timeout: float | None) -> TimedOutError:
        return TimedOutError(
            f"{name!r} of service {self.name!r} still had {known:,} bytes after {timeout} s",
            errno=errno.ETIMEDOUT,
        )

    def _watch(self, name: str) -> None:
        """Have the service tell of the length of a share, as long as the connection lasts."""
        protocol.check_name(name)
        self._watched.add(name)

    def _heard(self, name: str, nbytes: int) -> None:
        """Note the length of what is watched, in the order in which the service told of it."""
        with self._arrived:
            self._lengths[name] = nbytes
            self._arrived.notify_all()

    def map(
        self,
        name: str,
        *,
        offset: int = 0,
        length: int | None = None,
        access: Access | None = None,
        prefault: bool = False,
        guard_pages: int = 0,
        at_address: int | None = None,
        timeout: float | None = 5.0,
    ) -> LocalMemoryMap:
        """Map what is shared under a name into this task, waiting until it is shared.

        Parameters
        ----------
        name : str
            As the service shares it.
        offset, length, access, prefault, guard_pages, at_address
            As of `MemoryDescriptor.create_mapping_in_task`.
        timeout : float, optional
            Seconds to wait for the service to share it and to answer; None waits for ever, 0 asks
            once.

        Returns
        -------
        LocalMemoryMap
            A buffer; `array()` gives it as it was shared. It outlives the connection.

        Raises
        ------
        ShareNotFoundError, MappingError, TimedOutError, PeerGoneError, ClosedError
        """
        descriptor, share = self._open(name, timeout)
        return mapped(
            descriptor,
            share,
            offset=offset,
            length=length,
            access=access,
            prefault=prefault,
            guard_pages=guard_pages,
            at_address=at_address,
        )

    async def map_async(
        self, name: str, *, timeout: float | None = 5.0, **placement: Any
    ) -> LocalMemoryMap:
        """As `map`, for asyncio; the parameters are those of `map`.

        Only this task waits for the service; cancelled, nothing is mapped. Pages are mapped, and
        with `prefault` touched, in the event loop itself.
        """
        descriptor, share = await self._open_async(name, timeout)
        return mapped(descriptor, share, **placement)

    def _open(
        self, name: str, timeout: float | None
    ) -> tuple[ReceivedMemoryDescriptor, protocol.Share]:
        return self._opened(
            name, *self._ask_about(protocol.OpenShare, name, protocol.Opened, timeout)
        )

    async def _open_async(
        self, name: str, timeout: float | None
    ) -> tuple[ReceivedMemoryDescriptor, protocol.Share]:
        return self._opened(
            name, *await self._ask_about_async(protocol.OpenShare, name, protocol.Opened, timeout)
        )

    def _opened(
        self, name: str, answer: protocol.Opened, fds: list[int]
    ) -> tuple[ReceivedMemoryDescriptor, protocol.Share]:
        """Make what came, checking all of it."""
        descriptor = unpack(answer.portable, fds, user=self.task.credentials.uid)
        share = answer.share
        if (share.nbytes, share.writable) != (descriptor.length, descriptor.max_access.writable):
            descriptor.close()
            raise ProtocolError(
                f"{name!r} is said to have {share.nbytes:,} bytes, writable: {share.writable}; "
                f"what came has {descriptor.length:,}, {descriptor.max_access.value}",
                errno=errno.EPROTO,
            )
        descriptor.name = name
        return descriptor, share

    def _handle(self, message: Any, fds: list[int], lost: bool) -> None:
        if isinstance(message, protocol.LengthChanged) and message.name in self._watched:
            self._heard(message.name, message.nbytes)
        else:
            super()._handle(message, fds, lost)

    def _answered(self, answer: Any, fds: list[int], lost: bool) -> None:
        if isinstance(answer, protocol.Length) and answer.name in self._watched:
            self._heard(answer.name, answer.nbytes)
        elif isinstance(answer, protocol.Opened) and answer.share.name in self._lengths:
            self._heard(answer.share.name, answer.share.nbytes)  # newer than what was told before
        super()._answered(answer, fds, lost)


def mapped(
    descriptor: ReceivedMemoryDescriptor, share: protocol.Share, **placement: Any
) -> LocalMemoryMap:
    """Map what is shared, to be seen as it was shared."""
    mapping = descriptor.map(**placement)
    if share.dtype is not None and mapping.length == descriptor.length:
        mapping.layout = share.shape, share.dtype, "F" if share.column_major else "C"
    return mapping


def _left(until: float | None) -> float | None:
    """Give the seconds until then; None: for ever."""
    return None if until is None else max(until - time.monotonic(), 0)
