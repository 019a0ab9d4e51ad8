"""A stranger's few bytes that would take much: they are refused before, and what is honest is not.

Each of these streams is valid to PyArrow, and small.
"""

from __future__ import annotations

import errno
import struct
from typing import Any

import pytest

pa = pytest.importorskip("pyarrow")

from arrow_tables import stream_of  # noqa: E402
from test_hostile_tables import frozen  # noqa: E402

import memdesc as md  # noqa: E402
from memdesc.interop import arrow  # noqa: E402
from memdesc.tables import messages, validating  # noqa: E402
from memdesc.tables.messages import NotArrow, check_stream  # noqa: E402

MIB = 1 << 20


def refused(data: bytes) -> None:
    before = pa.total_allocated_bytes()
    with pytest.raises(md.InvalidArgument) as no:
        arrow.table(frozen(data))
    assert no.value.errno == errno.ENOTSUP
    assert pa.total_allocated_bytes() == before


def refused_by_its_form(data: bytes) -> None:
    refused(data)
    with pytest.raises(NotArrow) as no:  # nor is a file of it served
        check_stream(lambda at, nbytes, _: data[at : at + nbytes], len(data))
    assert no.value.errno == errno.ENOTSUP


@pytest.mark.skipif(not pa.Codec.is_available("zstd"), reason="this PyArrow has no zstd")
def test_a_batch_that_is_compressed_as_arrow_0_17_did_is_refused() -> None:
    packed = struct.pack("<q", 8 * MIB) + pa.compress(bytes(8 * MIB), codec="zstd", asbytes=True)
    batch = pa.record_batch({"n": pa.array(packed, pa.uint8())})
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(metadata_version=pa.ipc.MetadataVersion.V4)
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch, custom_metadata={"ARROW:experimental_compression": "zstd"})
    data = sink.getvalue().to_pybytes()
    found = pa.ipc.open_stream(data).read_all()
    assert found.column(0).chunk(0).buffers()[1].size == 8 * MIB  # what PyArrow makes of it
    refused_by_its_form(data)


def test_what_else_says_so_is_no_reason() -> None:
    """PyArrow believes it of no other version."""
    batch = pa.record_batch({"n": [1, 2]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch, custom_metadata={"ARROW:experimental_compression": "zstd"})
    data = sink.getvalue().to_pybytes()
    check_stream(lambda at, nbytes, _: data[at : at + nbytes], len(data))
    assert arrow.table(frozen(data)).to_pydict() == {"n": [1, 2]}


def overlapping() -> bytes:
    """Two columns of texts, of which the second has the buffers of the first."""
    data = stream_of(pa.table({"a": ["x" * 1000], "b": ["y"]}))
    _, batch = pa.ipc.MessageReader.open_stream(data)
    metadata = bytes(batch.metadata)
    (root,) = struct.unpack_from("<I", metadata)
    header = messages._follow(metadata, messages._field(metadata, root, messages._HEADER))
    at = messages._field(metadata, header, messages._BATCH_BUFFERS)
    at = messages._follow(metadata, at) + 4 + data.index(metadata)
    return data[: at + 48] + data[at:][:48] + data[at + 96 :]


def test_buffers_that_overlap_are_refused() -> None:
    data = overlapping()
    assert pa.ipc.open_stream(data).read_all()["b"][0].as_py() == "x" * 1000
    refused_by_its_form(data)


WORDS = ["word" * 1000, "another"]


def in_pieces(pieces: int) -> Any:
    words = pa.array(WORDS)
    chunks = [pa.DictionaryArray.from_arrays([0, 1, None], words) for _ in range(pieces)]
    return pa.table({"d": pa.chunked_array(chunks)})


def test_a_dictionary_that_pieces_share_is_validated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validating, "_MOST_REPEATED", 0)
    data = stream_of(in_pieces(50))
    table = arrow.table(frozen(data))
    assert table.column("d").to_pylist() == [*WORDS, None] * 50
    wrong = data.replace(b"another", b"anoth\xff\xfe")
    at = data.rindex(struct.pack("<qq", 0, 1))  # the last piece's
    for bad in (wrong, data[:at] + struct.pack("<qq", 0, 2) + data[at + 16 :]):
        with pytest.raises(md.InvalidArgument) as no:
            arrow.table(frozen(bad))
        assert no.value.errno == errno.EBADMSG


def in_lists(pieces: int) -> Any:
    words = pa.DictionaryArray.from_arrays([0, 1], WORDS)
    chunks = [pa.ListArray.from_arrays([0, 2], words) for _ in range(pieces)]
    return pa.table({"l": pa.chunked_array(chunks)})


def views(many: int) -> Any:
    text = b"text" * 1000
    buffers = [None, pa.py_buffer(struct.pack("<i4sii", 4000, b"text", 0, 0) * many)]
    array = pa.Array.from_buffers(pa.string_view(), many, [*buffers, pa.py_buffer(text)])
    return pa.table({"v": pa.StructArray.from_arrays([array], ["v"])})


def dictionary_of_views(many: int) -> Any:
    words = views(many).column("v").chunk(0).field(0)
    return pa.table({"d": pa.DictionaryArray.from_arrays([0], words)})


@pytest.mark.parametrize("make", [in_lists, views, dictionary_of_views])
def test_what_would_be_read_too_often_is_refused(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = stream_of(make(100))
    assert arrow.table(frozen(data)).num_rows  # so much is read in no time
    monkeypatch.setattr(validating, "_MOST_REPEATED", 0)
    assert arrow.table(frozen(stream_of(make(1)))).num_rows
    refused(data)
    assert arrow.table(frozen(data), trusted=True).num_rows
