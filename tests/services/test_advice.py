"""What errors of services tell who made a mistake: the cause, and what to do."""

from __future__ import annotations

import asyncio
import errno
import pickle
import socket as sockets
import threading
from collections.abc import Iterator

import numpy as np
import pytest

import memdesc as md
from memdesc.errors import (
    ClosedError,
    InvalidArgument,
    MethodNotFoundError,
    PeerGoneError,
    RangeError,
    ServiceNotFoundError,
    ShareNotFoundError,
    TimedOutError,
)


@pytest.fixture
def service() -> Iterator[md.Service]:
    with md.Service("advice") as one:
        yield one


@pytest.fixture
def client(service: md.Service) -> Iterator[md.Connection]:
    with md.connect("advice") as one:
        yield one
    one.task.close()  # pytest holds on to the connection


def test_a_stream_takes_no_elements_that_it_would_have_to_maim():
    with md.Stream(shape=2, dtype="u1") as stream:
        for data in (np.array([300.5, 1.0]), np.array([1, 2]), [300.5, 1.0], [300, 1], [-1, 1]):
            with pytest.raises(InvalidArgument) as caught:
                stream.publish(data)
            assert caught.value.errno == errno.EINVAL
        assert "float64" in str(_refusal(lambda: stream.publish(np.zeros(2))))
        assert "uint8" in str(_refusal(lambda: stream.publish(np.zeros(2))))
        assert stream.statistics().published == 0
        stream.publish([255, 1])
        stream.publish(np.array([True, False]))
        stream.publish(np.array([1, 2], "u8"))  # same_kind, as NumPy does it
        assert stream.statistics().published == 3


def test_an_array_that_lies_in_a_descriptor_leads_to_that(service):
    inside = md.empty((4,), dtype="u1")
    for array, wanted in ((inside, "md.descriptor_of(array)"), (inside[:2], "md.descriptor_of")):
        assert wanted in str(_refusal(lambda array=array: service.share("x", array)))
    for plain in (np.zeros(4), bytearray(9)):
        assert _refusal(lambda plain=plain: service.share("x", plain)).errno == errno.EINVAL
        told = str(_refusal(lambda plain=plain: service.share("x", plain)))
        assert "md.asarray" in told if isinstance(plain, np.ndarray) else "with_buffer" in told
    service.share("x", md.descriptor_of(inside))  # as it says
    service.share("x", md.descriptor_of(md.asarray(np.zeros(4))))


def test_with_of_what_was_closed_raises():
    service = md.Service("advice")
    plain, reconnecting = md.connect("advice"), md.connect("advice", reconnect=True)
    for one in (plain, reconnecting, service):
        one.close()
        with pytest.raises(ClosedError), one:
            pass

        async def enter(one=one):
            async with one:
                pass

        with pytest.raises(ClosedError):
            asyncio.run(enter())


def test_choices_by_name_in_any_case():
    assert md.Access("read_write") is md.Access("READ-WRITE") is md.Access.READ_WRITE
    assert md.Direction("out_in") is md.Direction.OUT_IN
    assert md.Backpressure("BLOCK") is md.Backpressure("block") is md.Backpressure.BLOCK
    for kind, wrong in ((md.Access, "rw"), (md.Direction, "up"), (md.Backpressure, "blok")):
        told = str(_refusal(lambda kind=kind, wrong=wrong: kind(wrong)))
        assert all(member.name in told for member in kind)
    for value in (1.5, None, []):
        with pytest.raises(InvalidArgument):
            md.Backpressure(value)


def test_wrong_types_are_told_as_such(service):
    memory = md.BufferMemoryDescriptor(100)
    for wrong in (
        lambda: service.share("x", memory, dtype="float99"),
        lambda: md.connect("advice", timeout="5"),
        lambda: md.connect("advice", timeout=float("nan")),
        lambda: md.connect(7),
        lambda: md.Service(7),
        lambda: md.send_descriptor(1, memory),
        lambda: md.receive_descriptor(1),
    ):
        with pytest.raises(InvalidArgument):
            wrong()
    with sockets.socket(sockets.AF_INET) as other, pytest.raises(InvalidArgument):
        md.send_descriptor(other, memory)


def test_a_method_that_is_slow_says_how_to_wait_longer(service, client):
    done = threading.Event()

    @service.method
    def slow() -> None:
        done.wait(30)

    try:
        with pytest.raises(TimedOutError, match="timeout="):
            client.call("slow", timeout=0.01)
        with pytest.raises(TimedOutError, match="timeout="):
            asyncio.run(client.call_async("slow", timeout=0.01))
    finally:
        done.set()


def test_a_name_that_is_not_there_leads_to_those_that_are(service, client):
    service.share("frames", md.BufferMemoryDescriptor(100))
    service.share("hidden", md.BufferMemoryDescriptor(100), allow=lambda task: False)
    service.stream("video", nbytes=10)
    service.stream("secret", nbytes=10, allow=lambda task: False)
    service.queue("samples")

    def told(ask) -> str:
        with pytest.raises(ShareNotFoundError) as caught:
            ask()
        assert caught.value.errno == errno.ENOENT
        assert "hidden" not in str(caught.value).replace("'hidden'", "", 1)
        assert "secret" not in str(caught.value).replace("'secret'", "", 1)
        return str(caught.value)

    text = told(lambda: client.map("zz", timeout=0.01))
    assert "0.01 s" in text
    assert "'frames'" in text
    assert "for you" in text
    assert "'video'" in told(lambda: client.subscribe("zz", timeout=0))
    assert "'samples'" in told(lambda: client.queue("zz", timeout=0))
    assert "subscribe('video')" in told(lambda: client.map("video", timeout=0))
    assert "map('frames')" in told(lambda: client.queue("frames", timeout=0))
    assert "queue('samples')" in told(lambda: client.subscribe("samples", timeout=0))
    for ask in (client.subscribe, client.queue, client.map):  # of another kind, but not for him
        assert "map('hidden')" not in told(lambda ask=ask: ask("hidden", timeout=0))
        assert "subscribe('secret')" not in told(lambda ask=ask: ask("secret", timeout=0))


def test_the_share_of_all_arrays_is_told_by_what_opens_it(service, client):
    def told(ask) -> str:
        with pytest.raises(ShareNotFoundError) as caught:
            ask()
        assert caught.value.errno == errno.ENOENT
        return str(caught.value)

    assert "arrays together" in told(lambda: client.arrays(timeout=0))
    service.share("weights", md.BufferMemoryDescriptor(100))
    assert "arrays()" not in told(lambda: client.map("wieghts", timeout=0))
    for name in ("*", "bias", "gamma", "beta", "alpha", "delta", "omega"):
        service.share(name, md.BufferMemoryDescriptor(100))
    text = told(lambda: client.map("omeag", timeout=0))
    assert "there is 'omega', 'weights'" in text  # the nearest first
    assert "arrays() has all" in text
    assert "'*'" not in text
    service.share("*", md.BufferMemoryDescriptor(100), allow=lambda task: False)
    assert "arrays()" not in told(lambda: client.map("omeag", timeout=0))


def test_a_method_that_is_not_there_leads_to_its_neighbour(service, client):
    @service.method
    def measure() -> int:
        return 1

    with pytest.raises(MethodNotFoundError, match="'measure'"):
        client.call("mesure")
    with pytest.raises(MethodNotFoundError) as caught:
        client.call("quite_another")
    assert "measure" not in str(caught.value)


def test_a_share_whose_memory_was_closed_is_named(service, client):
    memory = md.BufferMemoryDescriptor(100, name="inner")
    service.share("frames", memory)
    memory.close()
    with pytest.raises(ClosedError, match=r"share 'frames' of service 'advice'"):
        client.map("frames")


def test_a_result_that_can_not_travel_is_told_as_the_result(service, client):
    @service.method
    def odd():
        return object()

    with pytest.raises(InvalidArgument, match=r"the result of odd\(\)") as caught:
        client.call("odd")
    assert caught.value.errno == errno.EINVAL


def test_what_is_of_this_process_is_not_pickled(service, client):
    for one in (service, client, service.wait_client(10)):
        with pytest.raises(TypeError, match=r"connect"):
            pickle.dumps(one)
    with md.connect("advice", reconnect=True) as again, pytest.raises(TypeError, match="connect"):
        pickle.dumps(again)


def test_a_service_that_is_not_there_leads_to_those_that_are(service):
    def told(name: str) -> str:
        with pytest.raises(ServiceNotFoundError) as caught:
            md.connect(name, timeout=0)
        assert caught.value.errno == errno.ENOENT
        return str(caught.value)

    with md.Service("another"):
        assert "there is 'advice', 'another'" in told("advise")
    assert "there is" not in told("./advise")  # a path, of whatever folder
    service.close()
    assert "there is" not in told("advise")


def test_what_was_ended_says_by_what_and_what_to_do(service, client):
    memory = md.BufferMemoryDescriptor(100, name="frames")
    mapping = memory.map()
    with pytest.raises(RangeError, match="room for 25 such elements") as caught:
        mapping.array(26, "f4")
    assert caught.value.errno == errno.EINVAL
    mapping.unmap()
    for use in (mapping.array, lambda: memoryview(mapping), mapping.wire):
        with pytest.raises(ClosedError, match=r"100 bytes at 0x[0-9a-f]+ was unmapped.*map again"):
            use()
    memory.close()
    for use in (memory.map, memory.array, lambda: service.share("x", memory)):
        with pytest.raises(ClosedError, match="BufferMemoryDescriptor 'frames' was closed"):
            use()
    client.close()
    with pytest.raises(ClosedError, match="connect again"):
        client.map("frames")
    with md.Service("lonely") as lonely, pytest.raises(TimedOutError, match="lonely") as late:
        lonely.wait_client(0)
    assert late.value.errno == errno.ETIMEDOUT


def test_a_socket_whose_other_end_is_closed_is_told_with_what_was_tried():
    memory = md.BufferMemoryDescriptor(100)
    for what, use in (
        ("sending", lambda one: md.send_descriptor(one, memory)),
        ("receiving", md.receive_descriptor),
    ):
        ours, theirs = sockets.socketpair()
        theirs.close()
        with ours, pytest.raises(PeerGoneError, match=what) as caught:
            use(ours)
        assert caught.value.errno in (errno.EPIPE, errno.ECONNRESET)


def test_names_of_services():
    for name in ("", ".", "a\0b", "nowhere at all/c"):
        told = str(_refusal(lambda name=name: md.Service(name)))
        assert "slash" in told or "/" in told


def _refusal(work) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        work()
    return caught.value


def test_who_outlives_the_service_is_told_how_to_find_the_next_one(puppet):
    one = puppet("s = md.Service('mortal')", "s.stream('video', nbytes=10)")
    with md.connect("mortal") as connection, connection.subscribe("video") as video:
        one.kill()
        with pytest.raises(PeerGoneError, match="connect again") as caught:
            video.take(timeout=30)
        assert caught.value.errno == errno.ECONNRESET
        with pytest.raises(PeerGoneError, match=r"'mortal'.*reconnect=True") as caught:
            connection.call("anything")
        assert caught.value.errno == errno.ECONNRESET
    connection.task.close()
    md.Service("last").close()  # sweeps what the killed one left


def test_a_shape_that_is_none_leads_to_one():
    buffer = md.BufferMemoryDescriptor(16)
    for wrong, wanted in (("f4", "dtype="), ((-1, 2), "None"), (-1, "None")):
        refusal = _refusal(lambda wrong=wrong: buffer.array(wrong, "u1"))
        assert refusal.errno == errno.EINVAL
        assert wanted in str(refusal)
    assert buffer.array(None, "f4").shape == buffer.array(dtype="f4").shape == (4,)  # as it says
