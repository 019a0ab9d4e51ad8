"""A subscription that another thread closes in the middle of a call: an error, no stray access."""

from __future__ import annotations

import pytest

import memdesc as md
from memdesc.streams import subscription


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
