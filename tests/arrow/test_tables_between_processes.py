"""Tables read by other processes: the same pages, read-only, for as long as anybody reads them."""

from __future__ import annotations

import errno
import os
import pickle
import socket
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest

pa = pytest.importorskip("pyarrow")
pc = pytest.importorskip("pyarrow.compute")

from arrow_tables import of_every_type, stream_of  # noqa: E402
from puppets import Puppet  # noqa: E402

import memdesc as md  # noqa: E402
from memdesc.interop import arrow  # noqa: E402

ROWS = 1 << 18

READER = """
import ctypes, mmap
import pyarrow as pa
import pyarrow.compute as pc
from memdesc.interop import arrow

def region(address):
    "The maps line that an address lies in, and what smaps says of it."
    found = None
    for line in open("/proc/self/smaps"):
        words = line.split()
        if "-" in words[0] and words[0][-1] != ":":
            low, high = (int(one, 16) for one in words[0].split("-"))
            found = {"access": words[1], "inode": words[4]} if low <= address < high else None
        elif found is not None:
            if words[0] == "VmFlags:":
                return found
            found[words[0]] = int(words[1])

def protect(address):
    "Make a page writable, as an attacker would."
    libc = ctypes.CDLL(None, use_errno=True)
    page = address & -mmap.PAGESIZE
    done = libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 3)
    return ctypes.get_errno() if done else 0
"""


def reader() -> Puppet:
    puppet = Puppet()
    puppet.do(READER)
    return puppet


@pytest.fixture
def market() -> Iterator[md.Service]:
    with md.Service("market") as service:
        yield service


def regions_of(name: str) -> set[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if f"/memfd:{name} " in line}


@pytest.mark.slow
def test_two_readers_see_the_same_pages_and_can_not_write_them(market: md.Service) -> None:
    descriptor = arrow.to_descriptor({"n": range(ROWS)}, name="trades")
    market.share("trades", descriptor)
    (inode,) = regions_of("trades")
    with reader() as one, reader() as two:
        for puppet in (one, two):
            puppet.do('memory = md.connect("market")["trades"]')
            puppet.do("before = pa.total_allocated_bytes()")
            puppet.do("table = arrow.table(memory)")
            assert puppet.do("pa.total_allocated_bytes() - before") == 0
            puppet.do('numbers = table.column("n").chunk(0).buffers()[1]')
            assert puppet.do('pc.sum(table.column("n")).as_py()') == sum(range(ROWS))
        for puppet in (one, two):
            seen = puppet.do("region(numbers.address)")
            assert (seen["inode"], seen["access"]) == (inode, "r--s")
            assert seen["Rss:"] * 1024 >= 8 * ROWS
            assert seen["Pss:"] <= seen["Rss:"] / 2 + 4  # each page is counted for both
            assert puppet.do("numbers.is_mutable") is False
            assert puppet.do("protect(numbers.address)") == errno.EACCES
        # A mapping that the owner made in the reader is known to be immutable as well.
        one.do('market = md.connect("market")')
        (client,) = [known for known in market.clients() if known.task.pid == one.pid]
        there = descriptor.create_mapping_in_task(client.task, timeout=30)
        one.do("pushed = market.wait_mapping(timeout=30)")
        assert one.do("arrow.table(pushed).num_rows, pushed.address") == [ROWS, there.address]
        # A reader that is killed takes nothing along.
        one.kill()
        assert two.do('arrow.table(md.connect("market")["trades"]).num_rows') == ROWS
    assert pc.sum(arrow.table(descriptor).column("n")).as_py() == sum(range(ROWS))
    with pytest.raises(md.SealedError):  # nor can its owner write it
        descriptor.write_bytes(0, b"x")


@pytest.mark.slow
@pytest.mark.leaves(
    "socket", reason="the killed service's; whoever next opens the folder sweeps it"
)
def test_readers_read_on_when_the_owner_is_killed() -> None:
    with reader() as owner, reader() as other:
        owner.do('service = md.Service("market")')
        owner.do(f'd = arrow.to_descriptor({{"n": range({ROWS})}}, name="trades")')
        owner.do('service.share("trades", d)')
        other.do('table = arrow.table(md.connect("market")["trades"])')
        owner.kill()
        assert other.do('pc.sum(table.column("n")).as_py()') == sum(range(ROWS))
        # Nobody else has it: with this reader it goes.
        at = 'region(table.column("n").chunk(0).buffers()[1].address)'
        seen = other.do(at)
        assert seen["Pss:"] == seen["Rss:"] > 0
        assert not [name for name in os.listdir("/dev/shm") if "trades" in name]


def test_what_a_hostile_owner_shares_is_refused(market: md.Service) -> None:
    """What it could still change, and what it wrote wrong."""
    wrong = bytearray(stream_of(pa.table({"s": ["one", "two"]})))
    at = wrong.index((3).to_bytes(4, "little") + (6).to_bytes(4, "little"))
    wrong[at : at + 4] = (1 << 30).to_bytes(4, "little")  # the first text ends out of range
    with md.BufferMemoryDescriptor(len(wrong)) as buffer, md.connect("market") as connection:
        buffer.write_bytes(0, wrong)
        market.share("frozen", buffer.snapshot())
        market.share("open", buffer)
        for memory in (connection["open"], connection.descriptor("open")):
            with pytest.raises(md.SealedError) as sealed:
                arrow.table(memory)
            assert sealed.value.errno == errno.EPERM
        for memory in (connection["frozen"], connection.descriptor("frozen")):
            with pytest.raises(md.InvalidArgument) as invalid:
                arrow.table(memory)
            assert invalid.value.errno == errno.EBADMSG


def test_over_a_socket_of_ones_own() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        md.send_descriptor(ours, arrow.to_descriptor(of_every_type()))
        assert arrow.table(md.receive_descriptor(theirs)).equals(of_every_type())


def total(descriptor: md.MemoryDescriptor) -> int:
    return sum(arrow.table(descriptor).column("n").to_pylist())


@pytest.mark.slow
def test_a_descriptor_is_an_argument_of_multiprocessing() -> None:
    descriptor = arrow.to_descriptor({"n": range(1000)})
    with get_context("spawn").Pool(1) as pool:
        assert pool.apply(total, (descriptor,)) == 499_500


def test_a_pickled_table_is_a_copy() -> None:
    descriptor = arrow.to_descriptor({"n": range(1000)})
    buffers: list[pickle.PickleBuffer] = []
    theirs = arrow.table(descriptor)
    small = pickle.dumps(theirs, protocol=5, buffer_callback=buffers.append)
    assert len(small) < 4000
    assert pickle.loads(small, buffers=buffers).equals(theirs)
    assert len(pickle.dumps(theirs)) > 8000


def test_record_batches_through_a_stream(market: md.Service) -> None:
    batch = pa.record_batch({"price": [99.5, 101.0], "symbol": ["A", "B"]})
    stream = market.stream("quotes", nbytes=1 << 16, slots=4)
    connection = md.connect("market")
    quotes = connection.subscribe("quotes")
    with stream.loan() as slot:
        sink = pa.FixedSizeBufferWriter(pa.py_buffer(slot.array))
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write(batch)
        slot.nbytes = sink.tell()
        del sink, writer
    with quotes.take(timeout=30) as slot:
        with pytest.raises(md.SealedError):  # the publisher could still write it
            arrow.table(slot.array)
        table = arrow.table(slot.array, trusted=True)
        low, high = slot.address, slot.address + slot.nbytes
    assert all(low <= one.address < high for one in table.column("price").chunk(0).buffers() if one)
    assert table.to_pydict() == batch.to_pydict()
    assert quotes.statistics().held == 1
    del table, slot
    assert quotes.statistics().held == 0
    quotes.close()
    connection.close()
    stream.close()
