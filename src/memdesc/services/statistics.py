"""What services and connections tell of themselves, here and to those who look after them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memdesc.services.service import Service


@dataclass(frozen=True, slots=True)
class ServiceStatistics:
    """What a service has now, and what it did since it was made.

    Attributes
    ----------
    clients, shares, queues, streams, methods : int
        That it has now.
    opens, opened_bytes : int
        How often clients opened what is shared, and the bytes of that.
    calls, calls_in_flight : int
        Of its methods: ever, and now.
    entries, entry_bytes : int
        Through the queues that there are now, of clients that have gone too.
    slots, slot_bytes : int
        Published by its streams.
    mappings : int
        That it has made in its clients, and which exist.
    superseded : bool
        Whether another service has taken its name over.
    """

    clients: int
    shares: int
    queues: int
    streams: int
    methods: int
    opens: int
    opened_bytes: int
    calls: int
    calls_in_flight: int
    entries: int
    entry_bytes: int
    slots: int
    slot_bytes: int
    mappings: int
    superseded: bool


@dataclass(frozen=True, slots=True)
class PeerStatistics:
    """What hangs on a connection now, as one end sees it.

    Attributes
    ----------
    mappings, mapped_bytes : int
        That the other side made in this task.
    remote_mappings : int
        That this side made in the other task.
    requests : int
        Of this side, that wait for their answer.
    unread : int
        Messages that wait until the other side reads.
    """

    mappings: int
    mapped_bytes: int
    remote_mappings: int
    requests: int
    unread: int


def statistics_of(service: Service) -> ServiceStatistics:
    """Count what a service has and did; waits for no client."""
    queues, streams, clients = service.queues(), service.streams(), service.clients()
    put = [queue.total() for queue in queues.values()]
    published = [stream.statistics() for stream in streams.values()]
    return ServiceStatistics(
        clients=len(clients),
        shares=len(service._shares),
        queues=len(queues),
        streams=len(streams),
        methods=len(service._methods),
        opens=service.opens,
        opened_bytes=service.opened_bytes,
        calls=service._called,
        calls_in_flight=sum(len(client._calls) for client in clients),
        entries=sum(one.entries for one in put),
        entry_bytes=sum(one.nbytes for one in put),
        slots=sum(one.published for one in published),
        slot_bytes=sum(one.nbytes for one in published),
        mappings=sum(len(client._in_peer) for client in clients),
        superseded=service.superseded,
    )
