"""Arrays that live in descriptors: as NumPy's, and found again under any view of them."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import signal
import threading
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from children import in_child
from puppets import full_table

import memdesc as md
from memdesc import _core
from memdesc.testing.faults import failing

RW = md.Access.READ_WRITE
RO = md.Access.READ_ONLY
RECORD = np.dtype([("time", "f8"), ("name", "S5"), ("place", "i2", (3,))])


def inodes(name: str) -> set[str]:
    """The memory objects of that name that this process has mapped."""
    with open("/proc/self/maps") as maps:
        return {line.split()[4] for line in maps if f"/memfd:{name} " in line}


# -- making them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["u1", "f8", "c16", ">i4", "M8[ns]", "U7", RECORD])
@pytest.mark.parametrize("shape", [(), 7, (3,), (2, 3, 5), [4, 1], np.int64(6)])
def test_made_as_numpy_makes_them(shape: Any, dtype: Any, order: str) -> None:
    made, like = md.zeros(shape, dtype, order), np.zeros(shape, dtype, order)
    assert type(made) is np.ndarray
    assert (made.shape, made.dtype, made.strides) == (like.shape, like.dtype, like.strides)
    assert np.array_equal(made, like)
    assert made.flags.writeable
    made[...] = np.ones((), "u1").astype(made.dtype)
    found = md.descriptor_of(made)
    assert found is not None
    assert found.length == like.nbytes
    assert found.read_bytes() == made.tobytes("A")


def test_dtypes_of_several_and_shapes_of_none() -> None:
    assert md.empty(4, ("f4", (2, 3))).shape == (4, 2, 3)
    for shape in (0, (3, 0), (0, 0, 2)):
        assert md.zeros(shape).shape == np.zeros(shape).shape
        assert md.descriptor_of(md.empty(shape)) is None
    assert md.Slab(100).empty((0, 5)).shape == (0, 5)


@pytest.mark.parametrize(
    ("shape", "dtype", "order"),
    [
        (3, object, "C"),
        (3, [("a", "O")], "C"),
        (3, "S", "C"),
        (3, "no such", "C"),
        (-1, "u1", "C"),
        ((2, -3), "u1", "C"),
        ("3", "u1", "C"),
        (2.5, "u1", "C"),
        (3, "u1", "K"),
    ],
)
def test_what_is_no_array_is_refused(shape: Any, dtype: Any, order: str) -> None:
    for make in (md.empty, md.zeros, md.Slab(100).empty, md.Slab(100).zeros):
        with pytest.raises(md.InvalidArgument):
            make(shape, dtype, order)


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(md.AllocationError):
        md.empty((1 << 20, 1 << 40), "u1")
    with pytest.raises(md.InvalidArgument):
        md.empty((1 << 40, 1 << 40), "u1")


def test_no_descriptor_left_is_said() -> None:
    md.recycler.trim()
    with full_table(), pytest.raises(md.AllocationError) as no:
        md.empty(3 << 20, "u1")
    assert no.value.errno == errno.EMFILE


def test_options_are_the_buffers() -> None:
    made = md.empty(100, name="named", max_access=RW, pages=md.PageKind.BASE, lazy=True)
    found = md.descriptor_of(made)
    assert isinstance(found, md.BufferMemoryDescriptor)
    assert (found.name, found.max_access, found.pages) == ("named", RW, md.PageKind.BASE)


@pytest.mark.parametrize("order", ["K", "A", "C", "F"])
def test_made_like_others(order: str) -> None:
    base = np.arange(60, dtype="i4").reshape(3, 4, 5)
    for like in (base, base.T, base.transpose(1, 0, 2), np.asfortranarray(base)):
        expected = np.empty_like(like, order=order)
        for make in (md.empty_like, md.zeros_like):
            made = make(like, order=order)
            assert (made.shape, made.dtype) == (like.shape, like.dtype)
            assert made.strides == expected.strides
            assert md.descriptor_of(made) is not None
    assert not md.zeros_like(base).any()
    assert md.empty_like(base, "f8").dtype == "f8"
    assert md.zeros_like([1, 2, 3]).tolist() == [0, 0, 0]


def test_asarray_copies_only_what_lies_nowhere() -> None:
    made = md.asarray([[1, 2], [3, 4]], "f4")
    assert md.descriptor_of(made) is not None
    assert made.tolist() == [[1, 2], [3, 4]]
    assert md.asarray(made) is made
    assert md.asarray(made[1:]).base is made
    other = md.asarray(made, "f8")
    assert md.descriptor_of(other) is not md.descriptor_of(made)
    assert other.tolist() == made.tolist()
    fortran = md.asarray(np.arange(6).reshape(2, 3).T)
    assert fortran.flags.f_contiguous
    assert fortran.tolist() == [[0, 3], [1, 4], [2, 5]]
    records = md.asarray(np.zeros(3, RECORD), max_access=RW)
    assert records.dtype == RECORD
    received = md.descriptor_of(records)
    assert received is not None
    assert received.max_access is RW


# -- lifetime ------------------------------------------------------------------------------------


def test_a_view_keeps_the_descriptor_and_the_last_one_lets_it_go() -> None:
    whole = md.zeros((10, 10), "u1", name="kept")
    view = whole[2:5, ::2].T
    del whole
    gc.collect()
    found = md.descriptor_of(view)
    assert isinstance(found, md.SubMemoryDescriptor)
    assert (found.offset, found.length) == (20, 29)
    view[...] = 7
    assert found.parent.read_bytes(20, 3) == b"\x07\x00\x07"
    assert len(inodes("kept")) == 1
    del view, found
    md.recycler.trim()
    assert not inodes("kept")


def test_a_closed_descriptor_leaves_the_array() -> None:
    made = md.zeros(100, "u1")
    found = md.descriptor_of(made)
    assert found is not None
    found.close()
    made[:] = 3
    assert made.sum() == 300
    assert md.descriptor_of(made) is None


def test_the_flag_of_writing_can_be_taken_and_given_back() -> None:
    made = md.zeros(10)
    made.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        made[0] = 1
    made.flags.writeable = True
    made[0] = 1
    seen = md.descriptor_of(made).map(access=RO).array(dtype="f8")  # type: ignore[union-attr]
    assert seen[0] == 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        seen.flags.writeable = True


# -- finding them --------------------------------------------------------------------------------


def test_found_under_views_of_every_sort() -> None:
    made = md.zeros((6, 8), "i2")
    whole = md.descriptor_of(made)
    assert isinstance(whole, md.BufferMemoryDescriptor)
    views: list[tuple[Any, int, int]] = [
        (made[1], 16, 16),
        (made[1:3, 2:4], 20, 20),
        (made[::-1], 0, 96),
        (made[4:1:-2, ::-3], 34, 46),
        (made.T[3], 6, 82),
        (made.reshape(48)[5:6], 10, 2),
        (made.view("u1")[0, 1:], 1, 15),
        (np.broadcast_to(made[2:3, 3:4], (5, 5)), 38, 2),
        (memoryview(made)[2:4], 32, 32),
        (made[3:].view(np.recarray), 48, 48),
        (np.lib.stride_tricks.sliding_window_view(made[0], 3), 0, 16),
        (pickle.PickleBuffer(made[5]), 80, 16),
        (pickle.PickleBuffer(made[5]).raw(), 80, 16),
        (np.frombuffer(made, "u1")[9:], 9, 87),
        (np.asarray(memoryview(whole)[4:8]), 4, 4),
    ]
    for view, offset, length in views:
        found = md.descriptor_of(view)
        if length == 96:
            assert found is whole
            continue
        assert isinstance(found, md.SubMemoryDescriptor), (offset, length)
        assert (found.parent, found.offset, found.length) == (whole, offset, length)
    for private in (made.copy(), made + 1, made[:0], made[[1, 2]], b"abc", np.zeros(3), None, 5):
        assert md.descriptor_of(private) is None


def test_a_field_of_records_is_found() -> None:
    records = md.zeros(4, RECORD)
    found = md.descriptor_of(records["name"][1:])
    assert isinstance(found, md.SubMemoryDescriptor)
    assert (found.offset, found.length) == (RECORD.itemsize + 8, 2 * RECORD.itemsize + 5)


def test_where_contiguous_bytes_are_needed_it_is_said() -> None:
    made = md.zeros(10)
    for view in (made[::-1], made[::2]):
        with pytest.raises(md.InvalidArgument):
            md.MemoryDescriptor.with_buffer(view, md.Direction.OUT)
        with pytest.raises(md.InvalidArgument):
            md.descriptor_of(memoryview(view))


# -- views of descriptors and mappings -------------------------------------------------------------


def test_arrays_of_descriptors_and_mappings() -> None:
    buffer = md.BufferMemoryDescriptor(1000)
    buffer.write_bytes(0, bytes(range(250)) * 4)
    for giver in (buffer, buffer.map(access=RO)):
        assert giver.array((), "<u2").item() == 0x0100
        assert giver.array(np.int64(5), "u1", offset=3).tolist() == [3, 4, 5, 6, 7]
        assert giver.array((2, 3), "u1", order="F").tolist() == [[0, 2, 4], [1, 3, 5]]
        assert giver.array((0, 3), "f8").shape == (0, 3)
        assert giver.array(2, RECORD)["name"][0] == bytes(range(8, 13))
        assert giver.array(7, "<u4", offset=1)[0] == 0x04030201
        with pytest.raises(md.RangeError):
            giver.array(126, "f8")
        for shape, dtype, order in [
            (-1, "u1", "C"),
            (1.5, "u1", "C"),
            (1, "O", "C"),
            (1, "u1", "K"),
        ]:
            with pytest.raises(md.InvalidArgument):
                giver.array(shape, dtype, order=order)  # type: ignore[arg-type]


def test_dlpack_tells_what_may_be_written() -> None:
    buffer = md.BufferMemoryDescriptor(100)
    mapping = buffer.map(access=RO)
    assert mapping.__dlpack_device__() == buffer.__dlpack_device__() == (1, 0)
    with pytest.raises(BufferError):
        mapping.__dlpack__()  # a consumer of old, which would write
    if np.lib.NumpyVersion(np.__version__) < "2.1.0":
        pytest.skip("this NumPy tells no versions of DLPack, and takes all of it for read-only")
    ours = np.from_dlpack(buffer)
    ours[0] = 9
    assert buffer.read_bytes(0, 1) == b"\x09"
    seen = np.from_dlpack(mapping)
    assert (seen[0], seen.flags.writeable) == (9, False)
    assert seen.__array_interface__["data"][0] == mapping.address
    assert "versioned" in repr(mapping.__dlpack__(max_version=(1, 0)))
    with pytest.raises(BufferError):
        mapping.unmap()
    del buffer, mapping, ours
    gc.collect()
    assert seen[0] == 9


# -- pickle ----------------------------------------------------------------------------------------


def test_pickle_copies_and_protocol_5_need_not() -> None:
    made = md.asarray(np.arange(1000).reshape(10, 100))
    copied = pickle.loads(pickle.dumps(made))
    assert np.array_equal(copied, made)
    assert md.descriptor_of(copied) is None
    buffers: list[pickle.PickleBuffer] = []
    short = pickle.dumps(made, protocol=5, buffer_callback=buffers.append)
    assert len(short) < 300
    given = md.descriptor_of(buffers[0])
    assert given is md.descriptor_of(made)
    mapping = given.map(access=RO)  # type: ignore[union-attr]
    there = pickle.loads(short, buffers=[mapping])
    assert np.array_equal(there, made)
    assert not there.flags.writeable
    assert there.__array_interface__["data"][0] == mapping.address
    assert md.descriptor_of(there) is given


# -- slabs -----------------------------------------------------------------------------------------


def test_arrays_of_a_slab_share_one_descriptor_and_no_byte() -> None:
    slab = md.Slab(1 << 16, name="slabbed")
    before = len(os.listdir("/proc/self/fd"))
    arrays = [slab.empty(count, "u1") for count in (1, 63, 64, 65, 1000)]
    arrays.append(slab.zeros((3, 4), RECORD, "F"))
    assert len(os.listdir("/proc/self/fd")) <= before
    spans = sorted(
        (found.offset, found.length)
        for found in map(md.descriptor_of, arrays)
        if isinstance(found, md.SubMemoryDescriptor) and found.parent is slab.descriptor
    )
    assert len(spans) == len(arrays)
    assert all(offset % 64 == 0 for offset, _ in spans)
    assert all(a + n <= b for (a, n), (b, _) in pairwise(spans))
    for number, array in enumerate(arrays[:5]):
        array[:] = number
    assert [set(array.tolist()) for array in arrays[:5]] == [{0}, {1}, {2}, {3}, {4}]
    assert not arrays[5].tobytes().strip(b"\0")


def test_room_comes_back_and_zeros_are_zeros() -> None:
    slab = md.Slab(6400)
    for _ in range(50):
        arrays = [slab.zeros(100, "u1") for _ in range(50)]
        assert slab.free == 0
        assert not any(array.any() for array in arrays)
        with pytest.raises(md.AllocationError) as full:
            slab.empty(1, "u1")
        assert (full.value.errno, full.value.requested) == (errno.ENOMEM, 1)
        for array in arrays:
            array[:] = 255
        view = arrays[7][3:]
        del array, arrays[::2], arrays[:]
        assert slab.free == 6400 - 128
        assert view.sum() == 97 * 255
        del view
        assert slab.free == 6400
    assert slab.empty(6400, "u1").size == 6400


def test_the_last_piece_need_not_be_whole() -> None:
    slab = md.Slab(100)
    first, second = slab.empty(60, "u1"), slab.empty(36, "u1")
    with pytest.raises(md.AllocationError):
        slab.empty(1, "u1")
    del first, second
    assert slab.empty(100, "u1").size == 100


def test_what_others_may_see_is_not_used_again() -> None:
    slab = md.Slab(6400)
    array = slab.zeros(100, "u1")
    fd = slab.descriptor.memory.grant(RO, user=os.geteuid())
    os.close(fd)  # he may have kept it, in ways that nobody sees
    del array
    assert slab.free == 6400 - 128
    slab = md.Slab(6400)
    arrays = [slab.zeros(100, "u1") for _ in range(2)]
    child = in_child(lambda: (slab.free, _refusal(slab), arrays[0].sum()))
    assert child == (6400 - 256, "ClosedError", 0)
    arrays.clear()
    assert slab.free == 6400 - 256


def _refusal(slab: md.Slab) -> str | None:
    try:
        slab.empty(1)
    except md.MemdescError as error:
        return type(error).__name__
    return None


def test_a_slab_lives_as_long_as_its_arrays() -> None:
    with md.Slab(1000, name="short-lived") as slab:
        array = slab.zeros(10)
    with pytest.raises(md.ClosedError):
        slab.empty(1)
    del slab
    array[:] = 1
    assert array.sum() == 10
    del array
    md.recycler.trim()
    assert not inodes("short-lived")


def test_threads_take_of_one_slab() -> None:
    slab = md.Slab(1 << 16)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(100):
            array = slab.empty(200, "u1")
            array[:] = number
            if set(array.tolist()) != {number}:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert slab.free == 1 << 16


def test_a_signal_handler_makes_arrays_in_the_midst_of_making_one() -> None:
    slab = md.Slab(1 << 16)
    made: list[Any] = []

    def handler(*_: object) -> None:
        made.append(slab.empty(1, "u1"))

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
        ours = []
        while len(made) < 50:
            ours.append(slab.empty(1, "u1"))
            if len(ours) > 300:
                del ours[::2]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    for number, array in enumerate(ours + made):
        array[0] = number % 251
    assert [array[0] for array in ours + made] == [n % 251 for n in range(len(ours + made))]


def test_memory_that_can_not_be_mapped_is_said() -> None:
    with failing("map_memory", errno.ENOMEM), pytest.raises(OSError, match="map") as no:
        md.zeros(3 << 20, name="not mapped")
    assert no.value.errno == errno.ENOMEM
    assert _core.buffer_address(md.zeros(1))[1] == 8
