"""ShareableList: what the documentation promises, of both modules; and where ours is sound."""

import pickle
import secrets
import struct
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from shm_both import Kind, run_python

from memdesc import ProtocolError
from memdesc.interop.shared_memory import ShareableList, SharedMemory

Closing = Callable[[Any], Any]

ITEMS = ["howdy", b"HoWdY", -273.154, 100, None, True, 42]


def test_the_example_of_the_documentation(kind: Kind) -> None:
    a = kind.ShareableList(ITEMS)
    types = [str, bytes, float, int, type(None), bool, int]
    assert [type(entry) for entry in a] == types
    assert a[2] == -273.154
    a[2] = -78.5
    assert a[2] == -78.5
    a[2] = "dry ice"
    assert a[2] == "dry ice"
    with pytest.raises(ValueError, match="exceeds available storage"):
        a[2] = "larger than previously allocated storage space"
    assert a[2] == "dry ice"
    assert len(a) == 7
    assert a.index(42) == 6
    assert a.count(b"howdy") == 0
    assert a.count(b"HoWdY") == 1
    a.shm.close()
    a.shm.unlink()


def test_items_are_read_counted_and_found(kind: Kind, closing: Closing) -> None:
    sl = kind.ShareableList(ITEMS)
    closing(sl)
    assert list(sl) == ITEMS and tuple(sl) == tuple(ITEMS)
    assert sl[-2] is True and sl[-7] == "howdy"
    assert sl.format == "8s8sdqxxxxxx?xxxxxxxx?q"
    assert repr(sl) == f"ShareableList({ITEMS}, name={sl.shm.name!r})"
    for position in (7, 100):
        with pytest.raises(IndexError):
            sl[position]
        with pytest.raises(IndexError):
            sl[position] = 1
    with pytest.raises(ValueError):
        sl.index("100")
    assert sl.index(100) == 3
    sl[3] = 42
    assert sl.count(42) == 2
    with pytest.raises(AttributeError):
        sl.format = "8s"


def test_items_change_their_kind_where_they_have_room(kind: Kind, closing: Closing) -> None:
    sl = kind.ShareableList(ITEMS)
    closing(sl)
    sl[4] = "some"
    assert sl.format == "8s8sdq8sxxxxxxx?q"
    sl[0] = "encodés"  # 8 bytes: just what there is room for
    assert (sl[0], sl[1]) == ("encodés", b"HoWdY")
    for position, value in ((0, "encodées"), (1, b"123456789"), (4, "far too many")):
        with pytest.raises(ValueError, match="exceeds available storage"):
            sl[position] = value
    sl[0] = None
    sl[1] = 2**63 - 1
    sl[2] = -(2**63)
    sl[5] = 1.5
    sl[6] = False
    assert list(sl) == [None, 2**63 - 1, -(2**63), 100, "some", 1.5, False]


def test_a_copy_and_an_empty_one(kind: Kind, closing: Closing) -> None:
    sl = kind.ShareableList(ITEMS)
    closing(sl)
    name = f"memdesc-test-{secrets.token_hex(4)}"
    copy = kind.ShareableList(sl, name=name)
    closing(copy)
    assert copy.shm.name == name and list(copy) == list(sl) and copy.format == sl.format
    copy[-1] = 77
    assert sl[-1] == 42
    empty = kind.ShareableList()
    closing(empty)
    assert (len(empty), empty.format, empty.count("any")) == (0, "", 0)
    with pytest.raises(ValueError):
        empty.index(None)


def test_a_second_handle_by_the_name(kind: Kind, closing: Closing) -> None:
    b = kind.ShareableList(range(5))
    closing(b)
    c = kind.ShareableList(name=b.shm.name)
    assert list(c) == [0, 1, 2, 3, 4] and type(c.shm) is kind.SharedMemory
    c[-1] = -999
    assert b[-1] == -999
    c.shm.close()
    ended = run_python(
        f"import sys\nfrom {kind.module} import ShareableList\n"
        "a = ShareableList(name=sys.argv[1])\na[0] = 'other'\nprint(list(a))\na.shm.close()\n",
        b.shm.name,
    )
    assert (ended.stdout, ended.returncode) == ("['other', 1, 2, 3, -999]\n", 0), ended.stderr
    assert b[0] == "other"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_of_the_name(kind: Kind, closing: Closing, protocol: int) -> None:
    sl = kind.ShareableList(range(10))
    larger = kind.ShareableList(range(400))
    closing(sl), closing(larger)
    pickled = pickle.dumps(sl, protocol=protocol)
    assert len(pickled) == len(pickle.dumps(larger, protocol=protocol))
    other = pickle.loads(pickled)
    assert type(other) is kind.ShareableList and list(other) == list(range(10))
    other[4] = "changed"
    sl[3] = "newvalue"
    assert (sl[4], other[3]) == ("changed", "newvalue")
    other.shm.close()
    sl.shm.close()
    sl.shm.unlink()
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickled)


def test_it_can_be_named_in_annotations(kind: Kind) -> None:
    assert kind.ShareableList[int].__origin__ is kind.ShareableList


def test_the_layout_is_that_of_the_standard_library(closing: Closing) -> None:
    from multiprocessing import shared_memory

    for items in (ITEMS, [], ["", b"", "12345678", 0, False], ["é" * 4, "encodés"]):
        one, other = ShareableList(items), shared_memory.ShareableList(items)
        closing(one), closing(other)
        assert bytes(one.shm.buf) == bytes(other.shm.buf)[: one.shm.size]
        for sl in (one, other):
            if items:
                sl[0] = "abc"
                sl[-1] = -1
        assert bytes(one.shm.buf) == bytes(other.shm.buf)[: one.shm.size]


# -- where the original is not sound ---------------------------------------------------------------

TEXTS = [
    b"ends in\0",
    b"\0",
    b"\0" * 8,
    b"1234567\0",
    b"12345\1\0\0",
    b"123456\1",
    b"\1",
    b"\1\0",
    "text\0",
    "\0",
    "é\0",
    "",
    b"",
]


@pytest.mark.parametrize("text", TEXTS)
def test_zeros_at_the_end_of_a_text_belong_to_it(closing: Closing, text: str | bytes) -> None:
    sl = ShareableList([text, "12345678", b"1234567"])
    closing(sl)
    other = ShareableList(name=sl.shm.name)
    assert other[0] == text
    for position in (1, 2):
        other[position] = text
        assert sl[position] == text and type(sl[position]) is type(text)
    other.shm.close()


def test_the_original_loses_them(closing: Closing) -> None:
    """gh-106939: documented there as a bug."""
    from multiprocessing import shared_memory

    sl = shared_memory.ShareableList([b"ends in\0"])
    closing(sl)
    if sl[0] == b"ends in\0":
        pytest.skip(f"mended in CPython {sys.version.split()[0]}")
    assert sl[0] == b"ends in"


def test_a_text_has_the_room_of_its_bytes_not_of_its_letters(closing: Closing) -> None:
    sl = ShareableList(["é" * 5, "語" * 7])
    closing(sl)
    assert list(sl) == ["é" * 5, "語" * 7]
    assert sl.format == "16s24s"


def test_a_position_too_far_below_is_out_of_range(closing: Closing) -> None:
    sl = ShareableList([1, 2, 3])
    closing(sl)
    for position in (-4, -5, -100):
        with pytest.raises(IndexError):
            sl[position]
        with pytest.raises(IndexError):
            sl[position] = 5
    assert list(sl) == [1, 2, 3]


@pytest.mark.parametrize("item", [2**63, -(2**63) - 1, [], object(), 1j, bytearray(3)])
def test_what_can_not_be_stored_is_a_value_error_and_changes_nothing(
    closing: Closing, item: Any
) -> None:
    with pytest.raises(ValueError):
        ShareableList([1, item])
    sl = ShareableList(["text", 2])
    closing(sl)
    for position in range(2):
        with pytest.raises(ValueError):
            sl[position] = item
    assert list(sl) == ["text", 2]


def test_a_text_of_ten_million_bytes_is_refused() -> None:
    with pytest.raises(ValueError):
        ShareableList([bytes(10_000_000)])


def test_items_of_an_iterator(closing: Closing) -> None:
    sl = ShareableList(iter([1, "two", None]))
    closing(sl)
    assert list(sl) == [1, "two", None]


@pytest.mark.parametrize(
    "header",
    [
        b"",
        struct.pack("q", 5),
        struct.pack("2q", -1, 0),
        struct.pack("2q", 2**62, 0),
        struct.pack("3q", 1, 8, 16),
        struct.pack("3q", 1, 0, 4),
        struct.pack("3q", 1, 0, -8),
        struct.pack("3q", 1, 0, 1 << 40),
    ],
)
def test_a_block_that_holds_no_list_is_refused(closing: Closing, header: bytes) -> None:
    block = closing(SharedMemory(create=True, size=max(len(header), 1)))
    block.buf[: len(header)] = header
    with pytest.raises(ProtocolError):
        ShareableList(name=block.name)


@pytest.mark.parametrize(
    ("at", "bad"),
    [(-9, b"2s\0\0\0\0\0\0"), (-9, b"\xff" * 8), (-9, b"99999q\0\0"), (-1, b"\x09"), (-1, b"\x01")],
)
def test_a_format_that_another_process_spoiled_is_refused(
    closing: Closing, at: int, bad: bytes
) -> None:
    sl = ShareableList([5])
    closing(sl)
    start = sl.shm.size + at
    sl.shm.buf[start : start + len(bad)] = bad
    with pytest.raises(ProtocolError):
        sl[0]
    sl[0] = 6
    assert sl[0] == 6


STORABLE = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.booleans(),
    st.none(),
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.binary(max_size=20),
    st.sampled_from(TEXTS),
)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.lists(STORABLE, max_size=6), st.data())
def test_it_is_a_list_of_what_was_stored(items: list[Any], data: st.DataObject) -> None:
    sl = ShareableList(items)
    other = ShareableList(name=sl.shm.name)
    try:
        assert list(other) == items
        for position, value in data.draw(
            st.lists(st.tuples(st.integers(-7, 7), STORABLE), max_size=10)
        ):
            try:
                sl[position] = value
            except IndexError:
                assert not -len(items) <= position < len(items)
            except ValueError:
                assert len(value.encode() if isinstance(value, str) else value) > 8
            else:
                items[position] = value
            assert list(map(type, other)) == list(map(type, items))
            assert list(other) == items
    finally:
        other.shm.close()
        sl.shm.close()
        sl.shm.unlink()


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(STORABLE, min_size=1, max_size=4), st.data())
def test_whatever_another_process_writes_there_nothing_but_a_protocol_error_comes(
    items: list[Any], data: st.DataObject
) -> None:
    sl = ShareableList(items)
    size = sl.shm.size
    try:
        for _ in range(data.draw(st.integers(1, 6))):
            sl.shm.buf[data.draw(st.integers(0, size - 1))] = data.draw(st.integers(0, 255))
        for use in (
            lambda: list(sl),
            lambda: sl.format,
            lambda: list(ShareableList(name=sl.shm.name)),
        ):
            try:
                use()
            except ProtocolError:
                pass
    finally:
        sl.shm.close()
        sl.shm.unlink()
