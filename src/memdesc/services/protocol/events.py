"""Events: a client says of which it wants to hear, the service tells of those."""

from __future__ import annotations

import errno
from typing import Annotated, Any

import msgspec

from memdesc.errors import InvalidArgument, ProtocolError
from memdesc.portable import UNENCODABLE, UNREADABLE, Natural
from memdesc.services.protocol.basics import Name

MAX_VALUE = 4096
"""Bytes of MessagePack that an event carries at most."""


class Listen(msgspec.Struct, frozen=True, tag=True):
    """Client → service: tell me of these events from now on. Answered by `Done`."""

    id: Natural
    name: Name


class Unlisten(msgspec.Struct, frozen=True, tag=True):
    """Client → service: no longer. After the answer, `Done`, none of them comes any more."""

    id: Natural
    name: Name


class Notify(msgspec.Struct, frozen=True, tag=True):
    """Service → client: the latest value of an event, of the `count` that it came to since."""

    name: Name
    count: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    value: msgspec.Raw


Message = Listen | Unlisten | Notify

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


def encode_value(value: Any) -> bytes:
    """Make an event's value travel; `InvalidArgument` where it can not."""
    try:
        data = _encode(value)
    except UNENCODABLE as error:
        raise InvalidArgument(
            f"an event can not carry {type(value).__name__!r}: {error}; give what MessagePack has "
            "(None, numbers, text, bytes, lists, dicts, msgspec structs)",
            errno=errno.EINVAL,
        ) from error
    if len(data) > MAX_VALUE:
        raise InvalidArgument(
            f"the value has {len(data):,} bytes, an event carries {MAX_VALUE:,} at most: share "
            "what is larger as memory, or send it through a queue or a stream",
            errno=errno.EMSGSIZE,
        )
    return data


def decode_value(data: bytes) -> Any:
    """Read an event's value out of what a stranger sent; `ProtocolError` where it is none."""
    if len(data) > MAX_VALUE:
        raise ProtocolError(
            f"an event's value of {len(data):,} bytes: {MAX_VALUE:,} is the most",
            errno=errno.EPROTO,
        )
    try:
        return _decode(data)
    except UNREADABLE as error:
        raise ProtocolError(f"an event's value: {error}", errno=errno.EPROTO) from error
