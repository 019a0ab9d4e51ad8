"""A stream in one process: loan, publish, take, give back, and what each of them refuses."""

from __future__ import annotations

import errno
import gc
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from children import in_child
from stream_tools import ALL, LIMIT, publish, subscribe, taken

import memdesc as md
from memdesc.streams import METADATA_LIMIT, LoanedSlot, Stream, TakenSlot


@pytest.fixture
def stream() -> Iterator[Stream]:
    with Stream(shape=(4, 6), dtype="<u2", slots=8, policies=ALL) as stream:
        yield stream


# --- Publishing -------------------------------------------------------------------------------


def test_what_is_filled_in_place_is_seen_in_place(stream: Stream) -> None:
    subscription = subscribe(stream)
    before = time.monotonic_ns()
    with stream.loan() as slot:
        assert (slot.array.shape, slot.array.dtype.str) == ((4, 6), "<u2")
        slot.array[:] = np.arange(24).reshape(4, 6)
        slot.metadata = {"exposure": 0.5, "tags": ["a"]}
    with subscription.take() as seen:
        assert (seen.array == np.arange(24).reshape(4, 6)).all()
        assert not seen.array.flags.writeable
        with pytest.raises(ValueError, match="WRITEABLE"):
            seen.array.flags.writeable = True
        assert memoryview(seen).readonly
        assert (seen.sequence, seen.nbytes, len(seen)) == (1, 48, 48)
        assert seen.metadata == {"exposure": 0.5, "tags": ["a"]}
        assert before <= seen.timestamp <= time.monotonic_ns()
    assert subscription.statistics().taken == stream.statistics().published == 1


def test_an_exception_discards_and_so_does_dropping(stream: Stream) -> None:
    subscription = subscribe(stream)
    with pytest.raises(ZeroDivisionError), stream.loan():
        raise ZeroDivisionError
    slot = stream.loan()
    slot.discard()
    slot.discard()
    del slot
    stream.loan()
    assert subscription.try_take() is None
    numbers = stream.statistics()
    assert (numbers.published, numbers.discarded, numbers.free, numbers.loaned) == (0, 3, 8, 0)
    publish(stream, 7)
    with subscription.take() as seen:
        assert seen.sequence == 1  # no number was lost


def test_a_slot_is_published_once(stream: Stream) -> None:
    slot = stream.loan()
    slot.publish()
    for use in (slot.publish, lambda: slot.array, lambda: slot.buffer):
        with pytest.raises(md.ClosedError, match="published"):
            use()
    slot.discard()  # no-op
    assert stream.statistics().discarded == 0
    with slot_of(stream) as inner:
        inner.publish()  # leaving the block does not do it again
    assert stream.statistics().published == 2
    with pytest.raises(md.ClosedError, match="discarded"):
        _ = discarded(stream).array


def slot_of(stream: Stream) -> LoanedSlot:
    return stream.loan()


def discarded(stream: Stream) -> LoanedSlot:
    slot = stream.loan()
    slot.discard()
    return slot


def test_as_many_loans_as_agreed() -> None:
    with Stream(nbytes=16, slots=8, loans=2) as stream:
        first, second = stream.loan(), stream.loan()
        with pytest.raises(md.AllocationError) as caught:
            stream.loan()
        assert caught.value.errno == errno.ENOBUFS
        subscription = subscribe(stream)
        second.metadata, first.metadata = 2, 1
        second.publish()
        first.publish()
        assert [subscription.take().metadata for _ in range(2)] == [2, 1]  # as published


def test_bytes_of_any_length_up_to_the_slots() -> None:
    with Stream(nbytes=100) as stream:
        subscription = subscribe(stream)
        stream.publish(b"hello", metadata="text")
        with subscription.take() as seen:
            assert bytes(seen) == b"hello"
            assert (seen.array.tobytes(), seen.nbytes, seen.metadata) == (b"hello", 5, "text")
        stream.publish(np.arange(25, dtype="<f4"))
        with subscription.take() as seen:
            assert seen.nbytes == 100
            assert (seen.array.view("<f4") == np.arange(25)).all()
        stream.publish(b"")
        with subscription.take() as seen:
            assert bytes(seen) == b""
        with pytest.raises(md.RangeError) as caught:
            stream.publish(bytes(101))
        assert caught.value.errno == errno.EMSGSIZE
        with stream.loan() as slot:
            slot.nbytes = 3
            slot.buffer[:] = b"abc"
            with pytest.raises(md.RangeError):
                slot.nbytes = -1
        with subscription.take() as seen:
            assert bytes(seen) == b"abc"


def test_arrays_are_copied_in_whole(stream: Stream) -> None:
    subscription = subscribe(stream)
    stream.publish([[1] * 6] * 4)
    with subscription.take() as seen:
        assert seen.array.sum() == 24
    with pytest.raises(md.InvalidArgument, match="shape"):
        stream.publish(np.zeros((6, 4)))
    with stream.loan() as slot, pytest.raises(md.InvalidArgument):
        slot.nbytes = 10
    assert stream.statistics().discarded == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nbytes": 0},
        {"nbytes": 10, "dtype": "u1"},
        {"shape": (0, 3), "dtype": "u1"},
        {"shape": 3, "dtype": "O"},
        {"shape": 3, "dtype": "nonsense"},
        {"shape": 3, "dtype": [("a", "u1")]},
        {"nbytes": 10, "slots": 2},
        {"nbytes": 10, "slots": 5000},
        {"nbytes": 10, "slots": 8, "loans": 7},
        {"nbytes": 10, "loans": 0},
        {"nbytes": 1 << 62},
    ],
)
def test_a_stream_of_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(md.InvalidArgument):
        Stream(**options)


def test_metadata_has_bounds(stream: Stream) -> None:
    subscription = subscribe(stream)
    most = METADATA_LIMIT - 3  # a MessagePack string of that many bytes takes 3 more
    with stream.loan() as slot:
        for value, kind in ((("x" * (most + 1)), md.RangeError), (object(), md.InvalidArgument)):
            with pytest.raises(kind):
                slot.metadata = value
        assert slot.metadata is None
        slot.metadata = "x" * most
    with stream.loan() as slot:
        slot.metadata = 1
        slot.metadata = None
    assert subscription.take().metadata == "x" * most
    assert subscription.take().metadata is None
    assert len(msgspec.msgpack.encode("x" * most)) == METADATA_LIMIT


# --- Giving back ------------------------------------------------------------------------------


def test_a_slot_with_live_views_is_not_released(stream: Stream) -> None:
    subscription = subscribe(stream)
    publish(stream, 1)
    slot = subscription.take()
    for view in (slot.array, slot.array[1:], memoryview(slot), memoryview(slot.array)):
        with pytest.raises(BufferError):
            slot.release()
        assert slot.held
        del view
    slot.release()
    slot.release()
    assert not slot.held
    with pytest.raises(md.ClosedError):
        _ = slot.array
    with pytest.raises(BufferError):
        memoryview(slot)
    assert (slot.sequence, slot.metadata) == (1, 1)  # these are copies


@pytest.mark.parametrize("kind", ["array", "part", "memoryview", "of the array", "frombuffer"])
def test_no_one_sees_a_slot_change_under_a_live_view(stream: Stream, kind: str) -> None:
    make = {
        "array": lambda slot: slot.array,
        "part": lambda slot: slot.array[1:3].T,
        "memoryview": memoryview,
        "of the array": lambda slot: memoryview(slot.array),
        "frombuffer": lambda slot: np.frombuffer(slot, "<u2"),
    }[kind]
    subscription = subscribe(stream)
    publish(stream, 1)
    with subscription.take() as slot:
        view = make(slot)
    assert subscription.statistics().held == 1  # the block was left; the view lives
    for value in range(2, 40):
        publish(stream, value)
        assert taken(subscription) == [value]
    assert bytes(view) == b"\1" * memoryview(view).nbytes
    del view
    assert subscription.statistics().held == 0
    assert stream.statistics().subscribers[0].held == 0


def test_what_the_collector_takes_goes_back(stream: Stream) -> None:
    subscription = subscribe(stream)
    publish(stream, 1)
    cycle: list[object] = [subscription.take()]
    cycle.append(cycle)
    array = cycle[0].array  # type: ignore[attr-defined]
    del cycle
    gc.collect()
    assert subscription.statistics().held == 1
    del array
    assert subscription.statistics().held == 0
    slot: TakenSlot | None = None
    for value in range(10):
        publish(stream, value)
        slot = subscription.take()
    assert slot is not None
    assert subscription.statistics().held == 1


def test_iterating_gives_back_what_it_leaves_and_ends_with_the_stream(stream: Stream) -> None:
    subscription = subscribe(stream)
    publish(stream, 1, 2, 3)
    for slot in subscription:
        assert slot.metadata == 1
        break
    assert not slot.held
    slots = iter(subscription)
    view = memoryview(next(slots))
    del slots  # the slot has a view, and goes back with that
    assert subscription.statistics().held == 1
    view.release()
    assert subscription.statistics().held == 0
    slots = iter(subscription)
    assert iter(slots) is slots
    assert next(slots).metadata == 3
    stream.close()
    assert list(slots) == list(slots) == []


def test_iterating_raises_what_is_no_end(stream: Stream) -> None:
    subscription = subscribe(stream)
    slots = iter(subscription)
    subscription.close()
    for _ in range(2):
        with pytest.raises(md.ClosedError):
            next(slots)


def test_a_turn_gives_back_unless_kept(stream: Stream) -> None:
    subscription = subscribe(stream)
    publish(stream, 1, 2, 3, 4)
    stream.close()
    kept = []
    for slot in subscription:
        if slot.metadata == 2:
            slot.keep()
            kept.append(slot)
        assert subscription.statistics().held == len(kept) + (slot not in kept)
    assert [slot.metadata for slot in kept] == [2]
    assert kept[0].held
    kept[0].release()
    assert subscription.statistics().held == 0


def test_as_many_slots_as_agreed_are_held(stream: Stream) -> None:
    subscription = subscribe(stream, loans=1)
    publish(stream, 1, 2)
    slot = subscription.take()
    with pytest.raises(md.AllocationError) as caught:
        subscription.take()
    assert caught.value.errno == errno.ENOBUFS
    array = slot.array
    del slot
    with pytest.raises(md.AllocationError):
        subscription.try_take()
    assert (array.view("u1") == 1).all()
    del array
    assert subscription.take().metadata == 2


# --- Subscribing ------------------------------------------------------------------------------


def test_a_late_joiner_has_the_latest(stream: Stream) -> None:
    publish(stream, 1, 2, 3)
    with subscribe(stream) as late, subscribe(stream, latest=False) as later:
        assert taken(late) == [3]
        assert later.try_take() is None
        publish(stream, 4)
        assert taken(late) == taken(later) == [4]
        assert (late.missed, later.missed) == (0, 0)


def test_the_newest_is_taken_past_the_others(stream: Stream) -> None:
    for loans in (1, 2):
        with subscribe(stream, loans=loans, latest=False) as subscription:
            publish(stream, 1, 2, 3)
            with subscription.latest() as slot:
                assert slot.metadata == 3
            assert subscription.statistics().held == 0
            with pytest.raises(md.TimedOutError):
                subscription.latest(0.01)


def test_gaps_are_counted(stream: Stream) -> None:
    subscription = subscribe(stream, depth=2, latest=False)
    publish(stream, *range(1, 11))
    assert taken(subscription) == [9, 10]
    assert subscription.missed == 0  # what was before the first is no gap
    publish(stream, *range(11, 16))
    assert taken(subscription) == [14, 15]
    assert subscription.missed == 3
    assert stream.statistics().subscribers[0].dropped == 8 + 3


def test_admission_leaves_the_publisher_its_slots(stream: Stream) -> None:
    seats = [stream.admit(), stream.admit(), stream.admit()]
    with pytest.raises(md.AllocationError, match="slots=10") as caught:
        stream.admit()
    assert caught.value.errno == errno.EDQUOT
    subscriptions = [subscribe(stream, seat) for seat in seats]
    publish(stream, 1, 2)
    held = [one.take() for one in subscriptions for _ in range(2)]
    for value in range(3, 50):  # nobody gives back, nobody takes: the publisher never waits
        publish(stream, value, timeout=0)
    assert [slot.metadata for slot in held] == [1, 2] * 3
    subscriptions[0].close()
    with pytest.raises(md.AllocationError):
        stream.admit()  # its slots are still held
    del held[:2]
    stream.admit()


def test_a_policy_that_is_not_allowed(stream: Stream) -> None:
    with Stream(nbytes=1) as plain:
        with pytest.raises(md.InvalidArgument, match="BLOCK") as caught:
            plain.admit(md.Backpressure.BLOCK)
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(ValueError, match="nonsense"):
        stream.admit("nonsense")
    for options in ({"depth": 0}, {"loans": 0}, {"depth": 9}, {"loans": 9}):
        with pytest.raises(md.InvalidArgument):
            stream.admit(**options)  # type: ignore[arg-type]
    with pytest.raises(md.InvalidArgument, match="depth"):
        stream.admit(md.Backpressure.BLOCK, depth=1)


# --- Ends -------------------------------------------------------------------------------------


def test_what_was_offered_is_taken_after_the_end(stream: Stream) -> None:
    subscription = subscribe(stream)
    publish(stream, 1, 2)
    loaned = stream.loan()
    stream.close()
    stream.close()
    assert stream.closed
    with pytest.raises(md.ClosedError):
        loaned.publish()
    with pytest.raises(md.ClosedError):
        stream.loan()
    with pytest.raises(md.ClosedError):
        stream.admit()
    assert [slot.metadata for slot in subscription] == [1, 2]
    with pytest.raises(md.PeerGoneError) as caught:
        subscription.take()
    assert caught.value.errno == errno.EPIPE


def test_a_publisher_that_is_dropped_closes_the_stream() -> None:
    stream = Stream(nbytes=10)
    subscription = subscribe(stream)
    stream.publish(b"x")
    del stream
    assert [bytes(slot) for slot in subscription] == [b"x"]


def test_held_slots_outlive_both_ends(stream: Stream) -> None:
    subscription = subscribe(stream)
    publish(stream, 5)
    slot = subscription.take()
    array = slot.array
    subscription.close()
    with pytest.raises(md.ClosedError):
        subscription.take()
    for value in range(20):
        publish(stream, value)
    assert stream.statistics().subscribers[0].held == 1
    stream.close()
    del stream, subscription
    assert (slot.array.view("u1") == 5).all()
    del slot
    assert (array.view("u1") == 5).all()


def test_slots_of_one_who_left_come_back(stream: Stream) -> None:
    told: list[str] = []
    seat = stream.admit(ended=told.append)
    subscription = subscribe(stream, seat)
    publish(stream, 1, 2)
    slot = subscription.take()
    subscription.close()
    stream.look()
    assert (stream.statistics().free, seat.gone, told) == (6, False, [])
    del slot
    stream.look()
    assert (stream.statistics().free, seat.gone, told) == (7, True, ["left"])
    assert stream.subscribers() == []


def test_in_a_fork_child_both_ends_are_closed(stream: Stream) -> None:
    subscription = subscribe(stream)
    publish(stream, 1, 2)
    slot, loaned = subscription.take(), stream.loan()

    def child() -> None:
        nonlocal slot
        for call in (stream.loan, stream.admit, loaned.publish, subscription.take):
            with pytest.raises(md.ClosedError, match="parent"):
                call()
        assert stream.closed
        assert subscription.closed
        assert (slot.array.view("u1") == 1).all()
        slot.release()
        loaned.discard()
        subscription.close()
        stream.close()

    in_child(child)
    assert slot.held
    numbers = stream.statistics()
    assert (numbers.loaned, numbers.subscribers[0].held, numbers.subscribers[0].pending) == (
        1,
        1,
        1,
    )
    loaned.publish()
    slot.release()
    assert [subscription.take().sequence for _ in range(2)] == [2, 3]


def test_nothing_here_is_pickled_or_made_by_hand(stream: Stream) -> None:
    subscription = subscribe(stream)
    publish(stream, 1)
    things = (stream, subscription, stream.loan(), subscription.take(), iter(subscription))
    for thing in things:
        with pytest.raises(TypeError):
            pickle.dumps(thing)
    core = md._core
    for kind in (LoanedSlot, TakenSlot, core.SlotMemory, core.StreamLine, core.SlotIterator):
        with pytest.raises(TypeError):
            kind()
        empty = kind.__new__(kind)
        for name in ("array", "publish", "discard", "release", "keep", "sleep"):
            with pytest.raises((AttributeError, TypeError, md.MemdescError)):
                value = getattr(empty, name)
                value(0, 0, 0) if name == "sleep" else value()
                raise AttributeError  # release and discard of nothing do nothing


# --- Threads ----------------------------------------------------------------------------------


def test_threads_share_an_end() -> None:
    count, threads = 300, 3
    with Stream(nbytes=8, slots=20, loans=threads, policies=ALL) as stream:
        subscription = subscribe(stream, policy="block", depth=6, loans=threads)
        found: list[int] = []

        def put(first: int) -> None:
            for number in range(first, first + count):
                stream.publish(number.to_bytes(8, "little"), timeout=LIMIT)

        def take() -> None:
            found.extend(int.from_bytes(bytes(slot), "little") for slot in subscription)

        takers = [threading.Thread(target=take) for _ in range(threads)]
        putters = [threading.Thread(target=put, args=(n * count,)) for n in range(threads)]
        for thread in takers + putters:
            thread.start()
        for thread in putters:
            thread.join(LIMIT)
        stream.close()
        for thread in takers:
            thread.join(LIMIT)
        assert sorted(found) == list(range(threads * count))


def test_closing_ends_the_waits_of_other_threads(stream: Stream) -> None:
    subscription = subscribe(stream)
    blocked = subscribe(stream, policy="block", depth=2, loans=1)
    publish(stream, 1, 2)
    assert taken(subscription) == [1, 2]
    outcomes: list[type[BaseException]] = []

    def wait(call: Any) -> None:
        try:
            call()
        except md.MemdescError as error:
            outcomes.append(type(error))

    threads = [
        threading.Thread(target=wait, args=(call,)) for call in (subscription.take, stream.loan)
    ]
    for thread in threads:
        thread.start()
    subscription.close()
    stream.close()
    for thread in threads:
        thread.join(LIMIT)
    assert outcomes == [md.ClosedError] * 2
    assert taken(blocked) == [1, 2]


def test_who_lost_the_cpu_does_not_spin_next_time(stream: Stream) -> None:
    """As a queue's end. What spins for all of its time never sleeps."""
    video = subscribe(stream)
    spin = 10_000_000
    before = signal.signal(signal.SIGALRM, lambda *_: time.sleep(0.05))  # as another program
    try:
        while not video.statistics().sleeps:  # the timer may ring between two of them
            signal.setitimer(signal.ITIMER_REAL, 0.002)
            assert not video._sleep(spin, spin)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert video.statistics().sleeps == 1
    publish(stream, 1)
    assert video._sleep(spin, spin)
    video.close()
