"""Mapping into a peer that is stopped, busy, full, dying or forking, or whose driver is."""

from __future__ import annotations

import errno
import os
import threading

import pytest
from children import in_child
from drivers import driver, reason_of
from puppets import Told, full_table, memfds_mapped, wait_until

import memdesc as md
from memdesc.errors import TimedOutError

RW = md.Access.READ_WRITE
RO = md.Access.READ_ONLY
Reason = md.MappingReason
PAGE = md.page_size


@pytest.mark.slow
def test_a_stopped_client_does_not_answer_and_keeps_nothing():
    buffer = md.BufferMemoryDescriptor(PAGE, name="late")
    with driver() as (client, one):
        standing = buffer.create_mapping_in_task(client.task)
        one.stop()
        silent = (Reason.NOT_ANSWERING, errno.ETIMEDOUT)
        push = lambda: buffer.create_mapping_in_task(client.task, timeout=0.02)  # noqa: E731
        assert reason_of(push) == silent
        assert reason_of(push) == silent
        assert reason_of(lambda: standing.unmap(timeout=0.02)) == silent
        assert standing.is_mapped
        one.go_on()
        # What it maps late is released; what was to be unmapped is.
        wait_until(lambda: client._late == {})
        wait_until(lambda: memfds_mapped(one.pid, "late") == 0)
        assert client._in_peer == set()
        assert not standing.is_mapped
        with pytest.raises(Told):
            one.do("c.wait_mapping(0)")


@pytest.mark.slow
def test_task_gone_and_peer_gone():
    buffer = md.BufferMemoryDescriptor(PAGE)
    with driver() as (client, one):
        there = buffer.create_mapping_in_task(client.task)
        outcome = []
        one.stop()
        thread = threading.Thread(
            target=lambda: outcome.append(
                reason_of(lambda: buffer.create_mapping_in_task(client.task, timeout=30))
            )
        )
        thread.start()
        wait_until(lambda: client._pending)
        one.kill()
        thread.join(30)
        assert outcome == [(Reason.PEER_GONE, errno.ECONNRESET)]
        assert not there.is_mapped
        there.unmap()
        assert reason_of(lambda: buffer.create_mapping_in_task(client.task)) == (
            Reason.TASK_GONE,
            errno.ESRCH,
        )


@pytest.mark.slow
def test_the_clients_table_is_full():
    """The message arrives without its descriptors; it says so, and the connection goes on."""
    buffer = md.BufferMemoryDescriptor(PAGE)
    with driver() as (client, one):
        one.do(
            "import resource\n"
            "limits = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
            "n = len(os.listdir('/proc/self/fd')) - 1\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (n, limits[1]))"
        )
        full = (Reason.TOO_MANY_FILES, errno.EMFILE)
        for _ in range(3):
            assert reason_of(lambda: buffer.create_mapping_in_task(client.task)) == full
        one.do("resource.setrlimit(resource.RLIMIT_NOFILE, limits)")
        buffer.create_mapping_in_task(client.task).unmap()
        one.do("resource.setrlimit(resource.RLIMIT_NOFILE, (n, limits[1]))")
        client._service.share("it", buffer)
        with pytest.raises(Told) as caught:
            one.do("c.map('it')")
        assert (caught.value.kind, caught.value.reason) == ("MappingError", "TOO_MANY_FILES")
        one.do("resource.setrlimit(resource.RLIMIT_NOFILE, limits)")
        assert one.do("len(c.map('it'))") == PAGE


@pytest.mark.slow
@pytest.mark.parametrize("free", range(5))
def test_the_drivers_table_is_full(free):
    many = md.MultiMemoryDescriptor([md.BufferMemoryDescriptor(PAGE) for _ in range(5)])
    with driver() as (client, one):
        client._service.share("many", many)
        with full_table() as fillers:
            for _ in range(free):
                os.close(fillers.pop())
            full = (Reason.TOO_MANY_FILES, errno.EMFILE)
            assert reason_of(lambda: many.create_mapping_in_task(client.task)) == full
            with pytest.raises(Told) as caught:
                one.do("c.map('many')")
            assert (caught.value.reason, caught.value.errno) == ("TOO_MANY_FILES", errno.EMFILE)
        assert one.do("c.mappings()") == []
        many.create_mapping_in_task(client.task)
        assert one.do("len(c.map('many'))") == 5 * PAGE


@pytest.mark.slow
def test_fork_leaves_mappings_to_the_parent():
    buffer = md.BufferMemoryDescriptor(PAGE, name="forked")
    with driver() as (client, one):
        there = buffer.create_mapping_in_task(client.task)

        def child():
            before = there.is_mapped
            there.unmap()
            try:
                buffer.create_mapping_in_task(client.task)
            except md.MappingError as error:
                return before, error.reason.name

        assert in_child(child) == (False, "NOT_CONNECTED")
        assert there.is_mapped
        assert memfds_mapped(one.pid, "forked") == 1
        one.do(
            "m = c.wait_mapping(5)\npid = os.fork()\nif pid == 0:\n"
            "    try: c.wait_mapping(0)\n"
            "    except md.ClosedError: m.unmap(); os._exit(3)\n"
            "    os._exit(4)\n"
            "code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])"
        )
        assert one.do("[code, m.is_mapped]") == [3, True]
        assert there.is_mapped


@pytest.mark.slow
def test_many_threads_map_into_one_client():
    buffers = [md.BufferMemoryDescriptor(PAGE, name="threads") for _ in range(8)]
    failed = []
    with driver() as (client, one):

        def work(buffer):
            try:
                for _ in range(20):
                    there = buffer.create_mapping_in_task(client.task, timeout=30)
                    there.unmap(timeout=30)
                buffer.create_mapping_in_task(client.task, timeout=30)
            except md.MemdescError as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(buffer,)) for buffer in buffers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
            assert not thread.is_alive()
        assert failed == []
        assert one.do("len(c.mappings())") == 8
        assert memfds_mapped(one.pid, "threads") == 8


@pytest.mark.slow
def test_a_client_that_computes_is_stopped_and_forks_while_it_is_mapped_into():
    """Answered, timed out or refused, as documented; nothing hangs, nothing leaks."""
    buffer = md.BufferMemoryDescriptor(PAGE, name="storm")
    outcomes: dict[str, int] = {}

    def push(count, timeout):
        made = []
        for _ in range(count):
            try:
                made.append(buffer.create_mapping_in_task(client.task, timeout=timeout))
                outcome = "mapped"
            except md.MappingError as error:
                outcome = error.reason.name
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
        return made

    with driver("import numpy as np", "a = np.ones((300, 300)); b = np.random.rand(10**6)") as (
        client,
        one,
    ):
        one.begin("for _ in range(150): a @ a; b.copy().sort()")  # the GIL is free meanwhile
        made = push(250, 30)
        one.result(60)
        assert outcomes == {"mapped": 250}
        one.begin("10 ** 2_000_000 and None")  # holds the GIL throughout
        made += push(250, 0.001)
        one.result(60)
        one.stop()
        made += push(250, 0.001)
        assert outcomes.get("NOT_ANSWERING", 0) > 200
        one.go_on()
        wait_until(lambda: client._late == {})
        one.begin(
            "pids = []\nfor _ in range(20):\n    pid = os.fork()\n"
            "    if pid == 0: os._exit(0)\n    os.waitpid(pid, 0)"
        )
        made += push(250, 30)
        one.result(60)
        assert sum(outcomes.values()) == 1000
        assert set(outcomes) <= {"mapped", "NOT_ANSWERING", "REFUSED"}
        assert not client.closed
        wait_until(lambda: one.do("len(c.mappings())") == len(made))
        assert memfds_mapped(one.pid, "storm") == len(made) == outcomes["mapped"]
        for there in made:
            there.unmap(timeout=30)
        assert memfds_mapped(one.pid, "storm") == 0
        assert one.do("c.mappings()") == []
        fds = one.fds()
        push(1, 30)[0].unmap()
        assert one.fds() <= fds


def test_requests_from_the_io_thread_are_refused():
    """They would wait for themselves: a rule can not ask its client anything."""
    buffer = md.BufferMemoryDescriptor(PAGE)
    caught = []

    def rule(task):
        try:
            connection.shares()
        except md.MemdescError as error:
            caught.append(type(error))
        return True

    with md.Service("camera", allow=rule), md.Service("other") as other:
        other.share("it", buffer)
        connection = md.connect("other")
        with md.connect("camera"):
            pass
        assert caught == [md.MemdescError]
        connection.close()
    with pytest.raises(TimedOutError), md.Service("x") as service:
        service.wait_client(0)
