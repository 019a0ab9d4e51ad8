"""Descriptors over Unix sockets and through multiprocessing."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import handover_children as children
import msgspec
import pytest
from children import in_child
from puppets import count_fds, full_table, wait_until

import memdesc as md
from memdesc import handover
from memdesc.handover import receive_descriptor, send_descriptor
from memdesc.portable import Portable

RW = md.Access.READ_WRITE
RO = md.Access.READ_ONLY
PAGE = md.page_size
KINDS = [socket.SOCK_STREAM, socket.SOCK_SEQPACKET]
METHODS = multiprocessing.get_all_start_methods()


@pytest.fixture(params=KINDS, ids=["stream", "seqpacket"])
def pair(request) -> Iterator[tuple[socket.socket, socket.socket]]:
    one, two = socket.socketpair(socket.AF_UNIX, request.param)
    for end in (one, two):
        end.settimeout(20)
    with one, two:
        yield one, two


def buffer(nbytes: int = 3 * PAGE, **options: Any) -> md.BufferMemoryDescriptor:
    made = md.BufferMemoryDescriptor(nbytes, **{"name": "handed", **options})
    made.array()[:] = [index % 251 for index in range(nbytes)]
    return made


def received_mapping(stack: ExitStack) -> md.ReceivedMemoryDescriptor:
    one, two = socket.socketpair()
    with one, two:
        send_descriptor(one, buffer(max_access=RW))
        return stack.enter_context(receive_descriptor(two))


MAKERS: dict[str, Callable[[ExitStack], md.MemoryDescriptor]] = {
    "buffer": lambda _: buffer(),
    "writable buffer": lambda _: buffer(max_access=RW),
    "buffer with a tail": lambda _: buffer(5000),
    "sub": lambda _: md.SubMemoryDescriptor(buffer(), PAGE + 7, 100),
    "multi": lambda _: md.MultiMemoryDescriptor([buffer(PAGE), buffer(2 * PAGE), buffer(10)]),
    "multi of sub": lambda _: md.MultiMemoryDescriptor(
        [md.SubMemoryDescriptor(buffer(), PAGE, 2 * PAGE), buffer(PAGE)]
    ),
    "received": received_mapping,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_over_both_sockets(pair, kind):
    one, two = pair
    with ExitStack() as stack:
        given = MAKERS[kind](stack)
        send_descriptor(one, given)
        with receive_descriptor(two) as got:
            assert (got.length, got.name, got.direction) == (
                given.length,
                given.name,
                given.direction,
            )
            assert got.max_access is given.max_access
            assert got.read_bytes() == given.read_bytes()
            assert bytes(got.map()) == given.read_bytes()
            assert objects(got) == objects(given)
            if given.max_access is RW:
                got.write_bytes(0, b"changed")
                assert given.read_bytes(0, 7) == b"changed"
            else:
                with pytest.raises(md.SealedError):
                    got.write_bytes(0, b"changed")
                with pytest.raises(md.MappingError) as caught:
                    got.map(access=RW)
                assert caught.value.reason is md.MappingReason.ACCESS


def objects(descriptor: md.MemoryDescriptor) -> list[tuple[int, int]]:
    return [e.object.identity for e in descriptor._extents(0, descriptor.length, RO)]


def test_many_in_a_row_and_between_other_bytes(pair):
    """On a stream the descriptors keep to their own message."""
    one, two = pair
    given = [buffer(PAGE, name=f"handed{index}") for index in range(5)]
    for each in given:
        send_descriptor(one, each)
        one.send(b"and then?")
    for each in given:
        with receive_descriptor(two) as got:
            assert (got.name, objects(got)) == (each.name, objects(each))
        assert two.recv(9) == b"and then?"


def test_access_of_what_is_sent(pair):
    one, two = pair
    writable = buffer(max_access=RW)
    with pytest.raises(md.SealedError):
        send_descriptor(one, buffer(), access=RW)
    with pytest.raises(md.SealedError):
        send_descriptor(one, writable, access=RO)
    two.setblocking(False)
    with pytest.raises(BlockingIOError):
        two.recv(1)
    two.settimeout(20)
    send_descriptor(one, writable, access=RO, enforced=False)
    with receive_descriptor(two) as got:
        assert (got.max_access, got.enforced) == (RO, False)
        with pytest.raises(md.MappingError) as caught:
            send_descriptor(one, got)
        assert caught.value.reason is md.MappingReason.NOT_ENFORCED


def test_what_can_not_be_sent(pair):
    one, _ = pair
    private = md.MemoryDescriptor.with_buffer(bytearray(100), md.Direction.OUT)
    with pytest.raises(md.MappingError) as caught:
        send_descriptor(one, private)
    assert caught.value.reason is md.MappingReason.PRIVATE_MEMORY
    with pytest.raises(md.MappingError) as caught:
        send_descriptor(one, md.SubMemoryDescriptor(buffer(), 0, 0))
    assert caught.value.reason is md.MappingReason.ZERO_LENGTH
    closed = buffer()
    closed.close()
    with pytest.raises(md.ClosedError):
        send_descriptor(one, closed)
    with socket.socket(socket.AF_INET) as inet, pytest.raises(md.InvalidArgument):
        send_descriptor(inet, buffer())


def test_more_objects_and_pieces_than_a_message_carries(pair):
    one, two = pair
    parts = [md.BufferMemoryDescriptor(PAGE) for _ in range(handover.MAX_OBJECTS + 1)]
    with pytest.raises(md.InvalidArgument) as caught:
        send_descriptor(one, md.MultiMemoryDescriptor(parts))
    assert caught.value.errno == errno.E2BIG
    send_descriptor(one, md.MultiMemoryDescriptor(parts[:-1]))
    with receive_descriptor(two) as got:
        assert got.length == handover.MAX_OBJECTS * PAGE
    whole = buffer(2 * PAGE)
    pages = [md.SubMemoryDescriptor(whole, PAGE * (index % 2), PAGE) for index in range(4097)]
    with pytest.raises(md.InvalidArgument) as caught:
        send_descriptor(one, md.MultiMemoryDescriptor(pages))
    assert caught.value.errno == errno.E2BIG
    sender = threading.Thread(
        target=send_descriptor, args=(one, md.MultiMemoryDescriptor(pages[:-1]))
    )
    sender.start()
    with receive_descriptor(two) as got:
        assert got.length == 4096 * PAGE
    sender.join(20)


# -- peers that lie or fail --------------------------------------------------------------------


def header(**fields: Any) -> bytes:
    usual = {"version": 1, "name": "x", "direction": 3, "writable": False}
    form = Portable(**{**usual, "pieces": ((0, 0, PAGE),), **fields})
    return msgspec.msgpack.encode(form)


def message(body: bytes, *, magic: bytes = b"mdsc", length: int | None = None) -> bytes:
    return struct.pack("<4sI", magic, len(body) if length is None else length) + body


def send_raw(sock: socket.socket, data: bytes, count: int) -> None:
    fds = [handover.give([_extent()], RO, enforced=True, user=0)[1][0] for _ in range(count)]
    try:
        handover.send_with_fds(sock, data, fds)
    finally:
        handover.close_all(fds)


def _extent() -> Any:
    return _owned._extents(0, PAGE, RO)[0]


_owned: md.BufferMemoryDescriptor


@pytest.fixture(autouse=True)
def _own() -> Iterator[None]:
    global _owned
    _owned = md.BufferMemoryDescriptor(PAGE, name="raw")
    yield
    del _owned


LIES = {
    "fewer descriptors": (message(header(pieces=((0, 0, PAGE), (1, 0, PAGE)))), 1),
    "more descriptors": (message(header()), 2),
    "no descriptors": (message(header()), 0),
    "253 descriptors": (message(header()), 253),
    "an object too small": (message(header(pieces=((0, 0, PAGE + 1),))), 1),
    "an offset past the end": (message(header(pieces=((0, 2**63 - 1, 1),))), 1),
    "no pieces": (message(header(pieces=())), 1),
    "an empty piece": (message(header(pieces=((0, 0, 0),))), 1),
    "lengths past 2^63": (message(header(pieces=((0, 0, 2**62),) * 3)), 1),
    "another version": (message(header(version=2)), 1),
    "no direction": (message(header(direction=77)), 1),
    "writable, sent read-only": (message(header(writable=True)), 1),
    "wrong magic": (message(header(), magic=b"mdsd"), 1),
    "a length too large": (message(header(), length=2**31), 1),
    "a length too small": (message(header(), length=3), 1),
    "noise": (message(b"\xc1" * 40), 1),
    "a list": (message(msgspec.msgpack.encode([1, 2])), 1),
    "text for a number": (message(header().replace(b"\x01", b"\xa0")), 1),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_peer_that_lies(pair, lie):
    one, two = pair
    data, count = LIES[lie]
    before = count_fds()
    send_raw(one, data, count)
    with pytest.raises(md.ProtocolError) as caught:
        receive_descriptor(two)
    assert caught.value.errno == errno.EPROTO
    wait_until(lambda: count_fds() <= before)


def test_objects_that_are_not_sealed_or_no_memory(pair):
    one, two = pair
    unsealed = os.memfd_create("x", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(unsealed, PAGE)
    before = count_fds()
    wrong = [unsealed, os.open("/dev/zero", os.O_RDONLY), os.eventfd(0)]
    for fd in wrong:
        handover.send_with_fds(one, message(header()), [fd])
        os.close(fd)
        with pytest.raises(md.MappingError):
            receive_descriptor(two)
    wait_until(lambda: count_fds() <= before - 1)


@pytest.mark.parametrize("cut", [0, 3, 7, 8, 9, 20])
def test_a_peer_that_goes_in_the_middle(pair, cut):
    one, two = pair
    before = count_fds()
    if cut:
        send_raw(one, message(header())[:cut], 1)
    one.close()
    with pytest.raises((md.PeerGoneError, md.ProtocolError)) as caught:
        receive_descriptor(two)
    if two.type == socket.SOCK_STREAM or not cut:
        assert isinstance(caught.value, md.PeerGoneError)
        assert caught.value.errno == errno.ECONNRESET
    wait_until(lambda: count_fds() <= before - 1)


def test_a_message_in_many_pieces():
    one, two = socket.socketpair()
    with one, two:
        two.settimeout(20)
        data = message(header())

        def drip() -> None:
            send_raw(one, data[:1], 1)
            for index in range(1, len(data)):
                one.send(data[index : index + 1])

        thread = threading.Thread(target=drip)
        thread.start()
        with receive_descriptor(two) as got:
            assert got.length == PAGE
        thread.join(20)


@pytest.mark.parametrize("timeout", [0, 0.02])
def test_nothing_comes_in_time(pair, timeout):
    one, two = pair
    two.settimeout(timeout)
    with pytest.raises(md.TimedOutError) as caught:
        receive_descriptor(two)
    assert caught.value.errno == errno.ETIMEDOUT
    before = count_fds()
    if one.type == socket.SOCK_STREAM:
        send_raw(one, message(header())[:20], 1)
        with pytest.raises(md.TimedOutError):
            receive_descriptor(two)
    wait_until(lambda: count_fds() <= before)


@pytest.mark.parametrize("timeout", [0, 0.02])
def test_nobody_reads_in_time(pair, timeout):
    one, _ = pair
    one.settimeout(timeout)
    given = buffer(PAGE)
    before = count_fds()
    with pytest.raises(md.TimedOutError) as caught:
        for _ in range(100_000):
            send_descriptor(one, given)
    assert caught.value.errno == errno.ETIMEDOUT
    wait_until(lambda: count_fds() <= before)


def test_nobody_is_there(pair):
    one, two = pair
    two.close()
    given = buffer()
    before = count_fds()
    with pytest.raises(md.PeerGoneError) as caught:
        send_descriptor(one, given)
    assert caught.value.errno in (errno.EPIPE, errno.ECONNRESET)
    wait_until(lambda: count_fds() <= before)


def test_no_descriptor_left_to_receive(pair):
    one, two = pair
    many = md.MultiMemoryDescriptor([md.BufferMemoryDescriptor(PAGE) for _ in range(4)])
    for free in range(4):
        send_descriptor(one, many)
        before = count_fds()
        with full_table() as fillers:
            for _ in range(free):
                os.close(fillers.pop())
            with pytest.raises(md.ProtocolError) as caught:
                receive_descriptor(two)
            assert caught.value.errno == errno.EMFILE
        wait_until(lambda before=before: count_fds() <= before)
    send_descriptor(one, many)
    with receive_descriptor(two) as got:
        assert got.length == 4 * PAGE


def test_no_descriptor_left_to_send(pair):
    one, two = pair
    many = md.MultiMemoryDescriptor([md.BufferMemoryDescriptor(PAGE) for _ in range(4)])
    before = count_fds()
    with full_table() as fillers:
        for _ in range(3):
            os.close(fillers.pop())
        with pytest.raises(md.MemdescError) as caught:
            send_descriptor(one, many)
        assert caught.value.errno == errno.EMFILE
    wait_until(lambda: count_fds() <= before)
    two.setblocking(False)
    with pytest.raises(BlockingIOError):
        two.recv(1)


def test_what_a_receiver_gets_ends_with_the_receiver(pair):
    """Real processes: the child's view of the very same memory, and its stores."""
    one, two = pair
    given = buffer(max_access=RW)

    def child() -> tuple[bytes, list[tuple[int, int]]]:
        with receive_descriptor(two) as got:
            got.write_bytes(0, b"child")
            return got.read_bytes(5, 10), objects(got)

    send_descriptor(one, given)
    expected = given.read_bytes(5, 10)
    assert in_child(child) == (expected, objects(given))
    assert given.read_bytes(0, 5) == b"child"


def test_it_goes_round(pair):
    """Given on by who received it, with no more rights than came."""
    one, two = pair
    given = buffer()
    send_descriptor(one, given)
    for _ in range(3):
        with receive_descriptor(two) as got:
            send_descriptor(one, got)
    with receive_descriptor(two) as last:
        assert objects(last) == objects(given)
        assert last.max_access is RO


def test_received_memory_outlives_its_giver(pair):
    one, two = pair
    given = buffer(PAGE)
    expected = given.read_bytes()
    send_descriptor(one, given)
    given.close()
    del given
    with receive_descriptor(two) as got:
        mapping = got.map()
    assert bytes(mapping) == expected


# -- pickle and multiprocessing ----------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
def test_plain_pickle_refuses_and_says_what_to_do(kind):
    with ExitStack() as stack, pytest.raises(TypeError, match=r"send_descriptor|multiprocessing"):
        pickle.dumps(MAKERS[kind](stack))


@contextmanager
def started(method: str, target: Any, *arguments: Any) -> Iterator[Any]:
    process = multiprocessing.get_context(method).Process(target=target, args=arguments)
    process.start()
    try:
        yield process
        process.join(60)
        assert process.exitcode == 0
    finally:
        if process.is_alive():
            process.kill()
            process.join()
        process.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["buffer", "writable buffer", "sub", "multi"])
@pytest.mark.parametrize("method", METHODS)
def test_arguments_of_a_process(method, kind):
    with ExitStack() as stack:
        given = MAKERS[kind](stack)
        queue = multiprocessing.get_context(method).Queue()
        before = given.read_bytes()
        with started(method, children.answer, given, queue):
            seen = queue.get(timeout=60)
        close_queue(queue)
        assert seen["pid"] != os.getpid()
        assert (seen["name"], seen["length"]) == (given.name, given.length)
        assert [tuple(one) for one in seen["objects"]] == objects(given)
        # A fork child is no receiver: it inherits the owner's own rights.
        rights = RW if method == "fork" and kind != "writable buffer" else given.max_access
        assert seen["wrote"] is (rights is RW)
        assert seen["bytes"][5:] == before[5:]
        assert given.read_bytes(0, 5) == (b"child" if seen["wrote"] else before[:5])


def close_queue(queue: Any) -> None:
    queue.close()
    queue.join_thread()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_through_a_queue(method):
    context = multiprocessing.get_context(method)
    there, back = context.Queue(), context.Queue()
    given = buffer()
    with started(method, relay, there, back):
        there.put(given)
        seen = back.get(timeout=60)
        there.put(None)
    for queue in (there, back):
        close_queue(queue)
    assert [tuple(one) for one in seen["objects"]] == objects(given)
    assert (seen["wrote"], seen["access"]) == (False, "READ_ONLY")
    assert seen["bytes"] == given.read_bytes()


def relay(there: Any, back: Any) -> None:
    for descriptor in iter(there.get, None):
        back.put(children.describe(descriptor))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_through_a_pipe_and_back_and_on(method):
    """A child's memory comes to the parent, who hands it to a third process."""
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    with ours, theirs, started(method, children.make_and_send, theirs):
        with ours.recv() as got:
            assert got.name == "childs"
            queue = context.Queue()
            with started(method, children.answer, got, queue):
                seen = queue.get(timeout=60)
            close_queue(queue)
            ours.send("done")
            assert [tuple(one) for one in seen["objects"]] == objects(got)
    assert seen["bytes"][:12] == b"of the child"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_through_a_pool(method):
    given = [buffer(PAGE, name=f"pool{index}") for index in range(4)]
    with multiprocessing.get_context(method).Pool(2) as pool:
        sums = pool.map_async(children.total, given * 3).get(60)
        writable = buffer(PAGE, max_access=RW)
        pool.apply_async(children.write_all, (writable, 9)).get(60)
        pool.close()
        pool.join()
    assert sums == [sum(one.read_bytes()) for one in given] * 3
    assert writable.read_bytes() == b"\x09" * PAGE


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_nothing_stays_open_on_either_side(method):
    context = multiprocessing.get_context(method)
    given = buffer(name="counted")
    queue = context.Queue()
    with started(method, children.count_open, given, queue):
        assert [queue.get(timeout=60), queue.get(timeout=60)] == [1, 0]
    close_queue(queue)
    wait_until(lambda: children._open_of("counted") == 1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_process_that_can_not_be_started_leaves_nothing(method):
    context = multiprocessing.get_context(method)
    given = buffer(name="counted")
    process = context.Process(target=children.answer, args=(given, lambda: None))
    with pytest.raises((pickle.PicklingError, AttributeError)):
        process.start()
    del process
    wait_until(lambda: children._open_of("counted") == 1)


def test_raw_descriptors_are_not_inherited(pair):
    one, two = pair
    send_descriptor(one, buffer(name="cloexec"))
    with receive_descriptor(two) as got:
        fds = [extent.object.fileno() for extent in got._extents(0, got.length, RO)]
        assert not any(os.get_inheritable(fd) for fd in fds)
