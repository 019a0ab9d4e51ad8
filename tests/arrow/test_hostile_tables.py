"""A stranger's bytes: they raise our error or are a valid table, and never end the process."""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Callable

import pytest

pa = pytest.importorskip("pyarrow")

from arrow_tables import of_every_type, stream_of  # noqa: E402
from children import in_child  # noqa: E402

import memdesc as md  # noqa: E402
from memdesc.interop import arrow  # noqa: E402

WORDS = [0, 1, 7, 8, 0x7F, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1]


def frozen(data: bytes) -> md.SnapshotMemoryDescriptor:
    with md.BufferMemoryDescriptor(len(data)) as buffer:
        buffer.write_bytes(0, data)
        return buffer.snapshot()


def i32(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(4, "little") for number in numbers)


def i64(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(8, "little") for number in numbers)


WRONG: dict[str, tuple[Callable[[], pa.Table], bytes, bytes]] = {
    "a text ends out of range": (lambda: pa.table({"s": ["a", "bc"]}), i32(1, 3), i32(1, 1 << 30)),
    "a text begins behind its end": (
        lambda: pa.table({"s": ["a", "bc", "d"]}),
        i32(1, 3, 4),
        i32(3, 1, 4),
    ),
    "a text is not UTF-8": (lambda: pa.table({"s": ["wört"]}), "ö".encode(), b"\xff\xfe"),
    "a list reaches out of range": (
        lambda: pa.table({"l": pa.array([[1], [2, 3]], pa.list_(pa.int64()))}),
        i32(1, 3),
        i32(1, 999),
    ),
    "an index of no word": (
        lambda: pa.table({"d": pa.DictionaryArray.from_arrays([0, 77], list("ab" * 40))}),
        i64(77),
        i64(78000),
    ),
    "a run ends out of range": (
        lambda: pa.table({"r": pa.RunEndEncodedArray.from_arrays([30000, 50000], ["x", "y"])}),
        i64(30000, 50000),
        i64(50000, 30000),
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_hold_together_is_refused(what: str) -> None:
    make, right, wrong = WRONG[what]
    data = stream_of(make())
    assert data.count(right) == 1
    arrow.table(frozen(data))
    with pytest.raises(md.InvalidArgument) as no:
        arrow.table(frozen(data.replace(right, wrong)))
    assert no.value.errno == errno.EBADMSG
    assert isinstance(no.value.__cause__, pa.ArrowInvalid)


def test_every_beginning_of_a_stream_is_refused_or_a_shorter_table() -> None:
    table = pa.concat_tables([pa.table({"n": [1, 2]}), pa.table({"n": [3]})])
    data = stream_of(table)
    rows = Counter()
    for length in range(1, len(data)):
        try:
            rows[arrow.table(frozen(data[:length])).num_rows] += 1
        except md.InvalidArgument as error:
            assert error.errno == errno.EBADMSG
            rows["refused"] += 1
    assert set(rows) == {"refused", 0, 2, 3}  # a stream may end between two of its messages
    for other in (b"ARROW1\0\0", b"ARROW1\0\0" * 9, b"\xff" * 64, b"\0" * 4096, b"PAR1" * 9):
        with pytest.raises(md.InvalidArgument):
            arrow.table(frozen(other))


def mutated(data: bytes, choose: random.Random) -> bytes:
    """Change some bits, words or lengths, or the end."""
    out = bytearray(data)
    for _ in range(choose.choice([1, 1, 1, 2, 4])):
        at = choose.randrange(0, len(out) - 8, 4)
        how = choose.randrange(5)
        if how == 0:
            out[at] ^= 1 << choose.randrange(8)
        elif how == 1:
            size = choose.choice([1, 2, 4, 8])
            out[at : at + size] = choose.choice(WORDS).to_bytes(8, "little")[:size]
        elif how == 2:
            number = int.from_bytes(out[at : at + 4], "little") + choose.choice([-8, -1, 1, 8])
            out[at : at + 4] = (number % (1 << 32)).to_bytes(4, "little")
        elif how == 3:
            out[at : at + 16] = out[at // 2 // 4 * 4 :][:16]
        else:
            del out[max(at, 64) :]
    return bytes(out)


def look_at(table: pa.Table) -> None:
    """Use a table as programs do: it crashes where validation let through too much."""
    for number, kind in enumerate(table.schema.types):
        str(kind)
        if table.num_rows > 1 << 16:
            continue
        try:
            column = table.column(number)
            column.to_pylist()
            column.slice(1, 5).to_pylist()
            pa.concat_arrays(column.chunks)
            str(column)
        except (ArithmeticError, LookupError, ValueError, pa.ArrowException):
            pass  # a date of the year 10,000, a type that Python has no name for


def hostile(seed: int, count: int) -> Counter[str]:
    choose = random.Random(seed)
    whole = of_every_type()
    seeds = [stream_of(whole), *(stream_of(whole.select([name])) for name in whole.column_names)]
    seen: Counter[str] = Counter()
    for _ in range(count):
        memory = frozen(mutated(choose.choice(seeds), choose))
        try:
            table = arrow.table(memory)
        except md.InvalidArgument as error:
            seen[errno.errorcode[error.errno or 0]] += 1
            continue
        look_at(table)
        seen["read"] += 1
    return seen


@pytest.mark.slow
def test_mutated_tables_never_end_the_process() -> None:
    seen = in_child(hostile, 1, 1500, timeout=100)
    assert set(seen) >= {"EBADMSG", "read"}
    assert sum(seen.values()) == 1500
