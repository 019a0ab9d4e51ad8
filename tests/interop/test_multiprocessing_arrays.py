"""Arrays that travel through multiprocessing as handles."""

from __future__ import annotations

import copyreg
import errno
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import multiprocessing_children as children
import numpy as np
import pytest
from children import NOBODY, become, finish, in_child, kill, start
from puppets import count_fds, end_holder, full_table, memfds_mapped, wait_until

import memdesc as md
from memdesc.handover import reducers, transit
from memdesc.interop import multiprocessing as handles

RW = md.Access.READ_WRITE
RO = md.Access.READ_ONLY
METHODS = multiprocessing.get_all_start_methods()
RECORD = np.dtype([("time", "f8"), ("name", "S5"), ("place", "i2", (3,))])

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture
def installed() -> Iterator[None]:
    end_holder()  # what other tests left with it
    with handles.installed():
        yield


@contextmanager
def started(method: str, target: Any, *arguments: Any) -> Iterator[Any]:
    process = multiprocessing.get_context(method).Process(target=target, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.join(60)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()


def close_queues(*queues: Any) -> None:
    for queue in queues:
        queue.close()
        if hasattr(queue, "join_thread"):
            queue.join_thread()


def travel(value: Any) -> Any:
    """Send something to this very process."""
    return ForkingPickler.loads(bytes(ForkingPickler.dumps(value)))


def numbers(*shape: int, **options: Any) -> Any:
    return md.asarray(np.arange(np.prod(shape)).reshape(shape), **options)


# -- from process to process -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_vehicle(method: str, installed: None) -> None:
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    queue, simple, answers = context.Queue(), context.SimpleQueue(), context.Queue()
    given = numbers(4, 5)
    shared = handles.writable(numbers(3, max_access=RW))
    with ours, theirs, started(method, children.serve, given, theirs, queue, simple, answers):
        ours.send(given)
        queue.put(given[::-1, 1::2])
        simple.put(shared)
        ours.send({"a": [given.T], "b": np.arange(3)})
        seen = dict(answers.get(timeout=60) for _ in range(5))
    close_queues(queue, answers, simple)
    inode = children.inode_at(given)
    inherits = method == "fork"  # then the arguments of a process do not travel
    assert seen["Process"]["inode"] == seen["Pipe"]["inode"] == inode
    assert seen["Process"]["wrote"] is inherits
    assert bool(given[0, 0] == 1) is inherits
    assert seen["Pipe"]["pid"] != os.getpid()
    assert (seen["Pipe"]["values"], seen["Pipe"]["wrote"]) == (given.tolist(), False)
    part = seen["Queue"]
    assert (part["inode"], part["strides"]) == (inode, given[::-1, 1::2].strides)
    assert part["values"] == given[::-1, 1::2].tolist()
    assert (seen["SimpleQueue"]["inode"], seen["SimpleQueue"]["wrote"]) == (
        children.inode_at(shared),
        True,
    )
    assert shared.tolist() == [1, 2, 3]
    turned, plain = seen["inside others"]
    assert (turned["inode"], turned["values"]) == (inode, given.T.tolist())
    assert (plain["found"], plain["wrote"], plain["values"]) == (False, True, [0, 1, 2])
    assert not handles.in_transit().handles


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_pool_both_ways_also_of_workers_that_are_gone(method: str, installed: None) -> None:
    given = [numbers(50, 10) + 0, numbers(50, 10), numbers(50, 10)]
    context = multiprocessing.get_context(method)
    with context.Pool(1, maxtasksperchild=1) as pool:
        seen = pool.map_async(children.look, given, chunksize=3).get(60)
        made = pool.map_async(children.make_late, [10, 1000], chunksize=2).get(60)
        (back,) = pool.map_async(children.give_back, given[2:], chunksize=1).get(60)
        pool.close()
        pool.join()
    assert [one["inode"] != 0 for one in seen] == [False, True, True]
    assert [one["values"] for one in seen] == [array.tolist() for array in given]
    for array, count in zip(made, (10, 1000), strict=True):
        assert md.descriptor_of(array) is not None
        assert array.tolist() == list(range(count))
        assert not array.flags.writeable
    if method == "fork":  # spawned ones did not install, so what they send is a copy
        assert children.inode_at(back) == children.inode_at(given[2])
    assert np.array_equal(back, given[2])


@pytest.mark.slow
def test_an_executor_both_ways(installed: None) -> None:
    context = multiprocessing.get_context("forkserver")
    given = numbers(100)
    with ProcessPoolExecutor(1, mp_context=context, initializer=handles.install) as executor:
        seen = executor.submit(children.look, given).result(60)
        made = executor.submit(children.make, 30).result(60)
        again = executor.submit(children.look, made).result(60)
    assert (seen["inode"], seen["wrote"]) == (children.inode_at(given), False)
    assert md.descriptor_of(made) is not None
    assert again["inode"] == children.inode_at(made)


@pytest.mark.slow
def test_memory_of_a_worker_stays_flat(installed: None) -> None:
    size = 8 << 20
    given = [md.zeros(size, "u1") for _ in range(6)]
    for number, array in enumerate(given):
        array[:] = number
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply_async(children.anonymous_memory, (given[0],)).get(60)
        seen = [pool.apply_async(children.anonymous_memory, (array,)).get(60) for array in given]
        pool.close()
        pool.join()
    assert [one[0] for one in seen] == [number * size for number in range(6)]
    private, shared = [one[1] for one in seen], [one[2] for one in seen]
    assert max(private) - min(private) < size // 2
    assert max(shared) <= size + (1 << 20)  # one array at a time


def test_a_sender_that_is_killed_loses_nothing(installed: None) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    with ours, theirs:
        with started("fork", children.send_and_die, theirs) as process:
            process.join(60)
            assert process.exitcode == -9
        assert handles.in_transit() == handles.Transit(1, 1, md.round_page(8000))
        got = ours.recv()
    assert got.sum() == 999 * 500
    assert md.descriptor_of(got) is not None
    assert not handles.in_transit().handles


def test_where_the_first_process_did_not_install_the_senders_end_is_told() -> None:
    end_holder()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    with ours, theirs:
        with started("fork", children.install_send_and_die, theirs) as process:
            process.join(60)
            assert process.exitcode == -9
        with pytest.raises(handles.HandleLostError) as lost:
            ours.recv()
    assert lost.value.errno == errno.ECONNREFUSED
    assert isinstance(lost.value.__cause__, md.PeerGoneError)
    assert not isinstance(lost.value, OSError)


@pytest.mark.slow
def test_senders_that_have_ended_leave_no_way_to_them() -> None:
    """Where the first process did not install, each sender is a holder, which ends with it."""
    end_holder()
    context = multiprocessing.get_context("fork")
    before = len(transit.ways._links)
    for _ in range(4):
        ours, theirs = context.Pipe()
        with ours, theirs, started("fork", children.install_and_send, theirs):
            assert ours.recv().tolist() == list(range(10))
            assert len(transit.ways._links) <= before + 1
            ours.send(None)
    transit.ways.close()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_process_that_can_not_be_started_leaves_nothing(method: str, installed: None) -> None:
    context = multiprocessing.get_context(method)
    process = context.Process(target=children.look, args=(numbers(9), lambda: None))
    with pytest.raises((pickle.PicklingError, AttributeError)):
        process.start()
    del process
    gc.collect()
    wait_until(lambda: not handles.in_transit().handles)


# -- what arrives --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u1", "f8", "c16", ">i4", "M8[ns]", "U7", RECORD])
def test_any_view_of_any_dtype_arrives_as_it_is(dtype: Any, installed: None) -> None:
    whole = md.zeros((4, 6, 5), dtype)
    whole.view("u1").reshape(-1)[...] = np.arange(whole.nbytes) % 128
    if whole.dtype.kind == "U":
        whole[...] = np.arange(whole.size).reshape(whole.shape).astype("U7")
    views = [
        whole,
        whole.T,
        whole[1],
        whole[::2, ::-1, 1:4],
        whole[2, 3, 4:],
        whole[1, 2, 3:4].reshape(()),
        whole[-1:, 1:1],
        np.broadcast_to(whole[0, 0, :1], (3, 2)),
        md.asarray(whole, order="F"),
    ]
    for view in views:
        got = travel(view)
        assert type(got) is np.ndarray
        assert got.shape == view.shape
        assert got.tobytes() == view.tobytes()
        if view.size:
            assert (got.strides, got.dtype) == (view.strides, view.dtype)
            assert children.inode_at(got) == children.inode_at(view)
            assert not got.flags.writeable
            with pytest.raises(ValueError, match="WRITEABLE"):
                got.flags.writeable = True
    if dtype is RECORD:
        assert travel(whole["name"][1]).tolist() == whole["name"][1].tolist()


def test_what_lies_in_several_objects_arrives() -> None:
    parts = [md.BufferMemoryDescriptor(md.page_size) for _ in range(2)]
    parts[1].write_bytes(0, b"second")
    several = md.MultiMemoryDescriptor(parts)
    with handles.installed():
        got = travel(several.array()[100:])
        assert got[md.page_size - 100 :][:6].tobytes() == b"second"
        parts[0].write_bytes(100, b"!")
        assert got[0] == ord("!")
        assert not handles.in_transit().handles


def test_every_kind_of_descriptor_that_can_be_shared(installed: None) -> None:
    buffer = md.BufferMemoryDescriptor(1000)
    buffer.write_bytes(0, bytes(range(250)) * 4)
    part, frozen = md.SubMemoryDescriptor(buffer, 10, 100), buffer.snapshot()
    mapping = part.map(offset=5)
    received = md.descriptor_of(travel(buffer.array()[:500]))
    assert received is not None
    for array in (
        buffer.array(),
        part.array()[3:],
        frozen.array(),
        mapping.array(),
        received.array(),
    ):
        got = travel(array)
        assert children.inode_at(got) != 0
        assert got.tobytes() == array.tobytes()
    # An array alone does not keep its descriptor; made so, it does.
    view = buffer.snapshot().array()
    assert md.descriptor_of(travel(view)) is None
    assert md.descriptor_of(travel(md.asarray(buffer.snapshot())[7:])) is not None
    private = md.MemoryDescriptor.with_buffer(bytearray(b"private"), md.Direction.OUT)
    got = travel(private.array())
    assert (got.tobytes(), md.descriptor_of(got)) == (b"private", None)
    gone = buffer.array()
    buffer.close()
    assert md.descriptor_of(travel(gone)) is None


def test_others_go_by_value_as_before(installed: None) -> None:
    ours = numbers(6)
    for value in (
        np.arange(5),
        np.array([1, "a", None], object),
        np.asfortranarray(np.ones((2, 3))),
        ours + 0,
        ours[:0],
        np.ma.masked_array(ours, ours > 2),
        ours.view(np.recarray),
        np.float64(3),
    ):
        got = travel(value)
        assert type(got) is type(value)
        assert got.dtype == value.dtype
        assert got.tolist() == value.tolist()


# -- rights ----------------------------------------------------------------------------------------


def test_the_receivers_rights_are_the_senders_choice() -> None:
    closed, opened = numbers(5), numbers(5, max_access=RW)
    asleep = opened[1:]
    asleep.flags.writeable = False
    with handles.installed():
        assert not travel(closed).flags.writeable
        assert not travel(opened).flags.writeable
        assert handles.writable(opened) is opened
        assert travel(opened).flags.writeable
        assert not travel(opened[1:]).flags.writeable
    with handles.installed(access=RW):
        got = travel(opened)
        got[0] = 77
        assert opened[0] == 77
        assert not travel(closed).flags.writeable
        assert not travel(asleep).flags.writeable
        for array in (closed, asleep, closed[1:]):
            with pytest.raises(md.SealedError) as no:
                handles.writable(array)
            assert no.value.errno == errno.EACCES
        with pytest.raises(md.InvalidArgument):
            handles.writable(np.arange(3))
        with pytest.raises(md.InvalidArgument) as no:
            handles.writable(md.descriptor_of(opened))
        assert no.value.errno == errno.EINVAL


def test_a_mark_goes_with_its_array(installed: None) -> None:
    for _ in range(20):
        handles.writable(numbers(3, max_access=RW))
    assert not handles._writable
    assert not travel(numbers(3, max_access=RW)).flags.writeable


def test_what_came_is_passed_on_with_no_more_rights(installed: None) -> None:
    opened = handles.writable(numbers(5, max_access=RW))
    first = travel(opened)
    handles.writable(first)
    second = travel(first)
    second[0] = 5
    assert opened[0] == 5
    courtesy = travel(second)
    assert not courtesy.flags.writeable
    with pytest.raises(md.SealedError):
        handles.writable(courtesy)
    assert travel(courtesy)[0] == 5


def test_another_user_gets_nothing(installed: None) -> None:
    form = bytes(ForkingPickler.dumps(numbers(5)))

    def fetch() -> int | None:
        try:
            ForkingPickler.loads(form)
        except handles.HandleLostError as error:
            return error.errno
        return 0

    try:
        assert in_child(fetch, before=lambda: become(NOBODY)) == errno.EACCES
    finally:
        assert ForkingPickler.loads(form).tolist() == [0, 1, 2, 3, 4]


def test_only_his_own_user_leaves_things_with_a_holder(installed: None) -> None:
    """Also when he answers under the family's name, as somebody else would have to."""

    def leave() -> tuple[bool, bool]:
        array = numbers(5)  # the parent's holder belongs to another user now
        form = bytes(ForkingPickler.dumps(array))
        own = transit.ways.holder is not None
        return own, ForkingPickler.loads(form).tolist() == array.tolist()

    assert in_child(leave, before=lambda: become(NOBODY)) == (True, True)


# -- how much it takes -----------------------------------------------------------------------------


def test_what_is_known_is_not_mapped_again(installed: None) -> None:
    array = numbers(1000, name="once")
    got = [travel(array[number:]) for number in range(20)]
    fds = count_fds()
    got += [travel(array) for _ in range(100)]
    wait_until(lambda: count_fds() <= fds)
    assert memfds_mapped("self", "once") == 2  # the owner's, and what came
    assert len({md.descriptor_of(one).parent for one in got}) == 1  # type: ignore[union-attr]
    del got
    assert memfds_mapped("self", "once") == 1
    wait_until(lambda: count_fds() <= fds - 1)


def test_a_thousand_arrays_of_a_slab_with_256_descriptors() -> None:
    def send_all() -> tuple[int, tuple[int, int], int]:
        children.few_descriptors(256)
        with handles.installed():
            slab = md.Slab(1 << 18)
            given = [slab.zeros(10, "i4") for _ in range(1000)]
            for number, array in enumerate(given):
                array[:] = number
            forms = [bytes(ForkingPickler.dumps(array)) for array in given]
            waiting = handles.in_transit()
            got = [ForkingPickler.loads(form) for form in forms]
            told = waiting.handles, waiting.objects
            return sum(int(array.sum()) for array in got), told, handles.in_transit().handles

    assert in_child(send_all) == (10 * 999 * 500, (1000, 1), 0)


def test_no_descriptor_left_is_said_on_either_side(installed: None) -> None:
    array = numbers(5)
    with full_table(), pytest.raises(md.MappingError) as no:
        ForkingPickler.dumps(array)
    assert no.value.reason is md.MappingReason.TOO_MANY_FILES
    form, other = (bytes(ForkingPickler.dumps(one)) for one in (array, array[1:]))
    with full_table(), pytest.raises(handles.HandleLostError) as lost:
        ForkingPickler.loads(form)
    assert lost.value.errno == errno.EMFILE
    assert [ForkingPickler.loads(one)[-1] for one in (form, other)] == [4, 4]


def test_a_handle_is_for_one_receiver(installed: None) -> None:
    form = bytes(ForkingPickler.dumps(numbers(5)))
    first = ForkingPickler.loads(form)
    with pytest.raises(handles.HandleLostError) as lost:
        ForkingPickler.loads(form)
    assert lost.value.errno == errno.ENOENT
    assert first.sum() == 10
    assert in_child(_error_of, form) == errno.ENOENT


def _error_of(form: bytes) -> int | None:
    try:
        ForkingPickler.loads(form)
    except handles.HandleLostError as error:
        return error.errno
    return 0


def test_threads_send_and_receive_at_once(installed: None) -> None:
    arrays = [numbers(100) for _ in range(4)]
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            for turn in range(40):
                got = travel(arrays[(number + turn) % 4])
                if got.sum() != 4950:
                    wrong.append(got)
        except BaseException as error:  # noqa: BLE001 (shown by the assert)
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not handles.in_transit().handles


def test_a_signal_handler_sends_while_its_thread_waits_for_the_holder(installed: None) -> None:
    """In a child, whose holder is this process."""
    array, other = numbers(100), numbers(7)

    def work() -> tuple[int, bool]:
        got: list[int] = []
        signal.signal(signal.SIGALRM, lambda *_: got.append(int(travel(other).sum())))
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.003)
        fine = True
        while len(got) < 20:
            fine = fine and travel(array).sum() == 4950
        signal.setitimer(signal.ITIMER_REAL, 0)
        return len(got), fine and set(got) == {21}

    sent, fine = in_child(work)
    assert sent >= 20
    assert fine


def test_a_signal_handler_in_the_midst_of_the_books_is_refused(installed: None) -> None:
    holder = transit.ways.holder
    assert holder is not None
    with holder._alone(), pytest.raises(md.MappingError) as no:
        travel(numbers(3))
    assert no.value.errno == errno.EBUSY
    assert travel(numbers(3)).sum() == 3


# -- strangers at the holder's socket --------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "descriptors"),
    [
        (b"", 0),
        (b"x", 0),
        (b"T" + bytes(15), 0),
        (b"T" + bytes(17), 0),
        (b"X" + bytes(16), 1),
        (b"T" + bytes(16), 1),
        (b"C" + bytes(16), 0),
        (b"K" * 100_000, 0),
    ],
)
def test_who_says_nonsense_is_hung_up_on(message: bytes, descriptors: int, installed: None) -> None:
    holder = transit.ways.holder
    assert holder is not None
    fds = count_fds()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        link.settimeout(30)
        link.connect(holder.address)
        socket.send_fds(link, [message], [0] * descriptors)
        try:
            assert link.recv(1) == b""
        except ConnectionResetError:
            assert message
    wait_until(lambda: count_fds() <= fds)
    assert travel(numbers(3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("message", "answer"), [(b"T", b"n"), (b"K", b"f")])
def test_what_is_not_there_is_answered(message: bytes, answer: bytes, installed: None) -> None:
    holder = transit.ways.holder
    assert holder is not None
    fds = count_fds()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        link.settimeout(30)
        link.connect(holder.address)
        for _ in range(3):
            link.send(message + bytes(16))
            assert socket.recv_fds(link, 100, 10)[:2] == (answer + bytes(32), [])
    wait_until(lambda: count_fds() <= fds)


def test_a_holder_without_descriptors_says_so_and_goes_on(installed: None) -> None:
    """To whom it has a connection, at once; who connects waits until there is one."""
    holder = transit.ways.holder
    assert holder is not None
    go, gone = os.pipe()
    ours, theirs = multiprocessing.Pipe()

    def send() -> None:
        os.close(gone)
        theirs.send(numbers(3))
        os.read(go, 1)
        with pytest.raises(md.MappingError) as no:
            ForkingPickler.dumps(numbers(3))
        assert no.value.reason is md.MappingReason.TOO_MANY_FILES
        transit.Link(holder.address).keep(b"0123456789abcdef", [os.memfd_create("kept")])
        theirs.send(numbers(4))

    pid = start(send)
    os.close(go)
    with ours, theirs:
        assert ours.recv().sum() == 3
        with full_table():
            os.write(gone, b"!")
            watched = holder._loop._selector.get_map
            wait_until(lambda: holder._sock.fileno() not in watched())
        os.close(gone)
        assert ours.recv().sum() == 6
        assert finish(pid) == 0
    os.close(*holder.take(b"0123456789abcdef"))


@pytest.mark.parametrize(
    ("answer", "descriptors", "error"),
    [
        (None, 0, md.TimedOutError),
        (b"", 0, md.PeerGoneError),
        (b"y", 1, md.PeerGoneError),
        (b"y" + bytes(32), 0, md.ProtocolError),
        (b"y" + bytes(32), 2, md.ProtocolError),
        (b"y" + bytes(33), 1, md.ProtocolError),
        (b"y" + bytes(32), 1, md.MappingError),
        (b"n" + bytes(32), 1, md.PeerGoneError),
        (b"f" + bytes(32), 1, md.MappingError),
        (b"?" + bytes(32), 1, md.PeerGoneError),
    ],
)
def test_a_false_holder_is_seen_through(
    answer: bytes | None, descriptors: int, error: type[md.MemdescError], monkeypatch: Any
) -> None:
    monkeypatch.setattr(transit, "PATIENCE", 20 if answer is not None else 0.05)
    header = reducers.leave(md.BufferMemoryDescriptor(9), None, enforced=True).header
    handles.forget_in_transit()
    fds = count_fds()
    address = b"\0memdesc-test-" + os.urandom(8).hex().encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as false:
        false.bind(address)
        false.listen(1)

        def serve() -> None:
            link, _ = false.accept()
            with link:
                assert len(link.recv(100)) == 17
                if answer:
                    socket.send_fds(link, [answer], [0] * descriptors)
                if answer is None:
                    link.recv(1)  # until he has had enough

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(handles.HandleLostError) as lost:
            reducers.take(reducers.Handle(header, address, bytes(16)), "a test")
        assert type(lost.value.__cause__) is error
        transit.ways.close()
        thread.join()
    wait_until(lambda: count_fds() <= fds)


def test_what_a_killed_receiver_was_to_get_is_told_and_can_be_forgotten(installed: None) -> None:
    """A queue that is dropped full is the same."""
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        pid = start(signal.pause)
        array = numbers(3)
        ours.send([array, array[1:], numbers(2)])
        kill(pid)
        assert handles.in_transit() == handles.Transit(3, 2, 2 * md.page_size)
        fds = count_fds()
        assert handles.forget_in_transit() == handles.Transit(3, 2, 2 * md.page_size)
        assert handles.in_transit() == handles.forget_in_transit() == handles.Transit(0, 0, 0)
        wait_until(lambda: count_fds() <= fds - 2)
        with pytest.raises(handles.HandleLostError) as lost:
            theirs.recv()
        assert lost.value.errno == errno.ENOENT


# -- the switch ------------------------------------------------------------------------------------


def test_uninstalled_is_as_before() -> None:
    reducers: Any = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    before, fds = dict(reducers), count_fds()
    array = numbers(5)
    handles.uninstall()
    handles.install()
    handles.install(access=RW)
    form = bytes(ForkingPickler.dumps(array))
    handles.uninstall()
    assert reducers == before
    assert md.descriptor_of(travel(array)) is None
    assert ForkingPickler.loads(form).sum() == 10  # it was on its way
    wait_until(lambda: transit.ways.holder is None)
    handles.install()  # goes on with a new one
    assert travel(array).sum() == 10
    handles.uninstall()
    del array
    gc.collect()
    md.recycler.trim()
    wait_until(lambda: count_fds() <= fds + 2)  # the I/O thread's


def test_installed_again_while_the_holder_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    handles.install()
    first = transit.ways.holder
    assert first is not None
    loop, made = first._loop, []
    thread = threading.Thread(target=lambda: made.append(transit.ways.to_send()))
    forget = loop.forget

    def forget_late(fd: int) -> None:
        if fd == first._sock.fileno():
            thread.start()
            thread.join(0.2)  # it waits for the end
        forget(fd)

    monkeypatch.setattr(loop, "forget", forget_late)
    handles.uninstall()
    wait_until(lambda: thread.ident is not None)
    thread.join()
    assert first.closed
    (second,) = made
    assert transit.ways.holder is second
    with pytest.raises(md.PeerGoneError):
        first.keep(bytes(16), [os.dup(0)])
    with handles.installed():
        assert travel(numbers(3)).sum() == 3


def test_installed_inside_installed() -> None:
    array = numbers(5, max_access=RW)
    with handles.installed():
        with handles.installed(access=RW):
            assert travel(array).flags.writeable
        assert not travel(array).flags.writeable
        assert md.descriptor_of(travel(array)) is not None
    assert md.descriptor_of(travel(array)) is None


def test_what_another_library_registered_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def reduce(array: Any) -> Any:
        calls.append(array)
        return array.__reduce__()

    reducers: Any = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    monkeypatch.setitem(reducers, np.ndarray, reduce)
    with handles.installed():
        travel(numbers(5))
        assert not calls
        travel(np.arange(5))
        assert len(calls) == 1
    assert reducers[np.ndarray] is reduce


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickle_copies_or_refuses(protocol: int) -> None:
    ours, other = numbers(50), np.arange(50.0)
    with handles.installed():
        assert pickle.loads(pickle.dumps(ours, protocol)).tolist() == ours.tolist()
    plain = pickle.dumps(other, protocol)
    with handles.installed(plain="refuse"):
        if protocol < 5:
            with pytest.raises(TypeError, match="refuse"):
                pickle.dumps([ours], protocol)
        assert pickle.loads(pickle.dumps([other, other], protocol))[1].tolist() == other.tolist()
        assert pickle.loads(pickle.dumps(ours.copy(), protocol)).tolist() == ours.tolist()
        assert children.inode_at(travel(ours)) == children.inode_at(ours)
    assert np.ndarray not in copyreg.dispatch_table
    assert pickle.dumps(other, protocol) == plain


def test_out_of_band_stays_out_of_band_where_plain_pickle_refuses() -> None:
    for array in (numbers(50), np.arange(50)):
        with handles.installed(plain="refuse"):
            buffers: list[pickle.PickleBuffer] = []
            short = pickle.dumps(array, 5, buffer_callback=buffers.append)
        assert len(buffers) == 1
        got = pickle.loads(short, buffers=buffers)
        assert np.shares_memory(got, array)


@pytest.mark.parametrize("wrong", [{"plain": "perhaps"}, {"access": "all"}])
def test_settings_that_are_none(wrong: Any) -> None:
    with pytest.raises(ValueError):
        handles.install(**wrong)
    assert np.ndarray not in ForkingPickler._extra_reducers  # type: ignore[attr-defined]


# -- a program, two lines changed ------------------------------------------------------------------

PROGRAM = """
import sys
from multiprocessing import get_context
import numpy as np

def brightness(frame):
    return float(frame.mean())

if __name__ == "__main__":
    frames = [np.empty((90, 160, 3), "u1") for _ in range(8)]
    for number, frame in enumerate(frames):
        frame[:] = number
    with get_context(sys.argv[1]).Pool(2) as pool:
        print(pool.map(brightness, frames))
"""
CHANGES = {
    "import numpy as np\n": "import numpy as np, memdesc as md; "
    "md.interop.multiprocessing.install()\n",
    "np.empty": "md.empty",
}


@pytest.mark.slow
def test_a_program_with_two_lines_changed(tmp_path: Path) -> None:
    changed = PROGRAM
    for old, new in CHANGES.items():
        assert changed.count(old) == 1
        changed = changed.replace(old, new)
    lines = zip(PROGRAM.splitlines(), changed.splitlines(), strict=True)
    assert sum(old != new for old, new in lines) == 2
    program = tmp_path / "program.py"
    # A fork server imports the program, which installs there, too.
    for text, method in ((PROGRAM, "fork"), (changed, "forkserver")):
        program.write_text(text)
        done = subprocess.run(
            [sys.executable, program, method],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{[float(number) for number in range(8)]}\n"
