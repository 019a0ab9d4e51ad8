"""Page arithmetic: numbers against their definitions."""

import mmap

import pytest
from hypothesis import given, strategies as st

from memdesc.errors import InvalidArgument
from memdesc.vm.pages import (
    MAX_LENGTH,
    Access,
    Direction,
    check_integer,
    check_length,
    page_size,
    page_span,
    round_page,
    trunc_page,
)

SIZES = st.sampled_from([page_size, 1 << 16, 2 << 20, 1 << 30])


def test_the_page_size_is_the_systems() -> None:
    assert page_size == mmap.PAGESIZE


@given(st.integers(0, MAX_LENGTH), SIZES)
def test_trunc_is_the_last_border_at_or_below(address: int, size: int) -> None:
    below = trunc_page(address, size)
    assert below % size == 0
    assert below <= address < below + size


@given(st.integers(0, MAX_LENGTH), SIZES)
def test_round_is_the_first_border_at_or_above_or_an_error(address: int, size: int) -> None:
    if address > MAX_LENGTH // size * size:
        with pytest.raises(InvalidArgument):
            round_page(address, size)
    else:
        above = round_page(address, size)
        assert above % size == 0
        assert above - size < address <= above


@given(st.integers(0, 1 << 48), st.integers(1, 1 << 40), SIZES)
def test_a_span_holds_the_range_in_the_fewest_pages(address: int, length: int, size: int) -> None:
    start, whole = page_span(address, length, size)
    assert start % size == whole % size == 0
    assert start <= address < start + size
    assert start + whole - size < address + length <= start + whole


def test_a_span_that_wraps_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        page_span(MAX_LENGTH - 10, 10)


@pytest.mark.parametrize("length", [0, -1, MAX_LENGTH + 1, 2**64, "1", 1.0, None])
def test_what_is_no_length_is_refused(length: object) -> None:
    with pytest.raises(InvalidArgument):
        check_length(length)  # type: ignore[arg-type]


def test_lengths_go_up_to_the_last_that_linux_knows() -> None:
    assert check_length(1) == 1
    assert check_length(MAX_LENGTH) == MAX_LENGTH == 2**63 - 1


def test_an_integer_of_numpy_is_an_integer() -> None:
    numpy = pytest.importorskip("numpy")
    value = check_integer(numpy.int64(5), "offset")
    assert value == 5
    assert type(value) is int


def test_access_is_ordered_by_inclusion() -> None:
    assert Access.READ_ONLY.within(Access.READ_WRITE)
    assert Access.READ_ONLY.within(Access.READ_ONLY)
    assert Access.READ_WRITE.within(Access.READ_WRITE)
    assert not Access.READ_WRITE.within(Access.READ_ONLY)
    assert [access.writable for access in Access] == [False, True]


def test_only_the_direction_out_leaves_memory_unwritten() -> None:
    # XNU prepares for writing unless the direction is exactly kIODirectionOut.
    assert {d.name: d.writes_memory for d in Direction} == {
        "NONE": True,
        "IN": True,
        "OUT": False,
        "OUT_IN": True,
    }


@pytest.mark.parametrize("kind", [Access, Direction])
@pytest.mark.parametrize("value", ["rw", "outward", 99, None])
def test_words_that_are_none_of_ours_are_refused(kind: type, value: object) -> None:
    with pytest.raises(InvalidArgument):
        kind(value)
