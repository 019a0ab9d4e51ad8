"""What another thread closes in the middle of a call: an error, no stray access."""

from __future__ import annotations

import numpy as np
import pytest

import memdesc as md
from memdesc.streams import Stream, layout, subscription


def test_a_subscription_that_is_closed_while_it_looks(monkeypatch):
    clear = subscription.clear
    with md.Service("camera") as service, md.connect("camera") as connection:
        service.stream("video", nbytes=100)
        video = connection.subscribe("video")

        def close_it(sock):
            video.close()
            return clear(sock)

        assert video.fileno() >= 0  # from here on it looks at its socket
        monkeypatch.setattr(subscription, "clear", close_it)
        with pytest.raises(md.ClosedError):
            video.try_take()


def test_a_slot_that_is_given_back_while_its_array_is_made(monkeypatch):
    """The array would lie in what the closed subscription has unmapped."""
    make = layout._array
    with md.Service("camera") as service, md.connect("camera") as connection:
        stream = service.stream("video", shape=(100,), dtype="u1")

        held = []  # of what a subscription keeps, nothing may lead to it

        def give_it_back(*arguments):
            slot, video = held
            held.clear()
            slot.release()
            array = make(*arguments)
            video.close()
            return array

        monkeypatch.setattr(layout, "_array", give_it_back)
        video = connection.subscribe("video")
        monkeypatch.undo()
        stream.publish(np.zeros(100, "u1"))
        slot = video.take(60)
        held += slot, video
        with pytest.raises(md.ClosedError):
            slot.array  # a property, which makes it
        assert not slot.held


def test_a_stream_that_is_closed_while_a_loaned_slots_array_is_made(monkeypatch):
    make = layout._array
    with monkeypatch.context() as patched:
        patched.setattr(layout, "_array", lambda *arguments: (stream.close(), make(*arguments))[1])
        stream = Stream(shape=(100,), dtype="u1")
    slot = stream.loan()
    with pytest.raises(md.ClosedError):
        slot.array  # a property, which makes it
    slot.discard()
