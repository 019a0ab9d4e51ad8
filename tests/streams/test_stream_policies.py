"""What happens to a subscriber who is too slow, by the policy that it chose."""

from __future__ import annotations

import errno
import threading

import pytest
from stream_tools import ALL, LIMIT, publish, subscribe, taken

import memdesc as md
from memdesc.streams import Stream


def new(**options: int) -> Stream:
    return Stream(nbytes=64, slots=options.get("slots", 10), policies=ALL)


def test_drop_oldest_misses_the_oldest() -> None:
    with new() as stream:
        slow, quick = subscribe(stream, depth=3), subscribe(stream, depth=3)
        for value in range(1, 9):
            publish(stream, value, timeout=0)
            assert taken(quick) == [value]
        assert taken(slow) == [6, 7, 8]
        assert (slow.missed, quick.missed) == (0, 0)
        assert [one.dropped for one in stream.statistics().subscribers] == [5, 0]


def test_drop_newest_misses_the_newest() -> None:
    with new() as stream:
        slow = subscribe(stream, policy="drop_newest", depth=3)
        publish(stream, *range(1, 9), timeout=0)
        assert taken(slow) == [1, 2, 3]
        publish(stream, 9)
        assert taken(slow) == [9]
        assert slow.missed == 5


def test_what_a_subscriber_missed_is_counted_when_it_has_left() -> None:
    with new() as stream:
        slow, newest = subscribe(stream, depth=3), subscribe(stream, policy="drop_newest", depth=3)
        publish(stream, *range(1, 9), timeout=0)
        assert stream.statistics().dropped == 5 + 5
        slow.close()
        newest.close()
        assert stream.statistics().subscribers == ()
        assert stream.statistics().dropped == 10  # what they left untaken is nothing missed
        publish(stream, 9)
        assert stream.statistics().dropped == 10


def test_disconnect_drops_it_and_leaves_it_what_it_holds() -> None:
    with new() as stream:
        reasons: list[str] = []
        seat = stream.admit("disconnect", depth=2, ended=reasons.append)
        slow, other = subscribe(stream, seat), subscribe(stream)
        publish(stream, 1)
        slot = slow.take()
        publish(stream, 2, 3)
        assert seat.depth == 2
        publish(stream, 4, 5, timeout=0)
        assert taken(other) == [2, 3, 4, 5]
        for _ in range(2):
            with pytest.raises(md.PeerGoneError) as caught:
                slow.take(LIMIT)
            assert caught.value.errno == errno.ECONNABORTED
        publish(stream, *range(6, 30))
        assert (slot.array == 1).all()
        assert (slot.metadata, reasons) == (1, [])
        slot.release()
        publish(stream, 30)
        stream.look()
        assert reasons == ["was too slow"]
        assert len(stream.subscribers()) == 1


def test_block_waits_up_to_the_time_given() -> None:
    with new() as stream:
        slow, other = subscribe(stream, policy="block", depth=2), subscribe(stream)
        publish(stream, 1, 2, timeout=0)
        for timeout, number in ((0, errno.EAGAIN), (0.02, errno.ETIMEDOUT)):
            with pytest.raises(md.TimedOutError) as caught:
                stream.loan(timeout)
            assert caught.value.errno == number
        assert taken(other) == [1, 2]  # what is there is not lost, for nobody
        with slow.take() as slot:
            assert slot.metadata == 1
            publish(stream, 3, timeout=0)  # taken is enough; it need not be given back
        with pytest.raises(md.TimedOutError):
            stream.publish(b"", timeout=0.0)
        assert taken(slow) == [2, 3]
        assert slow.missed == 0
        assert stream.statistics().waits == 3


@pytest.mark.parametrize("how", ["takes", "closes", "is dropped"])
def test_block_goes_on_when_the_subscriber(how: str) -> None:
    with new() as stream:
        seat = stream.admit("block", depth=2, latest=False)
        slow = subscribe(stream, seat)
        publish(stream, 1, 2)
        done = threading.Event()

        def put() -> None:
            publish(stream, 3)
            done.set()

        thread = threading.Thread(target=put)
        thread.start()
        assert not done.wait(0.02)
        {"takes": slow.take, "closes": slow.close, "is dropped": seat.drop}[how]()
        assert done.wait(LIMIT)
        thread.join()
        assert slow.closed == (how == "closes")


def test_one_that_blocks_holds_all_up_and_no_one_else_does() -> None:
    with new(slots=20) as stream:
        block = subscribe(stream, policy="block", depth=2)
        others = [subscribe(stream, policy=policy) for policy in ("drop_oldest", "drop_newest")]
        publish(stream, 1, 2)
        with pytest.raises(md.TimedOutError):
            stream.loan(0.01)
        block.close()
        publish(stream, *range(3, 20), timeout=0)
        assert [taken(one)[-1] for one in others] == [19, 4]


def test_offers_are_taken_back_where_slots_are_short() -> None:
    with new(slots=6) as stream:
        first, second = subscribe(stream), subscribe(stream)
        publish(stream, 1, 2)
        held = [first.take(), first.take()]
        assert taken(second) == [1, 2]
        publish(stream, 3, 4)
        held += [second.take(), second.take()]
        publish(stream, *range(5, 13), timeout=0)  # four are held: two go round
        assert [slot.metadata for slot in held] == [1, 2, 3, 4]
        del held
        assert taken(first) == taken(second) == [11, 12]
        assert (first.missed, second.missed) == (8, 6)
