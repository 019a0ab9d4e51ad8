"""A service that takes the name of another while it lives: no connect fails, nothing is lost."""

from __future__ import annotations

import errno
import os
import socket
import threading

import numpy as np
import pytest
from children import NOBODY, become, in_child
from puppets import Told, count_fds, wait_until
from strangers import Stranger

import memdesc as md
from memdesc.services import folder, protocol, service as service_module, succession, taking_over
from memdesc.services.connection import connect

RW = md.Access.READ_WRITE
RO = md.Access.READ_ONLY
OLD = (
    "frames = md.BufferMemoryDescriptor(24); frames.array((2, 3), '<i4')[:] = 7",
    "both = md.BufferMemoryDescriptor(8, max_access=md.Access.READ_WRITE)",
    "s = md.Service('camera')",
    "s.share('frames', frames, shape=(2, 3), dtype='<i4')",
    "s.share('both', both)",
)

CLOSE = """
assert s.wait_superseded(20)
while s.clients():
    time.sleep(0.002)
s.close()
"""
"""As a program does that is succeeded: its clients are served to their end."""


@pytest.mark.slow
def test_a_name_passes_with_all_that_is_shared(puppet, runtime_dir):
    old = puppet(*OLD, "s.share('ruled', frames, allow=lambda task: True)")
    with md.connect("camera", reconnect=True) as moving, md.connect("camera") as staying:
        kept = moving.map("frames")
        assert not old.do("s.superseded")
        with md.Service("camera", take_over=True) as service:
            assert old.do("s.wait_superseded(20) and s.superseded")
            assert [(s.name, s.writable, s.shape, s.dtype) for s in service.shares()] == [
                ("frames", False, (2, 3), "<i4"),
                ("both", True, None, None),
            ]
            assert {n: d.max_access for n, d in service.inherited.items()} == {
                "frames": RO,
                "both": RW,
                "ruled": RO,
            }
            with md.connect("camera") as fresh:
                assert fresh.task == md.Task.current()
                assert fresh.map("frames").array().tolist() == np.full((2, 3), 7).tolist()
                fresh.map("both").array()[:] = 5
                with pytest.raises(md.ShareNotFoundError):
                    fresh.map("ruled", timeout=0)
            # The old one goes on for those whom it has.
            wait_until(lambda: staying.moved)
            assert staying.task.pid == old.pid
            assert len(staying.shares()) == 3
            assert old.do("both.read_bytes()[0]") == 5
            # Who wants to moves with its next operation.
            assert (moving.generation, moving.shares()) == (1, service.shares())
            assert (moving.generation, moving.task) == (2, md.Task.current())
            wait_until(lambda: old.do("len(s.clients())") == 1)
            old.do("s.close()")
            assert (runtime_dir / "camera").is_socket()  # it is not its name any more
            wait_until(lambda: staying.closed)
            assert bytes(kept)[:4] == b"\x07\x00\x00\x00"
            with md.connect("camera"):
                pass
            old.kill()
            with md.connect("camera"):
                pass
        assert list(runtime_dir.iterdir()) == []


def test_without_a_living_service_it_is_a_new_one(runtime_dir):
    with md.Service("camera", take_over=True) as service, md.connect("camera") as connection:
        assert (service.inherited, connection.shares(), service.superseded) == ({}, [], False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(runtime_dir / "camera"))
    with md.Service("camera", take_over=True), md.connect("camera"):
        pass
    service.wait_superseded(20)  # closed: nothing to wait for


def test_a_fork_child_has_nothing_to_pass_on():
    with md.Service("camera") as service:

        def child():
            service.wait_superseded()  # comes back: here it is closed
            return service.superseded

        assert in_child(child) is False
        with md.Service("camera", take_over=True):
            assert service.wait_superseded(20)
            assert in_child(lambda: service.superseded)


def test_in_one_process_and_again_and_again(runtime_dir):
    services = [md.Service("camera")]
    services[0].share("it", md.BufferMemoryDescriptor(8))
    with md.connect("camera", reconnect=True) as connection:
        for _ in range(5):
            services.append(md.Service("camera", take_over=True))
            wait_until(lambda: connection._current.moved)
            assert [share.name for share in connection.shares()] == ["it"]
            assert [s.superseded for s in services] == [True] * (len(services) - 1) + [False]
        assert connection.generation == 6
        assert len(connection.map("it")) == 8
        for service in services[:-1]:
            service.close()
        assert connection.shares() == services[-1].shares()
    services[-1].close()
    assert list(runtime_dir.iterdir()) == []


@pytest.mark.slow
def test_no_connect_fails_while_the_name_passes_back_and_forth(puppet):
    old, new = puppet(*OLD), puppet()
    stop, failures, seen = threading.Event(), [], set()

    def pour() -> None:
        while not stop.is_set():
            try:
                with md.connect("camera", timeout=20) as connection:
                    seen.add(connection.task.pid)
                    assert connection.map("frames").array().tolist() == [[7] * 3] * 2
            except BaseException as error:  # noqa: BLE001
                failures.append(error)
                return

    threads = [threading.Thread(target=pour) for _ in range(3)]
    for thread in threads:
        thread.start()
    rounds = 0
    while rounds < 4 or len(seen) < 2:
        rounds += 1
        assert rounds < 100
        new.do("s = md.Service('camera', take_over=True)")
        old.do(CLOSE)
        old.do("s = md.Service('camera', take_over=True)")
        new.do(CLOSE)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert seen == {old.pid, new.pid}
    old.do("s.close()")


KILL_SUCCESSOR = """
from memdesc.services import connection
real = connection.Connection.request
def request(self, message, *rest, **options):
    here = type(message).__name__ == {step!r}
    if here and {when!r} == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    answer = real(self, message, *rest, **options)
    if here:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer
connection.Connection.request = request
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", ["TakeOver", "ListShares", "OpenShare", "Took"])
def test_a_successor_that_is_killed_at_any_step(puppet, step, when):
    """The old one serves on; once it has let go, the next can take the name."""
    with md.Service("camera") as old, md.connect("camera", reconnect=True) as moving:
        old.share("it", md.BufferMemoryDescriptor(8))
        before = count_fds()
        killed = puppet(KILL_SUCCESSOR.format(step=step, when=when))
        killed.begin("md.Service('camera', take_over=True)")
        killed.process.wait(30)
        wait_until(lambda: len(old.clients()) == 1 and old._successor is None)
        assert old.superseded is (step == "Took" and when == "after")
        if old.superseded:
            with pytest.raises(md.ServiceNotFoundError):
                md.connect("camera", timeout=0.01)
            wait_until(lambda: moving._current.moved)
            moving._reach = lambda: connect("camera", timeout=0.01)
            assert len(moving.shares()) == 1  # who was succeeded is still there
            assert (moving.generation, moving.moved) == (1, False)
            with md.Service("camera", take_over=True) as third, md.connect("camera") as fresh:
                assert (third.inherited, fresh.shares()) == ({}, [])
        else:
            wait_until(lambda: count_fds() <= before + 2)  # the pipes of the puppet
            with md.connect("camera") as fresh:
                assert len(fresh.shares()) == 1
            with md.Service("camera", take_over=True) as third, md.connect("camera") as fresh:
                assert len(third.inherited) == len(fresh.shares()) == 1
                assert old.superseded


KILL_OLD = """
from memdesc.services import service
real = service.Service.{step}
def step(self, client):
    if {when!r} == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, client)
    os.kill(os.getpid(), signal.SIGKILL)
service.Service.{step} = step
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", ["_hand_over", "_pass_on"])
def test_an_old_one_that_is_killed_at_any_step(puppet, step, when, runtime_dir):
    old = puppet(*OLD, KILL_OLD.format(step=step, when=when))
    md.connect("camera").close()
    before = count_fds()
    with md.Service("camera", take_over=True) as service, md.connect("camera") as connection:
        assert (service.inherited, connection.shares()) == ({}, [])
        old.process.wait(30)
    del service, connection  # they hold tasks
    assert list(runtime_dir.iterdir()) == []
    wait_until(lambda: count_fds() <= before)


@pytest.mark.slow
def test_two_successors_at_once_come_one_after_the_other(puppet):
    with md.Service("camera") as old:
        old.share("it", md.BufferMemoryDescriptor(8))
        many = [puppet() for _ in range(3)]
        for one in many:
            one.begin("s = md.Service('camera', take_over=True)")
        for one in many:
            one.result()
        assert old.superseded
        for one in many[1:]:
            wait_until(lambda: sum(not one.do("s.superseded") for one in many) == 1)
        with md.connect("camera") as connection:
            (last,) = [one for one in many if not one.do("s.superseded")]
            assert connection.task.pid == last.pid
            assert len(connection.map("it")) == 8
        for one in many:
            one.do("s.close()")


@pytest.mark.slow
def test_new_services_that_race_for_a_free_name(puppet):
    """Plain ones: one has it. Those that may take over: all had it, one has it now."""
    many = [puppet() for _ in range(3)]
    for one in many:
        one.begin("s = md.Service('camera')")
    refused = 0
    for one in many:
        try:
            one.result()
        except Told as error:
            assert (error.kind, error.errno) == ("NameInUseError", errno.EADDRINUSE)
            one.do("s = None")
            refused += 1
    assert refused == 2
    for one in many:
        one.do("s and s.close()")
        one.begin("s = md.Service('camera', take_over=True)")
    for one in many:
        one.result()
    with md.connect("camera") as connection:
        assert connection.shares() == []
    wait_until(lambda: sum(not one.do("s.superseded") for one in many) == 1)
    for one in many:
        one.do("s.close()")


def test_who_may_not_take_over(caplog):
    asked = []

    def rule(task):
        asked.append(task.pid)
        if len(asked) == 1:
            raise RuntimeError("a bug")
        return len(asked) > 2

    with md.Service("camera", allow_successor=rule) as old, md.connect("camera") as connection:
        for _ in range(2):
            with pytest.raises(md.AccessDeniedError) as caught:
                md.Service("camera", take_over=True)
            assert caught.value.errno == errno.EACCES
            assert not old.superseded
        with md.Service("camera", take_over=True):
            assert old.superseded
            assert asked == [os.getpid()] * 3
            wait_until(lambda: connection.moved)
    caplog.clear()  # records hold the frames


@pytest.mark.slow
def test_another_user_may_not_whatever_the_rules_say(tmp_path_factory, runtime_dir):
    path = f"{runtime_dir}/camera"
    with md.Service(path, allow=lambda task: True, allow_successor=lambda task: True) as old:

        def child():
            with pytest.raises(md.AccessDeniedError) as caught:
                md.Service(path, take_over=True)
            with connect(path) as connection, pytest.raises(md.AccessDeniedError) as asked:
                connection.request(protocol.TakeOver(77), protocol.HandedOver)
            return caught.value.errno, asked.value.errno

        runtime_dir.chmod(0o711)
        assert in_child(child, before=lambda: become(NOBODY)) == (errno.EPERM, errno.EACCES)
        runtime_dir.chmod(0o700)
        assert not old.superseded


@pytest.mark.slow
def test_a_successor_that_stops_in_the_middle_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(succession, "PATIENCE", 0.05)
    with md.Service("camera") as old, connect("camera") as slow, connect("camera") as other:
        _, fds = slow.request(protocol.TakeOver(slow.next_id()), protocol.HandedOver)
        for one in (slow, other):  # one at a time
            with pytest.raises(md.NameInUseError) as busy:
                one.request(protocol.TakeOver(one.next_id()), protocol.HandedOver)
            assert busy.value.errno == errno.EBUSY
        with md.connect("camera", timeout=20) as connection:  # once the time is over
            assert connection.shares() == []
        with pytest.raises(md.TimedOutError) as late:
            slow.request(protocol.Took(slow.next_id()), protocol.Done)
        assert late.value.errno == errno.ETIMEDOUT
        os.close(fds[0])
        assert not old.superseded
        with pytest.raises(md.TimedOutError):  # who never asked has nothing to take
            other.request(protocol.Took(other.next_id()), protocol.Done)


def test_closing_while_a_successor_is_about_to_take_over(runtime_dir):
    old = md.Service("camera")
    with connect("camera") as slow:
        _, fds = slow.request(protocol.TakeOver(slow.next_id()), protocol.HandedOver)
        waiting = Stranger(old.path)
        old.close()
        os.close(fds[0])  # as a successor does whose connection ends
        assert waiting.is_ended()
        waiting.close()
        assert not old.superseded
    assert list(runtime_dir.iterdir()) == []
    with md.Service("camera", take_over=True), md.connect("camera"):
        pass


def test_who_waited_in_the_socket_comes_again(monkeypatch):
    """What the kernel tells him of the other side is the process that listened then."""
    with md.Service("camera") as old:
        old._loop.run(old._stop)
        early = [Stranger(old.path) for _ in range(3)]
        reached = threading.Event()
        monkeypatch.setattr(md.Connection, "start", _told(md.Connection.start, reached))
        made: list[md.Connection] = []
        thread = threading.Thread(target=lambda: made.append(connect("camera", timeout=30)))
        thread.start()
        assert reached.wait(20)
        service = _taken_over_by_hand(old)
        for one in early:
            assert one.receive()[0] == protocol.Moved()
            assert one.is_ended()
            one.close()
        thread.join(30)
        assert made[0].shares() == service.shares()
        made[0].close()
        service.close()


def _told(original, event):
    def start(self):
        event.set()
        original(self)

    return start


def _taken_over_by_hand(old: md.Service) -> md.Service:
    """Make a service of the socket of another, which can not answer since it takes nobody in."""
    sock = socket.socket(fileno=os.dup(old._listener.sock.fileno()))
    sock.setblocking(False)

    def inherit(name, *, for_all):
        listener = folder.Listener(name, for_all=for_all, inherited=sock)
        old._listener.give_away()
        return taking_over.Inheritance(listener)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service_module, "inherit", inherit)
        return md.Service("camera", take_over=True)


@pytest.mark.parametrize("what", ["none", "two", "a file", "a stream", "not listening"])
def test_an_old_one_that_hands_over_something_else(monkeypatch, what):
    def give(self, client):
        self._successor = client
        if what == "none":
            return []
        if what == "a file":
            return [os.open(os.devnull, os.O_RDONLY)]
        if what == "two":
            return [os.dup(self._listener.sock.fileno()) for _ in range(2)]
        kind = socket.SOCK_STREAM if what == "a stream" else socket.SOCK_SEQPACKET
        return [socket.socket(socket.AF_UNIX, kind).detach()]

    monkeypatch.setattr(succession.Succeeded, "_hand_over", give)
    with md.Service("camera") as old:
        before = count_fds()
        with pytest.raises(md.ProtocolError) as caught:
            md.Service("camera", take_over=True)
        assert caught.value.errno == errno.EPROTO
        del caught
        wait_until(lambda: old.clients() == [] and count_fds() <= before)
        with md.connect("camera"):
            pass


def test_a_full_table_in_the_middle_of_a_drain(monkeypatch):
    """Those who can not even be told are let go, and the service begins all the same."""
    with md.Service("camera") as old:
        old._loop.run(old._stop)
        early = Stranger(old.path)
        real, left = socket.socket.accept, [errno.EMFILE]

        def accept(self):
            if left:
                raise OSError(left.pop(), "accept")
            return real(self)

        monkeypatch.setattr(socket.socket, "accept", accept)
        with _taken_over_by_hand(old), md.connect("camera"):
            assert early.is_ended()
            early.close()
