"""Tables of every type that Arrow has, for the tests."""

from __future__ import annotations

import datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa


def of_every_type(rows: int = 40) -> pa.Table:
    """A table with a column of each layout, nulls in each of them."""
    numbers = range(rows)
    words = [None if n % 5 == 3 else "wört" * (n % 4) for n in numbers]
    lists = [None if n % 7 == 2 else [n] * (n % 4) for n in numbers]
    day = datetime.datetime(2026, 1, 2)
    columns: dict[str, Any] = {
        "null": pa.nulls(rows),
        "bool": pa.array([None if n % 6 == 1 else n % 2 == 0 for n in numbers]),
        "i8": pa.array(numbers, pa.int8()),
        "u64": pa.array(numbers, pa.uint64()),
        "f2": pa.array([float(n) for n in numbers]).cast(pa.float16()),
        "f8": pa.array([None if n % 9 == 4 else n / 2 for n in numbers]),
        "decimal": pa.array([Decimal(n) for n in numbers], pa.decimal128(20, 3)),
        "decimal256": pa.array([Decimal(n) for n in numbers], pa.decimal256(50, 3)),
        "date": pa.array([day.date()] * rows),
        "time": pa.array([day + datetime.timedelta(n) for n in numbers], pa.timestamp("us", "UTC")),
        "interval": pa.array([pa.MonthDayNano([1, n, 2]) for n in numbers]),
        "text": pa.array(words),
        "large_text": pa.array(words, pa.large_string()),
        "binary": pa.array([word and word.encode() for word in words]),
        "text_view": pa.array([w and w * 5 for w in words], pa.string_view()),
        "fixed": pa.array([b"%04d" % n for n in numbers], pa.binary(4)),
        "list": pa.array(lists, pa.list_(pa.int32())),
        "large_list": pa.array(lists, pa.large_list(pa.int32())),
        "list_view": pa.array(lists, pa.list_view(pa.int32())),
        "fixed_list": pa.array([[n, None] for n in numbers], pa.list_(pa.int16(), 2)),
        "struct": pa.array([{"a": n, "b": words[n]} for n in numbers]),
        "map": pa.array([[("k", n)] for n in numbers], pa.map_(pa.string(), pa.int8())),
        "dictionary": pa.array(words).dictionary_encode(),
        "deep": pa.array([[words[n]] for n in numbers], pa.list_(pa.string())).cast(
            pa.list_(pa.dictionary(pa.int8(), pa.string()))
        ),
        "runs": pa.RunEndEncodedArray.from_arrays([rows // 2, rows], ["x", None]),
        "dense": pa.UnionArray.from_dense(
            pa.array([n % 2 for n in numbers], pa.int8()),
            pa.array([n // 2 for n in numbers], pa.int32()),
            [pa.array(range(rows)), pa.array(["u"] * rows)],
        ),
        "sparse": pa.UnionArray.from_sparse(
            pa.array([n % 2 for n in numbers], pa.int8()),
            [pa.array(range(rows)), pa.array(["u"] * rows)],
        ),
    }
    return pa.table(columns, metadata={"made": "by a test"})


def stream_of(table: pa.Table, *, file: bool = False, **options: Any) -> bytes:
    """An IPC stream, or file, of a table, as PyArrow alone writes it."""
    sink = pa.BufferOutputStream()
    make = pa.ipc.new_file if file else pa.ipc.new_stream
    written = pa.ipc.IpcWriteOptions(**options)
    with make(sink, table.schema, options=written) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())
