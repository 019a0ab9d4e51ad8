"""The books of debugging: where what is open was made; errors that name it; what is left over."""

import errno
import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from children import in_child

import memdesc as md
from memdesc import debug
from memdesc.testing.faults import failing
from memdesc.vm import tracing
from memdesc.wiring import wire


@pytest.fixture
def noted() -> Iterator[None]:
    with debug.tracing():
        yield
    assert tracing.books is None


def line() -> int:
    return sys._getframe(1).f_lineno


def names() -> list[tuple[str, str]]:
    return [(one.kind, one.name) for one in debug.live()]


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


def test_what_is_open_is_listed_with_where_it_was_made(noted: None) -> None:
    buffer, at = md.BufferMemoryDescriptor(100, name="frames"), line()
    (one,) = debug.live()
    assert (one.kind, one.name, one.nbytes) == ("BufferMemoryDescriptor", "frames", 100)
    assert (one.site.file, one.site.line) == (__file__, at)
    assert one.site.function == "test_what_is_open_is_listed_with_where_it_was_made"
    assert one.stack[0] == one.site
    assert 1 < len(one.stack) <= 8
    assert (one.thread, one.thing) == ("MainThread", buffer)
    assert one.age >= 0
    buffer.close()
    assert debug.live() == []


def test_it_is_not_kept_alive(noted: None) -> None:
    buffer = md.BufferMemoryDescriptor(100)
    (one,) = debug.live()
    del buffer
    assert one.thing is None
    assert debug.live() == []


def test_memory_that_outlives_its_descriptor_is_listed_until_its_views_go(noted: None) -> None:
    with md.BufferMemoryDescriptor(100, name="frames", recycle=False) as buffer:
        image = buffer.array()
    (one,) = debug.live()
    assert (one.kind, one.name) == ("MappedMemory", "frames")
    assert one.nbytes >= 100
    assert [holder for holder in debug.holders(one) if "`image`" in holder.holder]
    del image
    assert debug.live() == []


def test_a_mapping_that_is_open_is_listed_once(noted: None) -> None:
    buffer = md.BufferMemoryDescriptor(100, name="frames")
    mapping = buffer.map()
    buffer.close()
    del buffer
    assert ("LocalMemoryMap", "frames") in names()
    assert sum(kind == "MappedMemory" for kind, _ in names()) <= 1
    mapping.unmap()
    assert "LocalMemoryMap" not in {kind for kind, _ in names()}


def test_services_connections_streams_files_and_wiring_are_listed(
    noted: None, tmp_path: Path
) -> None:
    path = tmp_path / "clip.raw"
    path.write_bytes(bytes(4096))
    with (
        md.Service("camera") as camera,
        camera.stream("video", nbytes=100),
        md.connect("camera") as client,
        client.subscribe("video"),
        md.dma.DirectFile(path),
    ):
        there = dict(names())
    assert {
        "Service": "camera",
        "Connection": "camera",
        "UserClient": f"task {os.getpid()}",
        "DirectFile": str(path),
    }.items() <= there.items()
    queue = md.create_data_queue(4096, name="orders")
    with md.Producer(queue):
        assert ("Producer", "orders") in names()
    queue.close()
    del queue
    assert any("Stream" in kind for kind in there)
    assert any("Subscription" in kind for kind in there)
    assert {kind for kind, _ in names()} <= {"MappedMemory"}


def test_what_the_io_thread_makes_is_told_with_that_thread(noted: None) -> None:
    with md.Service("camera") as camera, md.connect("camera"):
        camera.wait_client(10)
        (client,) = [one for one in debug.live() if one.kind == "UserClient"]
    assert client.thread == "memdesc-io"
    assert client.site.file.endswith(".py")


def test_unmapping_names_who_holds_the_views(noted: None) -> None:
    mapping = md.BufferMemoryDescriptor(100).map()
    image = mapping.array()
    with pytest.raises(BufferError) as caught:
        mapping.unmap()
    assert "local variable `image`" in notes(caught.value)
    assert "local variable" not in str(caught.value)
    del image, caught
    mapping.unmap()


def test_without_debugging_an_error_has_no_notes() -> None:
    mapping = md.BufferMemoryDescriptor(100).map()
    image = mapping.array()
    with pytest.raises(BufferError) as caught:
        mapping.unmap()
    assert notes(caught.value) == ""
    del image


def test_held_slots_are_named(noted: None) -> None:
    with md.Stream(nbytes=100) as stream:
        seat = stream.admit(loans=1)
        with md.Subscription(stream.memory, seat.memory, stream.form, seat.depth, 1) as video:
            stream.publish(b"1")
            stream.publish(b"2")
            held = video.take()
            with pytest.raises(md.AllocationError) as caught:
                video.take(0)
            assert caught.value.errno == errno.ENOBUFS
            assert "local variable `held`" in notes(caught.value)
            assert f"TakenSlot 'stream', 100 bytes, made at {__file__}" in notes(caught.value)
            held.release()
        loaned = stream.loan()
        with pytest.raises(md.AllocationError) as caught:
            stream.loan(0)
        assert caught.value.errno == errno.ENOBUFS
        assert "local variable `loaned`" in notes(caught.value)
        assert f"LoanedSlot 'stream', 100 bytes, made at {__file__}" in notes(caught.value)
        loaned.discard()


def _slots() -> list[tuple[str, str]]:
    return [(one.kind, one.site.function) for one in debug.live() if one.kind.endswith("Slot")]


def _open(stream: md.Stream, loans: int) -> md.Subscription:
    seat = stream.admit(loans=loans)
    return md.Subscription(stream.memory, seat.memory, stream.form, seat.depth, loans)


def test_slots_are_listed_by_the_line_that_took_them(noted: None) -> None:
    kept: list[Any] = []

    def keeps_views(video: md.Subscription) -> None:
        for slot in video:  # each handle goes back at the next turn; the array keeps its slot
            kept.append(slot.array)
            if len(kept) == 2:
                return

    def keeps_the_handle(video: md.Subscription) -> md.streams.TakenSlot:
        return video.take(0)

    with md.Stream(nbytes=100, name="video") as stream, _open(stream, 3) as video:
        for _ in range(4):
            stream.publish(b"1")
        keeps_views(video)
        slot = keeps_the_handle(video)
        video_2 = [("TakenSlot", keeps_views.__qualname__)] * 2
        assert _slots() == [*video_2, ("TakenSlot", keeps_the_handle.__qualname__)]
        out = io.StringIO()
        debug.report(out)
        assert out.getvalue().count("held: array of shape (1,)") == 2
        assert "held: <TakenSlot 3: 1 bytes>: local variable `slot`" in out.getvalue()
        slot.release()
        kept.clear()
        assert _slots() == []
        again = video.take(0)
        assert _slots() == [("TakenSlot", sys._getframe().f_code.co_qualname)]
        image = again.array
        del again
        assert len(_slots()) == 1
        del image
        assert _slots() == []
        loaned = stream.loan()
        assert [kind for kind, _ in _slots()] == ["LoanedSlot"]
        loaned.discard()
        assert _slots() == []


def test_slots_are_noted_only_while_one_looks() -> None:
    with md.Stream(nbytes=100) as stream, _open(stream, 2) as video:
        stream.publish(b"1")
        stream.publish(b"2")
        before = video.take(0)
        with debug.tracing():
            during = video.take(0)
            assert len(_slots()) == 1
        during.release()
        before.release()
        with debug.tracing():
            assert _slots() == []


def test_slots_that_are_the_parents_are_not_the_childs(noted: None) -> None:
    with md.Stream(nbytes=100) as stream, _open(stream, 1) as video:
        stream.publish(b"1")
        slot, loaned = video.take(0), stream.loan()
        assert in_child(_slots) == []
        assert len(_slots()) == 2
        assert slot.held and loaned.held
        loaned.publish()
        assert not loaned.held
        slot.release()


def test_wiring_past_the_limit_names_what_is_wired(noted: None) -> None:
    with md.BufferMemoryDescriptor(1 << 16) as buffer, wire(buffer.address, 4096) as token:
        with (
            failing("mlock", errno.ENOMEM),
            pytest.raises(md.WiringError) as caught,
        ):
            wire(buffer.address + 8192, 4096)
        assert f"Wire '{token.address:#x}', {token.length:,} bytes" in notes(caught.value)
        assert __file__ in notes(caught.value)


def test_memory_that_is_not_there_names_the_largest_buffers(noted: None) -> None:
    with md.BufferMemoryDescriptor(1 << 16, name="large", recycle=False):
        with pytest.raises(md.AllocationError) as caught:
            md.BufferMemoryDescriptor(1 << 60)
    assert "'large', 65,536 bytes, made at" in notes(caught.value)


def test_a_zone_that_is_exhausted_names_who_took_its_elements(noted: None) -> None:
    zone = md.Zone("headers", element_size=64, capacity=64)
    element = zone.alloc()
    with pytest.raises(md.ZoneExhausted) as caught:
        zone.alloc()
    assert __file__ in caught.value.holders[0].holder
    view = memoryview(element)
    with pytest.raises(BufferError) as busy:
        zone.free(element)
    assert "local variable `view`" in notes(busy.value)
    view.release()
    zone.free(element)


def test_a_limit_of_the_service_names_what_this_task_has_of_it(noted: None) -> None:
    with md.Service("camera", limits=md.Limits(loans=2)) as camera:
        camera.stream("video", nbytes=100)
        with md.connect("camera") as client, client.subscribe("video", loans=2):
            with pytest.raises(md.LimitError) as caught:
                client.subscribe("video", loans=2)
    assert caught.value.errno == errno.EDQUOT
    assert "Subscription 'video'" in notes(caught.value)


def test_nested_it_goes_on_and_off_nothing_is_told() -> None:
    with debug.tracing():
        with debug.tracing():
            assert debug.is_on()
        assert debug.is_on()
    assert not debug.is_on()
    with pytest.raises(md.InvalidArgument):
        debug.live()
    with pytest.raises(md.InvalidArgument):
        debug.start(frames=0)
    debug.stop()


def test_many_threads_may_make_things_meanwhile(noted: None) -> None:
    def make() -> None:
        for _ in range(50):
            md.BufferMemoryDescriptor(1).close()

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert all(one.nbytes for one in debug.live() if one.kind == "BufferMemoryDescriptor")
    assert debug.live() == []


def test_a_fork_child_knows_what_it_inherits(noted: None) -> None:
    with md.BufferMemoryDescriptor(100, name="frames"), md.Service("camera"):

        def look() -> list[tuple[str, str, int]]:
            return [(one.kind, one.name, one.site.line) for one in debug.live()]

        there = in_child(look)
        assert ("BufferMemoryDescriptor", "frames") in {(kind, name) for kind, name, _ in there}
        assert "Service" not in {kind for kind, _, _ in there}  # it is the parent's
        assert "Service" in {kind for kind, _, _ in look()}


PROGRAM = """
import sys
import memdesc as md
frames = md.BufferMemoryDescriptor(100, name="frames")
with md.BufferMemoryDescriptor(200, name="closed"):
    pass
md.debug.report(sys.stdout)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, **environment},
    )


@pytest.mark.slow
def test_a_whole_program_is_watched_by_its_environment() -> None:
    done = run(PROGRAM, MEMDESC_DEBUG="1")
    assert "BufferMemoryDescriptor" in done.stdout
    assert "made at <string>:4 in <module>" in done.stdout
    assert done.stderr.splitlines() == [
        "memdesc.debug: still open at exit: BufferMemoryDescriptor 'frames', 100 bytes, made at "
        "<string>:4 in <module>"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("value", ["", "0"])
def test_off_it_is_not_even_imported(value: str) -> None:
    code = """
import sys, memdesc as md
md.BufferMemoryDescriptor(100).close()
print([name for name in sys.modules if name.startswith("memdesc.debug")])
"""
    done = run(code, MEMDESC_DEBUG=value)
    assert (done.stdout, done.stderr) == ("[]\n", "")
