"""Tables that travel through multiprocessing as handles, and what of them goes by value."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")

from dataclasses import replace  # noqa: E402

import table_children as children  # noqa: E402
from arrow_tables import of_every_type  # noqa: E402
from children import finish, kill, start  # noqa: E402
from puppets import count_fds, end_holder, full_table, memfds_mapped, wait_until  # noqa: E402

import memdesc as md  # noqa: E402
from memdesc.descriptors.homes import home_at  # noqa: E402
from memdesc.handover import reducers  # noqa: E402
from memdesc.interop import arrow, multiprocessing as handles  # noqa: E402
from memdesc.interop.multiprocessing import tables  # noqa: E402

METHODS = multiprocessing.get_all_start_methods()
NOTHING = handles.Transit(0, 0, 0)

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture
def installed() -> Iterator[None]:
    end_holder()  # what other tests left with it
    with handles.installed():
        yield


def dumped(value: Any) -> bytes:
    return bytes(ForkingPickler.dumps(value))


def travel(value: Any) -> Any:
    """Send something to this very process."""
    return ForkingPickler.loads(dumped(value))


def placed(columns: Any, **options: Any) -> Any:
    return arrow.table(arrow.to_descriptor(columns, **options))


# -- in place --------------------------------------------------------------------------------------


def test_every_type_travels_by_one_handle_and_nothing_is_allocated(installed: None) -> None:
    ours = placed(of_every_type(), name="every")
    allocated = pa.total_allocated_bytes()
    form = dumped(ours)
    assert handles.in_transit().handles == 1
    theirs = ForkingPickler.loads(form)
    assert handles.in_transit() == NOTHING
    assert pa.total_allocated_bytes() == allocated
    assert theirs.equals(ours, check_metadata=True)
    theirs.validate(full=True)
    assert children.inodes_of(theirs) == children.inodes_of(ours)
    assert not any(one.is_mutable for one in theirs.column("f8").chunk(0).buffers() if one)


@pytest.mark.parametrize(
    "part",
    [
        lambda table: table.slice(3, 20),
        lambda table: table.select(["struct", "dictionary", "text"]),
        lambda table: table.to_batches()[0],
        lambda table: table.to_batches()[0].slice(7),
        lambda table: table.column("deep"),
        lambda table: table.column("runs").chunk(0),
        lambda table: table.column("struct").chunk(0)[5:9],
        lambda table: table.column("f8").chunk(0).buffers()[1],
    ],
    ids=["slice", "select", "batch", "part of a batch", "column", "runs", "struct", "buffer"],
)
def test_whatever_has_the_buffers_travels_so(part: Any, installed: None) -> None:
    ours = part(placed(of_every_type()))
    form = dumped({"it": [ours, ours]})
    assert handles.in_transit().handles == 1
    one, other = ForkingPickler.loads(form)["it"]
    assert one is other
    assert one.equals(ours)


def test_chunks_and_tables_of_one_descriptor_take_one_handle(installed: None) -> None:
    chunked = pa.table({"n": pa.chunked_array([[number] * 3 for number in range(50)])})
    ours = placed(chunked)
    form = dumped([ours, ours.slice(10, 100), ours.to_batches()])
    assert handles.in_transit().handles == 1
    whole, part, batches = ForkingPickler.loads(form)
    assert whole.column(0).num_chunks == 50
    assert whole.equals(ours)
    assert part.equals(ours.slice(10, 100))
    assert pa.Table.from_batches(batches).equals(ours)


def test_a_table_of_two_descriptors(installed: None) -> None:
    one, two = placed({"n": range(100)}, name="one"), placed({"n": range(7)}, name="two")
    ours = pa.concat_tables([one, two])
    form = dumped(ours)
    assert handles.in_transit().handles == 2
    theirs = ForkingPickler.loads(form)
    assert theirs.equals(ours)
    assert children.inodes_of(theirs) == children.inodes_of(ours)
    assert len(children.inodes_of(theirs)) == 2


def test_a_table_in_pieces_of_several_objects(installed: None) -> None:
    from arrow_tables import stream_of

    data = stream_of(pa.table({"n": range(1000)}))
    parts = [data[: md.page_size], data[md.page_size :]]
    buffers = [md.BufferMemoryDescriptor(len(part)) for part in parts]
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.write_bytes(0, part)
    ours = arrow.table(md.MultiMemoryDescriptor([one.snapshot() for one in buffers]))
    form = dumped(ours)
    assert handles.in_transit().objects == 2
    assert ForkingPickler.loads(form).equals(ours)
    assert children.inodes_of(ForkingPickler.loads(dumped(ours))) == children.inodes_of(ours)


def test_what_was_computed_beside_goes_by_value(installed: None) -> None:
    """Numbers that lie in an array of ours, with a bitmap that PyArrow made."""
    numbers = md.asarray(np.arange(100_000.0))
    column = pa.array(numbers, mask=np.arange(100_000) % 3 == 0)
    validity, values = column.buffers()
    beside = pa.Array.from_buffers(
        pa.float64(), len(column), [validity, pa.py_buffer(numbers)], column.null_count
    )
    ours = pa.table({"n": beside, "private": range(100_000)})
    assert children.inodes_of(ours) > {0}
    del values
    form = dumped(ours)
    assert handles.in_transit().handles == 1
    assert 100_000 * 8 < len(form) < 100_000 * 9  # the bitmap and the private column
    theirs = ForkingPickler.loads(form)
    assert theirs.equals(ours)
    assert children.inodes_of(theirs) == children.inodes_of(ours)
    numbers[1] = -1  # the memory is the same, as of arrays
    assert theirs.column("n")[1].as_py() == -1


def test_what_came_is_sent_on(installed: None) -> None:
    ours = travel(placed({"n": range(1000)}))
    with handles.installed():
        theirs = travel(ours.slice(5))
    assert theirs.equals(ours.slice(5))
    assert children.inodes_of(theirs) == children.inodes_of(ours) != {0}


def test_a_shared_table_is_sent_on(installed: None) -> None:
    with md.Service("market") as market, md.connect("market") as connection:
        market.share("trades", arrow.to_descriptor({"n": range(1000)}))
        for memory in (connection.map("trades"), connection.descriptor("trades")):
            ours = arrow.table(memory)
            del memory
            gc.collect()
            assert children.inodes_of(travel(ours)) == children.inodes_of(ours) != {0}


def test_writable_memory_arrives_read_only() -> None:
    numbers = md.zeros(100, "i8", max_access=md.Access.READ_WRITE)
    with handles.installed(access=md.Access.READ_WRITE):
        theirs = travel(pa.py_buffer(numbers))
    assert not theirs.is_mutable
    assert memoryview(theirs).readonly
    assert children.inode_at(theirs.address) != 0


# -- by value --------------------------------------------------------------------------------------


def test_all_others_go_by_value_as_before(installed: None) -> None:
    mutable = pa.py_buffer(bytearray(b"mutable"))
    empty = placed({"n": pa.array([], pa.int64()), "s": pa.array([], pa.string())})
    for value in (
        pa.table({"n": range(1000)}),
        of_every_type(),
        pa.table({}),
        empty,
        placed({"n": range(10)}).slice(10),
        pa.nulls(5),
        pa.py_buffer(b""),
        pa.py_buffer(b"bytes"),
        mutable,
    ):
        got = travel(value)
        assert type(got) is type(value)
        assert got.equals(value)
    assert travel(mutable).is_mutable
    assert not handles.in_transit().handles


def test_what_nobody_can_be_given_goes_by_value(installed: None, tmp_path: Any) -> None:
    """A closed descriptor's, and a file's, which can be shortened."""
    descriptor = arrow.to_descriptor({"n": range(1000)})
    ours = arrow.table(descriptor)
    descriptor.close()
    assert children.inodes_of(travel(ours)) == {0}
    path = tmp_path / "memory"
    path.write_bytes(np.arange(1024).tobytes())
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 8192) as mapped:
        address = np.frombuffer(mapped, "u1").__array_interface__["data"][0]
        found = md.MemoryDescriptor.with_address_range(
            address, 8192, md.Direction.OUT, task=md.Task.current(), trust_size=True
        )
        mapping = found.map(unique=True)
        ours = [pa.py_buffer(mapping).slice(800, 80), pa.py_buffer(mapping).slice(8, 16)]
        assert home_at(ours[0].address, 80) is not None
        theirs = travel(ours)
        assert [bytes(one) for one in theirs] == [bytes(one) for one in ours]
        assert {children.inode_at(one.address) for one in theirs} == {0}
        del ours
        mapping.unmap()
        found.close()
        gc.collect()
    assert not handles.in_transit().handles


def test_what_is_closed_in_the_midst_of_it_goes_by_value(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptor = arrow.to_descriptor({"n": range(1000)})
    ours = arrow.table(descriptor)
    real = reducers.leave

    def leave(*arguments: Any, **options: Any) -> Any:
        descriptor.close()
        return real(*arguments, **options)

    monkeypatch.setattr(reducers, "leave", leave)
    theirs = travel(ours)
    assert theirs.equals(ours)
    assert children.inodes_of(theirs) == {0}


def test_what_can_not_be_sent_or_had_is_said(installed: None) -> None:
    ours = placed({"n": range(1000)})
    handles.limit_in_transit(1)
    try:
        with pytest.raises(md.LimitError) as over:
            dumped(ours)
    finally:
        handles.limit_in_transit(None)
    assert over.value.errno == errno.EDQUOT
    with full_table(), pytest.raises(md.MappingError) as no:
        dumped(ours)
    assert no.value.reason is md.MappingReason.TOO_MANY_FILES
    form, other = dumped(ours), dumped(ours)
    with full_table(), pytest.raises(handles.HandleLostError) as lost:
        ForkingPickler.loads(form)
    assert lost.value.errno == errno.EMFILE
    assert ForkingPickler.loads(form).equals(ours)
    gc.collect()
    fds = count_fds()
    with full_table(), pytest.raises(handles.HandleLostError) as lost:
        ForkingPickler.loads(other)  # the last handle takes what is kept, and can not map it
    assert lost.value.errno == errno.EMFILE
    assert isinstance(lost.value.__cause__, md.MappingError)
    assert not isinstance(lost.value, OSError)
    del lost
    gc.collect()
    assert count_fds() <= fds
    form = dumped(ours)
    ForkingPickler.loads(form)
    with pytest.raises(handles.HandleLostError) as lost:  # a handle is for one receiver
        ForkingPickler.loads(form)
    assert lost.value.errno == errno.ENOENT


def test_a_buffer_that_is_not_in_what_came_is_refused(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = placed({"n": range(1000)}).column("n").chunk(0).buffers()[1]
    found = home_at(ours.address, ours.size)
    assert found is not None
    wrong = [
        (-1, ours.size),
        (md.round_page(16_000), ours.size),
        (1 << 62, ours.size),
        (1 << 20, -8),
    ]
    for offset, length in wrong:
        home = replace(found, offset=offset, length=length)
        with monkeypatch.context() as patch:
            patch.setattr(tables, "home_at", lambda *_, home=home: home)
            form = dumped(ours)
        with pytest.raises(handles.HandleLostError) as lost:
            ForkingPickler.loads(form)
        assert lost.value.errno == errno.EPROTO
        with pytest.raises(handles.HandleLostError):  # nor in bytes, in place of a handle
            tables._rebuild(bytes(16_384), offset, length)


def test_a_buffer_right_behind_a_part_of_a_descriptor_is_not_in_it(installed: None) -> None:
    """Of which only one page is mapped there, and other memory where the next would lie."""
    page = md.page_size
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = libc.mmap(None, ctypes.c_size_t(2 * page), mmap.PROT_READ, private, -1, 0)
    assert start not in (None, ctypes.c_void_p(-1).value)
    assert libc.munmap(ctypes.c_void_p(start), ctypes.c_size_t(page)) == 0
    with md.BufferMemoryDescriptor(16 * page) as buffer:
        buffer.write_bytes(0, b"theirs" * page)
        with buffer.map(offset=0, length=page, at_address=start, unique=True):
            inside = pa.foreign_buffer(start, page)
            assert home_at(inside.address, page) is not None
            for other in (
                pa.foreign_buffer(start + page, page),
                pa.foreign_buffer(start + page - 8, 16),
            ):
                assert home_at(other.address, other.size) is None
            assert travel(pa.foreign_buffer(start + page, page)).to_pybytes() == bytes(page)
    assert libc.munmap(ctypes.c_void_p(start + page), ctypes.c_size_t(page)) == 0


def test_plain_pickle_copies(installed: None) -> None:
    ours = placed({"n": range(1000)})
    got = pickle.loads(pickle.dumps(ours))
    assert got.equals(ours)
    assert children.inodes_of(got) == {0}


# -- from process to process -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_pool_both_ways(method: str, installed: None) -> None:
    ours = placed({"n": range(10_000), "s": ["text"] * 10_000})
    with multiprocessing.get_context(method).Pool(1, initializer=handles.install) as pool:
        rows, inodes, allocated, back = pool.apply(children.look, (ours,))
        made = pool.apply_async(children.make, (500,)).get(60)
        pool.close()
        pool.join()
    assert (rows, inodes, allocated) == (10_000, children.inodes_of(ours), 0)
    assert children.inodes_of(back) == inodes  # and so came the part that it sent back
    assert back.equals(ours.slice(1, 3))
    assert made.column("n").to_pylist() == list(range(500))
    assert children.inodes_of(made) != {0}
    assert handles.in_transit() == NOTHING


@pytest.mark.slow
def test_an_executor(installed: None) -> None:
    ours = placed({"n": range(10_000)})
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        rows, inodes, allocated, back = executor.submit(children.look, ours).result(60)
    assert (rows, inodes, allocated) == (10_000, children.inodes_of(ours), 0)
    assert children.inodes_of(back) == {0}  # it did not install


def test_a_sender_that_is_killed_loses_nothing(installed: None) -> None:
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        assert finish(start(lambda: children.send_and_die(theirs))) == -signal.SIGKILL
        assert handles.in_transit().handles == 1
        got = ours.recv()
    assert got.column("n").to_pylist() == list(range(1000))
    assert handles.in_transit() == NOTHING


def test_a_receiver_that_is_killed_leaves_nothing(installed: None) -> None:
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        table = placed({"n": range(1000)}, name="of the killed")
        pid = start(lambda: children.receive_and_die(theirs))
        ours.send(table)
        assert ours.poll(60)
        assert ours.recv() == md.page_size
        kill(pid)  # with the table
        assert handles.in_transit() == NOTHING
        ours.send([table, table.slice(5)])  # which nobody takes
        fds = count_fds()
        assert handles.forget_in_transit().handles == 1
        assert count_fds() < fds
        with pytest.raises(handles.HandleLostError) as lost:
            theirs.recv()
        assert lost.value.errno == errno.ENOENT
    del table
    gc.collect()
    wait_until(lambda: not memfds_mapped(os.getpid(), "of the killed"))


# -- the switch ------------------------------------------------------------------------------------


def test_uninstalled_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    known: Any = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    before, ours = dict(known), placed({"n": range(1000)})
    with handles.installed():
        assert children.inodes_of(travel(ours)) != {0}
        with handles.installed(plain="refuse"):
            assert children.inodes_of(travel(ours)) != {0}
        assert pa.Buffer in known
    assert known == before
    assert children.inodes_of(travel(ours)) == {0}
    calls = []

    def reduce(buffer: Any) -> Any:
        calls.append(buffer)
        return buffer.__reduce_ex__(4)

    monkeypatch.setitem(known, pa.Buffer, reduce)
    with handles.installed():
        travel(ours)
        assert not calls
        travel(pa.py_buffer(b"private"))
        assert len(calls) == 1
    assert known[pa.Buffer] is reduce


@pytest.mark.slow
def test_pyarrow_may_be_imported_after_installing() -> None:
    code = """
import sys
from multiprocessing.reduction import ForkingPickler
import memdesc as md
md.interop.multiprocessing.install()
assert "pyarrow" not in sys.modules
from memdesc.interop import arrow
ours = arrow.table(arrow.to_descriptor({"n": range(1000)}))
form = bytes(ForkingPickler.dumps(ours))
assert md.interop.multiprocessing.in_transit().handles == 1, len(form)
assert ForkingPickler.loads(form).equals(ours)
"""
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


# -- finding by address ----------------------------------------------------------------------------


def test_homes_are_found_by_address() -> None:
    buffers = [md.BufferMemoryDescriptor(md.page_size * (1 + n % 3)) for n in range(40)]
    known = {buffer.address: buffer for buffer in buffers}
    for address, buffer in known.items():
        for offset, length in ((0, 1), (5, 9), (0, buffer.length), (buffer.length - 1, 1)):
            home = home_at(address + offset, length)
            assert home is not None
            assert (home.descriptor, home.offset, home.length) == (buffer, offset, length)
        assert home_at(address, 0) is None
        assert home_at(address, buffer.length + 1) is None
    private = bytearray(100)
    assert home_at(np.frombuffer(private, "u1").__array_interface__["data"][0], 100) is None
    assert home_at(0, 1) is None
    assert home_at((1 << 63) - 1, 1) is None
    last = buffers.pop()
    address, view = last.address, last.array()
    last.close()
    assert home_at(address, 1) is None
    del last, view
    fresh = md.BufferMemoryDescriptor(md.page_size)
    home = home_at(fresh.address, 1)
    assert home is not None
    assert home.descriptor is fresh
