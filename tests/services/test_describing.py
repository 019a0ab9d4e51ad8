"""What a service tells those who look after it, and how they ask."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from children import NOBODY, become, in_child
from strangers import Stranger

import memdesc as md
from memdesc.services import describing, protocol
from memdesc.services.describing import Inquiry
from memdesc.services.protocol.describing import Item


def answer_all(inquiry: Inquiry, until: float) -> tuple[protocol.Described, list[Item]]:
    first = answer = inquiry.answer(until)
    items: list[Item] = []
    while inquiry.ask_on(answer, items):
        answer = inquiry.answer(until)
    return first, items


def ask(path: Path, start: int | None = 0) -> tuple[protocol.Described, list[object]]:
    with Inquiry(path) as inquiry:
        inquiry.ask(start)
        first, items = answer_all(inquiry, time.monotonic() + 20)
        return first, list(items)


def refusal(call: Callable[[], object]) -> tuple[type[BaseException], int | None]:
    with pytest.raises(md.MemdescError) as caught:
        call()
    return type(caught.value), caught.value.errno


def test_a_page_takes_no_time_for_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[object] = []
    objects = describing._objects
    monkeypatch.setattr(describing, "_objects", lambda it: [looked.append(it), objects(it)][1])
    with md.Service("full") as service:
        memory = md.BufferMemoryDescriptor(4096)
        for number in range(600):
            service.share(f"share {number}", memory)
        with service.stream("video", nbytes=100):
            _, items = ask(service.path)
            assert len(items) == 601
            told = len(looked)
            assert told < 2 * 601  # each once, and one that began the next page
            assert ask(service.path, 599)[1] == items[599:]
            assert ask(service.path, 600)[1] == items[600:]
            assert ask(service.path, 601)[1] == ask(service.path, 2**63 - 1)[1] == []
            assert len(looked) < told + 10


def test_all_that_a_service_has() -> None:
    with md.Service("camera") as service:
        frames = md.BufferMemoryDescriptor(5000, name="frames")
        service.share("frames", frames, shape=(5, 1000), dtype="u1")
        parts = md.MultiMemoryDescriptor([frames, md.SubMemoryDescriptor(frames, 0, 100)])
        service.share("parts", parts, allow=lambda task: True)
        stream = service.stream("video", nbytes=100)
        samples = service.queue("samples", capacity=4096)
        service.method(os.getpid)
        service.method(_add)
        with (
            md.connect("camera") as client,
            client.subscribe("video") as video,
            client.queue("samples") as queue,
        ):
            assert client.call("_add", 1, 2) == 3
            stream.publish(b"slot")
            video.take(timeout=20).release()
            samples.put(b"entry")
            queue.dequeue(timeout=20)
            told, items = ask(service.path)
    assert (told.service, told.superseded) == ("camera", False)
    assert (told.clients, told.shares, told.queues, told.streams) == (1, 2, 1, 1)
    assert (told.methods, told.calls) == (2, 1)
    assert (told.entries, told.entry_bytes, told.slots, told.slot_bytes) == (1, 5, 1, 4)
    of = {type(one): one for one in reversed(items)}
    share, client_item = of[protocol.ShareItem], of[protocol.ClientItem]
    assert (share.name, share.nbytes, share.writable, share.enforced) == (
        "frames", 5000, False, True,
    )  # fmt: skip
    assert (share.shape, share.dtype, share.ruled) == ((5, 1000), "|u1", False)
    assert share.objects == (frames.memory.identity,)
    assert items[1].objects == share.objects  # each once
    assert items[1].ruled
    assert (client_item.pid, client_item.uid) == (os.getpid(), os.geteuid())
    end = of[protocol.QueueEndItem]
    assert (end.queue, end.pid, end.entries, len(end.objects)) == ("samples", os.getpid(), 1, 1)
    seat = of[protocol.SubscriberItem]
    assert (seat.stream, seat.pid, seat.offered, seat.held) == ("video", os.getpid(), 1, 0)
    assert len({*end.objects, *seat.objects, *share.objects, *of[protocol.StreamItem].objects}) == 4


def _add(left: int, right: int) -> int:
    return left + right


def test_who_asks_is_no_client() -> None:
    called = []
    with md.Service("camera", allow=lambda task: not called.append(task)) as service:
        frames = md.BufferMemoryDescriptor(100)
        service.share("frames", frames)
        with Inquiry(service.path) as inquiry:
            for _ in range(3):
                inquiry.ask()
                assert inquiry.answer(time.monotonic() + 20).clients == 0
            assert inquiry.task is not None
            assert inquiry.task.pid == os.getpid()
            assert (service.clients(), called) == ([], [])
            with pytest.raises(md.TimedOutError):
                service.wait_client(0)
        assert frames.memory.lifecycle.state.name == "PRIVATE"  # nothing was granted for it


def test_a_client_may_ask_too() -> None:
    with md.Service("camera") as service, Stranger(service.path).greet() as one:
        told = one.answer(protocol.Describe(7))
        assert (told.id, told.clients, told.items) == (7, 1, ())


def test_who_asks_and_does_not_read_is_dropped() -> None:
    with md.Service("camera") as service, Stranger(service.path) as one:
        memory = md.BufferMemoryDescriptor(100)
        for number in range(200):
            service.share(f"{number:0100}", memory)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is dropped already
            for _ in range(200):
                one.send(protocol.Describe(1, 0))
        answers = 0
        while not one.is_ended():
            answers += 1
        assert (
            0 < answers < 100
        )  # as many as lie in a socket; of one that does not end there is 200
        assert ask(service.path)[0].shares == 200


def test_many_items_come_in_pages() -> None:
    with md.Service("camera") as service:
        buffer = md.BufferMemoryDescriptor(100)
        names = [f"{number:05}" + "x" * 500 for number in range(1000)]
        for name in names:
            service.share(name, buffer)
        told, items = ask(service.path)
        assert told.more
        assert [one.name for one in items] == names
        assert ask(service.path, None)[1] == []


def test_memory_of_a_stranger_is_not_looked_for() -> None:
    with md.Service("camera") as service, md.BufferMemoryDescriptor(8192) as buffer:
        view = md.MemoryDescriptor.with_address_range(buffer.address, 100, md.Direction.OUT)
        service.share("range", view, access=md.Access.READ_ONLY, enforced=False)
        assert ask(service.path)[1][0].objects == ()


def test_other_users_are_not_told(tmp_path: Path) -> None:
    in_child(become, NOBODY)  # or skip
    with _open_folder() as folder, md.Service(f"{folder}/camera", allow=lambda task: True):
        path = Path(folder) / "camera"

        def look() -> object:
            become(NOBODY)
            return refusal(lambda: ask(path))

        assert in_child(look) == (md.AccessDeniedError, errno.EACCES)
        assert ask(path)[0].clients == 0


@contextmanager
def _open_folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="md-") as folder:
        os.chmod(folder, 0o755)
        yield folder


def test_no_one_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert refusal(lambda: Inquiry(path)) == (md.ServiceNotFoundError, errno.ENOENT)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))
    assert refusal(lambda: Inquiry(path)) == (md.ServiceNotFoundError, errno.ECONNREFUSED)
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(path))
        other.listen()
        assert refusal(lambda: Inquiry(path)) == (md.ProtocolError, errno.EPROTOTYPE)


def test_one_that_never_answers(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen(0)
        with Inquiry(path) as inquiry:
            inquiry.ask()
            assert refusal(lambda: inquiry.answer(time.monotonic())) == (
                md.TimedOutError, errno.ETIMEDOUT,
            )  # fmt: skip
            # Its queue is full: who comes now is not kept waiting either.
            assert refusal(lambda: Inquiry(path)) == (md.TimedOutError, errno.EAGAIN)


def _described(number: int, **fields: object) -> protocol.Described:
    zeros = dict.fromkeys(protocol.Described.__struct_fields__, 0)
    usual = {"id": number, "service": "x", "superseded": False, "items": (), "more": False}
    return protocol.Described(**{**zeros, **usual, **fields})


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"\xc1\xff", (md.ProtocolError, errno.EPROTO)),
        (protocol.Welcome(3, "x"), (md.ProtocolError, errno.EPROTO)),
        (_described(99), (md.ProtocolError, errno.EPROTO)),
        (protocol.Failed(1, "AccessDeniedError", "no", 13), (md.AccessDeniedError, errno.EACCES)),
        (protocol.Failed(0, "AccessDeniedError", "full", 24), (md.AccessDeniedError, errno.EMFILE)),
        (None, (md.PeerGoneError, errno.ECONNRESET)),
    ],
    ids=["rubbish", "another answer", "an answer to another", "refused", "turned away", "gone"],
)
def test_what_is_no_answer(tmp_path: Path, answer: object, expected: tuple[object, int]) -> None:
    path = tmp_path / "x"
    with _answering(path, lambda number: answer), Inquiry(path) as inquiry:
        inquiry.ask()
        assert refusal(lambda: inquiry.answer(time.monotonic() + 20)) == expected


def test_late_answers_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with _answering(path, lambda number: _described(number, calls=number)), Inquiry(path) as one:
        one.ask()  # and its answer is not waited for
        one.ask()
        assert one.answer(time.monotonic() + 20).calls == 2


def test_a_list_without_end_ends(tmp_path: Path) -> None:
    path = tmp_path / "x"
    item = protocol.ShareItem("x", 1, False, True, False)
    endless = _described(0, items=(item,) * 256, more=True)

    def answer(number: int) -> object:
        return msgspec.structs.replace(endless, id=number)

    with _answering(path, answer), Inquiry(path) as inquiry:
        inquiry.ask(0)
        assert refusal(lambda: answer_all(inquiry, time.monotonic() + 60)) == (
            md.ProtocolError, errno.EPROTO,
        )  # fmt: skip


@contextmanager
def _answering(path: Path, answer: Callable[[int], object]) -> Iterator[None]:
    """A service that answers questions so; with None it hangs up."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()
    listener.settimeout(30)

    def serve() -> None:
        with Stranger(sock=listener.accept()[0]) as one:
            try:
                while True:
                    question, _ = one.receive()
                    said = answer(question.id)
                    if said is None:
                        return
                    one.send(said)
            except OSError:  # who asked has let go
                return

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        thread.join(30)
        listener.close()
        assert not thread.is_alive()
