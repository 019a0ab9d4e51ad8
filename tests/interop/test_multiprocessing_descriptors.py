"""Descriptors that are sent through multiprocessing themselves: as handles, without `install`."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import resource_sharer
from multiprocessing.reduction import ForkingPickler
from typing import Any

import multiprocessing_children as children
import pytest
from children import NOBODY, become, finish, in_child, kill, start
from puppets import count_fds, end_holder, full_table

import memdesc as md
from memdesc.interop import multiprocessing as handles

RW = md.Access.READ_WRITE
RO = md.Access.READ_ONLY
PAGE = md.page_size
METHODS = multiprocessing.get_all_start_methods()
NOTHING = handles.Transit(0, 0, 0)

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def no_holder() -> Iterator[None]:
    """At first nobody keeps anything; at the end nothing is on its way."""
    end_holder()
    yield
    left = handles.in_transit()
    end_holder()
    assert left == NOTHING


def travel(value: Any) -> Any:
    """Send something to this very process."""
    return ForkingPickler.loads(dumped(value))


def dumped(value: Any) -> bytes:
    return bytes(ForkingPickler.dumps(value))


def buffer(nbytes: int = PAGE, fill: bytes = b"sent", **options: Any) -> md.BufferMemoryDescriptor:
    made = md.BufferMemoryDescriptor(nbytes, **{"name": "sent", **options})
    made.write_bytes(0, fill)
    return made


def objects(descriptor: md.MemoryDescriptor) -> list[tuple[int, int]]:
    return [extent.object.identity for extent in descriptor._extents(0, descriptor.length, RO)]


# -- what arrives --------------------------------------------------------------------------------


def test_every_kind_inside_others_and_one_stays_one() -> None:
    whole, shared = buffer(3 * PAGE), buffer(max_access=RW)
    part = md.SubMemoryDescriptor(whole, PAGE + 7, 100)
    several = md.MultiMemoryDescriptor([part, buffer(), buffer(10)])
    frozen = whole.snapshot()
    received = travel(shared)
    given = {"a": [whole, whole, (part, {1: several})], "b": [frozen, received], "c": whole}
    got = travel(given)
    assert got["a"][0] is got["a"][1] is got["c"]
    pairs = [
        (whole, got["c"]),
        (part, got["a"][2][0]),
        (several, got["a"][2][1][1]),
        (frozen, got["b"][0]),
        (received, got["b"][1]),
    ]
    for before, after in pairs:
        assert objects(after) == objects(before)
        assert (after.name, after.length, after.direction, after.max_access) == (
            before.name,
            before.length,
            before.direction,
            before.max_access,
        )
        assert after.read_bytes() == before.read_bytes()
    assert [after.max_access for _, after in pairs] == [RO, RO, RO, RO, RW]
    with pytest.raises(md.SealedError):
        got["c"].write_bytes(0, b"no")
    got["b"][1].write_bytes(0, b"yes")
    assert shared.read_bytes(0, 3) == b"yes"


def test_descriptors_of_a_connection_are_sent_on() -> None:
    with md.Service("sent") as service:
        service.share("frames", buffer(fill=b"shared"))
        with md.connect("sent") as connection:
            got = travel(connection.descriptor("frames"))
    assert (got.read_bytes(0, 6), got.max_access) == (b"shared", RO)


def test_no_resource_sharer_is_started() -> None:
    """It would keep a duplicate of each descriptor for as long as nobody comes."""
    for one in [dumped(buffer()) for _ in range(3)]:
        ForkingPickler.loads(one)
    assert resource_sharer._resource_sharer._listener is None  # type: ignore[attr-defined]


# -- from process to process ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_what_a_killed_sender_sent_arrives(method: str) -> None:
    """The first process sent something, and so keeps what the others send."""
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    queue = context.SimpleQueue()
    with ours, theirs:
        process = context.Process(target=children.send_on_and_die, args=(theirs, queue))
        process.start()
        ours.send(buffer())
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        process.close()
        assert handles.in_transit() == handles.Transit(3, 2, 2 * PAGE)
        first, (second, third) = ours.recv(), queue.get()
    queue.close()
    assert objects(first) == objects(second)
    assert (first.read_bytes(0, 4), third.read_bytes(0, 6)) == (b"sent", b"of his")
    assert handles.in_transit() == NOTHING


def test_what_a_killed_sender_kept_himself_is_lost_and_said() -> None:
    """The first process neither installed nor sent anything."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    with ours, theirs:

        def send() -> None:
            theirs.send(buffer())
            os.kill(os.getpid(), signal.SIGKILL)

        assert finish(start(send)) == -signal.SIGKILL
        with pytest.raises(handles.HandleLostError, match="install") as lost:
            ours.recv()
    assert lost.value.errno == errno.ECONNREFUSED
    assert isinstance(lost.value.__cause__, md.PeerGoneError)
    assert not isinstance(lost.value, OSError)


def test_what_a_killed_receiver_was_to_get_is_told_and_can_be_forgotten() -> None:
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        pid = start(signal.pause)
        ours.send([buffer(), md.MultiMemoryDescriptor([buffer(), buffer(3 * PAGE)])])
        kill(pid)
        fds = count_fds()
        assert handles.in_transit() == handles.Transit(2, 3, 5 * PAGE)
        assert handles.forget_in_transit() == handles.Transit(2, 3, 5 * PAGE)
        assert count_fds() <= fds - 3
        with pytest.raises(handles.HandleLostError) as lost:
            theirs.recv()
    assert lost.value.errno == errno.ENOENT


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_pool_whose_workers_end_gives_descriptors_back(method: str) -> None:
    given = [buffer(fill=bytes([number]) * 4) for number in range(4)]
    handles.install()
    try:
        with multiprocessing.get_context(method).Pool(1, maxtasksperchild=1) as pool:
            got = pool.map_async(children.turned_over, given, chunksize=2).get(60)
            pool.close()
            pool.join()
    finally:
        handles.uninstall()
    for number, (same, made) in enumerate(got):
        assert objects(same) == objects(given[number])
        assert made.read_bytes(0, 4) == bytes([255 - number]) * 4
        assert made.max_access is RO


@pytest.mark.slow
def test_an_executor_both_ways() -> None:
    given = buffer(fill=b"\1\2\3\4")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        same, made = executor.submit(children.turned_over, given).result(60)
    assert objects(same) == objects(given)
    assert made.read_bytes(0, 4) == b"\xfe\xfd\xfc\xfb"


# -- how much may be on its way ------------------------------------------------------------------


def few_descriptors(count: int) -> None:
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        pytest.skip(f"this user may have {hard} file descriptors: see `ulimit -Hn`")
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


@pytest.mark.slow
def test_a_thousand_at_once() -> None:
    def work() -> tuple[int, int]:
        few_descriptors(8192)
        whole = md.BufferMemoryDescriptor(1000 * PAGE)
        parts = [md.SubMemoryDescriptor(whole, number * PAGE, PAGE) for number in range(1000)]
        form = dumped(parts + [buffer() for _ in range(1000)])
        return handles.in_transit().objects, len({id(one) for one in ForkingPickler.loads(form)})

    assert in_child(work) == (1001, 2000)


def test_what_is_on_its_way_leaves_file_descriptors_to_the_program() -> None:
    def work() -> tuple[int, Any, int]:
        few_descriptors(128)
        forms = []
        with pytest.raises(md.MappingError) as no:
            while True:
                forms.append(dumped(buffer()))
        assert (no.value.reason, no.value.errno) == (
            md.MappingReason.TOO_MANY_FILES,
            errno.EMFILE,
        )
        kept = handles.in_transit().objects
        refused = in_child(_errno_of_sending)  # by the way to the holder
        ForkingPickler.loads(forms.pop()).close()
        forms.append(dumped(buffer()))
        return kept, refused, len([ForkingPickler.loads(form).close() for form in forms])

    kept, refused, got = in_child(work)
    assert (kept, refused, got) == (96, errno.EMFILE, 96)


def _errno_of_sending() -> int | None:
    try:
        dumped(buffer())
    except (md.MappingError, md.LimitError) as error:
        assert "96 objects" in str(error)
        return error.errno
    return 0


def test_too_many_descriptors_of_the_user_in_sockets_is_said() -> None:
    def send() -> tuple[Any, Any]:
        few_descriptors(64)
        one, two = socket.socketpair()
        one.setblocking(False)
        with one, two:
            try:
                while True:
                    socket.send_fds(one, [b"x"], [0])
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS:
                    pytest.skip(f"this kernel has no such limit here: {error}")
            with pytest.raises(md.MappingError) as no:
                dumped(buffer())
        return no.value.reason.name, no.value.errno

    def work() -> Any:
        ForkingPickler.loads(dumped(buffer()))  # so the holder is of this user
        return in_child(send)

    seen = in_child(work, before=lambda: become(NOBODY))
    assert seen == ("TOO_MANY_FILES", errno.ETOOMANYREFS)


def test_a_limit_on_bytes_holds_for_all_of_the_family() -> None:
    handles.limit_in_transit(3 * PAGE)
    try:
        two, other = buffer(2 * PAGE), buffer(2 * PAGE)
        forms = [dumped(two), dumped(md.SubMemoryDescriptor(two, 5, 5))]
        with pytest.raises(md.LimitError, match=f"{2 * PAGE:,} bytes.*allows {3 * PAGE:,}") as no:
            dumped(other)
        assert no.value.errno == errno.EDQUOT
        fds = count_fds()
        with pytest.raises(md.LimitError):
            dumped(md.MultiMemoryDescriptor([buffer(), buffer(), two]))
        md.recycler.trim()
        assert count_fds() <= fds
        assert handles.in_transit() == handles.Transit(2, 1, 2 * PAGE)

        def send() -> tuple[int | None, int | None]:
            with pytest.raises(md.LimitError, match=f"{2 * PAGE:,} bytes.*{3 * PAGE:,}") as no:
                dumped(buffer(2 * PAGE))
            return no.value.errno, len(dumped(two)) and 0

        assert in_child(send) == (errno.EDQUOT, 0)
        assert handles.in_transit().handles == 3
        handles.limit_in_transit(None)
        forms.append(dumped(other))
        assert [ForkingPickler.loads(form).length for form in forms] == [2 * PAGE, 5, 2 * PAGE]
        handles.forget_in_transit()
    finally:
        handles.limit_in_transit(None)
    for wrong in (0, -1, 1.5):
        with pytest.raises(md.InvalidArgument):
            handles.limit_in_transit(wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_what_a_pool_can_not_send_is_the_error_of_the_task() -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        handles.limit_in_transit(PAGE)
        try:
            with pytest.raises(md.LimitError):
                pool.apply_async(children.turned_over, (buffer(2 * PAGE),)).get(60)
        finally:
            handles.limit_in_transit(None)
        assert len(pool.apply_async(children.turned_over, (buffer(2 * PAGE),)).get(60)) == 2
        pool.close()
        pool.join()


def test_a_handle_of_several_objects_is_taken_whole_or_not_at_all() -> None:
    one, two = buffer(fill=b"one"), buffer(fill=b"two")
    form = dumped(md.MultiMemoryDescriptor([one, two, md.SubMemoryDescriptor(one, 0, 3)]))
    other = dumped(one)  # so that `one` is given as a duplicate
    with full_table(), pytest.raises(handles.HandleLostError) as lost:
        ForkingPickler.loads(form)
    assert lost.value.errno == errno.EMFILE
    assert handles.in_transit().handles == 2
    got = ForkingPickler.loads(form)
    assert got.read_bytes(PAGE, 3) + got.read_bytes(2 * PAGE, 3) == b"twoone"
    assert ForkingPickler.loads(other).read_bytes(0, 3) == b"one"


# -- what is told --------------------------------------------------------------------------------

PROGRAM = """
import multiprocessing, sys
import memdesc as md
from memdesc.interop.multiprocessing import in_transit

ours, theirs = multiprocessing.Pipe()
for name in ("left", "lost"):
    ours.send(md.BufferMemoryDescriptor(5 * md.page_size, name=name))
if sys.argv[1] == "received":
    theirs.recv(), theirs.recv()
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["left", "received"])
def test_what_nobody_received_is_told_at_the_end(what: str) -> None:
    told = subprocess.run(
        [sys.executable, "-W", "default::ResourceWarning", "-c", PROGRAM, what],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stderr
    if what == "received":
        assert told == ""
    else:
        assert "ResourceWarning" in told
        assert f"2 handle(s) of {10 * PAGE:,} bytes: left, lost\n" in told


def test_debug_lists_what_is_on_its_way_with_who_sent_it() -> None:
    theirs: list[bytes] = []
    with md.debug.tracing():
        form = dumped(buffer())
        pid, form_of_child = in_child(lambda: (os.getpid(), dumped(buffer(2 * PAGE, name="his"))))
        found = {one.name: one for one in md.debug.live() if one.kind == "InTransit"}
        assert {name: one.nbytes for name, one in found.items()} == {
            "sent": PAGE,
            f"his (left by task {pid})": 2 * PAGE,
        }
        assert found["sent"].site.function == "dumped"
        theirs += [form, form_of_child]
        for one in theirs:
            ForkingPickler.loads(one)
        assert not [one for one in md.debug.live() if one.kind == "InTransit"]


def test_a_fork_child_keeps_nothing_of_it() -> None:
    form = dumped(buffer(name="of the parent"))
    here = count_fds()
    there = in_child(lambda: (gc.collect(), handles.in_transit(), count_fds())[1:])
    assert there[0] == NOTHING
    assert there[1] <= here
    assert ForkingPickler.loads(form).name == "of the parent"
