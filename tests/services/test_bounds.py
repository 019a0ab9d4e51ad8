"""What one client, or a thousand of them, can take of a service: and what the others notice."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import time

import pytest
from children import in_child
from puppets import full_table, is_idle, wait_until
from strangers import Stranger

import memdesc as md
from memdesc.loop import loop
from memdesc.services import accepting, logs, protocol
from memdesc.services.rate import Bucket


@pytest.mark.parametrize("limits", [{"clients": 2}, {"clients": 9, "clients_per_task": 2}])
def test_one_client_too_many_is_told_so(limits):
    with md.Service("camera", limits=md.Limits(**limits)) as service:
        first, second = md.connect("camera"), md.connect("camera")
        for _ in range(3):
            with pytest.raises(md.AccessDeniedError) as caught:
                md.connect("camera")
            assert caught.value.errno == errno.EDQUOT
            assert list(limits)[-1] in str(caught.value)
        assert len(service.clients()) == 2
        second.close()
        wait_until(lambda: len(service.clients()) == 1)
        with md.connect("camera") as third:
            assert (third.shares(), first.shares()) == ([], [])
        first.close()


def test_the_limit_of_one_task_leaves_room_for_another():
    with md.Service("camera", limits=md.Limits(clients_per_task=1)) as service:
        with md.connect("camera"):
            assert in_child(lambda: md.connect("camera").shares()) == []
            with pytest.raises(md.AccessDeniedError):
                md.connect("camera")
        wait_until(lambda: not service.clients() and not service._of_task)


@pytest.mark.parametrize("limits", [{"clients": None}, {"clients_per_task": -1}, {"clients": "4"}])
def test_what_is_no_limit(limits):
    with pytest.raises(md.InvalidArgument):
        md.Limits(**limits)


def test_descriptors_are_kept_for_those_who_are_in(monkeypatch):
    """Newcomers are turned away while the clients that there are can still map."""
    monkeypatch.setattr(accepting, "RESERVE", 12)
    with md.Service("camera") as service, md.connect("camera") as connection:
        service.share("it", md.BufferMemoryDescriptor(100))
        with full_table() as fillers:
            for _ in range(9):
                os.close(fillers.pop())
            with pytest.raises(md.AccessDeniedError) as caught:
                md.connect("camera")
            assert caught.value.errno == errno.EMFILE
            assert len(connection.map("it")) == 100
        with md.connect("camera"):
            pass


def test_who_does_not_read_has_none_of_the_last_descriptors(monkeypatch):
    """What waits for it to read takes descriptors here."""
    monkeypatch.setattr(accepting, "RESERVE", 8)
    with md.Service("camera") as service, md.connect("camera") as connection:
        service.share("it", md.BufferMemoryDescriptor(100))
        with Stranger(service.path) as one:
            one.greet()  # it is in: being let in takes descriptors too
            with full_table() as fillers:
                for _ in range(15):
                    os.close(fillers.pop())
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    for number in range(1000):
                        one.send(protocol.OpenShare(number, "it"))
                wait_until(lambda: len(service.clients()) == 1)
                one.sock.close()  # with what lies unread in it: that counts for who sent it
                assert len(connection.map("it")) == 100


def test_no_descriptor_limit_turns_nobody_away(monkeypatch):
    monkeypatch.setattr(
        resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    )
    with md.Service("camera"), md.connect("camera") as connection:
        assert connection.shares() == []


def test_a_bucket_keeps_its_rate(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bucket = Bucket(10, 3)
    assert [bucket.take() for _ in range(5)] == [True, True, True, False, False]
    assert bucket.wait == pytest.approx(0.1)
    now += 0.25
    assert [bucket.take() for _ in range(3)] == [True, True, False]
    now += 1000
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    never = Bucket(0, 1)
    assert (never.take(), never.take(), never.wait) == (True, False, float("inf"))


@pytest.mark.slow
def test_connections_that_come_too_fast_wait_and_the_others_are_served(monkeypatch):
    monkeypatch.setattr(accepting, "BURST", 5)
    with md.Service("camera", limits=md.Limits(connections_per_second=100)) as service:
        honest = md.connect("camera")
        begun = time.monotonic()
        many = [Stranger(service.path) for _ in range(45)]
        assert honest.shares() == []
        for one in many:
            one.greet()
        assert time.monotonic() - begun >= (45 - 5) / 100
        wait_until(lambda: len(service.clients()) == 46)
        for one in many:
            one.close()
        wait_until(lambda: len(service.clients()) == 1)
        wait_until(lambda: is_idle(loop()))
        honest.close()


@pytest.mark.slow
def test_a_service_that_closes_while_connections_wait(monkeypatch):
    monkeypatch.setattr(accepting, "BURST", 1)
    with md.Service("camera", limits=md.Limits(connections_per_second=1)) as service:
        first, second = Stranger(service.path).greet(), Stranger(service.path)
        wait_until(lambda: loop()._timers)
        service.close()
        assert first.is_ended()
        assert second.is_ended()
        first.close()
        second.close()
    with md.Service("camera"), md.connect("camera"):
        pass
    wait_until(lambda: is_idle(loop()))


@pytest.mark.slow
def test_a_stranger_can_not_fill_the_log(caplog):
    logs.sparing.forget()
    limits = md.Limits(connections_per_second=None)
    with md.Service("camera", limits=limits) as service:
        with caplog.at_level(logging.WARNING, "memdesc.services"):
            for _ in range(200):
                with Stranger(service.path) as one:
                    one.send(b"noise")
                    assert one.is_ended()
        lines = [r for r in caplog.records if r.getMessage() == "channel.protocol_error"]
        assert len(lines) == logs.BURST
        wait_until(lambda: not service._strangers)
    logs.sparing.forget()


def test_what_was_left_out_is_told_with_the_next_line():
    sparing = logs.Sparing()

    def written(event, level=logging.WARNING):
        record = logging.LogRecord("x", level, "", 0, event, (), None)
        return sparing.filter(record) and getattr(record, "left_out", None)

    assert [written("one") for _ in range(logs.BURST + 3)] == [0] * logs.BURST + [False] * 3
    assert written("another") == 0
    assert all(sparing.filter(logging.LogRecord("x", 10, "", 0, "one", (), None)) for _ in "ab")
    sparing._buckets["one"]._tokens = 1
    assert (written("one"), written("one")) == (3, False)
    for number in range(1000):
        written(f"event {number}")
    assert len(sparing._buckets) <= logs._MOST_EVENTS + 1


def test_who_never_greets_is_no_client():
    with md.Service("camera", limits=md.Limits(clients=1)) as service:
        with Stranger(service.path), md.connect("camera") as connection:
            assert connection.shares() == []
            with Stranger(service.path) as late:
                late.send(protocol.Hello(protocol.VERSION))
                refusal = late.receive()[0]
                assert (refusal.error, refusal.errno) == ("AccessDeniedError", errno.EDQUOT)
                assert late.is_ended()
