"""Sharing: what a service shares under names, and what its user clients have of it."""

from __future__ import annotations

import errno
import socket as sockets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memdesc.descriptors.base import MemoryDescriptor, check_descriptor
from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.errors import (
    ClosedError,
    InvalidArgument,
    MemdescError,
    SealedError,
    ShareNotFoundError,
)
from memdesc.handover import check_giving, pack
from memdesc.mapping import check_order, elements_of, fit
from memdesc.services import protocol
from memdesc.services.accepting import Accepted, Accepting
from memdesc.services.limits import Limits
from memdesc.services.offers import Allow, Offers, allows, not_offered
from memdesc.tables import ARROW
from memdesc.vm.pages import Access
from memdesc.vm.task import Task

if TYPE_CHECKING:
    import numpy.typing as npt

    from memdesc.services.service import Service


_SHARES_AT_ONCE = 128


@dataclass(frozen=True, slots=True)
class _Shared:
    """One thing that a service shares, and with whom."""

    name: str
    descriptor: MemoryDescriptor
    access: Access
    enforced: bool
    shape: tuple[int, ...] | None
    dtype: str | None
    column_major: bool
    content: str
    allow: Allow | None

    def described(self) -> protocol.Share:
        """As clients are told of it."""
        return protocol.Share(
            self.name,
            self.descriptor.length,
            self.access.writable,
            self.shape,
            self.dtype,
            self.allow is not None,
            self.column_major,
            self.content,
        )


class Sharing(Accepting):
    """What a service has of it."""

    def __init__(self, name: str, allow: Allow | None, limits: Limits) -> None:
        self._shares: dict[str, _Shared] = {}
        self._telling = False
        self.opens = self.opened_bytes = 0
        super().__init__(name, allow, limits)

    def share(
        self,
        name: str,
        descriptor: MemoryDescriptor,
        *,
        access: Access | None = None,
        enforced: bool = True,
        shape: tuple[int, ...] | None = None,
        dtype: npt.DTypeLike | None = None,
        order: str = "C",
        content: str = "",
        allow: Allow | None = None,
    ) -> None:
        """Let clients find a descriptor under a name. Replaces what was shared under it.

        Parameters
        ----------
        name : str
            At most 1,024 characters.
        descriptor : MemoryDescriptor
            Kept alive while shared; sealed at the first client's opening.
        access : Access, optional
            What clients get; by default the most that `max_access` allows.
        enforced : bool
            False accepts read-only as a courtesy on memory that is READ_WRITE.
        shape, dtype : optional
            How `mapping.array()` looks at the other side. With `dtype` alone it is flat, and as
            long as the descriptor then is; a `shape` stays as it is when that grows.
        order : {"C", "F"}
            Whether the last or the first index varies fastest.
        content : str
            "arrow" where it is an Arrow stream or file, as of `memdesc.interop.arrow`: then
            ``connection[name]`` is a table. Such memory is immutable.
        allow : callable, optional
            Further rule for this share: takes the client's Task.

        Raises
        ------
        SealedError
            READ_WRITE memory can not be shared read-only and enforced; nor the other way round;
            nor memory that can still be changed as a table (EPERM).
        MappingError
            No client could map it: PRIVATE_MEMORY, ZONE_MEMORY, NOT_MAPPED, ...; CAN_SHRINK:
            memory whose size is not sealed (an anonymous mmap of this task, a file).
        ClosedError
            The descriptor, or the service, was closed. A descriptor that is closed later stays
            listed, and clients that open it get this error: `unshare` it first.
        RangeError, InvalidArgument
            The array does not fit, or can not travel.

        Notes
        -----
        Several descriptors as one that do not meet at page borders can be shared, but be mapped in
        parts only, by clients as here (NOT_CONGRUENT).
        """
        protocol.check_name(name)
        check_descriptor(descriptor, "what is shared")
        access = descriptor.max_access if access is None else Access(access)
        if not access.within(descriptor.max_access):
            raise SealedError(
                f"what is shared as {name!r} gives {descriptor.max_access.value} at most: make it "
                "with max_access=READ_WRITE to share it for writing",
                errno=errno.EACCES,
            )
        if enforced and access is Access.READ_ONLY and descriptor.max_access.writable:
            raise SealedError(
                f"what is shared as {name!r} is max_access=READ_WRITE: a client that it is shared "
                "with read-only could re-open it for writing; make it READ_ONLY, or say "
                "enforced=False if a courtesy is enough",
                errno=errno.EACCES,
            )
        if descriptor.length:  # now, to who can do something about it; a client would get it later
            extents = descriptor._extents(0, descriptor.length, access)
            check_giving(extents, access, enforced=enforced)
        shape, kind = _check_layout(descriptor, shape, dtype, order)
        _check_content(name, descriptor, content, kind)
        column_major = order == "F"
        shared = _Shared(
            name, descriptor, access, enforced, shape, kind, column_major, content, allow
        )
        with self._lock:
            self._check_open()
            self._shares[name] = shared
        if isinstance(descriptor, BufferMemoryDescriptor):
            descriptor.watch_length(self)
        self.length_changed()  # of what was shared under the name before

    def unshare(self, name: str) -> None:
        """Share it no longer; clients keep what they have mapped."""
        with self._lock:
            self._check_open()
            if self._shares.pop(name, None) is None:
                raise ShareNotFoundError(
                    f"service {self.name!r} shares no {name!r}", errno=errno.ENOENT
                )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Make what is shared and unshared in this block known all at once, when it ends.

        A client sees either nothing of it or all. Where the block raises nothing of it is done.
        Clients that ask something of the service meanwhile wait: prepare everything before.
        """
        with self._lock:
            self._check_open()
            before = dict(self._shares)
            try:
                yield
            except BaseException:
                self._shares = before
                raise

    def shares(self) -> list[protocol.Share]:
        """List what is shared."""
        with self._lock:
            return [shared.described() for shared in self._shares.values()]

    def length_changed(self) -> None:
        """Have clients that wait for it told of a length that changed; called by buffers."""
        if not self._closed and not self._telling:
            self._telling = True
            self._loop.post(self._tell_lengths)

    def _tell_lengths(self) -> None:
        self._telling = False  # first: what changes from here on is told the next time
        for client in self.clients():
            client.tell_lengths()

    def _visible_to(self, client: Accepted) -> list[protocol.Share]:
        with self._lock:
            known = list(self._shares.values())
        return [one.described() for one in known if allows(one.allow, client, one.name)]

    def _find(self, client: Accepted, name: str) -> _Shared:
        with self._lock:
            shared = self._shares.get(name)
        if shared is None or not allows(shared.allow, client, name):
            raise not_offered(self, client, "map", name, "share")
        return shared

    def _offers(self) -> Offers:
        return super()._offers() | {"map": (self._shares, lambda shared: shared.allow)}

    def _ending(self) -> None:
        super()._ending()
        with self._lock:
            self._shares.clear()


class SharingClient(Accepted):
    """What a service's user client has of it."""

    def __init__(self, service: Service, sock: sockets.socket, task: Task) -> None:
        super().__init__(service, sock, task)
        self._told: dict[str, int] = {}  # lengths of what it watches, as it last heard

    def _handle(self, message: Any, fds: list[int], lost: bool) -> None:
        service = self._service
        if service is None:
            return
        if isinstance(message, protocol.ListShares):
            self._answer(message.id, lambda: self._list(service, message))
        elif isinstance(message, protocol.OpenShare):
            self._answer(message.id, lambda: self._open(service, message))
        elif isinstance(message, protocol.WatchLength):
            self._answer(message.id, lambda: self._watch(service, message))
        else:
            super()._handle(message, fds, lost)

    def _list(
        self, service: Service, request: protocol.ListShares
    ) -> tuple[protocol.Shares, list[int]]:
        shares = service._visible_to(self)[request.start :]
        page: list[protocol.Share] = []
        room = protocol.MAX_MESSAGE - 1024
        for share in shares[:_SHARES_AT_ONCE]:
            room -= len(protocol.encode(share))
            if room < 0:
                break
            page.append(share)
        return protocol.Shares(request.id, tuple(page), len(page) < len(shares)), []

    def _open(
        self, service: Service, request: protocol.OpenShare
    ) -> tuple[protocol.Opened, list[int]]:
        shared = service._find(self, request.name)
        try:
            portable, fds = pack(
                shared.descriptor,
                shared.access,
                enforced=shared.enforced,
                user=self.task.credentials.uid,
            )
        except ClosedError as error:
            raise ClosedError(
                f"share {shared.name!r} of service {service.name!r}: the service closed what it "
                "shares there"
            ) from error
        service.opens += 1
        service.opened_bytes += shared.descriptor.length
        return protocol.Opened(request.id, shared.described(), portable), fds

    def _watch(
        self, service: Service, request: protocol.WatchLength
    ) -> tuple[protocol.Length, list[int]]:
        nbytes = service._find(self, request.name).descriptor.length
        self._told[request.name] = nbytes
        return protocol.Length(request.id, request.name, nbytes), []

    def tell_lengths(self) -> None:
        """Tell of the lengths that changed, unless it has not read all yet. On the I/O thread.

        Then it is told when it has: once, of the lengths as they are by then.
        """
        service = self._service
        if service is None:
            return
        for name, told in self._told.items():
            try:
                nbytes = service._find(self, name).descriptor.length
            except MemdescError:
                continue  # it is shared no longer, or not with this one
            if nbytes != told and not self._queue:
                self._told[name] = nbytes
                self._send_if_there(protocol.LengthChanged(name, nbytes))

    def _write_waiting(self) -> None:
        super()._write_waiting()
        if not self._queue:
            self.tell_lengths()


def _check_layout(
    descriptor: MemoryDescriptor, shape: tuple[int, ...] | None, dtype: Any, order: str
) -> tuple[tuple[int, ...] | None, str | None]:
    """Check that an array of that form fits and can travel: (shape, array-protocol string)."""
    if shape is None and dtype is None:
        return None, None
    elements = elements_of("u1" if dtype is None else dtype)
    check_order(order)
    fitting, _ = fit(shape, elements, elements.itemsize, descriptor.length)
    return None if shape is None else fitting, elements.dtype


def _check_content(
    name: str, descriptor: MemoryDescriptor, content: str, dtype: str | None
) -> None:
    """Check that what is shared as a table can be read as one."""
    if content not in ("", ARROW) or (content and dtype is not None):
        raise InvalidArgument(
            f"content is {str(content)[:80]!r}: give {ARROW!r}, without dtype and shape, or none",
            errno=errno.EINVAL,
        )
    if not content or not descriptor.length:
        return
    extents = descriptor._extents(0, descriptor.length, Access.READ_ONLY)
    if not all(extent.object.immutable for extent in extents):
        raise SealedError(
            f"what is shared as {name!r} can still be changed, so no client would read it as a "
            "table: share what arrow.to_descriptor(...) gives, or its snapshot()",
            errno=errno.EPERM,
        )
