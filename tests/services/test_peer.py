"""Mappings that one side makes in the other: create_mapping_in_task over a connection."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from children import in_child
from puppets import Puppet, Told, full_table, memfds_mapped, wait_until

import memdesc as md
from memdesc.errors import TimedOutError
from memdesc.services import peer as peers

RW = md.Access.READ_WRITE
RO = md.Access.READ_ONLY
Reason = md.MappingReason
PAGE = md.page_size


@contextmanager
def driver(*lines: str, **options: object) -> Iterator[tuple[md.UserClient, Puppet]]:
    """A service of this process with one client: a puppet, whose connection is `c`."""
    limit = f", mapping_limit={options['mapping_limit']}" if "mapping_limit" in options else ""
    with md.Service("camera") as service, Puppet() as one:
        one.do(f"c = md.connect('camera'{limit})")
        for line in lines:
            one.do(line)
        yield service.wait_client(20), one


def reason_of(call) -> tuple[Reason, int | None]:
    with pytest.raises(md.MappingError) as caught:
        call()
    return caught.value.reason, caught.value.errno


@pytest.mark.slow
def test_the_same_pages_are_mapped_in_the_client():
    buffer = md.BufferMemoryDescriptor(3 * PAGE, name="pushed", max_access=RW)
    buffer.write_bytes(0, b"driver")
    with driver() as (client, one):
        there = buffer.create_mapping_in_task(client.task)
        one.do("m = c.wait_mapping(5)")
        assert one.do("[m.address, m.length, m.access.name, m.task.pid]") == [
            there.address,
            there.length,
            "READ_WRITE",
            client.task.pid,
        ]
        assert there.verified in (True, None)
        assert there.task == client.task
        assert one.do("bytes(m)[:6].decode()") == "driver"
        one.do("memoryview(m)[:6] = b'client'")
        assert buffer.read_bytes(0, 6) == b"client"
        assert buffer.mappings() == [there]
        there.unmap()
        assert not there.is_mapped
        assert memfds_mapped(one.pid, "pushed") == 0
        assert one.do("[m.is_mapped, c.mappings()]") == [False, []]
        there.unmap()


@pytest.mark.slow
def test_every_option():
    buffer = md.BufferMemoryDescriptor(8 * PAGE, name="pushed")
    buffer.array()[:] = 3
    regions = "open('/proc/self/maps').read().splitlines()"
    with driver() as (client, one):
        task = client.task
        part = buffer.create_mapping_in_task(task, offset=PAGE + 5, length=100)
        assert part.address % PAGE == 5
        assert (part.offset, part.length) == (PAGE + 5, 100)
        one.do("m = c.wait_mapping(5)")
        assert one.do("[m.offset, len(m), sum(bytes(m))]") == [PAGE + 5, 100, 300]
        guarded = buffer.create_mapping_in_task(task, guard_pages=2, prefault=True)
        one.do("m = c.wait_mapping(5)")
        guards = one.do(
            f"[l.split()[1] for l in {regions} if ' /memfd' not in l and "
            f"(l.startswith('%x-' % (m.address + len(m))) or "
            f"'-%x ' % m.address in l)]"
        )
        assert guards == ["---p", "---p"]
        resident = one.do(
            "import re\n"
            "text = open('/proc/self/smaps').read()\n"
            "at = text.index('%x-' % m.address)\n"
            "rss = int(re.search(r'Rss: *(\\d+)', text[at:])[1])"
        )
        assert resident is None
        assert one.do("rss") * 1024 == 8 * PAGE
        free = guarded.address
        guarded.unmap()
        fixed = buffer.create_mapping_in_task(task, at_address=free)
        assert fixed.address == free
        with buffer.create_mapping_in_task(task, unique=True, access=RO) as block:
            assert block.access is RO
        wait_until(lambda: memfds_mapped(one.pid, "pushed") == 2)
        for wrong, reason, number in [
            ({"at_address": free}, Reason.ADDRESS_IN_USE, errno.EEXIST),
            ({"at_address": free + 1}, Reason.ADDRESS_UNALIGNED, errno.EINVAL),
            ({"at_address": 1 << 62}, Reason.NO_SPACE, None),
            ({"offset": 8 * PAGE + 1}, Reason.OUT_OF_RANGE, errno.EINVAL),
            ({"length": 0}, Reason.ZERO_LENGTH, errno.EINVAL),
            ({"access": RW}, Reason.ACCESS, errno.EACCES),
            ({"reference": True}, Reason.NO_SUCH_MAPPING, errno.ENOENT),
            (
                {"at_address": free, "guard_pages": 1},
                Reason.GUARDS_NEED_ANYWHERE,
                errno.EINVAL,
            ),
        ]:
            got, code = reason_of(lambda wrong=wrong: buffer.create_mapping_in_task(task, **wrong))
            assert (got, code if number else None) == (reason, number), wrong


@pytest.mark.slow
def test_wait_mapping_takes_them_in_order_and_times_out():
    buffer = md.BufferMemoryDescriptor(PAGE)
    with driver() as (client, one):
        with pytest.raises(Told) as caught:
            one.do("c.wait_mapping(0.01)")
        assert (caught.value.kind, caught.value.errno) == ("TimedOutError", errno.ETIMEDOUT)
        addresses = [buffer.create_mapping_in_task(client.task).address for _ in range(3)]
        assert one.do("[c.wait_mapping(5).address for _ in range(3)]") == addresses
        there = buffer.create_mapping_in_task(client.task)
        there.unmap()  # before its program saw it
        with pytest.raises(Told):
            one.do("c.wait_mapping(0)")
        assert one.do("len(c._unseen)") == 0


@pytest.mark.slow
def test_live_views_in_the_client_refuse_unmap_and_outlive_a_release():
    buffer = md.BufferMemoryDescriptor(PAGE, name="viewed")
    buffer.array()[:] = 5
    with driver() as (client, one):
        there = buffer.create_mapping_in_task(client.task)
        one.do("m = c.wait_mapping(5); v = memoryview(m)")
        with pytest.raises(BufferError):
            there.unmap()
        assert there.is_mapped
        one.do("v.release()")
        there.unmap()
        with buffer.create_mapping_in_task(client.task) as block:
            one.do("m = c.wait_mapping(5); v = memoryview(m)")
        assert not block.is_mapped
        wait_until(lambda: one.do("m.is_mapped") is False)
        assert one.do("bytes(v[:2]) == b'\\x05\\x05'") is True
        one.do("del v, m")
        wait_until(lambda: memfds_mapped(one.pid, "viewed") == 0)


@pytest.mark.slow
def test_the_client_may_end_a_mapping_by_itself():
    buffer = md.BufferMemoryDescriptor(PAGE, name="ended")
    with driver() as (client, one):
        there = buffer.create_mapping_in_task(client.task)
        one.do("m = c.wait_mapping(5); m.unmap()")
        wait_until(lambda: not there.is_mapped)
        assert client._in_peer == set()
        there.unmap()
        assert one.do("c.mappings()") == []


@pytest.mark.slow
def test_a_client_that_ends_mappings_as_fast_as_they_come():
    """Its end may be told before we have seen its beginning: then it is not in the books."""
    buffer = md.BufferMemoryDescriptor(PAGE)
    with driver() as (client, one):
        one.begin("for _ in range(300): c.wait_mapping(20).unmap()")
        made = [buffer.create_mapping_in_task(client.task) for _ in range(300)]
        one.result()
        wait_until(lambda: client._in_peer == set())
        assert not any(there.is_mapped for there in made)
        assert {there.verified for there in made} <= {True, None}


@pytest.mark.slow
def test_both_ways():
    with driver() as (client, one):
        one.do("b = md.BufferMemoryDescriptor(5000, name='clients'); b.array()[:] = 9")
        one.do("t = b.create_mapping_in_task(c.task)")
        mine = client.wait_mapping(5)
        assert bytes(mine) == b"\x09" * 5000
        assert client.mappings() == [mine]
        assert memoryview(mine).readonly
        one.do("b.array()[0] = 1")
        assert bytes(mine)[0] == 1
        view = memoryview(mine)
        with pytest.raises(Told, match="BufferError"):
            one.do("t.unmap()")
        view.release()
        one.do("t.unmap()")
        assert client.mappings() == []


@pytest.mark.slow
def test_limits_refuse():
    buffer = md.BufferMemoryDescriptor(4 * PAGE)
    two = md.MultiMemoryDescriptor([md.BufferMemoryDescriptor(PAGE) for _ in range(2)])
    with driver(mapping_limit=3) as (client, _):
        made = [buffer.create_mapping_in_task(client.task) for _ in range(2)]
        refusal = (Reason.REFUSED, errno.EDQUOT)
        assert reason_of(lambda: two.create_mapping_in_task(client.task)) == refusal
        made.append(buffer.create_mapping_in_task(client.task))
        assert reason_of(lambda: buffer.create_mapping_in_task(client.task)) == refusal
        made.pop().unmap()
        made.pop().unmap()
        two.create_mapping_in_task(client.task).unmap()
    with driver(mapping_limit=0) as (client, _):
        assert reason_of(lambda: buffer.create_mapping_in_task(client.task)) == refusal
    with md.Service("camera", mapping_limit=1) as service, Puppet() as one:
        one.do("c = md.connect('camera')")
        one.do("b = md.BufferMemoryDescriptor(100); t = b.create_mapping_in_task(c.task)")
        with pytest.raises(Told) as caught:
            one.do("b.create_mapping_in_task(c.task)")
        assert caught.value.reason == "REFUSED"
        assert len(service.wait_client(5).mappings()) == 1


@pytest.mark.slow
def test_more_than_the_machine_has_is_refused():
    """A sparse object costs its owner nothing, and could fill an address space."""
    size = 4 * peers._memory_size()  # swap may come and go
    huge = md.BufferMemoryDescriptor(md.round_page(size), lazy=True)
    with driver() as (client, one):
        refusal = (Reason.REFUSED, errno.EDQUOT)
        assert reason_of(lambda: huge.create_mapping_in_task(client.task)) == refusal
        there = huge.create_mapping_in_task(client.task, length=PAGE)
        assert there.is_mapped
        assert one.do("len(c.mappings())") == 1


@pytest.mark.slow
def test_prefault_is_paid_by_the_owner():
    lazy = md.BufferMemoryDescriptor(64 * PAGE, lazy=True, name="lazy")
    with driver() as (client, _):
        lazy.create_mapping_in_task(client.task).unmap()
        assert lazy.page_counts().resident == 0
        there = lazy.create_mapping_in_task(client.task, prefault=True)
        assert lazy.page_counts().resident == 64
        there.unmap()


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
def test_a_client_that_closed_is_not_connected():
    buffer = md.BufferMemoryDescriptor(PAGE)
    with driver() as (client, one):
        assert reason_of(
            lambda: buffer.create_mapping_in_task(client.task, connection=object())
        ) == (Reason.NOT_CONNECTED, errno.ENOTCONN)
        one.do("c.close()")
        wait_until(lambda: client.closed)
        assert reason_of(lambda: buffer.create_mapping_in_task(client.task)) == (
            Reason.NOT_CONNECTED,
            errno.ENOTCONN,
        )


@pytest.mark.slow
def test_several_connections_to_one_task():
    buffer = md.BufferMemoryDescriptor(PAGE)
    with md.Service("camera") as service, Puppet() as one:
        one.do("cs = [md.connect('camera') for _ in range(2)]")
        first, second = (service.wait_client(20) for _ in range(2))
        assert reason_of(lambda: buffer.create_mapping_in_task(first.task)) == (
            Reason.SEVERAL_CONNECTIONS,
            errno.EINVAL,
        )
        for client in (first, second):
            there = buffer.create_mapping_in_task(first.task, connection=client)
            assert client._in_peer == {there._token}
        assert sorted(one.do("[len(c.mappings()) for c in cs]")) == [1, 1]
        one.do("cs.pop().close()")
        wait_until(lambda: len(service.clients()) == 1)
        buffer.create_mapping_in_task(first.task)


@pytest.mark.slow
def test_a_connection_that_is_dropped_is_no_way_any_more():
    """And the books hold neither it nor its task's pidfd (the leak guard looks)."""
    buffer = md.BufferMemoryDescriptor(PAGE)
    with Puppet() as one:
        one.do("s = md.Service('camera')")
        connection = md.connect("camera")
        task = md.Task(one.pid)
        assert buffer.create_mapping_in_task(task).is_mapped
        del connection
        assert reason_of(lambda: buffer.create_mapping_in_task(task))[0] is Reason.NOT_CONNECTED
        task.close()
        assert one.finish() == 0


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
def test_access_and_not_enforced():
    writable = md.BufferMemoryDescriptor(PAGE, max_access=RW)
    readable = md.BufferMemoryDescriptor(PAGE)
    with driver() as (client, one):
        task = client.task
        assert reason_of(lambda: readable.create_mapping_in_task(task, access=RW)) == (
            Reason.ACCESS,
            errno.EACCES,
        )
        assert reason_of(lambda: writable.create_mapping_in_task(task, access=RO))[0] is (
            Reason.NOT_ENFORCED
        )
        there = writable.create_mapping_in_task(task, access=RO, enforced=False)
        assert one.do("memoryview(c.wait_mapping(5)).readonly") is True
        assert there.access is RO
        readable.create_mapping_in_task(task)
        assert one.do("memoryview(c.wait_mapping(5)).readonly") is True


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
        assert one.fds() == fds


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
