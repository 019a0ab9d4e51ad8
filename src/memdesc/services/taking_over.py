"""Taking over: how a new service gets the name, and the descriptors, of one that still lives."""

from __future__ import annotations

import contextlib
import errno
import os
import socket as sockets
import time

from memdesc.descriptors.received import ReceivedMemoryDescriptor
from memdesc.errors import (
    AccessDeniedError,
    ClosedError,
    NameInUseError,
    PeerGoneError,
    ProtocolError,
    ServiceNotFoundError,
    ShareNotFoundError,
)
from memdesc.handover import discard, unpack
from memdesc.services import folder, protocol
from memdesc.services.connection import Connection, reach
from memdesc.services.limits import Limits
from memdesc.services.succession import PATIENCE


class Inheritance:
    """What a service begins with: its listening socket, and what another had shared."""

    def __init__(self, listener: folder.Listener) -> None:
        self.listener = listener
        self.shares: list[tuple[protocol.Share, ReceivedMemoryDescriptor]] = []


def inherit(name: str, *, for_all: bool) -> Inheritance:
    """Take the name of the living service over, or have it anew where none lives.

    Raises
    ------
    AccessDeniedError
        The living service is another user's (EPERM), or does not let this task (EACCES).
    TimedOutError
        It does not answer.
    NameInUseError
        Others took the name, one after the other, all the time.
    """
    until = time.monotonic() + 2 * PATIENCE
    while True:
        try:
            if folder.is_served(name):
                return _take_over(name, for_all, until)
            return Inheritance(folder.Listener(name, for_all=for_all))
        except (PeerGoneError, ClosedError, ServiceNotFoundError):
            pass  # it ended meanwhile
        except NameInUseError:  # another successor was faster
            if time.monotonic() > until:
                raise
        time.sleep(0.005)


def _take_over(name: str, for_all: bool, until: float) -> Inheritance:
    timeout = max(until - time.monotonic(), 0.05)
    with reach(name, timeout, Limits(), appears=False) as old:
        user = old.task.credentials.uid
        if user != os.geteuid():
            raise AccessDeniedError(
                f"service {name!r} is of user {user}, this task of {os.geteuid()}: only the same "
                "user can take a name over",
                errno=errno.EPERM,
            )
        _, fds = old.request(
            protocol.TakeOver(old.next_id()), protocol.HandedOver, timeout=PATIENCE
        )
        sock = _listening(fds, user)
        inheritance = None
        try:
            listener = folder.Listener(name, for_all=for_all, inherited=sock)
            inheritance = Inheritance(listener)
            inheritance.shares += _opened(old)
            old.request(protocol.Took(old.next_id()), protocol.Done, timeout=PATIENCE)
        except BaseException:
            sock.close()
            if inheritance is not None:
                inheritance.listener.close()
                for _, descriptor in inheritance.shares:
                    descriptor.close()
            raise
        return inheritance


def _listening(fds: list[int], user: int) -> sockets.socket:
    """Make a socket of what came, which must be one that listens as ours do."""
    if len(fds) != 1:
        discard(fds, user)
        raise ProtocolError(f"{len(fds)} descriptors came for one socket", errno=errno.EPROTO)
    try:
        sock = sockets.socket(fileno=fds[0])
    except OSError as error:
        discard(fds, user)
        raise ProtocolError("what came is no socket", errno=errno.EPROTO) from error
    listens = False
    with contextlib.suppress(OSError):
        listens = bool(sock.getsockopt(sockets.SOL_SOCKET, sockets.SO_ACCEPTCONN))
    if (sock.family, sock.type) != (sockets.AF_UNIX, sockets.SOCK_SEQPACKET) or not listens:
        discard([sock.detach()], user)
        raise ProtocolError("what came is no socket that listens", errno=errno.EPROTO)
    sock.setblocking(False)
    return sock


def _opened(old: Connection) -> list[tuple[protocol.Share, ReceivedMemoryDescriptor]]:
    """Open all that is shared with this task."""
    found: list[tuple[protocol.Share, ReceivedMemoryDescriptor]] = []
    try:
        for share in old.shares(timeout=PATIENCE):
            question = protocol.OpenShare(old.next_id(), share.name)
            with contextlib.suppress(ShareNotFoundError):  # it was unshared meanwhile
                answer, fds = old.request(question, protocol.Opened, timeout=PATIENCE)
                found.append((answer.share, unpack(answer.portable, fds, user=os.geteuid())))
    except BaseException:
        for _, descriptor in found:
            descriptor.close()
        raise
    return found
