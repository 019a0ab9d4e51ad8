"""Services whose clients die, fork or are many, and services without descriptors or that fork."""

from __future__ import annotations

import errno
import logging
import os

import pytest
from children import in_child
from puppets import Told, count_fds, full_table, memfds_mapped, wait_until

import memdesc as md
from memdesc.services import accepting

RW = md.Access.READ_WRITE
RO = md.Access.READ_ONLY


def refused(error, number):
    assert error.value.errno == number


@pytest.mark.slow
def test_no_descriptor_left_for_a_client(caplog, puppet):
    """The client is turned away, and the next one is served."""
    one = puppet("import socket", "s = [socket.socket(1, 5) for _ in range(3)]")
    with md.Service("camera") as service, caplog.at_level(logging.WARNING, "memdesc.services"):
        first = md.connect("camera")
        with full_table():
            one.do(f"[x.connect({str(service.path)!r}) for x in s] and None")
            one.do("[x.settimeout(20) for x in s] and None")
            assert one.do("[len(x.recv(100)) for x in s]") == [0, 0, 0]
        assert "service.no_descriptors" in {record.getMessage() for record in caplog.records}
        assert first.shares() == []
        first.close()
        with md.connect("camera") as connection:
            assert connection.shares() == []


@pytest.mark.slow
@pytest.mark.parametrize("free", [1, 2, 3])
def test_a_descriptor_too_few_for_a_client(free, puppet, monkeypatch):
    """Enough to accept it, not enough to hold its task: it is let go, and nothing leaks."""
    monkeypatch.setattr(accepting, "RESERVE", 0)
    one = puppet("import socket", "s = socket.socket(1, 5)", "s.settimeout(20)")
    with md.Service("camera") as service:
        before = count_fds()
        with full_table() as fillers:
            for _ in range(free):
                os.close(fillers.pop())
            one.do(f"s.connect({str(service.path)!r})")
            if free < 3:
                assert one.do("len(s.recv(100))") == 0
        one.do("s.close()")
        wait_until(lambda: count_fds() <= before)


def test_no_descriptor_left_for_a_service_or_a_connection():
    connect = md.connect  # which imports it
    with md.Service("camera"):
        for make in (lambda: md.Service("other"), lambda: connect("camera")):
            with full_table(), pytest.raises(md.AllocationError) as caught:
                make()
            refused(caught, errno.EMFILE)
        for free in range(1, 5):
            before = count_fds()
            with full_table() as fillers:
                for _ in range(free):
                    os.close(fillers.pop())
                refusals = (md.AllocationError, md.AccessDeniedError, md.PeerGoneError)
                with pytest.raises(refusals) as caught:
                    md.connect("camera")
                assert caught.value.errno in (errno.EMFILE, errno.ECONNRESET)
                del caught  # it holds the frames, and these the connection
            wait_until(lambda before=before: count_fds() <= before)  # others close some, too
        for free in range(1, 3):
            before = count_fds()
            with full_table() as fillers:
                for _ in range(free):
                    os.close(fillers.pop())
                with pytest.raises(md.AllocationError):
                    md.Service("other")
            wait_until(lambda before=before: count_fds() <= before)


@pytest.mark.slow
def test_many_clients_at_once(puppet):
    frames = md.BufferMemoryDescriptor(1 << 20, name="many")
    frames.array()[:] = 7
    with md.Service("camera") as service:
        service.share("frames", frames)
        before = count_fds()
        puppets = [puppet() for _ in range(6)]
        for one in puppets:
            one.begin(
                "cs = [md.connect('camera') for _ in range(20)]\n"
                "ms = [c.map('frames') for c in cs]\n"
                "total = sum(sum(bytes(m)[:100]) for m in ms)"
            )
        for one in puppets:
            one.result()
            assert one.do("total") == 20 * 700
        wait_until(lambda: len(service.clients()) == 120)
        for one in puppets[:3]:
            one.do("[c.close() for c in cs] and None")
        wait_until(lambda: len(service.clients()) == 60)
        for one in puppets[3:]:
            one.kill()
        wait_until(lambda: service.clients() == [])
        wait_until(lambda: count_fds() <= before + 6 * 2)  # the pipes of puppets


@pytest.mark.slow
def test_the_death_of_a_client_is_seen_at_once_and_its_mappings_are_struck(puppet):
    buffer = md.BufferMemoryDescriptor(8192, name="held")
    with md.Service("camera") as service:
        service.share("it", buffer)
        one = puppet("c = md.connect('camera')", "m = c.map('it')", "v = memoryview(m)")
        client = service.wait_client(20)
        there = buffer.create_mapping_in_task(client.task)
        one.do("own = md.BufferMemoryDescriptor(100); t = own.create_mapping_in_task(c.task) and 1")
        assert len(client.mappings()) == 1
        mine = client.wait_mapping(5)
        assert there.is_mapped
        assert memfds_mapped(one.pid, "held") == 2
        one.kill()
        wait_until(lambda: client.closed)
        assert not there.is_mapped
        wait_until(lambda: (service.clients(), client.mappings()) == ([], []))
        assert bytes(mine) == bytes(100)  # the memory outlives who gave it
        there.unmap()
        with pytest.raises(md.MappingError) as caught:
            buffer.create_mapping_in_task(client.task)
        assert caught.value.reason is md.MappingReason.TASK_GONE
        with pytest.raises(md.PeerGoneError):
            client.wait_mapping(1)
        mine.unmap()


@pytest.mark.slow
def test_the_death_of_a_client_is_seen_though_a_child_holds_its_socket(puppet):
    with md.Service("camera") as service:
        one = puppet("c = md.connect('camera')", "fd = os.dup(c._sock.fileno())")
        client = service.wait_client(20)
        one.do("import subprocess; p = subprocess.Popen(['sleep', '600'], pass_fds=[fd])")
        holder = one.do("p.pid")
        try:
            assert "socket:" in os.readlink(f"/proc/{holder}/fd/{one.do('fd')}")
            one.kill()
            wait_until(lambda: client.closed and service.clients() == [])
        finally:
            os.kill(holder, 9)


@pytest.mark.slow
def test_a_client_that_closes_is_seen_though_a_child_holds_its_socket(puppet):
    with md.Service("camera") as service:
        one = puppet("c = md.connect('camera')", "fd = os.dup(c._sock.fileno())")
        client = service.wait_client(20)
        one.do("c.close()")
        wait_until(lambda: client.closed)
        assert one.do("os.fstat(fd).st_nlink") == 1


@pytest.mark.slow
def test_fork_leaves_the_service_to_the_parent(runtime_dir):
    buffer = md.BufferMemoryDescriptor(8)
    with md.Service("camera") as service, md.connect("camera") as connection:
        service.share("it", buffer)
        client = service.wait_client(5)

        def child():
            errors = []
            for call in (
                lambda: service.share("x", buffer),
                lambda: service.unshare("it"),
                lambda: service.wait_client(0),
                lambda: connection.map("it"),
                lambda: connection.shares(),
                lambda: connection.wait_mapping(0),
                lambda: client.wait_mapping(0),
            ):
                try:
                    call()
                except md.ClosedError as error:
                    errors.append(type(error).__name__)
            service.close()
            connection.close()
            client.close()
            with md.connect("camera") as again:  # on a connection of its own
                errors.append(len(again.map("it")))
            with md.Service("childs") as own, md.connect("childs"):
                errors.append(own.wait_client(5).task.pid == os.getpid())
            return errors, [service.clients(), connection.closed, client.closed]

        errors, state = in_child(child)
        assert errors == ["ClosedError"] * 7 + [8, True]
        assert state == [[], True, True]
        assert not connection.closed
        assert len(connection.map("it")) == 8
        assert [path.name for path in runtime_dir.iterdir()] == ["camera"]


@pytest.mark.slow
def test_a_child_that_exits_normally_takes_nothing_along(puppet, runtime_dir):
    """Its interpreter runs every exit handler and finalizer."""
    one = puppet(
        "s = md.Service('camera')",
        "b = md.BufferMemoryDescriptor(8); s.share('it', b)",
        "c = md.connect('camera')",
    )
    one.do("import multiprocessing as mp; m = mp.get_context('fork')")
    one.do("p = m.Process(target=lambda: None); p.start(); p.join(20)")
    assert one.do("p.exitcode") == 0
    one.do(
        "pid = os.fork()\nif pid == 0:\n    sys = __import__('sys'); sys.stdin = None; "
        "import atexit; atexit._run_exitfuncs(); os._exit(0)\nos.waitpid(pid, 0)"
    )
    assert (runtime_dir / "camera").is_socket()
    assert one.do("len(c.map('it'))") == 8
    with md.connect("camera") as connection:
        assert len(connection.map("it")) == 8
    assert one.finish() == 0


@pytest.mark.slow
def test_the_end_of_a_service_is_seen_though_a_fork_child_lives(puppet):
    one = puppet("s = md.Service('camera')")
    with md.connect("camera") as connection:
        child = one.do("pid = os.fork() or (time.sleep(600) or os._exit(0))")
        child = one.do("pid")
        try:
            one.do("s.close()")
            wait_until(lambda: connection.closed)
            with pytest.raises(md.ServiceNotFoundError):
                md.connect("camera", timeout=0)
        finally:
            os.kill(child, 9)
    with pytest.raises(Told, match="closed"):
        one.do("s.wait_client(0)")
