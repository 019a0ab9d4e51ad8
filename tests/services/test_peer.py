"""Mappings that one side makes in the other: create_mapping_in_task over a connection."""

from __future__ import annotations

import errno
import weakref

import pytest
from drivers import driver, reason_of
from puppets import Puppet, Told, memfds_mapped, wait_until

import memdesc as md
from memdesc.services import peer as peers

RW = md.Access.READ_WRITE
RO = md.Access.READ_ONLY
Reason = md.MappingReason
PAGE = md.page_size


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
    with driver(mappings=3) as (client, _):
        made = [buffer.create_mapping_in_task(client.task) for _ in range(2)]
        refusal = (Reason.REFUSED, errno.EDQUOT)
        assert reason_of(lambda: two.create_mapping_in_task(client.task)) == refusal
        made.append(buffer.create_mapping_in_task(client.task))
        assert reason_of(lambda: buffer.create_mapping_in_task(client.task)) == refusal
        made.pop().unmap()
        made.pop().unmap()
        two.create_mapping_in_task(client.task).unmap()
    with driver(mappings=0) as (client, _):
        assert reason_of(lambda: buffer.create_mapping_in_task(client.task)) == refusal
    with md.Service("camera", limits=md.Limits(mappings=1)) as service, Puppet() as one:
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
def test_a_client_that_closed_is_not_connected():
    buffer = md.BufferMemoryDescriptor(PAGE)
    with driver() as (client, one):
        assert reason_of(
            lambda: buffer.create_mapping_in_task(client.task, connection=object())
        ) == (Reason.NOT_CONNECTED, errno.ENOTCONN)
        one.do("c.close()")
        wait_until(lambda: client._service is None)  # all that hung on it is dropped
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
        gone = weakref.ref(connection)
        del connection
        wait_until(lambda: gone() is None)  # the I/O thread may be at it still
        assert reason_of(lambda: buffer.create_mapping_in_task(task))[0] is Reason.NOT_CONNECTED
        task.close()
        assert one.finish() == 0


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
