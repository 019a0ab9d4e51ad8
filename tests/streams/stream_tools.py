"""Streams of a test."""

from __future__ import annotations

from typing import Any

from memdesc.streams import Backpressure, Stream, Subscriber, Subscription

LIMIT = 30.0
"""Seconds: how long a test waits for what is sure to come."""

ALL = frozenset(Backpressure)


def subscribe(stream: Stream, seat: Subscriber | None = None, **options: Any) -> Subscription:
    """Subscribe in this process."""
    if seat is None:
        seat = stream.admit(**options)
        options = {}
    return Subscription(
        stream.memory, seat.memory, stream.form, seat.depth, seat.loans, name=stream.name, **options
    )


def publish(stream: Stream, *values: int, timeout: float | None = LIMIT) -> None:
    """Publish slots whose every byte, and metadata, is that value."""
    for value in values:
        with stream.loan(timeout) as slot:
            slot.array.view("u1")[...] = value & 0xFF
            slot.metadata = value


def taken(subscription: Subscription) -> list[int]:
    """Take all that is offered: the metadata of each; the contents are checked."""
    found = []
    while subscription.pending:
        with subscription.take(LIMIT) as slot:
            assert (slot.array.view("u1") == slot.metadata & 0xFF).all()
            found.append(slot.metadata)
    return found
