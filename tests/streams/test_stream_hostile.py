"""The other side writes whatever it likes: it harms itself alone, and nobody reaches outside."""

from __future__ import annotations

import errno
import random
import socket as sockets
import struct
import time

import pytest
from children import in_child, kill, start
from stream_tools import ALL, LIMIT, publish, subscribe, taken

import memdesc as md
from memdesc import _core
from memdesc.streams import Stream, Subscriber, layout

NASTY = [0, 1, 2, 3, 7, 8, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
AT = _core.OFFERS_OFFSETS
SLOTS = 8


def write(memory: md.MemoryDescriptor, offset: int, value: int) -> None:
    memory.write_bytes(offset, struct.pack("=Q", value))


def new() -> Stream:
    return Stream(nbytes=64, slots=SLOTS, policies=ALL)


# --- A hostile subscriber ---------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["drop_oldest", "block", "drop_newest", "disconnect"])
def test_a_position_that_can_not_be_drops_the_subscriber(policy: str) -> None:
    for read in (2, *NASTY[5:]):  # 2: it says that it holds two, one more than it may
        move(policy, read)


def move(policy: str, read: int) -> None:
    with new() as stream:
        reasons: list[str] = []
        seat = stream.admit(policy, depth=3, loans=1, ended=reasons.append)
        good = subscribe(stream, loans=1)
        publish(stream, 1, 2)
        write(seat.memory, AT["read"], read)
        publish(stream, 3, 4, timeout=LIMIT)
        assert taken(good) == [1, 2, 3, 4]
        assert reasons == ["wrote what can not be, or held too many slots"]
        assert stream.statistics().free == SLOTS - 1
        assert len(stream.subscribers()) == 1


def test_a_position_that_goes_back() -> None:
    with new() as stream:
        seat = stream.admit()
        subscription = subscribe(stream, seat)
        publish(stream, 1, 2)
        assert taken(subscription) == [1, 2]
        stream.look()
        write(seat.memory, AT["read"], 1)
        publish(stream, 3)
        stream.look()
        assert stream.subscribers() == []
        with pytest.raises(md.ProtocolError) as caught:
            subscription.take(LIMIT)
        assert caught.value.errno == errno.EPROTO


@pytest.mark.parametrize("field", ["released", "written", "ended", "magic", "cells"])
def test_other_fields_harm_nobody_else(field: str) -> None:
    for value in NASTY:
        harm(field, value)


def harm(field: str, value: int) -> None:
    with new() as stream:
        seat = stream.admit()
        good = subscribe(stream)
        publish(stream, 1, 2)
        if field == "released":
            for slot in range(SLOTS):
                write(seat.memory, AT["released"] + 8 * slot, value)
        elif field == "cells":
            for word in range(2 * seat.depth):
                write(seat.memory, stream.form.line_bytes(0) + 8 * word, value)
        else:
            write(seat.memory, AT[field], value)
        publish(stream, *range(3, 30), timeout=0)
        assert taken(good) == [26, 27, 28, 29]
        seat.drop()
        assert stream.statistics().free == SLOTS - 1


def test_one_who_never_gives_back_is_left_with_what_it_may_hold() -> None:
    with new() as stream:
        seat = stream.admit(loans=2)
        good = subscribe(stream)
        written = 0
        for value in range(1, 30):
            publish(stream, value, timeout=0)
            assert taken(good) == [value]
            if written < 2:  # it takes two, and says nothing of giving them back
                written += 1
                write(seat.memory, AT["read"], written)
        assert [one.held for one in stream.statistics().subscribers] == [2, 0]
        assert [one.number for one in stream.subscribers()] == [1, 2]


def scribble(seat: Subscriber, seed: int) -> None:
    rng = random.Random(seed)
    words = memoryview(seat.memory).cast("Q")
    while True:
        words[rng.randrange(40)] = rng.choice([*NASTY, rng.randrange(64)])
        words[rng.choice((8, 16))] = rng.randrange(8)


@pytest.mark.parametrize("seed", range(3))
def test_others_notice_nothing_of_one_who_scribbles(seed: int) -> None:
    with Stream(nbytes=64, slots=20, policies=ALL) as stream:
        rng = random.Random(seed)
        good = subscribe(stream, policy="block", depth=3)
        until = time.monotonic() + 0.2
        value = 0
        seat = stream.admit(rng.choice(sorted(ALL, key=str)), depth=3)
        pid = start(scribble, seat, seed)
        while time.monotonic() < until:
            value += 1
            publish(stream, value)
            assert taken(good) == [value]
            if seat.gone:
                kill(pid)
                seat = stream.admit(rng.choice(sorted(ALL, key=str)), depth=3)
                pid = start(scribble, seat, rng.randrange(1000))
        kill(pid)
        seat.drop()
        assert good.missed == 0
        assert stream.statistics().free == 19


def test_the_pool_is_read_only_to_subscribers() -> None:
    with new() as stream:
        subscription = subscribe(stream)
        publish(stream, 1)
        with subscription.take() as slot:
            with pytest.raises(ValueError, match="read-only"):
                slot.array[0] = 1
            assert stream.memory.max_access is md.Access.READ_ONLY
        # Here the pool was never granted to a stranger: once it was, the seals are on.
        ours, theirs = sockets.socketpair()
        with ours, theirs:
            md.send_descriptor(ours, stream.memory)
            with md.receive_descriptor(theirs) as received:
                with pytest.raises(md.MappingError):
                    received.map(access=md.Access.READ_WRITE)
                with received.map() as mapping, pytest.raises(OSError, match="mprotect"):
                    _core.mprotect(mapping.address, md.page_size, 3)


# --- A hostile publisher ----------------------------------------------------------------------


def header(stream: Stream, slot: int, **fields: int) -> None:
    """Write a slot's header as only the publisher can."""
    for name, value in fields.items():
        at = {"sequence": 0, "timestamp": 8, "nbytes": 16, "metadata": 24}[name]
        write(stream.memory, slot * layout.HEADER + at, value)


@pytest.mark.parametrize("field", ["sequence", "nbytes", "metadata"])
def test_a_header_that_can_not_be(field: str) -> None:
    for nasty in NASTY:
        see_header(field, nasty)


def see_header(field: str, nasty: int) -> None:
    with new() as stream:
        subscription = subscribe(stream)
        publish(stream, 1)
        header(stream, 0, **{field: nasty})
        good = {"sequence": nasty == 1, "nbytes": nasty <= 64, "metadata": nasty <= 992}[field]
        if good:
            with subscription.take(LIMIT) as slot:
                assert slot.nbytes <= 64
                assert bytes(slot) == b"\1" * slot.nbytes
            return
        for _ in range(2):
            with pytest.raises(md.ProtocolError) as caught:
                subscription.take(LIMIT)
            assert caught.value.errno == errno.EPROTO


@pytest.mark.parametrize("word", range(2))
def test_a_cell_that_can_not_be(word: int) -> None:
    for nasty in (8, *NASTY[6:]):
        with new() as stream:
            seat = stream.admit()
            subscription = subscribe(stream, seat)
            publish(stream, 1)
            write(seat.memory, stream.form.line_bytes(0) + 8 * word, nasty)
            with pytest.raises(md.ProtocolError):
                subscription.take(LIMIT)


@pytest.mark.parametrize("written", [0, 2**63, 2**64 - 1])
def test_offers_that_can_not_be(written: int) -> None:
    with new() as stream:
        seat = stream.admit()
        subscription = subscribe(stream, seat)
        publish(stream, 1)
        assert taken(subscription) == [1]
        write(seat.memory, AT["written"], written)
        for call in (subscription.take, subscription.wait, subscription.try_take):
            with pytest.raises(md.ProtocolError):
                call()


def test_metadata_that_is_none() -> None:
    with new() as stream:
        subscription = subscribe(stream)
        publish(stream, 1)
        stream.memory.write_bytes(32, b"\xc1")
        with subscription.take(LIMIT) as slot, pytest.raises(md.ProtocolError):
            _ = slot.metadata


def test_memory_that_is_none_of_a_stream() -> None:
    with new() as stream, md.BufferMemoryDescriptor(100) as small:
        seat = stream.admit()
        for pool, line in ((small, seat.memory), (stream.memory, stream.memory)):
            with pytest.raises((md.ProtocolError, md.MappingError, md.SealedError)):
                md.Subscription(pool, line, stream.form, seat.depth, seat.loans)
        write(seat.memory, AT["magic"], 0)
        with pytest.raises(md.ProtocolError, match="admit"):
            subscribe(stream, seat)


def test_a_pool_without_pages_is_not_filled_at_the_subscribers_cost() -> None:
    form = layout.StreamForm(SLOTS, 1 << 20)
    with (
        md.BufferMemoryDescriptor(form.pool_bytes, lazy=True, pages=md.PageKind.BASE) as pool,
        new() as stream,
    ):
        seat = stream.admit()
        with pytest.raises(md.ProtocolError, match="pages"):
            md.Subscription(pool, seat.memory, form, seat.depth, seat.loans)
        assert pool.page_counts().resident == 0


def test_a_subscriber_touches_its_own_line_alone() -> None:
    """A subscriber has the pool and its own line; what others take is none of its business."""
    with new() as stream:
        first, second = stream.admit(), stream.admit()
        mine, theirs = subscribe(stream, first), subscribe(stream, second)
        publish(stream, 1)
        before = second.memory.read_bytes()

        def child() -> bool:
            view = md.Subscription(
                stream.memory, first.memory, stream.form, first.depth, first.loans
            )
            with view.take(LIMIT) as slot:
                return bool(slot.metadata == 1)

        assert in_child(child)
        assert second.memory.read_bytes() == before
        assert taken(theirs) == [1]
        assert mine.try_take() is None
