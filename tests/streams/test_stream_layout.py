"""The tables in the layout module's head are what the code does."""

from __future__ import annotations

import re
import struct

import pytest
from stream_tools import ALL, publish, subscribe

from memdesc import _core
from memdesc.streams import Stream, layout
from memdesc.vm.pages import page_size

ROW = re.compile(r"^\| (\d+) +\| (u32|u64)(?:\[slots\])? +\| (\w+) +\| (\w+)", re.M)


def tables() -> tuple[dict[str, int], dict[str, tuple[int, str, str]]]:
    assert layout.__doc__ is not None
    pool, line = layout.__doc__.split("The line, between")
    header = {name: int(offset) for offset, _, name, _ in ROW.findall(pool)}
    return header, {
        name: (int(offset), kind, writer) for offset, kind, name, writer in ROW.findall(line)
    }


def test_the_offsets_are_those_of_the_core() -> None:
    header, line = tables()
    assert header == {"sequence": 0, "timestamp": 8, "nbytes": 16, "metadata": 24}
    assert {name: offset for name, (offset, _, _) in line.items()} == _core.OFFERS_OFFSETS
    assert len(line) == 10


def test_a_history_as_the_table_says() -> None:
    _, table = tables()
    with Stream(nbytes=10, slots=8, policies=ALL) as stream:
        seat = stream.admit("block", depth=3)
        memory, pool = seat.memory, stream.memory

        def field(name: str) -> int:
            offset, kind, _ = table[name]
            form = "=Q" if kind == "u64" else "=I"
            return int(struct.unpack(form, memory.read_bytes(offset, struct.calcsize(form)))[0])

        def words(at: int, count: int) -> tuple[int, ...]:
            return struct.unpack(f"={count}Q", memory.read_bytes(at, 8 * count))

        cells = layout.StreamForm(8, 10).line_bytes(0)
        assert field("magic") == _core.OFFERS_MAGIC
        subscription = subscribe(stream, seat)
        publish(stream, 1, 2)
        assert (field("written"), field("read")) == (2, 0)
        assert words(cells, 4) == (1, 0, 2, 1)
        header = struct.unpack("=4Q", pool.read_bytes(layout.HEADER, 32))
        assert (header[0], header[2], header[3]) == (2, 10, 1)
        assert pool.read_bytes(layout.HEADER + 32, 1) == b"\2"  # as MessagePack has it
        assert pool.read_bytes(2 * page_size + page_size, 10) == b"\2" * 10
        assert layout.StreamForm(8, 10).pool_bytes == pool.length == 10 * page_size
        slot = subscription.take()
        assert (field("read"), words(192, 8)) == (1, (0,) * 8)
        slot.release()
        assert words(192, 8) == (1, 0, 0, 0, 0, 0, 0, 0)
        subscription.take()
        while field("subscriber_wanted") == 0:  # the time may be over before it sleeps
            assert not subscription.wait(0.01)
        assert (field("subscriber_wanted"), field("bell")) == (3, 0)
        publish(stream, 3)
        assert field("bell") == 1
        publish(stream, 4, 5)
        assert field("bell") == 1
        while field("wanted") == 0:
            with pytest.raises(TimeoutError):
                stream.loan(0.01)
        assert (field("wanted"), field("subscriber_bell")) == (3, 0)
        subscription.take()
        assert field("subscriber_bell") == 1
        assert field("subscriber_ended") == 0
        subscription.close()
        assert (field("subscriber_ended"), field("subscriber_bell")) == (1, 2)
        other = stream.admit("drop_oldest", latest=False)
        table_of_other = other.memory
        stream.close()
        with pytest.raises(ValueError, match="closed"):
            table_of_other.read_bytes(0, 1)


def test_subscribers_write_their_own_fields_alone() -> None:
    _, table = tables()
    with Stream(nbytes=10, slots=8, policies=ALL) as stream:
        seat = stream.admit()
        subscription = subscribe(stream, seat)
        publish(stream, 1, 2)
        before = seat.memory.read_bytes()
        with subscription.take():
            pass
        subscription.take().release()
        assert not subscription.wait(0.01)
        subscription.close()
        after = seat.memory.read_bytes()
        changed = {at for at in range(len(before)) if before[at] != after[at]}
        allowed = {
            at
            for offset, _, writer in table.values()
            for at in range(offset, offset + 8)
            if writer in ("subscriber", "both")
        } | set(range(192, 192 + 64))
        assert changed <= allowed
