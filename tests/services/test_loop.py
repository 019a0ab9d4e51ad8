"""The I/O thread: its errors, and what it and others hold when a process forks."""

from __future__ import annotations

import errno
import gc
import logging
import os
import subprocess
import sys
import threading
import time
import weakref

import pytest
from children import in_child
from puppets import is_idle, wait_until

import memdesc as md
from memdesc import loop as loops


def test_nothing_starts_at_import(puppet):
    assert puppet("import memdesc.services.service").do("threading.active_count()") == 1


def test_what_a_call_raises_goes_to_who_asked():
    def fail():
        raise KeyError("told")

    with pytest.raises(KeyError):
        loops.loop().run(fail)
    assert loops.loop().run(lambda: None) is None


def test_what_a_handler_raises_is_logged_and_the_thread_goes_on(caplog):
    def fail(kind):
        raise kind("a bug")

    with caplog.at_level(logging.ERROR, "memdesc.services"):
        for kind in (ValueError, SystemExit, KeyboardInterrupt):
            loops.loop().post(lambda kind=kind: fail(kind))
        loops.loop().run(lambda: None)
    assert [record.getMessage() for record in caplog.records] == ["loop.handler_failed"] * 3
    assert all("a bug" in str(record.exc_info[1]) for record in caplog.records)


def test_calls_from_many_threads_all_run():
    seen = []
    io = loops.loop()
    threads = [
        threading.Thread(target=lambda n=n: [io.run(lambda: seen.append(n)) for _ in range(50)])
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(seen) == sorted(list(range(8)) * 50)


def test_a_fork_waits_for_the_handler_that_runs():
    """Whatever lock the handler holds, the child would find it held by nobody."""
    lock = threading.Lock()
    started = threading.Event()

    def handler():
        with lock:
            started.set()
            time.sleep(0.1)

    loops.loop().post(handler)
    assert started.wait(10)
    assert in_child(lambda: lock.acquire(timeout=5)) is True


def test_a_fork_from_the_thread_itself_does_not_wait():
    pids = []

    def handler():
        pid = os.fork()
        if pid == 0:
            os._exit(7)
        pids.append(pid)

    loops.loop().run(handler)
    assert os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == 7


def test_forks_from_many_threads_while_handlers_run():
    io = loops.loop()
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            io.run(lambda: None)

    def fork():
        for _ in range(10):
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)

    threads = [threading.Thread(target=busy)] + [threading.Thread(target=fork) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join(60)
        assert not thread.is_alive()
    stop.set()
    threads[0].join(30)
    io.run(lambda: None)


FORK = """
import ctypes, functools, logging, os, signal
strike = functools.partial(getattr(ctypes.CDLL(None), "raise"), signal.SIGINT)
os.register_at_fork(after_in_parent=strike)  # no Python code: the next one to run is interrupted
import memdesc as md
from memdesc.loop import loop
md.Service("camera")
try:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
except KeyboardInterrupt:
    pass
loop().run(lambda: print("handled", flush=True))
os._exit(0)
"""


@pytest.mark.slow
def test_a_signal_during_a_fork_leaves_the_thread_at_work():
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "handled\n", done.stderr


def test_timers_run_in_their_order_and_not_before():
    io = loops.loop()
    seen = []
    done = threading.Event()
    begun = time.monotonic()

    def begin():
        io.later(0.03, done.set)
        for number, seconds in enumerate([0.02, 0.01, 0.01, 0]):
            io.later(seconds, lambda n=number: seen.append((n, time.monotonic() - begun)))

    io.run(begin)
    assert done.wait(20)
    assert [number for number, _ in seen] == [3, 1, 2, 0]
    assert all(at >= [0.02, 0.01, 0.01, 0][number] for number, at in seen)
    wait_until(lambda: is_idle(io))


def test_a_child_gets_a_thread_of_its_own():
    parents = loops.loop()

    def child():
        own = loops.loop()
        answered = []
        own.run(lambda: answered.append(threading.current_thread().name))
        return own is not parents, answered

    assert in_child(child) == (True, ["memdesc-io"])


def test_what_is_dropped_without_closing_is_closed_by_the_collector():
    service = md.Service("camera")
    service.share("frames", md.BufferMemoryDescriptor(100))
    connection = md.connect("camera")
    mapping = connection.map("frames")
    client = weakref.ref(service.wait_client(5))
    del connection
    gc.collect()
    wait_until(lambda: client() is None)
    assert service.clients() == []
    assert bytes(mapping) == bytes(100)
    mapping.unmap()
    path = service.path
    del service
    gc.collect()
    assert not path.exists()


def test_the_collector_may_run_anywhere(monkeypatch):
    """Finalizers post to the thread, lock-free: also from within a handler or a held lock."""
    with md.Service("camera") as service:
        service.share("frames", md.BufferMemoryDescriptor(100))
        for _ in range(20):
            connection = md.connect("camera")
            cycle = [connection]
            cycle.append(cycle)
            mapping = connection.map("frames")
            with connection._lock, service._lock:
                del connection, cycle, mapping
                gc.collect()
        loops.loop().run(gc.collect)
        wait_until(lambda: service.clients() == [])


def test_a_task_that_the_program_closed_is_watched_all_the_same(puppet):
    with md.Service("camera") as service:
        one = puppet("c = md.connect('camera')")
        client = service.wait_client(20)
        client.task.close()
        one.kill()
        wait_until(lambda: client.closed and service.clients() == [])


def test_without_a_thread_there_is_no_io_and_that_is_said() -> None:
    def work() -> list[int | None]:
        def fails(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        start, found = threading.Thread.start, []
        for _ in range(2):
            threading.Thread.start = fails  # type: ignore[method-assign]
            fds = len(os.listdir("/proc/self/fd"))
            try:
                with pytest.raises(md.AllocationError) as caught:
                    loops.loop()
            finally:
                threading.Thread.start = start  # type: ignore[method-assign]
            assert len(os.listdir("/proc/self/fd")) <= fds
            found.append(caught.value.errno)
        loops.loop().run(lambda: found.append(0))
        return found

    assert in_child(work) == [errno.EAGAIN, errno.EAGAIN, 0]
