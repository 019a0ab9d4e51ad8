"""An end that another thread closes in the middle of a call: `ClosedError`, and no stray access."""

from __future__ import annotations

import pytest

import memdesc as md
from memdesc.queues import notification_pair, waiting
from memdesc.queues.notify import clear


def test_a_socket_that_this_side_closed_tells_of_nobody():
    notify, listen = notification_pair()
    assert clear(listen)
    listen.close()
    assert not clear(listen)
    notify.close()


def test_a_consumer_that_is_closed_while_it_looks(monkeypatch):
    notify, listen = notification_pair()
    memory = md.create_data_queue(4096)
    consumer = md.Consumer(memory, listen=listen)

    def close_it(sock):
        consumer.close()
        memory.close()
        return clear(sock)

    monkeypatch.setattr(waiting, "clear", close_it)
    with pytest.raises(md.ClosedError):
        consumer.try_dequeue()
    notify.close()
    listen.close()
