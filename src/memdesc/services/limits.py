"""What one side of a connection lets the other take of it."""

from __future__ import annotations

import errno
from dataclasses import dataclass, fields

from memdesc.errors import InvalidArgument
from memdesc.vm.pages import check_integer


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a service lets each of its clients take at most, or a client its service.

    What goes beyond is refused with an error that names the limit, and the others notice nothing.

    Attributes
    ----------
    mappings : int
        Ranges that the other side may have mapped into this task at a time; 0 refuses all. A
        mapping is one, or as many as the pieces that it was put together from.
    mapped_bytes : int, optional
        Bytes that these may have together. None: the machine's memory.
    clients : int
        Of a service: clients that may be connected at a time.
    clients_per_task : int
        Of a service: as how many of these one task may be connected.
    connections_per_second : int, optional
        Of a service: connections that it takes, on the average; 128 at once. What is above waits,
        and those who are connected are served meanwhile. None: as fast as they come.
    calls : int
        Of a service: calls that a client may have in flight; more are refused at once.
    call_bytes : int, optional
        Of a service: bytes of the arguments of these, those that came in the messages (at most
        128 KiB each) and those in memory beside them. None: the machine's memory.
    queue_bytes : int
        Of a service: bytes of the queues that a client may have open together.
    wired_bytes : int
        Of a service: how many of these may be of queues that are wired.
    loans : int
        Of a service: slots of its streams that a client's subscriptions may hold together.
    events : int
        Of a service: names that a client may listen to at a time.

    Raises
    ------
    InvalidArgument
        A limit that is negative, or no integer.
    """

    mappings: int = 64
    mapped_bytes: int | None = None
    clients: int = 4096
    clients_per_task: int = 1024
    connections_per_second: int | None = 500
    calls: int = 64
    call_bytes: int | None = None
    queue_bytes: int = 64 << 20
    wired_bytes: int = 4 << 20
    loans: int = 64
    events: int = 64

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and "None" in str(field.type):
                continue
            if check_integer(value, field.name) < 0:
                raise InvalidArgument(
                    f"{field.name} is {value}: a limit is 0 or more", errno=errno.EINVAL
                )


def check_limits(limits: object) -> Limits:
    """Give limits back, or raise `InvalidArgument` for what is none."""
    if not isinstance(limits, Limits):
        raise InvalidArgument(f"limits are {limits!r}: give a Limits", errno=errno.EINVAL)
    return limits
