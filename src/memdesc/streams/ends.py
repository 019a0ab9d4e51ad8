"""What both ends of a stream have: waiting, fork, what metadata is."""

from __future__ import annotations

import errno
import os
from typing import Any

from memdesc import _core
from memdesc.descriptors.base import MemoryDescriptor
from memdesc.errors import ClosedError, InvalidArgument, ProtocolError, RangeError
from memdesc.mapping import has_hole
from memdesc.streams.layout import METADATA_LIMIT
from memdesc.vm import tracing
from memdesc.vm.forks import Heir, tell_child
from memdesc.vm.pages import Access

INHERITED = 3
_hooked = False


def register(end: Heir) -> None:
    """Have an end know of forks: it stays the parent's."""
    global _hooked
    if not _hooked:
        _hooked = True
        # Not in a function of ours, at whose head an interrupt strikes that came during the fork.
        os.register_at_fork(after_in_child=_core.note_fork)
    tell_child(end)
    if tracing.books is not None:
        tracing.books.note(end, _told)


def _told(end: Any) -> tracing.Told:
    return None if end.closed else (end.name, end.form.pool_bytes)


def window_of(descriptor: MemoryDescriptor, access: Access, nbytes: int) -> _core.Window:
    """Map a stream's memory at addresses of its own."""
    if descriptor.length < nbytes:
        raise ProtocolError(
            f"{descriptor.name!r} has {descriptor.length:,} bytes; a stream of its form takes "
            f"{nbytes:,}",
            errno=errno.EPROTO,
        )
    if any(has_hole(extent) for extent in descriptor._extents(0, nbytes, access)):
        raise ProtocolError(
            f"not all pages of {descriptor.name!r} are there: who made them is to pay for them",
            errno=errno.EPROTO,
        )
    mapping = descriptor.map(access=access, length=nbytes, unique=True, prefault=True)
    window = mapping._export()
    if not isinstance(window, _core.Window):
        raise InvalidArgument(
            f"{descriptor.name!r} is private memory: it can be no part of a stream",
            errno=errno.EINVAL,
        )
    return window


def encode(value: object) -> bytes:
    """Metadata as it travels."""
    import msgspec

    from memdesc.portable import UNENCODABLE

    try:
        encoded = msgspec.msgpack.encode(value)
    except UNENCODABLE as error:
        raise InvalidArgument(
            f"metadata can not travel ({error}): give dicts, lists, strings, numbers, bytes",
            errno=errno.EINVAL,
        ) from error
    if len(encoded) > METADATA_LIMIT:
        raise RangeError(
            f"metadata of {len(encoded):,} bytes: a slot carries at most {METADATA_LIMIT}; put it "
            "into the slot itself",
            errno=errno.EMSGSIZE,
        )
    return encoded


def decode(encoded: bytes) -> Any:
    """What the publisher gave as metadata."""
    import msgspec

    from memdesc.portable import UNREADABLE

    try:
        return msgspec.msgpack.decode(encoded)
    except UNREADABLE as error:
        raise ProtocolError(
            f"the slot's metadata can not be read: {error}", errno=errno.EPROTO
        ) from error


def given_back() -> ClosedError:
    """What is raised where a slot is used after it was given back."""
    return ClosedError("this slot was given back: keep() it, or copy what is needed longer")
