"""The table of `memdesc.queues.layout` says what the code does."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

import pytest

import memdesc as md
from memdesc import _core
from memdesc.queues import layout
from memdesc.vm.pages import page_size

TYPES = {"u64": "=Q", "u32": "=I"}


def table() -> dict[str, tuple[int, str, str]]:
    """The rows of the docstring: name -> (offset, type, page)."""
    rows = re.findall(
        r"^\| (both|1st) +\| (\d+) +\| (\w+) +\| (u\d+)  \|", layout.__doc__ or "", re.M
    )
    return {name: (int(offset), kind, page) for page, offset, name, kind in rows}


def field(memory: md.MemoryDescriptor, page: int, name: str) -> int:
    offset, kind, _ = table()[name]
    form = TYPES[kind]
    raw = memory.read_bytes(page * page_size + offset, struct.calcsize(form))
    return int(struct.unpack(form, raw)[0])


def test_the_offsets_are_those_of_the_core() -> None:
    assert {name: offset for name, (offset, _, _) in table().items()} == _core.RING_OFFSETS


def test_the_fields_do_not_overlap_and_fill_one_line() -> None:
    end = 0
    for offset, kind, _ in sorted(table().values()):
        assert offset == end
        end += struct.calcsize(TYPES[kind])
    assert end <= 64


@pytest.fixture
def memory() -> Iterator[md.BufferMemoryDescriptor]:
    with md.create_data_queue(page_size) as memory:
        yield memory


def test_what_each_field_says(memory: md.BufferMemoryDescriptor) -> None:
    producer, consumer = md.Producer(memory), md.Consumer(memory)
    assert field(memory, 0, "magic") == _core.RING_MAGIC
    producer.enqueue(b"12345")
    assert (field(memory, 0, "position"), field(memory, 1, "position")) == (16, 0)
    at = layout.CONTROL
    assert struct.unpack("=Q", memory.read_bytes(at, 8)) == (5,)
    assert memory.read_bytes(at + 8, 5) == b"12345"
    consumer.dequeue()
    assert (field(memory, 0, "position"), field(memory, 1, "position")) == (16, 16)
    while not consumer.statistics().sleeps:  # the time may run out before
        assert not consumer.wait(0.01)
    assert field(memory, 1, "wanted") == 17
    assert field(memory, 0, "bell") == 0
    producer.enqueue(b"")
    assert field(memory, 0, "bell") == 1
    producer.enqueue(b"")
    assert field(memory, 0, "bell") == 1
    assert field(memory, 0, "closed") == 0
    producer.close()
    assert (field(memory, 0, "closed"), field(memory, 0, "bell")) == (1, 2)
    assert field(memory, 1, "closed") == 0


def test_an_entry_that_begins_near_the_end_goes_on_at_the_start(
    memory: md.BufferMemoryDescriptor,
) -> None:
    producer, consumer = md.Producer(memory), md.Consumer(memory)
    producer.enqueue(bytes(page_size - 16))
    consumer.dequeue()
    producer.enqueue(b"abcdefghijkl")
    data = memory.read_bytes(layout.CONTROL)
    assert data[-8:] == b"\x0c" + bytes(7)
    assert data[:12] == b"abcdefghijkl"
    assert consumer.peek() == b"abcdefghijkl"


def test_each_side_writes_its_own_lines_alone(memory: md.BufferMemoryDescriptor) -> None:
    producer, consumer = md.Producer(memory), md.Consumer(memory)

    def pages() -> tuple[bytes, bytes, bytes]:
        whole = memory.read_bytes()
        return whole[:page_size], whole[page_size : 2 * page_size], whole[2 * page_size :]

    first, second, data = pages()
    producer.enqueue(b"x" * 1000)
    assert not producer.wait(producer.largest, 0.01)
    assert pages()[1] == second
    assert pages()[0][64:] == first[64:]
    first, second, data = pages()
    consumer.dequeue()
    assert not consumer.wait(0.01)
    consumer.close()
    assert (pages()[0], pages()[2]) == (first, data)
    assert pages()[1][64:] == second[64:]


@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 9, 64])
def test_what_an_entry_takes(memory: md.BufferMemoryDescriptor, nbytes: int) -> None:
    producer, consumer = md.Producer(memory), md.Consumer(memory)
    producer.enqueue(bytes(nbytes))
    assert consumer.used == layout.entry_extent(nbytes)
