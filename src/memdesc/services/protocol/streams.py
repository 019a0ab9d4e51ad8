"""Streams: a client subscribes, the service gives it the pool and a line of its own."""

from __future__ import annotations

import msgspec

from memdesc.portable import Natural, Portable
from memdesc.services.protocol.basics import Name, Shape


class Subscribe(msgspec.Struct, frozen=True, tag=True):
    """Client → service: offer me what is published under that name."""

    id: Natural
    name: Name
    policy: Name
    depth: Natural
    loans: Natural
    latest: bool


class Subscribed(msgspec.Struct, frozen=True, tag=True):
    """The answer: with the descriptors of the pool, of the line, and the client's socket.

    `slots` of `nbytes` each, of that `shape` and `dtype` where they are arrays.
    """

    id: Natural
    slots: Natural
    nbytes: Natural
    shape: Shape | None
    dtype: Name | None
    pool: Portable
    line: Portable


Message = Subscribe | Subscribed
Answer = Subscribed
