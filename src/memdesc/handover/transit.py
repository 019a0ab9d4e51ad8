"""Descriptors on their way from one process of a family to another, which is not known yet.

A pipe of `multiprocessing` carries bytes only. So who sends a handle leaves its file descriptors
with a *holder*, and the receiver, told the holder's address and a token, takes them there. The
holder is the family's first process: what a worker sent can be had after the worker's death. Where
that one has none (it did not install, and sent nothing), each sender is its own holder, and what it
sent ends with it; so it stays a moment at its end, for those who are about to come.

A holder's name is made of the family's `authkey`, which all of it inherit; it is asked only where
it is of our own user.
"""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import select
import socket as sockets
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import closing
from multiprocessing import connection
from typing import Protocol

from memdesc.errors import AccessDeniedError, PeerGoneError, TimedOutError
from memdesc.handover import endings
from memdesc.handover.forms import too_many_files
from memdesc.handover.holder import (
    ANSWER,
    COUNT,
    KEEP,
    NO_FILES,
    TAKE,
    TOKEN,
    TOO_MUCH,
    YES,
    Counts,
    Holder,
    counts_in,
    is_ours,
    nbytes_of,
    not_there,
    peer_of,
    too_many_objects,
    too_much,
)
from memdesc.handover.sockets import receive_with_fds, send_with_fds
from memdesc.memory.closing import close_all, discard
from memdesc.vm.forks import lock_for, tell_child

PREFIX = b"\0memdesc-transit-"
PATIENCE = 60.0
"""Seconds that a holder has for an answer: its process may be stopped, or hold the GIL."""
_PAUSE = 0.005
_NAMED = 5
_STAYS = 5.0
"""Seconds that a worker which is its own holder stays at its end, for who takes what it sent."""


class HolderLike(Protocol):
    """A holder, or the way to one."""

    address: bytes

    def keep(self, token: bytes, fds: Sequence[int]) -> None:
        """Keep the descriptors of a handle until it is taken; takes them over."""

    def take(self, token: bytes) -> list[int]:
        """Give what is kept under a token, once."""


class Link:
    """The way to the holder of another process, connected when it is asked, and again if need be.

    `pid` is that process, as far as this one sees it. `limit` is what it said last of the bytes
    that it keeps; None: no limit, or it said nothing. Threads: one at a time asks.
    """

    _sock: sockets.socket | None = None

    def __init__(self, address: bytes, patience: float | None = None) -> None:
        self.address = address
        self.pid = 0
        self.limit: int | None = None
        self._patience = PATIENCE if patience is None else patience
        self._lock = lock_for(self)

    def open(self) -> None:
        """Connect, unless it is connected."""
        if not self._lock._is_owned():  # else a signal handler of the thread that is about to
            with self._lock:
                self._connected()

    def _connected(self) -> sockets.socket:
        sock = self._sock
        if sock is not None:
            if not self.closed:
                return sock
            sock.close()
        self._sock = None  # so it is not `closed`: who wants it waits for this attempt
        sock = sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)
        try:
            sock.settimeout(self._patience)
            self._connect(sock)
            self.pid, user = peer_of(sock)
            if not is_ours(self.pid, user):
                raise AccessDeniedError(
                    f"what keeps the memory belongs to user {user}, this process to user "
                    f"{os.geteuid()}: handles travel between processes of one user",
                    errno=errno.EACCES,
                )
        except (ConnectionRefusedError, FileNotFoundError) as error:
            sock.close()
            raise PeerGoneError(
                "the process that kept the memory has ended (have the first one of the program "
                "call memdesc.interop.multiprocessing.install(): then that one keeps it), or this "
                "one is in another network namespace",
                errno=error.errno,
            ) from error
        except BaseException:
            sock.close()
            raise
        finally:
            self._sock = sock
        return sock

    def _connect(self, sock: sockets.socket) -> None:
        """Connect, trying again while too many wait for it: any user may, and it may be stopped."""
        until = time.monotonic() + self._patience
        while True:
            try:
                sock.connect(self.address)
                return
            except BlockingIOError as error:
                if time.monotonic() >= until:
                    raise TimedOutError(
                        f"what keeps the memory took no connection within {self._patience:g} s: "
                        "its queue of those who wait is full (stopped?)",
                        errno=errno.ETIMEDOUT,
                    ) from error
            time.sleep(_PAUSE)

    def keep(self, token: bytes, fds: Sequence[int]) -> None:
        """Have descriptors kept there; closes them."""
        try:
            came = self._ask(KEEP + token, fds)
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:  # the holder was slow to take those of others
                raise too_many_files(error) from error
            raise
        finally:
            close_all(fds)
        discard(came, os.geteuid())

    def take(self, token: bytes) -> list[int]:
        """Take what is kept there."""
        return self._ask(TAKE + token, [])

    def counts(self) -> Counts:
        """Tell what is kept there."""
        self._ask(COUNT, [])
        return self._counts

    def _ask(self, message: bytes, fds: Sequence[int]) -> list[int]:
        if self._lock._is_owned():  # a signal handler of the thread that waits further down
            with closing(Link(self.address, self._patience)) as other:
                return other._ask(message, fds)
        with self._lock:
            sock = self._connected()
            try:
                send_with_fds(sock, message, fds)
                answer, came = receive_with_fds(sock, ANSWER, ANSWER)
            except BaseException:
                sock.close()  # the answer to come would be taken for that to the next question
                raise
        self._counts, limit = counts_in(answer)
        self.limit = limit or None
        if answer[:1] == YES:
            return came
        discard(came, os.geteuid())
        if answer[:1] == NO_FILES:
            raise too_many_objects(self._counts)
        if answer[:1] == TOO_MUCH:
            raise too_much(self._counts, limit, sum(nbytes_of(os.fstat(fd)) for fd in fds))
        raise not_there()

    def fileno(self) -> int:
        """The socket's descriptor; -1: it has none."""
        return -1 if self._sock is None else self._sock.fileno()

    def close(self) -> None:
        """Hang up; while a thread asks, that is left to the collector, after it."""
        if self._sock is not None and self._lock.acquire(blocking=False):
            try:
                self._sock.close()
            finally:
                self._lock.release()

    __del__ = close

    @property
    def closed(self) -> bool:
        """Whether it was hung up, by this end or the holder."""
        if self._sock is None:
            return False
        poller = select.poll()
        if (fd := self._sock.fileno()) >= 0:
            poller.register(fd, 0)  # no answer that is on its way, its end alone
        return fd < 0 or bool(poller.poll(0))


class Ways:
    """This process's holder, if it has one, and its ways to those of others."""

    def __init__(self) -> None:
        self._holder: Holder | None = None
        self._links: dict[bytes, Link] = {}
        self._limit: int | None = None
        self._lock = lock_for(self)
        tell_child(self)

    @property
    def holder(self) -> Holder | None:
        """This process's own."""
        holder = self._holder
        return None if holder is None or holder.closed else holder

    def to_send(self) -> HolderLike:
        """The holder that this process leaves things with, made now if there is none."""
        with self._lock:
            if self._holder is not None and self._holder.go_on():
                return self._holder
            link = self._link(_family_address())
        try:
            link.open()  # without the lock: a holder that is stopped holds up who wants it, only
        except (PeerGoneError, AccessDeniedError):
            with self._lock:
                if self._holder is None or not self._holder.go_on():  # another thread made none
                    self._holder = self._open(link.address)
                return self._holder
        return link

    def fds(self) -> set[int]:
        """The descriptors of its sockets, which last as this process does; not what is kept."""
        with self._lock:
            links = {link.fileno() for link in self._links.values()} - {-1}
            return links if self.holder is None else links | self.holder.fds()

    def limit(self, nbytes: int | None) -> None:
        """Let this process's holder keep no more bytes."""
        with self._lock:
            self._limit = nbytes
            if self._holder is not None:
                self._holder.limit = nbytes

    def _open(self, address: bytes) -> Holder:
        endings.prepare()
        if multiprocessing.parent_process() is None:
            try:
                return Holder(address, self._limit)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
        return Holder(address + os.urandom(8).hex().encode(), self._limit)

    def to(self, address: bytes) -> HolderLike:
        """The holder of that address."""
        with self._lock:
            if self.holder is not None and self.holder.address == address:
                return self.holder
            return self._link(address)

    def _link(self, address: bytes) -> Link:
        link = self._links.get(address)
        if link is None:
            # Many a sender was a holder, and has ended.
            self._links = {at: known for at, known in self._links.items() if not known.closed}
            link = self._links[address] = Link(address)
        return link

    def close(self) -> None:
        """Hang up, and end the holder once nothing waits there."""
        with self._lock:
            for link in self._links.values():
                link.close()
            self._links.clear()
            if self._holder is not None:
                self._holder.end_when_idle()

    def _inherit(self) -> None:
        for link in self._links.values():
            link.close()
        self._links.clear()
        if self._holder is not None:
            self._holder.forked()
            self._holder = None

    def end(self) -> None:
        """At the end of this process: let what was sent be taken; tell of what is not."""
        holder = self.holder
        if holder is None:
            return
        _stay(holder)
        if not (counts := holder.counts()).handles:
            return
        names = holder.names()
        more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
        warnings.warn(
            f"memdesc: what was sent and never received ends with task {os.getpid()}, which kept "
            f"it, {counts.handles:,} handle(s) of {counts.nbytes:,} bytes: "
            f"{', '.join(names[:_NAMED])}{more}",
            ResourceWarning,
            stacklevel=1,
        )


def _stay(holder: Holder) -> None:
    """Give those who were sent something by a worker time to take it; while its parent lives."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    until = time.monotonic() + _STAYS
    while holder.counts().handles and time.monotonic() < until:
        if connection.wait([parent.sentinel], _PAUSE):
            return
    holder.settle()


def _family_address() -> bytes:
    """The name of the first process's holder: as secret, until it listens, as the `authkey`."""
    key = bytes(multiprocessing.current_process().authkey)
    name = hashlib.blake2b(b"memdesc transit", key=key[:64], digest_size=16).hexdigest()
    return PREFIX + name.encode()


ways = Ways()


def leave(fds: Sequence[int]) -> tuple[bytes, bytes]:
    """Leave the descriptors of a handle with a holder, and close them: (its address, a token).

    Raises
    ------
    PeerGoneError, TimedOutError
        The holder ended just now, or does not answer.
    MappingError
        TOO_MANY_FILES: it has no descriptor left.
    LimitError
        It keeps as many bytes as it may (EDQUOT).
    """
    try:
        holder = ways.to_send()
    except BaseException:
        close_all(fds)
        raise
    token = os.urandom(TOKEN)
    holder.keep(token, fds)
    return holder.address, token


def take(address: bytes, token: bytes) -> list[int]:
    """Take what was left; the caller closes the descriptors."""
    return ways.to(address).take(token)


def forget_with(owner: object, token: bytes) -> None:
    """Close what nobody took of a handle when `owner` is collected."""
    holder = ways.holder
    if holder is not None:
        call: Callable[..., object] = holder.forget
        weakref.finalize(owner, call, [token]).atexit = False
