"""Tables in descriptors: what goes in comes out, in place, and the memory lives as long as it."""

from __future__ import annotations

import errno
import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")

from arrow_tables import of_every_type, stream_of  # noqa: E402

import memdesc as md  # noqa: E402
from memdesc.interop import arrow  # noqa: E402
from memdesc.tables import messages  # noqa: E402
from memdesc.testing import failing  # noqa: E402

ROWS = {"price": [99.5, None, 101.0], "symbol": ["A", "B", None]}


def buffers_of(array: pa.Array) -> Iterator[pa.Buffer]:
    """All buffers of an array, its children's and dictionaries' too."""
    yield from (one for one in array.buffers() if one is not None)
    if pa.types.is_dictionary(array.type):
        yield from buffers_of(array.dictionary)


def spans_of(table: pa.Table) -> list[tuple[int, int]]:
    chunks = [chunk for column in table.columns for chunk in column.chunks]
    return [(one.address, one.size) for chunk in chunks for one in buffers_of(chunk) if one.size]


def lies_in(table: pa.Table, address: int, length: int) -> bool:
    spans = spans_of(table)
    assert spans
    return all(address <= at and at + size <= address + length for at, size in spans)


def maps_of(name: str) -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if f"/memfd:{name} " in line]


# -- what goes in comes out ------------------------------------------------------------------------


def test_every_type_comes_back_in_place_and_nothing_is_allocated() -> None:
    ours = of_every_type()
    descriptor = arrow.to_descriptor(ours, name="every")
    assert isinstance(descriptor, md.SnapshotMemoryDescriptor)
    assert (descriptor.copied_bytes, descriptor.reason) == (0, None)
    before = pa.total_allocated_bytes()
    theirs = arrow.table(descriptor)
    assert pa.total_allocated_bytes() == before
    assert theirs.equals(ours, check_metadata=True)
    assert theirs.schema.metadata == {b"made": b"by a test"}
    assert lies_in(theirs, descriptor.address, descriptor.length)
    chunks = [chunk for column in theirs.columns for chunk in column.chunks]
    assert not any(one.is_mutable for chunk in chunks for one in buffers_of(chunk))
    assert all(address % 8 == 0 for address, _ in spans_of(theirs))


class Capsule:
    """A data frame of some other library, as Arrow sees it."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: object = None) -> Any:
        return self._table.__arrow_c_stream__(requested_schema)


@pytest.mark.parametrize(
    "make",
    [
        dict,
        pa.table,
        pa.RecordBatch.from_pydict,
        lambda rows: Capsule(pa.table(rows)),
        lambda rows: pa.table(rows).to_reader(),
    ],
    ids=["dict", "Table", "RecordBatch", "capsule", "reader"],
)
def test_what_is_a_table_to_pyarrow_is_one_here(make: Any) -> None:
    assert arrow.table(arrow.to_descriptor(make(ROWS))).to_pydict() == ROWS


def test_shapes_of_tables() -> None:
    one = pa.table({"d": pa.array(["a", "b"]).dictionary_encode()})
    two = pa.table({"d": pa.array(["c", "a", "d"]).dictionary_encode()})
    for ours in (
        pa.table({}),
        pa.table(ROWS).slice(0, 0),
        pa.table(ROWS).schema.empty_table(),
        pa.table(ROWS).slice(1, 1),
        pa.concat_tables([one, two, one]),  # with other dictionaries in each chunk
        pa.table({"n": pa.chunked_array([[], [1], [2, 3]], pa.int64())}),
    ):
        theirs = arrow.table(arrow.to_descriptor(ours))
        theirs.validate(full=True)
        assert theirs.equals(ours)
    chunked = arrow.table(arrow.to_descriptor(pa.concat_tables([one, two, one])))
    assert chunked.column(0).num_chunks == 3


def test_of_a_slice_only_what_it_shows_is_written() -> None:
    ours = pa.table({"n": range(100_000)})
    assert arrow.to_descriptor(ours.slice(10, 10)).length < 1000


@pytest.mark.parametrize("file", [False, True])
def test_what_others_wrote_is_read_too(file: bool) -> None:
    ours = of_every_type().drop_columns(["dense", "deep"])
    data = stream_of(ours, file=file)
    with md.BufferMemoryDescriptor(len(data)) as buffer:
        buffer.write_bytes(0, data)
        frozen = buffer.snapshot()
    assert arrow.table(frozen).equals(ours)


def test_others_read_what_is_written_here() -> None:
    descriptor = arrow.to_descriptor(ROWS)
    assert pa.ipc.open_stream(descriptor.map()).read_all().to_pydict() == ROWS


def test_options_are_the_buffers() -> None:
    descriptor = arrow.to_descriptor(ROWS, name="named", pages=md.PageKind.BASE)
    assert descriptor.name == "named"
    assert maps_of("named")
    with failing("fallocate", errno.ENOSPC) as fault, pytest.raises(md.AllocationError):
        arrow.to_descriptor(ROWS, name="none")
    assert fault.failures == 1
    assert not maps_of("none")


# -- lifetime --------------------------------------------------------------------------------------


def test_a_column_keeps_the_memory_and_the_last_one_lets_it_go() -> None:
    descriptor = arrow.to_descriptor(ROWS, name="kept")
    column = arrow.table(descriptor).column("symbol").chunk(0)[1:]
    descriptor.close()
    del descriptor
    gc.collect()
    assert column.to_pylist() == ["B", None]
    assert maps_of("kept")
    del column
    gc.collect()
    assert not maps_of("kept")


def test_unmap_refuses_while_a_table_lives() -> None:
    mapping = arrow.to_descriptor(ROWS).map(unique=True)
    numbers = arrow.table(mapping).column("price").chunk(0)
    with pytest.raises(BufferError):
        mapping.unmap()
    assert numbers[2].as_py() == 101.0
    del numbers
    mapping.unmap()


def test_numpy_goes_on_without_a_copy() -> None:
    descriptor = arrow.to_descriptor({"n": np.arange(1000.0)})
    numbers = arrow.table(descriptor).column("n").chunk(0).to_numpy(zero_copy_only=True)
    address = numbers.__array_interface__["data"][0]
    assert descriptor.address <= address < descriptor.address + descriptor.length
    assert not numbers.flags.writeable
    descriptor.close()
    del descriptor
    assert numbers.sum() == 499_500


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [7, object(), {"a": [1], "b": [1, 2]}, {"a": [object()]}, None])
def test_what_is_no_table_is_refused(data: Any) -> None:
    with pytest.raises(md.InvalidArgument) as no:
        arrow.to_descriptor(data)
    assert no.value.errno == errno.EINVAL
    assert no.value.__cause__ is not None


class Other:
    """What is no table, of some other library, with what is known of it."""

    def __init__(self, *methods: str, **known: Any) -> None:
        self.__dict__.update({name: lambda: None for name in methods} | known)


@pytest.mark.parametrize(
    ("data", "instead"),
    [
        (Other("collect", columns=["a"]), ".collect()"),  # a LazyFrame of Polars
        (Other("compute", columns=["a"]), ".compute()"),  # a data frame of Dask
        (Other("to_frame", "__array__"), ".to_frame()"),  # a Series
        (Other(columns=["a", "a"]), "one type"),  # a data frame that can not be converted
        ({"a": [1, "x"]}, "one type"),
        (pa.array([1, 2]), '{"values": it}'),
        (pa.chunked_array([[1]]), '{"values": it}'),
        (np.arange(3), '{"values": it}'),
        (np.zeros((2, 2)), "dict of columns"),
        ([{"a": 1}], "dict of columns"),
        ("trades.arrow", "dict of columns"),
    ],
)
def test_what_is_refused_is_told_what_to_give_instead(data: Any, instead: str) -> None:
    with pytest.raises(md.InvalidArgument) as no:
        arrow.to_descriptor(data)
    assert no.value.errno == errno.EINVAL
    assert instead in str(no.value)
    assert str(no.value.__cause__) in str(no.value)


@pytest.mark.parametrize("library", ["polars", "pandas"])
def test_objects_of_other_libraries(library: str) -> None:
    """Where it is installed."""
    frames = pytest.importorskip(library)
    frame = frames.DataFrame(ROWS)
    assert arrow.table(arrow.to_descriptor(frame)).column_names == list(ROWS)
    column = frame["price"]
    assert arrow.table(arrow.to_descriptor(column.to_frame())).column_names == ["price"]
    others = [(column, ".to_frame()")]
    if hasattr(frame, "lazy"):
        others.append((frame.lazy(), ".collect()"))
    for data, instead in others:
        with pytest.raises(md.InvalidArgument, match=f"{library}.*{instead}") as no:
            arrow.to_descriptor(data)
        assert no.value.errno == errno.EINVAL


@pytest.mark.parametrize(("before", "after"), [(100, 200), (200, 100)])
def test_texts_that_change_meanwhile_are_refused(
    before: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their lengths lie in memory of a program, which another thread of it stores to."""
    ends = np.array([0, before], "i4")
    text = pa.StringArray.from_buffers(1, pa.py_buffer(ends), pa.py_buffer(bytes(1000)))
    written = []

    def write(pa: Any, columns: pa.Table, sink: Any) -> None:
        ends[1] = after if written else before
        written.append(columns)
        real(pa, columns, sink)

    real = arrow._write
    monkeypatch.setattr(arrow, "_write", write)
    with pytest.raises(md.InvalidArgument) as no:
        arrow.to_descriptor({"s": text}, name="changes")
    assert no.value.errno == errno.EAGAIN
    assert len(written) == 2
    del no
    gc.collect()
    md.recycler.trim()
    assert not maps_of("changes")


@pytest.mark.parametrize("max_access", list(md.Access))
def test_memory_that_can_still_change_must_be_asked_for(max_access: md.Access) -> None:
    data = stream_of(pa.table(ROWS))
    buffer = md.BufferMemoryDescriptor(len(data), max_access=max_access)
    buffer.write_bytes(0, data)
    frozen = buffer.snapshot()
    private = bytearray(data)
    for memory in (buffer, buffer.map(), buffer.array(), memoryview(buffer), private, np.zeros(9)):
        with pytest.raises(md.SealedError) as no:
            arrow.table(memory)
        assert no.value.errno == errno.EPERM
    part = md.SubMemoryDescriptor(frozen, 0, frozen.length)
    for memory in (frozen, frozen.map(unique=True), frozen.array(), memoryview(frozen), part, data):
        assert arrow.table(memory).to_pydict() == ROWS
    trusted = arrow.table(buffer, trusted=True)
    assert trusted.column("price").to_pylist() == ROWS["price"]
    at = data.index(np.float64(99.5).tobytes())
    buffer.write_bytes(at, np.float64(7).tobytes())
    assert trusted.column("price")[0].as_py() == 7  # what the refusal is for
    assert arrow.table(frozen).column("price")[0].as_py() == 99.5


def test_a_path_is_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "trades.arrow"
    path.write_bytes(stream_of(pa.table(ROWS)))
    for given in (path, str(path)):
        with pytest.raises(md.InvalidArgument, match=r"files\.load") as no:
            arrow.table(given)
        assert no.value.errno == errno.EINVAL
    assert md.files.load(path).arrays()["trades"].to_pydict() == ROWS  # as it says


def test_bytes_are_immutable_and_checked() -> None:
    class Bytes(bytes):
        """May have a __buffer__ of its own (PEP 688), of whatever memory."""

    data = stream_of(pa.table(ROWS))
    with pytest.raises(md.SealedError):
        arrow.table(Bytes(data))
    wrong = bytearray(data)
    at = wrong.index(b"\1\0\0\0\2\0\0\0\2\0\0\0")  # where the texts end
    wrong[at : at + 4] = (1 << 30).to_bytes(4, "little")
    with pytest.raises(md.InvalidArgument) as no:
        arrow.table(bytes(wrong))
    assert no.value.errno == errno.EBADMSG


def test_a_private_mapping_of_immutable_memory_is_not_immutable() -> None:
    from memdesc.descriptors.homes import lies_immutable
    from memdesc.mapping import Placement, map_extents

    descriptor = arrow.to_descriptor(ROWS)
    extents = descriptor._extents(0, descriptor.length, md.Access.READ_ONLY)
    assert lies_immutable(memoryview(map_extents(extents, md.Access.READ_ONLY)))
    private = map_extents(extents, md.Access.READ_ONLY, Placement(private=True))
    assert not lies_immutable(memoryview(private))


def test_all_parts_must_be_immutable() -> None:
    data = stream_of(pa.table({"n": range(1000)}))
    pieces = [data[: md.page_size], data[md.page_size :]]
    parts = [md.BufferMemoryDescriptor(len(piece)) for piece in pieces]
    for part, piece in zip(parts, pieces, strict=True):
        part.write_bytes(0, piece)
    frozen = [part.snapshot() for part in parts]
    for members in ([frozen[0], parts[1]], [parts[0], frozen[1]]):
        with pytest.raises(md.SealedError):
            arrow.table(md.MultiMemoryDescriptor(members))
    assert arrow.table(md.MultiMemoryDescriptor(frozen)).num_rows == 1000


def test_closed_memory_is_refused() -> None:
    descriptor = arrow.to_descriptor(ROWS)
    mapping = descriptor.map()
    mapping.unmap()
    descriptor.close()
    for memory in (descriptor, mapping):
        with pytest.raises(md.ClosedError):
            arrow.table(memory)
    with pytest.raises(md.InvalidArgument):
        arrow.table(7)  # type: ignore[arg-type]


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
@pytest.mark.parametrize("trusted", [False, True])
def test_what_would_be_unpacked_is_refused_before_it_is(codec: str, trusted: bool) -> None:
    data = stream_of(pa.table({"n": np.zeros(1 << 20)}), compression=codec)
    with md.BufferMemoryDescriptor(len(data)) as buffer:
        buffer.write_bytes(0, data)
        frozen = buffer.snapshot()
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(md.InvalidArgument) as no:
        arrow.table(frozen, trusted=trusted)
    assert no.value.errno == errno.ENOTSUP
    assert pa.default_memory_pool().max_memory() == before


def test_dictionaries_in_pieces_and_the_other_byte_order_are_refused() -> None:
    pieces = [pa.array(words).dictionary_encode() for words in (["a"], ["a", "b"])]
    table = pa.table({"d": pa.chunked_array(pieces)})
    in_pieces = stream_of(table, emit_dictionary_deltas=True)
    assert pa.ipc.open_stream(in_pieces).read_all().equals(table)
    swapped = bytearray(stream_of(pa.table({"n": [1, 2]})))
    reader = pa.ipc.MessageReader.open_stream(bytes(swapped))
    schema = bytes(reader.read_next_message().metadata)
    root = int.from_bytes(schema[:4], "little")
    table_at = messages._follow(schema, messages._field(schema, root, messages._HEADER))
    # The writer leaves out what is the default: let an absent field have the place of another.
    vtable = table_at - int.from_bytes(schema[table_at : table_at + 4], "little", signed=True)
    prefix = bytes(swapped).index(schema)
    fields = int.from_bytes(schema[vtable + 6 : vtable + 8], "little")
    swapped[prefix + vtable + 4 : prefix + vtable + 6] = fields.to_bytes(2, "little")
    for data in (in_pieces, bytes(swapped)):
        with md.BufferMemoryDescriptor(len(data)) as buffer:
            buffer.write_bytes(0, data)
            with pytest.raises(md.InvalidArgument) as no:
                arrow.table(buffer.snapshot())
            assert no.value.errno == errno.ENOTSUP


def test_without_pyarrow_it_says_what_to_install() -> None:
    code = """
import sys
import memdesc as md
from memdesc.interop import arrow
assert "pyarrow" not in sys.modules
sys.modules["pyarrow"] = None
for call in (lambda: arrow.to_descriptor({}), lambda: arrow.table(b"")):
    try:
        call()
    except ModuleNotFoundError as error:
        assert "memdesc[arrow]" in str(error) and error.name == "pyarrow"
    else:
        raise SystemExit("it went on without")
"""
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)
