"""What keeps file descriptors that are on their way, for receivers that are not known yet.

A holder is a Unix socket (SOCK_SEQPACKET) with an abstract name, served by the I/O thread. It
answers tasks of its own user only (SO_PEERCRED). Each message is answered by a letter and what is
kept then: handles, objects, their bytes, and the limit on these (u64 each, little endian; 0: none).

| Message     | With        | Answer                                          | With        |
|-------------|-------------|-------------------------------------------------|-------------|
| ``K`` token | descriptors | ``y``; ``f`` no descriptor left; ``l`` the limit |             |
| ``T`` token |             | ``y``; ``n`` not there; ``f``                    | descriptors |
| ``C``       |             | ``y``                                           |             |

A token is 16 random bytes, for one taking: all descriptors of one handle. Objects are kept once,
however many handles lead to them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket as sockets
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from memdesc.errors import (
    LimitError,
    MappingError,
    MappingReason,
    PeerGoneError,
    ProtocolError,
)
from memdesc.handover.sockets import receive_once, send_with_fds
from memdesc.loop import loop
from memdesc.memory.closing import close_all, close_socket, discard, is_memory
from memdesc.vm import tracing
from memdesc.vm.forks import lock_for

KEEP, TAKE, COUNT = b"K", b"T", b"C"
YES, NO, NO_FILES, TOO_MUCH = b"y", b"n", b"f", b"l"
TOKEN = 16
_COUNTS = struct.Struct("<4Q")
ANSWER = 1 + _COUNTS.size
_CREDENTIALS = struct.Struct("iII")
_SHARE = 3, 4
"""Of the file descriptors that its process may have, what a holder keeps at most: whatever nobody
ever takes, and whoever connects, leaves the program some to go on with."""
_LINKS = 1, 2
"""Of them, what connections take at most, so that whoever connects leaves room for what is kept:
that is refused by its number, below which the program's other descriptors lie, too."""
_BLOCK = 512
_PAUSE = 0.05
_OVERFLOW = 65534
"""What the kernel tells of users that have no number in a user namespace (overflowuid)."""
_BACKLOG = 256


class Counts(NamedTuple):
    """What a holder keeps: handles, objects (files), and bytes of these when they were left."""

    handles: int
    objects: int
    nbytes: int


def counts_in(answer: bytes) -> tuple[Counts, int]:
    """What an answer of a holder tells: what it keeps, and its limit (0: none)."""
    *counts, limit = _COUNTS.unpack_from(answer, 1)
    return Counts(*counts), limit


@dataclass(slots=True, eq=False, weakref_slot=True)
class InTransit:
    """One opening of an object, and the tokens of the handles that lead to it."""

    fd: int
    sender: int
    """The task that left it, by its pid; 0: the holder's own."""
    key: tuple[int, int, int] = field(init=False)
    nbytes: int = field(init=False)
    tokens: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        status = os.fstat(self.fd)
        self.key = status.st_dev, status.st_ino, fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_ACCMODE
        self.nbytes = nbytes_of(status)

    def told(self) -> tuple[str, int] | None:
        """The memory's name and bytes; None once it is kept no more."""
        if not self.tokens:
            return None
        try:
            shown = os.readlink(f"/proc/self/fd/{self.fd}")
        except OSError:  # it was taken just now
            return None
        name = shown.removeprefix("/memfd:").removesuffix(" (deleted)")
        return f"{name} (left by task {self.sender})" if self.sender else name, self.nbytes


class Holder:
    """Keeps descriptors in this process, for all of its user that have a token.

    `limit` is that on the bytes of what it keeps; None: none.
    """

    def __init__(self, address: bytes, limit: int | None) -> None:
        self.address = address
        self.limit = limit
        self.ending = False
        self._tokens: dict[bytes, list[InTransit]] = {}
        self._objects: dict[tuple[int, int, int], InTransit] = {}
        self._nbytes = 0
        self._links: dict[sockets.socket, None] = {}  # who asked last comes last
        self._lock = lock_for(self)
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
        if self._lock._is_owned():
            raise MappingError(
                "a signal handler sends or receives a handle in the midst of its own thread's "
                "doing so: do it outside of the handler",
                reason=MappingReason.NOT_ANSWERING,
                errno=errno.EBUSY,
            )
        with self._lock:
            yield

    def keep(self, token: bytes, fds: Sequence[int], sender: int = 0) -> None:
        """Keep the descriptors of a handle until it is taken; takes them over.

        Raises
        ------
        PeerGoneError
            It has ended (ECONNREFUSED).
        LimitError
            They would be too many bytes (EDQUOT).
        MappingError
            TOO_MANY_FILES: too many objects.
        """
        try:
            came = [InTransit(fd, sender) for fd in fds]
            with self._alone():
                if self.closed:  # by another thread, just now
                    raise PeerGoneError("what keeps handles has ended", errno=errno.ECONNREFUSED)
                new = {one.key: one for one in came if one.key not in self._objects}
                self._check_room(len(new), sum(one.nbytes for one in new.values()))
                self._objects.update(new)
                self._nbytes += sum(one.nbytes for one in new.values())
                kept = self._tokens[token] = [self._objects[one.key] for one in came]
                for one in kept:
                    one.tokens.add(token)
        except OSError:  # refused, before any was kept; an interrupt may have left some
            close_all(fds)
            raise
        close_all([one.fd for one in came if new.get(one.key) is not one])
        if tracing.books is not None:
            for one in new.values():
                tracing.books.note(one, InTransit.told)

    def _check_room(self, objects: int, nbytes: int) -> None:
        if not objects:
            return
        if len(self._objects) + objects > _most_descriptors():
            raise too_many_objects(self.counts())
        if self.limit is not None and self._nbytes + nbytes > self.limit:
            raise too_much(self.counts(), self.limit, nbytes)

    def take(self, token: bytes) -> list[int]:
        """Give what is kept under a token, once; the caller closes it."""
        with self._alone():
            kept = self._tokens.get(token)
            if kept is None:
                raise not_there()
            fds: list[int] = []
            made: list[int] = []
            try:
                for index, one in enumerate(kept):
                    if len(one.tokens) > 1 or one in kept[index + 1 :]:
                        made.append(os.dup(one.fd))
                        fds.append(made[-1])
                    else:
                        fds.append(one.fd)
            except BaseException:
                close_all(made)
                raise
            self._drop(token)
        self._end_if_idle()
        return fds

    def forget(self, tokens: Sequence[bytes]) -> None:
        """Close what was not taken of these; for finalizers, it waits for no lock."""
        if not self.closed:  # as in a fork child, which has no thread for that
            self._loop.post(lambda: self._forget(tokens))

    def _forget(self, tokens: Sequence[bytes]) -> None:
        with self._alone():
            fds = [one.fd for token in tokens for one in self._drop(token)]
        close_all(fds)
        self._end_if_idle()

    def forget_all(self) -> Counts:
        """Close all that was not taken; tell what that was."""
        counts = self.counts()
        self._forget(list(self._tokens))
        return counts

    def _drop(self, token: bytes) -> list[InTransit]:
        """Forget a token, if it is known; what no other one leads to, which is the caller's now."""
        gone = []
        for one in self._tokens.pop(token, ()):
            one.tokens.discard(token)
            if not one.tokens and self._objects.pop(one.key, None) is not None:
                self._nbytes -= one.nbytes
                gone.append(one)
        return gone

    def counts(self) -> Counts:
        """Tell what waits."""
        with self._lock:
            return Counts(len(self._tokens), len(self._objects), self._nbytes)

    def names(self) -> list[str]:
        """Name what waits."""
        with self._lock:
            return [told[0] for one in self._objects.values() if (told := one.told())]

    def settle(self) -> None:
        """Wait until whoever has asked is answered: what was taken may not be sent yet."""
        self._loop.run(lambda: None)

    # -- the socket; all of it on the I/O thread ---------------------------------------------------

    def _watch(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.watch(self._sock.fileno(), self._accept)

    def _accept(self, _: int) -> None:
        """Take in who waits. Strangers among them make all who come next wait for a moment.

        Any user can knock at an abstract name: so it costs little, and of those who wait nobody is
        left waiting.
        """
        strangers = False
        for _ in range(_BACKLOG):
            try:
                link, _address = self._sock.accept()
            except BlockingIOError:
                break
            except OSError:  # no descriptor is left; some will come back
                self._rest()
                return
            if is_ours(*peer_of(link)):
                self._take_in(link)
            else:
                close_socket(link)
                strangers = True
        if strangers:
            self._rest()

    def _rest(self) -> None:
        self._loop.forget(self._sock.fileno())
        self._loop.later(_PAUSE, self._watch)

    def _take_in(self, link: sockets.socket) -> None:
        link.setblocking(False)
        links = len(self._links)
        if links >= _most_descriptors(_LINKS) or (
            links and links + len(self._objects) >= _most_descriptors()
        ):
            self._hang_up(next(iter(self._links)))  # who comes back for more connects again
        self._links[link] = None
        self._loop.watch(link.fileno(), lambda _: self._serve(link))

    def _serve(self, link: sockets.socket) -> None:
        fds: list[int] = []
        try:
            message, fds, dropped = receive_once(link, 2 + TOKEN)  # one more than there should be
            if not message:
                raise PeerGoneError("it has ended", errno=errno.ECONNRESET)
            self._links[link] = self._links.pop(link)
            answer, given = self._answer(link, message, fds, dropped)
        except BlockingIOError:
            return
        except OSError:
            discard(fds, os.geteuid())
            self._hang_up(link)
            return
        try:
            send_with_fds(link, answer + _COUNTS.pack(*self.counts(), self.limit or 0), given)
        except OSError:
            self._hang_up(link)  # what it took is gone with it, as in a pipe
        finally:
            close_all(given)

    def _answer(
        self, link: sockets.socket, message: bytes, fds: list[int], dropped: bool
    ) -> tuple[bytes, list[int]]:
        what, token = message[:1], message[1:]
        form = what, len(token)
        wrong = form not in ((KEEP, TOKEN), (TAKE, TOKEN), (COUNT, 0)) or (fds and what != KEEP)
        # Of a file of another kind its server may make us wait; a token is for one handle.
        if wrong or not all(map(is_memory, fds)) or (what == KEEP and token in self._tokens):
            raise ProtocolError("it says what no process of the family does", errno=errno.EPROTO)
        if what == COUNT:
            return YES, []
        if what == TAKE:
            return self._given(token)
        if dropped or not fds or max(fds) >= _most_descriptors():
            close_all(fds)
            return NO_FILES, []
        came = fds[:]
        fds.clear()  # they are taken over
        try:
            self.keep(token, came, peer_of(link)[0])
        except LimitError:
            return TOO_MUCH, []
        except MappingError:
            return NO_FILES, []
        return YES, []

    def _given(self, token: bytes) -> tuple[bytes, list[int]]:
        try:
            return YES, self.take(token)
        except PeerGoneError:
            return NO, []
        except OSError:  # no number for a duplicate is left
            return NO_FILES, []

    def _hang_up(self, link: sockets.socket) -> None:
        self._loop.forget(link.fileno())
        self._links.pop(link, None)
        close_socket(link)

    # -- its end -----------------------------------------------------------------------------------

    def end_when_idle(self) -> None:
        """Close once nothing waits any more."""
        self.ending = True
        self._end_if_idle()

    def go_on(self) -> bool:
        """Do not end, after all; False where it has."""
        with self._lock:
            self.ending = False
            return not self.closed

    def _end_if_idle(self) -> None:
        if self.ending and not self._tokens:
            self._loop.post(self._end)

    def _end(self) -> None:
        with self._lock:  # who would go on with it waits, and then makes another
            if not self.ending or self._tokens or self.closed:
                return
            self._loop.forget(self._sock.fileno())
            self._sock.close()
        for link in list(self._links):
            self._hang_up(link)

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self._sock.fileno() < 0

    def fds(self) -> set[int]:
        """The descriptors of its sockets."""
        return {sock.fileno() for sock in (self._sock, *self._links)}

    def forked(self) -> None:
        """Close what a fork child has of it: it is the parent's."""
        for sock in (self._sock, *self._links):
            sock.close()
        close_all([one.fd for one in self._objects.values()])
        self._tokens.clear()
        self._objects.clear()


def _most_descriptors(share: tuple[int, int] = _SHARE) -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] * share[0] // share[1]


def peer_of(sock: sockets.socket) -> tuple[int, int]:
    """The pid and effective user of the other end when it connected, or began to listen."""
    pid, user, _group = _CREDENTIALS.unpack(
        sock.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, _CREDENTIALS.size)
    )
    return int(pid), int(user)


def is_ours(pid: int, user: int) -> bool:
    """Whether a peer is of our own user."""
    if user != os.geteuid():
        return False
    if user != _OVERFLOW:
        return True
    with open("/proc/self/uid_map") as table:
        if table.read().split() == ["0", "0", str(2**32 - 1)]:
            return True
    # Whoever has no number in this user namespace is told as this one, whom alone signals reach;
    # of another pid namespace (0) nothing more can be known.
    try:
        if pid > 0:
            os.kill(pid, 0)
    except OSError:
        return False
    return pid > 0


def not_there() -> PeerGoneError:
    """Say that a token leads to nothing."""
    return PeerGoneError(
        "nothing is kept for this handle: it was unpickled before, forgotten, or was an argument "
        "of a process that could not be started",
        errno=errno.ENOENT,
    )


def nbytes_of(status: os.stat_result) -> int:
    """What counts of an object: what is allocated of it."""
    return status.st_blocks * _BLOCK


def too_many_objects(counts: Counts) -> MappingError:
    """Say that what is on its way takes all the descriptors that it may."""
    return MappingError(
        f"{counts.objects:,} objects are on their way already, and the process that keeps them has "
        "no more file descriptors for that: let the receivers take them, send parts of fewer "
        "buffers (a Slab), forget_in_transit() what nobody will take, or raise `ulimit -n` there",
        reason=MappingReason.TOO_MANY_FILES,
        errno=errno.EMFILE,
    )


def too_much(counts: Counts, limit: int, nbytes: int) -> LimitError:
    """Say that what is on its way would be more than it may be."""
    return LimitError(
        f"{nbytes:,} bytes more can not be sent: {counts.nbytes:,} bytes are on their way already, "
        f"and the process that keeps them allows {limit:,}: let the receivers take them, "
        "forget_in_transit() what nobody will take, or raise limit_in_transit() there",
        errno=errno.EDQUOT,
    )
