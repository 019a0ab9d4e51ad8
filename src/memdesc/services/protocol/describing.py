"""What a service tells of itself to those who look after it: its own user, and root."""

from __future__ import annotations

from typing import Annotated

import msgspec

from memdesc.portable import Natural
from memdesc.services.protocol.basics import Name, Shape

MAX_ITEMS = 256
"""Items that one answer carries at most."""
MAX_TOLD_OBJECTS = 64
"""VM objects of one item that are told at most."""

Objects = Annotated[tuple[tuple[Natural, Natural], ...], msgspec.Meta(max_length=MAX_TOLD_OBJECTS)]


class Describe(msgspec.Struct, frozen=True, tag=True):
    """Who looks after it → service: what are you doing? Also instead of Hello, by who is no client.

    `start`: and what you have, from that item on.
    """

    id: Natural
    start: Natural | None = None


class ShareItem(msgspec.Struct, frozen=True, tag=True):
    """What is shared under a name. `objects`: device and inode of what it lies in."""

    name: Name
    nbytes: Natural
    writable: bool
    enforced: bool
    ruled: bool
    shape: Shape | None = None
    dtype: Name | None = None
    objects: Objects = ()
    content: Name = ""


class QueueItem(msgspec.Struct, frozen=True, tag=True):
    """A queue, of `nbytes` for each client that has it open."""

    name: Name
    nbytes: Natural
    produces: bool
    wired: bool


class QueueEndItem(msgspec.Struct, frozen=True, tag=True):
    """A queue that a client has open, and what went through it. The client is told by its pid."""

    queue: Name
    pid: Natural
    entries: Natural
    nbytes: Natural
    dropped: Natural
    objects: Objects = ()


class StreamItem(msgspec.Struct, frozen=True, tag=True):
    """A stream of `slots` of `nbytes` each, and what was published."""

    name: Name
    slots: Natural
    nbytes: Natural
    published: Natural
    published_bytes: Natural
    shape: Shape | None = None
    dtype: Name | None = None
    objects: Objects = ()


class SubscriberItem(msgspec.Struct, frozen=True, tag=True):
    """A subscriber: slots `offered` to it, `dropped` as it was too slow, and `held` by it now."""

    stream: Name
    pid: Natural | None
    policy: Name
    offered: Natural
    dropped: Natural
    held: Natural
    objects: Objects = ()


class ClientItem(msgspec.Struct, frozen=True, tag=True):
    """A client: its calls that are in flight, and mappings that were made in it from here."""

    pid: Natural
    uid: Natural
    calls: Natural
    mappings: Natural


Item = ShareItem | QueueItem | QueueEndItem | StreamItem | SubscriberItem | ClientItem


class Described(msgspec.Struct, frozen=True, tag=True):
    """The answer: how many it has of each; since it began, the calls that came.

    Of the queues that are open and the streams that there are: the entries and slots that went
    through them, and their bytes. `more`: the items go on.
    """

    id: Natural
    service: Name
    superseded: bool
    clients: Natural
    shares: Natural
    queues: Natural
    streams: Natural
    methods: Natural
    calls: Natural
    entries: Natural
    entry_bytes: Natural
    slots: Natural
    slot_bytes: Natural
    items: Annotated[tuple[Item, ...], msgspec.Meta(max_length=MAX_ITEMS)] = ()
    more: bool = False


Message = Describe | Described
Answer = Described
