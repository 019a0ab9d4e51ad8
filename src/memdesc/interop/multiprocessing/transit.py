"""Descriptors on their way from one process of a family to another, which is not known yet.

A pipe of `multiprocessing` carries bytes only. So who sends an array leaves its file descriptor
with a *holder*, and the receiver, told the holder's address and a token, takes it there. The holder
is the family's first process: what a worker sent can be had after the worker's death. Where that
one did not install, each sender is its own holder, and what it sent ends with it.

A holder is a Unix socket (SOCK_SEQPACKET) with an abstract name, served by the I/O thread. Its
name is made of the family's `authkey`, which all of it inherit. It answers tasks of its own user
only (SO_PEERCRED), and is asked only where it is of that user. Each message is answered:

| Message            | With       | Answer        | With         |
|--------------------|------------|---------------|--------------|
| ``K`` token        | descriptor | ``y`` or ``n``|              |
| ``T`` token        |            | ``y`` or ``n``| descriptor   |

A token is 16 random bytes, for one taking. Objects are kept once, however many tokens they have.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import multiprocessing
import os
import select
import socket as sockets
import struct
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from memdesc.errors import (
    AccessDeniedError,
    MappingError,
    MappingReason,
    PeerGoneError,
    ProtocolError,
)
from memdesc.handover import (
    close_all,
    discard,
    receive_once,
    receive_with_fds,
    send_with_fds,
)
from memdesc.services.loop import loop
from memdesc.vm.forks import lock_for, tell_child

PATIENCE = 60.0
"""Seconds that a holder has for an answer: its process may be stopped, or hold the GIL."""
_KEEP, _TAKE, _YES, _NO = b"K", b"T", b"y", b"n"
_CREDENTIALS = struct.Struct("3i")
_TOKEN = 16
_PAUSE = 0.05
_BACKLOG = 256


class HolderLike(Protocol):
    """A holder, or the way to one."""

    address: bytes

    def keep(self, token: bytes, fd: int) -> None:
        """Keep a descriptor until it is taken; takes it over."""

    def take(self, token: bytes) -> int:
        """Give what is kept under a token, once."""


@dataclass(slots=True, eq=False)
class _Kept:
    """One opening of an object, and under which tokens it waits."""

    fd: int
    key: tuple[int, int, int]
    tokens: set[bytes] = field(default_factory=set)


class Holder:
    """Keeps descriptors in this process, for all of its user that have a token."""

    def __init__(self, address: bytes) -> None:
        self.address = address
        self.ending = False
        self._tokens: dict[bytes, _Kept] = {}
        self._objects: dict[tuple[int, int, int], _Kept] = {}
        self._links: set[sockets.socket] = set()
        self._lock = lock_for(self)
        self._busy = False
        self._loop = loop()
        self._sock = sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)
        try:
            self._sock.setblocking(False)
            self._sock.bind(address)
            self._sock.listen(_BACKLOG)
        except BaseException:
            self._sock.close()
            raise
        self._loop.post(self._watch)

    # -- what is kept ----------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._lock:
            if self._busy:
                raise MappingError(
                    "a signal handler sends or receives an array in the midst of its own thread's "
                    "doing so: do it outside of the handler",
                    reason=MappingReason.NOT_ANSWERING,
                    errno=errno.EBUSY,
                )
            self._busy = True
            try:
                yield
            finally:
                self._busy = False

    def keep(self, token: bytes, fd: int) -> None:
        """Keep a descriptor until it is taken; takes it over."""
        status = os.fstat(fd)
        key = status.st_dev, status.st_ino, fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        try:
            with self._alone():
                kept = self._objects.setdefault(key, _Kept(fd, key))
                kept.tokens.add(token)
                self._tokens[token] = kept
        except MappingError:
            os.close(fd)
            raise
        if kept.fd != fd:
            os.close(fd)

    def take(self, token: bytes) -> int:
        """Give what is kept under a token, once; the caller closes it."""
        with self._alone():
            kept = self._tokens.get(token)
            if kept is None:
                raise PeerGoneError(
                    "nothing is kept under this token: the array was unpickled before, or its "
                    "process could not be started",
                    errno=errno.ENOENT,
                )
            fd = kept.fd if len(kept.tokens) == 1 else os.dup(kept.fd)
            self._drop(token, kept)
        self._end_if_idle()
        return fd

    def forget(self, tokens: Sequence[bytes]) -> None:
        """Close what was not taken of these; for finalizers, it waits for no lock."""
        self._loop.post(lambda: self._forget(tokens))

    def _forget(self, tokens: Sequence[bytes]) -> None:
        fds = []
        with self._alone():
            for token in tokens:
                kept = self._tokens.get(token)
                if kept is not None:
                    self._drop(token, kept)
                    fds += [] if kept.tokens else [kept.fd]
        close_all(fds)
        self._end_if_idle()

    def forget_all(self) -> tuple[int, int]:
        """Close all that was not taken: (tokens, objects)."""
        counts = self.counts()
        self._forget(list(self._tokens))
        return counts

    def _drop(self, token: bytes, kept: _Kept) -> None:
        del self._tokens[token]
        kept.tokens.discard(token)
        if not kept.tokens:
            del self._objects[kept.key]

    def counts(self) -> tuple[int, int]:
        """Tell how many tokens wait, and of how many objects."""
        with self._lock:
            return len(self._tokens), len(self._objects)

    # -- the socket; all of it on the I/O thread ---------------------------------------------------

    def _watch(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.watch(self._sock.fileno(), self._accept)

    def _accept(self, _: int) -> None:
        try:
            link, _address = self._sock.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptor is left; some will come back
            self._loop.forget(self._sock.fileno())
            self._loop.later(_PAUSE, self._watch)
            return
        if _user_of(link) != os.geteuid():
            link.close()
            return
        link.setblocking(False)
        self._links.add(link)
        self._loop.watch(link.fileno(), lambda _: self._serve(link))

    def _serve(self, link: sockets.socket) -> None:
        fds: list[int] = []
        try:
            message, fds, dropped = receive_once(link, 2 + _TOKEN)  # one more than there should be
            if not message:
                raise PeerGoneError("it has ended", errno=errno.ECONNRESET)
            answer, given = self._answer(message, fds, dropped)
        except BlockingIOError:
            return
        except OSError:
            discard(fds)
            self._hang_up(link)
            return
        try:
            send_with_fds(link, answer, given)
        except OSError:
            self._hang_up(link)  # what it took is gone with it, as in a pipe
        finally:
            close_all(given)

    def _answer(self, message: bytes, fds: list[int], dropped: bool) -> tuple[bytes, list[int]]:
        what, token = message[:1], message[1:]
        if len(token) != _TOKEN or len(fds) > 1 or what not in (_KEEP, _TAKE):
            raise ProtocolError("it says what no process of the family does", errno=errno.EPROTO)
        if what == _TAKE:
            discard(fds)
            try:
                return _YES, [self.take(token)]
            except OSError:  # not there; or no number for a duplicate is left
                return _NO, []
        if dropped or not fds:
            discard(fds)
            return _NO, []
        self.keep(token, fds.pop())
        return _YES, []

    def _hang_up(self, link: sockets.socket) -> None:
        self._loop.forget(link.fileno())
        self._links.discard(link)
        link.close()

    # -- its end -----------------------------------------------------------------------------------

    def end_when_idle(self) -> None:
        """Close once nothing waits any more."""
        self.ending = True
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self.ending and not self._tokens:
            self._loop.post(self._end)

    def _end(self) -> None:
        if not self.ending or self._tokens or self._sock.fileno() < 0:
            return
        for link in list(self._links):
            self._hang_up(link)
        self._loop.forget(self._sock.fileno())
        self._sock.close()

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self._sock.fileno() < 0

    def forked(self) -> None:
        """Close what a fork child has of it: it is the parent's."""
        for sock in (self._sock, *self._links):
            sock.close()
        close_all([kept.fd for kept in self._objects.values()])
        self._tokens.clear()
        self._objects.clear()


class Link:
    """The way to the holder of another process."""

    def __init__(self, address: bytes) -> None:
        self.address = address
        self._lock = lock_for(self)
        self._busy = False
        self._sock = sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)
        try:
            self._sock.settimeout(PATIENCE)
            self._sock.connect(address)
            user = _user_of(self._sock)
            if user != os.geteuid():
                raise AccessDeniedError(
                    f"what keeps the array belongs to user {user}, this process to user "
                    f"{os.geteuid()}: arrays travel between processes of one user",
                    errno=errno.EACCES,
                )
        except (ConnectionRefusedError, FileNotFoundError) as error:
            self._sock.close()
            raise PeerGoneError(
                "the process that kept the array has ended, or this one is in another network "
                "namespace",
                errno=error.errno,
            ) from error
        except BaseException:
            self._sock.close()
            raise

    def keep(self, token: bytes, fd: int) -> None:
        """Have a descriptor kept there; closes it."""
        try:
            self._ask(_KEEP + token, [fd])
        finally:
            os.close(fd)

    def take(self, token: bytes) -> int:
        """Take what is kept there."""
        fds = self._ask(_TAKE + token, [])
        if len(fds) != 1:
            discard(fds)
            raise ProtocolError(f"{len(fds)} descriptors came for one", errno=errno.EPROTO)
        return fds[0]

    def _ask(self, message: bytes, fds: Sequence[int]) -> list[int]:
        with self._lock:
            if self._busy:  # a signal handler of the thread that waits for its answer further down
                with closing(Link(self.address)) as other:
                    return other._ask(message, fds)
            self._busy = True
            try:
                send_with_fds(self._sock, message, fds)
                answer, came = receive_with_fds(self._sock, 1, 1)
            except BaseException:
                self.close()  # the answer to come would be taken for that to the next question
                raise
            finally:
                self._busy = False
        if answer == _YES:
            return came
        discard(came)
        if fds:
            raise MappingError(
                "the process that keeps what is on its way has no file descriptor left: let the "
                "receivers take it, send arrays of one Slab, or raise `ulimit -n` there",
                reason=MappingReason.TOO_MANY_FILES,
                errno=errno.EMFILE,
            )
        raise PeerGoneError(
            "this array is not kept there: it was unpickled before, its process could not be "
            "started, or the one that keeps it has no file descriptor left (`ulimit -n`)",
            errno=errno.ENOENT,
        )

    def close(self) -> None:
        """Hang up."""
        if hasattr(self, "_sock"):
            self._sock.close()

    __del__ = close

    @property
    def closed(self) -> bool:
        """Whether it can be asked no more: this end, or the holder, has hung up."""
        poller = select.poll()
        if (fd := self._sock.fileno()) >= 0:
            poller.register(fd, 0)  # no answer that is on its way, its end alone
        return fd < 0 or bool(poller.poll(0))


def _user_of(sock: sockets.socket) -> int:
    """The effective user of the other end when it connected, or began to listen."""
    _pid, user, _group = _CREDENTIALS.unpack(
        sock.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, _CREDENTIALS.size)
    )
    return int(user)


class Ways:
    """This process's holder, if it has one, and its ways to those of others."""

    def __init__(self) -> None:
        self._holder: Holder | None = None
        self._links: dict[bytes, Link] = {}
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
            if self.holder is not None:
                self.holder.ending = False
                return self.holder
            address = _family_address()
            try:
                return self._link(address)
            except (PeerGoneError, AccessDeniedError):
                self._holder = self._open(address)
                return self._holder

    def _open(self, address: bytes) -> Holder:
        if multiprocessing.parent_process() is None:
            try:
                return Holder(address)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
        return Holder(address + os.urandom(8).hex().encode())

    def to(self, address: bytes) -> HolderLike:
        """The holder of that address."""
        with self._lock:
            if self.holder is not None and self.holder.address == address:
                return self.holder
            return self._link(address)

    def _link(self, address: bytes) -> Link:
        link = self._links.get(address)
        if link is None or link.closed:
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


def _family_address() -> bytes:
    """The name of the first process's holder: as secret, until it listens, as the `authkey`."""
    key = bytes(multiprocessing.current_process().authkey)
    name = hashlib.blake2b(b"memdesc arrays", key=key[:64], digest_size=16).hexdigest()
    return b"\0memdesc-arrays-" + name.encode()


ways = Ways()


def leave(fds: Sequence[int]) -> tuple[bytes, list[bytes]]:
    """Leave descriptors with a holder, and close them: (its address, a token for each).

    Raises
    ------
    PeerGoneError, TimedOutError
        The holder ended just now, or does not answer.
    MappingError
        TOO_MANY_FILES: it has no descriptor left.
    """
    left = list(fds)
    try:
        holder = ways.to_send()
        tokens = []
        while left:
            tokens.append(os.urandom(_TOKEN))
            holder.keep(tokens[-1], left.pop(0))
    except BaseException:
        close_all(left)
        raise
    return holder.address, tokens


def take(address: bytes, tokens: Sequence[bytes]) -> list[int]:
    """Take what was left; the caller closes the descriptors."""
    fds: list[int] = []
    try:
        holder = ways.to(address)
        for token in tokens:
            fds.append(holder.take(token))
    except BaseException:
        close_all(fds)
        raise
    return fds


def forget_with(owner: object, tokens: Sequence[bytes]) -> None:
    """Close what nobody took of these when `owner` is collected."""
    holder = ways.holder
    if holder is not None:
        call: Callable[..., object] = holder.forget
        weakref.finalize(owner, call, tokens).atexit = False
