"""The way of file descriptors between processes of one host: each that receives has an inbox.

Dask's messages carry bytes. So who sends a handle first leaves the file descriptor in the inbox of
the process that asked, and then writes the message, with a token. Whatever is the matter with that
(the inbox is full, its process stopped, another user's, in another namespace) is known before the
message is written, which then carries bytes. Who reads a message finds the descriptor in its own
process: it asks nobody, and waits for nobody.

An inbox is a `Holder`, with an abstract name of its own, that takes what tasks of its own user
bring (SO_PEERCRED): a limited number, for a limited time.
"""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from memdesc.errors import MappingError, MappingReason, MemdescError, PeerGoneError
from memdesc.handover.holder import TOKEN, Holder
from memdesc.handover.transit import Link
from memdesc.memory.closing import close_all
from memdesc.vm.forks import lock_for, tell_child

MOST = 1024
"""Handles that wait in an inbox at most."""
KEPT = 120.0
"""Seconds that one waits for its message. What comes later gets an error, and Dask asks again."""
REST = 30.0
"""Seconds in which bytes are sent, after handles could not be."""
PATIENCE = 2.0
"""Seconds that the I/O thread of the process that asked has to take a descriptor."""

_PREFIX = b"\0memdesc-dask-"


def host_id() -> str:
    """Name what two processes must share so that descriptors can go from one to the other.

    The boot of the machine, the network namespace (abstract sockets), the user namespace and the
    user. No address: two containers can have one, and one machine has several. A digest: it is
    told to whoever this process connects to.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    spaces = [os.stat(f"/proc/self/ns/{kind}") for kind in ("net", "user")]
    told = repr((boot, [(space.st_dev, space.st_ino) for space in spaces], os.geteuid()))
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


class Inbox(Holder):
    """Keeps what peers bring until its message is read, but not for ever, and not everything."""

    def __init__(self, address: bytes) -> None:
        self._rests_until = 0.0
        self._came: deque[tuple[float, bytes]] = deque()
        super().__init__(address, limit=None)

    def rest(self) -> None:
        """Take nothing for a while: what was taken could not be opened, bytes can be read."""
        self._rests_until = time.monotonic() + REST

    def keep(self, token: bytes, fds: Sequence[int], sender: int = 0) -> None:
        """Keep the descriptors of a handle for its message; on the I/O thread."""
        now = time.monotonic()
        # Their numbers tell how many this process has: half of what it may have is for others.
        crowded = max(fds) > resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        if crowded or now < self._rests_until or self.counts().handles >= MOST:
            close_all(fds)  # memory: the holder has looked
            raise MappingError(
                "this inbox takes nothing now: it is full, its process has many descriptors, or "
                "could not open what came before",
                reason=MappingReason.TOO_MANY_FILES,
                errno=errno.EMFILE,
            )
        super().keep(token, fds, sender)
        self._came.append((now, token))
        if len(self._came) == 1:
            self._loop.later(KEPT, self._sweep)

    def _sweep(self) -> None:
        late = []
        while self._came and self._came[0][0] <= time.monotonic() - KEPT:
            late.append(self._came.popleft()[1])
        self._forget(late)
        if self._came:
            self._loop.later(KEPT - (time.monotonic() - self._came[0][0]), self._sweep)

    def end(self) -> None:
        """Close it, with what waits there."""
        self.end_when_idle()
        self.forget(list(self._tokens))


class Ends:
    """This process's inbox, while it has receivers, and its ways to those of others."""

    def __init__(self) -> None:
        self.host: str | None = None
        self._inbox: Inbox | None = None
        self._receivers = 0
        self._links: dict[bytes, Link] = {}
        self._avoided: dict[bytes, float] = {}
        self._lock = lock_for(self)
        tell_child(self)

    def open(self) -> str:
        """Have an inbox for one receiver more; give its name."""
        with self._lock:
            if self._inbox is None:
                self.host = host_id()
                self._inbox = Inbox(_PREFIX + os.urandom(16).hex().encode())
            self._receivers += 1
            return self._inbox.address[len(_PREFIX) :].decode()

    def close(self) -> None:
        """Have one receiver less; with the last one the inbox ends, and all ways are closed."""
        with self._lock:
            self._receivers = max(self._receivers - 1, 0)
            if self._receivers:
                return
            inbox, self._inbox = self._inbox, None
            links, self._links = self._links, {}
            self.host = None
        if inbox is not None:
            inbox.end()
        for link in links.values():
            link.close()

    def waiting(self) -> int:
        """How many descriptors wait for their messages here."""
        inbox = self._inbox
        return 0 if inbox is None else inbox.counts().handles

    def leave(self, name: str, fds: Sequence[int]) -> bytes:
        """Leave the descriptors of a handle in a peer's inbox, and close them; give its token.

        Raises
        ------
        PeerGoneError, AccessDeniedError, TimedOutError, MappingError
            It is not there, another user's, does not answer, or is full. It is left alone for
            `REST` seconds then, so that not every message waits for it.
        """
        address = _PREFIX + name.encode()
        token = os.urandom(TOKEN)
        try:
            try:
                link = self._to(address)
            except BaseException:
                close_all(fds)
                raise
            link.keep(token, fds)
        except OSError:
            with self._lock:
                self._avoided.setdefault(address, time.monotonic() + REST)
            raise
        return token

    def _to(self, address: bytes) -> Link:
        with self._lock:
            now = time.monotonic()
            self._avoided = {at: until for at, until in self._avoided.items() if until > now}
            if address in self._avoided:
                raise PeerGoneError(
                    f"this inbox took nothing less than {REST:g} s ago", errno=errno.EAGAIN
                )
            link = self._links.get(address)
            if link is None or link.closed:
                self._links = {at: known for at, known in self._links.items() if not known.closed}
                link = self._links[address] = Link(address, PATIENCE)
            return link

    def take(self, token: bytes) -> list[int]:
        """Take what was left here; the caller closes the descriptors.

        Raises
        ------
        PeerGoneError
            It is not there (ENOENT): taken before, waited too long, or left in another inbox.
        """
        inbox = self._inbox
        if inbox is None:
            raise PeerGoneError("this process has no inbox", errno=errno.ENOENT)
        return inbox.take(token)

    def rest(self) -> None:
        """Ask for bytes for a while."""
        inbox = self._inbox
        if inbox is not None:
            inbox.rest()

    def _inherit(self) -> None:
        for link in self._links.values():
            link.close()
        if self._inbox is not None:
            self._inbox.forked()
        self.host, self._inbox, self._receivers = None, None, 0
        self._links, self._avoided = {}, {}


ends = Ends()

REFUSED = (MemdescError, OSError)
"""What leaving a handle raises where bytes are to be sent instead."""
