"""Arrays that belong together, in one descriptor; and arrays of any share."""

from __future__ import annotations

import errno
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import memdesc as md
from memdesc.services import arrays as module
from memdesc.services.arrays import ALL, MAGIC, ArrayEntry, Arrays, Catalogue, encode

ENTRY = ArrayEntry("a", "<f8", (2, 3), False, 8, 48)


@contextmanager
def holding(data: bytes) -> Iterator[md.BufferMemoryDescriptor]:
    with md.BufferMemoryDescriptor(len(data), recycle=False) as buffer:
        buffer.write_bytes(0, data)
        yield buffer


def whole(*entries: ArrayEntry, room: int = 64, version: int = 3) -> bytes:
    return np.arange(room / 8).tobytes() + encode(version, entries)


def test_the_layout_is_that_of_the_table() -> None:
    data = whole(ENTRY)
    catalogue = msgspec.msgpack.encode(Catalogue(3, (ENTRY,)))
    assert data[64:] == catalogue + struct.pack("<Q", len(catalogue)) + b"MDARRAYS"
    rows = re.findall(r"^(\w.*?)  +(8|N|as told) ", module.__doc__ or "", re.M)
    assert rows == [
        ("anywhere before", "as told"),
        ("length - 16 - N", "N"),
        ("length - 16", "8"),
        ("length - 8", "8"),
    ]
    with holding(data) as buffer:
        arrays = Arrays(buffer)
        assert (arrays.version, arrays.nbytes, len(arrays)) == (3, 48, 1)
        assert arrays["a"].tolist() == [[1, 2, 3], [4, 5, 6]]
        assert arrays.entry("a") == ENTRY
        with pytest.raises(md.ShareNotFoundError, match="'a'") as no:
            arrays.entry("b")
        assert no.value.errno == errno.ENOENT
        del arrays


WRONG = {
    "no trailer": whole(ENTRY)[:-1],
    "no room for one": b"MDARRAYS",
    "another magic": whole(ENTRY)[:-1] + b"T",
    "longer than the memory": whole(ENTRY)[:-16] + struct.pack("<Q", 1000) + MAGIC,
    "longer than can be": whole(ENTRY)[:-16] + struct.pack("<Q", 2**64 - 1) + MAGIC,
    "shorter than it is": whole(ENTRY)[:-16] + struct.pack("<Q", 3) + MAGIC,
    "no catalogue": bytes(64) + b"\xc1" + struct.pack("<Q", 1) + MAGIC,
    "another record": bytes(64) + b"\x80" + struct.pack("<Q", 1) + MAGIC,
}


def changed(**fields: Any) -> ArrayEntry:
    return msgspec.structs.replace(ENTRY, **fields)


WRONG_ENTRIES = {
    "behind the end": changed(offset=17),
    "at the end of all numbers": changed(offset=2**63 - 1),
    "a negative offset": changed(offset=-8),
    "into the catalogue": changed(shape=(8,), nbytes=64),
    "more bytes than its shape": changed(nbytes=56),
    "fewer bytes than its shape": changed(nbytes=40),
    "a shape that overflows": changed(shape=(2**62, 2**62), nbytes=0),
    "empty, and too large": changed(shape=(0, 2**62, 2**62), nbytes=0),
    "a negative extent": changed(shape=(-2, -3)),
    "objects": changed(dtype="O"),
    "fields": changed(dtype="i4,i4", shape=(6,)),
    "no dtype": changed(dtype="]["),
    "too many dimensions": changed(shape=(1,) * 33, nbytes=8),
}


def test_a_catalogue_that_can_not_be_is_refused() -> None:
    wrong = WRONG | {what: whole(entry) for what, entry in WRONG_ENTRIES.items()}
    wrong["a name twice"] = whole(ENTRY, ENTRY)
    with md.Service("liar") as service, md.connect("liar") as connection:
        for what, data in wrong.items():
            with holding(data) as buffer:
                service.share(ALL, buffer)
                with pytest.raises(md.ProtocolError) as caught:
                    connection.arrays()
                assert caught.value.errno == errno.EPROTO, what
                del caught
        with holding(whole(ENTRY)) as buffer:
            service.share("others", buffer)
            assert connection.arrays("others")["a"][1, 2] == 6


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_catalogue_is_refused_or_holds(data: st.DataObject) -> None:
    content = bytearray(whole(ENTRY, changed(name="b", dtype="|S1", shape=(), nbytes=1)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(64, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    with md.MemoryDescriptor.with_buffer(content, md.Direction.OUT) as memory:
        try:
            arrays = Arrays(memory)
        except md.ProtocolError:
            return
        for name, array in arrays.items():
            assert array.nbytes == arrays.entry(name).nbytes <= len(content)
            array.tobytes()
        del arrays


def test_an_array_of_any_share() -> None:
    with (
        md.Service("camera") as service,
        holding(bytes(range(48))) as buffer,
        md.connect("camera", reconnect=True) as again,
    ):
        service.share("plain", buffer)
        service.share("rows", buffer, shape=(4, 6), dtype="<u2")
        service.share("columns", buffer, shape=(4, 6), dtype="<u2", order="F")
        for connection in (md.connect("camera"), again):
            assert bytes(connection["plain"]) == bytes(range(48))
            numbers = np.frombuffer(bytes(range(48)), "<u2")
            assert (connection["rows"] == numbers.reshape(4, 6)).all()
            columns = connection["columns"]
            assert (columns == numbers.reshape((4, 6), order="F")).all()
            assert columns.flags.f_contiguous
            with pytest.raises(md.InvalidArgument):
                connection[0]
            with pytest.raises(md.ShareNotFoundError):
                connection.arrays(timeout=0)
        assert [share.column_major for share in again.shares()] == [False, False, True]
        with pytest.raises(md.InvalidArgument):
            service.share("columns", buffer, dtype="u1", order="K")
        with md.Service("camera", take_over=True) as successor:
            assert successor.shares()[2].column_major
            assert again["columns"].flags.f_contiguous
        del columns, connection
