"""Data queues between a service and each of its clients."""

from __future__ import annotations

import msgspec

from memdesc.portable import Natural, Portable
from memdesc.services.protocol.basics import Name


class OpenQueue(msgspec.Struct, frozen=True, tag=True):
    """Client → service: make a queue of that name for me."""

    id: Natural
    name: Name


class QueueOpened(msgspec.Struct, frozen=True, tag=True):
    """The answer: with the descriptors of the queue's memory, and the client's notification socket.

    `produces`: the client puts entries in; else it takes them out.
    """

    id: Natural
    produces: bool
    portable: Portable


Message = OpenQueue | QueueOpened
Answer = QueueOpened
