"""The messages between a service and its clients: typed MessagePack, one a packet.

A packet of a Unix seqpacket socket carries one message and the file descriptors that belong to
it. Every field is checked when it is decoded; what does not fit ends the connection. Whatever
needs an answer has an `id` of its sender's choice; the answer carries it.
"""

from __future__ import annotations

import errno
from typing import Annotated

import msgspec

from memdesc.errors import InvalidArgument, ProtocolError
from memdesc.portable import UNREADABLE, Natural, Piece, Portable

VERSION = 2
MAX_MESSAGE = 128 * 1024
"""Bytes of a packet at most; below the socket buffer's default (net.core.wmem_default)."""
MAX_COPY = 64 * 1024
"""Bytes of another task's memory that one message carries at most."""

MAX_NAME = 1024
Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME)]
Text = Annotated[str, msgspec.Meta(max_length=8192)]
Shape = Annotated[tuple[Natural, ...], msgspec.Meta(max_length=64)]


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Client → service, first of all."""

    version: Natural


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """Service → client: admitted."""

    version: Natural
    service: Name


class Share(msgspec.Struct, frozen=True):
    """What a service tells of one thing that it shares. `dtype` is NumPy's string for it."""

    name: Name
    nbytes: Natural
    writable: bool
    shape: Shape | None = None
    dtype: Name | None = None


class ListShares(msgspec.Struct, frozen=True, tag=True):
    """Client → service: what is there, from the `start`-th on?"""

    id: Natural
    start: Natural = 0


class Shares(msgspec.Struct, frozen=True, tag=True):
    """The answer; `more` says that the list goes on."""

    id: Natural
    shares: Annotated[tuple[Share, ...], msgspec.Meta(max_length=128)]
    more: bool


class OpenShare(msgspec.Struct, frozen=True, tag=True):
    """Client → service: give me that."""

    id: Natural
    name: Name


class Opened(msgspec.Struct, frozen=True, tag=True):
    """The answer, with the descriptors of its objects."""

    id: Natural
    share: Share
    portable: Portable


class WatchLength(msgspec.Struct, frozen=True, tag=True):
    """Client → service: how many bytes has that, and tell me from now on when it changes."""

    id: Natural
    name: Name


class Length(msgspec.Struct, frozen=True, tag=True):
    """The answer."""

    id: Natural
    name: Name
    nbytes: Natural


class LengthChanged(msgspec.Struct, frozen=True, tag=True):
    """Service → client: what it watches has so many bytes now. Only the latest is told."""

    name: Name
    nbytes: Natural


class PushMapping(msgspec.Struct, frozen=True, tag=True):
    """Either side: map this, with the descriptors of its objects (create_mapping_in_task)."""

    id: Natural
    token: Natural
    name: Name
    writable: bool
    pieces: Annotated[tuple[Piece, ...], msgspec.Meta(min_length=1, max_length=4096)]
    offset: Natural
    at_address: Natural | None
    guard_pages: Natural
    prefault: bool


class Mapped(msgspec.Struct, frozen=True, tag=True):
    """The answer: where it lies in the answering task. A claim."""

    id: Natural
    address: Natural


class PullMapping(msgspec.Struct, frozen=True, tag=True):
    """Either side: unmap that; an error while views of it are alive."""

    id: Natural
    token: Natural


class ReleaseMapping(msgspec.Struct, frozen=True, tag=True):
    """Either side: that mapping may go as soon as your views allow. No answer."""

    token: Natural


class MappingEnded(msgspec.Struct, frozen=True, tag=True):
    """Either side: my program ended that mapping by itself. No answer."""

    token: Natural


class ReadMemory(msgspec.Struct, frozen=True, tag=True):
    """Either side: copy that range of your memory to me (copyin where the kernel denies it)."""

    id: Natural
    address: Natural
    nbytes: Annotated[int, msgspec.Meta(ge=1, le=MAX_COPY)]


class MemoryRead(msgspec.Struct, frozen=True, tag=True):
    """The answer: the bytes up to the first that can not be read."""

    id: Natural
    data: Annotated[bytes, msgspec.Meta(max_length=MAX_COPY)]


class WriteMemory(msgspec.Struct, frozen=True, tag=True):
    """Either side: copy that into your memory (copyout)."""

    id: Natural
    address: Natural
    data: Annotated[bytes, msgspec.Meta(min_length=1, max_length=MAX_COPY)]


class MemoryWritten(msgspec.Struct, frozen=True, tag=True):
    """The answer: how many bytes were, up to the first that can not be written."""

    id: Natural
    nbytes: Natural


class Done(msgspec.Struct, frozen=True, tag=True):
    """The answer to what returns nothing."""

    id: Natural


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The answer that it failed: the class's name in the family, and its fields."""

    id: Natural
    error: Name
    message: Text
    errno: int | None = None
    reason: Name | None = None


Message = (
    Hello
    | Welcome
    | ListShares
    | Shares
    | OpenShare
    | Opened
    | WatchLength
    | Length
    | LengthChanged
    | PushMapping
    | Mapped
    | PullMapping
    | ReleaseMapping
    | MappingEnded
    | ReadMemory
    | MemoryRead
    | WriteMemory
    | MemoryWritten
    | Done
    | Failed
)
Answer = Shares | Opened | Length | Mapped | MemoryRead | MemoryWritten | Done | Failed

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Message).decode


def read(data: bytes) -> Message:
    """Decode what a stranger sent; `ProtocolError` where it is no message."""
    try:
        message: Message = decode(data)
        return message
    except UNREADABLE as error:
        raise ProtocolError(str(error), errno=errno.EPROTO) from error


def check_name(name: str) -> str:
    """Give a share's name back if it can travel, else raise `InvalidArgument`."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not _can_be_encoded(name):
        raise InvalidArgument(
            f"a share's name is text of 1 to {MAX_NAME:,} characters, not {str(name)[:80]!r}"
        )
    return name


def _can_be_encoded(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # lone surrogates
        return False
    return True
