"""The messages between a service and its clients: typed MessagePack, one a packet.

A packet of a Unix seqpacket socket carries one message and the file descriptors that belong to
it. Every field is checked when it is decoded; what does not fit ends the connection. Whatever
needs an answer has an `id` of its sender's choice; the answer carries it.

Each capability has its messages in a module of its own: its unions `Message` and `Answer` (those
of the messages that answer a question) are joined here.
"""

from __future__ import annotations

import errno

import msgspec

from memdesc.errors import ProtocolError
from memdesc.portable import UNREADABLE
from memdesc.services.protocol import (
    calls,
    describing,
    events,
    mappings,
    queues,
    sharing,
    streams,
    succession,
)
from memdesc.services.protocol.basics import (
    ALL as ALL,
    MAX_COPY as MAX_COPY,
    MAX_MESSAGE as MAX_MESSAGE,
    MAX_NAME as MAX_NAME,
    VERSION as VERSION,
    Done as Done,
    Failed as Failed,
    Hello as Hello,
    Welcome as Welcome,
    check_name as check_name,
)
from memdesc.services.protocol.calls import (
    Call as Call,
    Cancel as Cancel,
    Returned as Returned,
)
from memdesc.services.protocol.describing import (
    ClientItem as ClientItem,
    Describe as Describe,
    Described as Described,
    QueueEndItem as QueueEndItem,
    QueueItem as QueueItem,
    ShareItem as ShareItem,
    StreamItem as StreamItem,
    SubscriberItem as SubscriberItem,
)
from memdesc.services.protocol.events import (
    MAX_VALUE as MAX_VALUE,
    Listen as Listen,
    Notify as Notify,
    Unlisten as Unlisten,
    decode_value as decode_value,
    encode_value as encode_value,
)
from memdesc.services.protocol.mappings import (
    Mapped as Mapped,
    MappingEnded as MappingEnded,
    MemoryRead as MemoryRead,
    MemoryWritten as MemoryWritten,
    PullMapping as PullMapping,
    PushMapping as PushMapping,
    ReadMemory as ReadMemory,
    ReleaseMapping as ReleaseMapping,
    WriteMemory as WriteMemory,
)
from memdesc.services.protocol.queues import (
    OpenQueue as OpenQueue,
    QueueOpened as QueueOpened,
)
from memdesc.services.protocol.sharing import (
    Length as Length,
    LengthChanged as LengthChanged,
    ListShares as ListShares,
    Opened as Opened,
    OpenShare as OpenShare,
    Share as Share,
    Shares as Shares,
    WatchLength as WatchLength,
)
from memdesc.services.protocol.streams import Subscribe as Subscribe, Subscribed as Subscribed
from memdesc.services.protocol.succession import (
    HandedOver as HandedOver,
    Moved as Moved,
    TakeOver as TakeOver,
    Took as Took,
)

Message = (
    Hello
    | Welcome
    | Done
    | Failed
    | sharing.Message
    | mappings.Message
    | events.Message
    | calls.Message
    | queues.Message
    | streams.Message
    | succession.Message
    | describing.Message
)
Answer = (
    Done
    | Failed
    | sharing.Answer
    | mappings.Answer
    | calls.Answer
    | queues.Answer
    | streams.Answer
    | succession.Answer
    | describing.Answer
)

WITH_DESCRIPTORS = (Opened, Returned, QueueOpened, Subscribed, HandedOver)
"""Answers whose descriptors are handed to who asked; those of any other are closed."""

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Message).decode


def read(data: bytes) -> Message:
    """Decode what a stranger sent; `ProtocolError` where it is no message."""
    try:
        message: Message = decode(data)
        return message
    except UNREADABLE as error:
        raise ProtocolError(str(error), errno=errno.EPROTO) from error
