"""Handles of Dask's messages, and the inboxes they go by, without a cluster: also hostile ones."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from children import NOBODY, become, capability, in_child
from puppets import Puppet, count_fds, wait_until

import memdesc as md
from memdesc.testing.faults import failing

pytest.importorskip("distributed", reason="Dask's distributed is not installed")

from dask.sizeof import sizeof
from distributed.protocol import deserialize, serialize
from distributed.spill import SpillBuffer

from memdesc.interop.dask import ends as ends_module, handles, plugin, statistics
from memdesc.interop.dask.ends import ends

LENGTH = 1 << 20
CAP_SETUID = 7
NEWUSER, NEWNET = 0x10000000, 0x40000000  # linux/sched.h
Context = dict[str, Any]


@pytest.fixture
def here() -> Iterator[Context]:
    """A context as of a connection whose other end is this process."""
    handles.register()
    name = ends.open()
    yield _context(name)
    ends.close()
    ends._avoided.clear()


def _context(name: str, **said: Any) -> Context:
    return {"recipient": {"memdesc": {"version": 1, "host": ends.host, "inbox": name, **said}}}


def _array() -> Any:
    array = md.empty(LENGTH, "u1")
    array[:] = np.arange(LENGTH) % 251
    return array


def test_a_handle_is_small_and_what_comes_of_it_is_the_same_memory(here: Context) -> None:
    array = _array()
    header, frames = serialize(array, context=here)
    assert sum(map(len, frames)) < 500
    assert ends.waiting() == 1
    made = deserialize(header, frames)
    assert ends.waiting() == 0
    array[3] = 99
    assert made[3] == 99 and not made.flags.writeable and (made == array).all()


@pytest.mark.parametrize(
    "said",
    [
        {"version": 2},
        {"version": "1"},
        {"host": "another"},
        {"host": "f" * 32},
        {"host": None},
        {"inbox": "x" * 32},
        {"inbox": "../../etc"},
        {"inbox": "0" * 31},
        {"inbox": "0" * 32 + "\n"},
        {"inbox": b"0" * 32},
    ],
)
def test_bytes_go_to_who_is_elsewhere_or_says_nonsense(here: Context, said: Context) -> None:
    context = {"recipient": {"memdesc": {**here["recipient"]["memdesc"], **said}}}
    header, frames = serialize(_array(), context=context)
    assert sum(memoryview(frame).nbytes for frame in frames) == LENGTH
    assert ends.waiting() == 0
    assert (deserialize(header, frames) == _array()).all()


@pytest.mark.parametrize("context", [None, {}, {"recipient": {}}, {"recipient": {"memdesc": 3}}])
def test_bytes_go_to_who_says_nothing(here: Context, context: Context | None) -> None:
    assert sum(memoryview(frame).nbytes for frame in serialize(_array(), context=context)[1]) == (
        LENGTH
    )


def test_bytes_go_out_of_a_process_that_has_no_plugin(here: Context) -> None:
    context = _context(ends._inbox.address[-32:].decode())  # type: ignore[union-attr]
    ends.close()
    assert len(serialize(_array(), context=context)[1][0]) == LENGTH
    ends.open()


def test_the_host_is_of_this_user_and_these_namespaces(here: Context) -> None:
    assert ends.host == ends_module.host_id() == in_child(ends_module.host_id)
    if capability(CAP_SETUID):
        assert in_child(ends_module.host_id, before=_become_nobody) != ends.host
    with Puppet() as other:
        other.do("from memdesc.interop.dask.ends import host_id", timeout=60)
        assert other.do("host_id()") == ends.host
        other.do("import ctypes; unshare = ctypes.CDLL(None).unshare")
        if other.do(f"unshare({NEWNET}) and unshare({NEWUSER | NEWNET})"):
            pytest.skip("this kernel or container denies a network namespace of one's own")
        assert other.do("host_id()") != ends.host


def test_what_went_as_bytes_is_counted(here: Context) -> None:
    def counted(send: Any, context: Context | None) -> tuple[int, ...]:
        before = statistics()
        serialize(send, context=context)
        now = statistics()
        return (
            now.sent - before.sent,
            now.as_bytes - before.as_bytes,
            now.nbytes_as_bytes - before.nbytes_as_bytes,
        )

    elsewhere: Context = {"sender": {}, "recipient": {}}
    descriptor = md.descriptor_of(_array())
    assert descriptor is not None
    assert counted(_array(), here) == (1, 0, 0)
    assert counted(_array(), elsewhere) == (0, 1, LENGTH)
    assert counted(descriptor, elsewhere) == (0, 1, descriptor.length)
    assert counted(np.zeros(10, "u1"), here) == (0, 1, 10)
    assert counted(np.zeros(LENGTH, "u1"), here) == (0, 1, LENGTH)  # private memory
    for nobody in (None, {}):  # spilled, or of a graph
        assert counted(_array(), nobody) == counted(descriptor, nobody) == (0, 0, 0)
    descriptor.close()
    assert counted(descriptor, elsewhere) == (0, 0, 0)


# -- inboxes that are not there, do not answer, are full, are another user's -----------------------


def _refused(context: Context) -> None:
    """It goes as bytes, and for a while nothing else is tried there."""
    before = statistics()
    for _ in range(2):
        header, frames = serialize(_array(), context=context)
        assert "memdesc" not in header["sub-header"]
        assert (deserialize(header, frames) == _array()).all()
    assert statistics().refused == before.refused + 2
    assert statistics().sent == before.sent


def test_no_such_inbox(here: Context) -> None:
    _refused(_context("0" * 32))


def test_an_inbox_whose_process_is_stopped(here: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends_module, "PATIENCE", 0.05)
    with Puppet() as peer:
        peer.do("from memdesc.interop.dask.ends import ends; name = ends.open()", timeout=60)
        name = peer.do("name")
        peer.stop()
        _refused(_context(name))
        peer.go_on()


def test_an_inbox_that_is_full(here: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends_module, "MOST", 2)
    kept = [serialize(_array(), context=here) for _ in range(2)]
    assert ends.waiting() == 2
    _refused(here)
    assert [bool((deserialize(*one) == _array()).all()) for one in kept] == [True, True]


def test_an_inbox_of_a_process_with_many_descriptors(here: Context) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    limit = highest + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    held = [os.dup(0)]
    while held[-1] <= limit // 2:
        held.append(os.dup(0))
    try:
        _refused(here)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)


def test_an_inbox_is_tried_again_after_a_while(
    here: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ends_module, "REST", 0.2)
    ends.rest()
    _refused(here)
    array = _array()
    # Also where there is always something to be sent.
    wait_until(lambda: "memdesc" in serialize(array, context=here)[0]["sub-header"])


def test_an_inbox_that_is_resting(here: Context) -> None:
    ends.rest()
    _refused(here)


def test_a_name_that_another_user_took(here: Context) -> None:
    if not capability(CAP_SETUID):
        pytest.skip("becoming another user needs CAP_SETUID")
    token = os.urandom(16).hex()
    address = b"\0memdesc-dask-" + token.encode()
    ready, told = os.pipe()

    def squat() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as false:
            false.bind(address)
            false.listen(1)
            os.write(told, b"r")
            link, _ = false.accept()
            with link:
                assert link.recv(100) == b""  # hung up, and nothing was said

    child = threading.Thread(target=in_child, args=(squat,), kwargs={"before": _become_nobody})
    child.start()
    os.read(ready, 1)
    _refused(_context(token))
    child.join()
    os.close(ready)
    os.close(told)


def _become_nobody() -> None:
    become(NOBODY)


def test_another_user_brings_nothing_and_takes_nothing(here: Context) -> None:
    if not capability(CAP_SETUID):
        pytest.skip("becoming another user needs CAP_SETUID")
    _, frames = serialize(_array(), context=here)
    token = msgspec.msgpack.decode(frames[0], type=handles.Handle).token
    assert ends._inbox is not None
    address = ends._inbox.address

    def try_it() -> list[str]:
        told = []
        for message in (b"T" + token, b"K" + bytes(16)):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
                link.connect(address)
                link.settimeout(20)
                try:
                    link.send(message)
                    told.append(repr(link.recv(10)))
                except OSError as error:
                    told.append(errno.errorcode[error.errno or 0])
        return told

    told = in_child(try_it, before=_become_nobody)
    assert set(told) <= {"b''", "EPIPE", "ECONNRESET"} and len(told) == 2
    assert ends.waiting() == 1


def test_what_nobody_comes_for_is_let_go(here: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends_module, "KEPT", 0.05)
    late = [serialize(_array(), context=here) for _ in range(3)]
    wait_until(lambda: not ends.waiting())
    assert ends._inbox is not None
    assert ends._inbox.counts() == (0, 0, 0) and not ends._inbox._came
    with pytest.raises(md.PeerGoneError) as error:
        deserialize(*late[0])
    assert error.value.errno == errno.ENOENT


def test_dtypes_that_a_name_does_not_tell_go_as_bytes(here: Context) -> None:
    handles.copies = handles.Copies()
    texts: list[Any] = [np.zeros(1 << 16, [("a", "i4"), ("b", "f8")]), np.zeros(1 << 16, "V8")]
    if hasattr(np.dtypes, "StringDType"):  # NumPy 2
        texts.append(np.array(["text"] * (1 << 16), np.dtypes.StringDType()))
    try:
        for array in texts:
            header, frames = serialize(array, context=here)
            assert "memdesc" not in header["sub-header"]
            assert (deserialize(header, frames) == array).all()
    finally:
        handles.copies = None


def test_what_says_more_than_it_has_goes_as_bytes(here: Context) -> None:
    """A row of a large array, broadcast: neither the whole of that is kept, nor the rest made."""
    handles.copies = handles.Copies()
    try:
        for row in (md.zeros((100, 100_000))[5], np.zeros(100_000)):
            _, frames = serialize(np.broadcast_to(row, (10**9, 100_000)), context=here)
            assert sum(memoryview(frame).nbytes for frame in frames) == row.nbytes
    finally:
        handles.copies = None
    assert ends.waiting() == 0


# -- messages that lie -----------------------------------------------------------------------------


def _changed(frames: Any, **changes: Any) -> list[bytes]:
    handle = msgspec.msgpack.decode(frames[0], type=handles.Handle)
    form = {name: changes.pop(name) for name in list(changes) if name in FIELDS}
    if form:
        changes["form"] = msgspec.structs.replace(handle.form, **form)
    return [msgspec.msgpack.encode(msgspec.structs.replace(handle, **changes))]


FIELDS = handles.Form.__struct_fields__


@pytest.mark.parametrize(
    "changes",
    [
        {"token": bytes(16)},
        {"token": b"short"},
        {"form": None},
        {"dtype": "O"},
        {"dtype": "V0"},
        {"dtype": "no such"},
        {"dtype": "f8,f8"},
        {"shape": (LENGTH + 1,)},
        {"shape": (2**62, 2**62)},
        {"shape": (LENGTH, 1), "strides": (1,)},
        {"strides": (2,)},
        {"strides": (-1,)},
        {"strides": (2**62,)},
        {"first": 1},
        {"first": 2**63 - 1},
    ],
)
def test_a_message_that_lies_is_an_error_that_dask_takes_for_the_networks(
    here: Context, changes: dict[str, Any]
) -> None:
    array, fds = _array(), count_fds()
    before = statistics().lost
    header, frames = serialize(array, context=here)
    with pytest.raises(md.PeerGoneError) as error:
        deserialize(header, _changed(frames, **changes))
    assert isinstance(error.value, OSError)
    assert statistics().lost == before + 1
    with pytest.raises(md.PeerGoneError):  # it was taken, or waits: then there is one such
        deserialize(header, [b"\xc1"])
    del error
    ends._inbox.forget_all()  # type: ignore[union-attr]
    wait_until(lambda: count_fds() <= fds + 2)  # of the link


@pytest.mark.parametrize("frames", [[], [b""], [b"\xc1"], [b"\x80"], [bytes(100)], [b"", b""]])
def test_garbage_is_an_error_too(here: Context, frames: list[bytes]) -> None:
    for load in (handles.load_array, handles.load_descriptor):
        with pytest.raises(md.PeerGoneError):
            load({"memdesc": "handle"}, list(frames))
    for header in ({}, {"memdesc": "bytes"}, {"memdesc": "bytes", "name": "", "direction": 9}):
        with pytest.raises(md.PeerGoneError):
            handles.load_descriptor(header, list(frames))


def test_what_can_not_be_mapped_is_an_error_and_then_comes_as_bytes(here: Context) -> None:
    message = serialize(_array(), context=here)
    with failing("map_memory", errno.ENOMEM), pytest.raises(md.PeerGoneError) as error:
        deserialize(*message)
    assert error.value.errno == errno.ENOMEM
    del error
    _refused(here)


def test_a_handle_is_for_one_opening(here: Context) -> None:
    message = serialize(_array(), context=here)
    assert (deserialize(*message) == _array()).all()
    with pytest.raises(md.PeerGoneError) as error:
        deserialize(*message)
    assert error.value.errno == errno.ENOENT


# -- descriptors, accounting, spilling, fork -------------------------------------------------------


def test_a_descriptor_is_received_read_only_as_handle_and_as_bytes(here: Context) -> None:
    with md.BufferMemoryDescriptor(5000, name="frames", direction=md.Direction.IN) as buffer:
        buffer.write_bytes(0, b"memory")
        for context, marks in ((here, "handle"), (None, "bytes")):
            header, frames = serialize(buffer, context=context)
            assert header["sub-header"]["memdesc"] == marks
            with deserialize(header, frames) as made:
                assert made.read_bytes(0, 6) == b"memory"
                assert (made.name, made.direction) == ("frames", md.Direction.IN)
                assert (made.length, made.max_access) == (5000, md.Access.READ_ONLY)
                with pytest.raises(md.SealedError):
                    made.write_bytes(0, b"x")


def test_a_descriptor_in_pieces_and_one_of_another_task_are_bytes() -> None:
    handles.register()
    with md.BufferMemoryDescriptor(5000) as buffer, Puppet() as other:
        buffer.write_bytes(100, b"memory")
        pieces = md.MultiMemoryDescriptor([md.SubMemoryDescriptor(buffer, 100, 50), buffer])
        other.do("import ctypes; memory = ctypes.create_string_buffer(b'memory')")
        task, address = md.Task(other.pid), other.do("ctypes.addressof(memory)")
        theirs = md.MemoryDescriptor.with_address_range(address, 6, md.Direction.OUT, task=task)
        for descriptor, length in ((pieces, 5050), (theirs, 6)):
            with deserialize(*serialize(descriptor)) as made:
                assert (made.length, made.read_bytes(0, 6)) == (length, b"memory")
        other.kill()
        made = deserialize(*serialize(theirs))
        assert made.closed and "ended" in made.name
        pieces.close()
        theirs.close()
        task.close()


def test_a_descriptor_that_was_closed_arrives_closed(here: Context) -> None:
    buffer = md.BufferMemoryDescriptor(5000, name="frames")
    buffer.close()
    made = deserialize(*serialize(buffer, context=here))
    assert made.name.startswith("frames (")
    with pytest.raises(md.ClosedError):
        made.read_bytes()


def test_the_accounting_counts_what_is_described() -> None:
    handles.register()
    with md.BufferMemoryDescriptor(1 << 20) as buffer:
        assert sizeof(buffer) == 1 << 20
        assert sizeof(md.SubMemoryDescriptor(buffer, 0, 100)) == 100


def test_what_is_spilled_is_bytes_on_the_disk(here: Context, tmp_path: Path) -> None:
    spilled = SpillBuffer(str(tmp_path), target=1000)
    array, buffer = _array(), md.BufferMemoryDescriptor(1 << 20)
    buffer.write_bytes(0, b"memory")
    spilled["array"], spilled["memory"] = array, buffer
    assert len(spilled.slow) == 2 and ends.waiting() == 0
    del array, buffer  # else they would be given back themselves
    back = spilled["array"]
    assert (back == _array()).all() and md.descriptor_of(back) is None and back.flags.writeable
    assert spilled["memory"].read_bytes(0, 6) == b"memory"


def test_what_is_pickled_is_bytes(here: Context) -> None:
    back = pickle.loads(pickle.dumps(_array()))
    assert (back == _array()).all() and md.descriptor_of(back) is None


def test_a_fork_child_has_neither_inbox_nor_ways(here: Context) -> None:
    message = serialize(_array(), context=here)

    def look() -> Any:
        header, _ = serialize(_array(), context=here)
        return ends.host, ends.waiting(), "memdesc" in header["sub-header"], count_fds()

    fds = count_fds()
    host, waiting, sent, left = in_child(look)
    assert (host, waiting, sent) == (None, 0, False)
    assert left <= fds
    assert (deserialize(*message) == _array()).all()


class Node:
    """What a worker and a client have of what is used of them."""

    def __init__(self) -> None:
        self.connection_args: dict[str, Any] = {"handshake_overrides": {"compression": None}}
        self.rpc = self
        self.collected = 0

    def collect(self) -> None:
        self.collected += 1


def test_the_inbox_is_there_as_long_as_one_receives() -> None:
    first, second = Node(), Node()
    made = plugin.Plugin()
    made.setup(first)
    made.setup(first)
    made.setup(second)
    told = first.connection_args["handshake_overrides"]
    assert set(told) == {"compression", "memdesc"}
    assert told == second.connection_args["handshake_overrides"]
    made.teardown(first)
    made.teardown(first)
    assert first.connection_args["handshake_overrides"] == {"compression": None}
    assert ends.host is not None
    del second  # closed without a word
    gc.collect()
    assert ends.host is None
    assert first.collected == 4


def test_what_is_no_client_is_not_attached() -> None:
    with pytest.raises(md.InvalidArgument) as no:
        plugin.attach(Node())
    assert no.value.errno == errno.EINVAL
    assert ends.host is None


def test_without_distributed_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['distributed'] = None\n"
        "import memdesc as md; md.interop.dask\n"
        "try:\n    md.interop.dask.Plugin\n"
        "except ModuleNotFoundError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "memdesc[dask]" in done.stdout
