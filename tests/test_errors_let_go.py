"""An error that was handled holds nothing: neither the frames that it came through, nor what those
had. Else arrays, slots and descriptors would stay until the collector runs.

Of calls that wait, see test_timeouts.py; of peers that lie, test_hostile_service.py.
"""

from __future__ import annotations

import ast
import asyncio
import errno
import gc
import logging
import socket
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from letting_go import lets_go, lets_go_async, no_collector
from puppets import Puppet

import memdesc as md
from memdesc import _core, files, iokit
from memdesc.dma import DirectFile
from memdesc.handover import receive_descriptor
from memdesc.loop import loop
from memdesc.mapping import LocalMemoryMap
from memdesc.memory.populate import in_parallel
from memdesc.streams import Stream, Subscription
from memdesc.testing.faults import failing
from memdesc.vm.awaiting import in_thread
from memdesc.vm.patience import look_at

PAGE = md.page_size
SOURCE = Path(md.__file__).parent
NOT_THERE = md.MemdescError  # ShareNotFoundError, or where all is busy TimedOutError
CONTEXTS = {"contextmanager", "asynccontextmanager"}


@pytest.fixture(autouse=True)
def without_collector() -> Iterator[None]:
    with no_collector():
        yield


def divide(*_: object) -> None:
    raise ZeroDivisionError


def test_the_test_finds_what_is_kept() -> None:
    kept = []

    def keep() -> None:
        try:
            raise ValueError
        except ValueError as error:
            kept.append(error)
            raise

    def know_itself() -> None:
        error = KeyError()
        raise error

    assert not lets_go(keep, ValueError, within=0.1)
    kept.clear()
    gc.collect()
    assert not lets_go(know_itself, KeyError)
    assert lets_go(divide, ZeroDivisionError)


def test_no_generator_replaces_an_error() -> None:
    """From CPython 3.12 on such an error refers to itself: see memdesc.vm.telling."""
    found, seen = [], 0
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        for function in ast.walk(ast.parse(text)) if "contextmanager" in text else ():
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            marks = {ast.unparse(one).rpartition(".")[2] for one in function.decorator_list}
            if not marks & CONTEXTS:
                continue
            seen += 1
            found += [f"{path.name}:{one.lineno}" for one in replacing(function)]
    assert seen > 10
    # Its own error is the end of the program.
    assert [one for one in found if not one.startswith("reader_gone.py")] == []


def replacing(function: ast.AST) -> Iterator[ast.ExceptHandler]:
    """The handlers of a generator that raise another error than came in where it yields."""
    for block in ast.walk(function):
        if isinstance(block, ast.Try) and has(block.body, ast.Yield):
            yield from (
                one
                for one in block.handlers
                if any(isinstance(inner, ast.Raise) and inner.exc for inner in ast.walk(one))
            )


def has(statements: list[ast.stmt], kind: type[ast.AST]) -> bool:
    return any(isinstance(inner, kind) for one in statements for inner in ast.walk(one))


def test_streams() -> None:
    stream = Stream(nbytes=10, slots=4)
    seat = stream.admit(loans=1)
    subscription = Subscription(stream.memory, seat.memory, stream.form, seat.depth, seat.loans)
    kept = stream.loan()
    assert lets_go(stream.loan, md.AllocationError)
    kept.publish()
    taken = subscription.take()
    assert lets_go(subscription.take, md.AllocationError)
    taken.release()
    assert lets_go(subscription.take_nowait, md.TimedOutError)
    stream.close()
    assert lets_go(subscription.take, md.PeerGoneError)
    subscription.close()
    assert lets_go(subscription.take, md.ClosedError)


def test_memory() -> None:
    buffer = md.BufferMemoryDescriptor(100)
    mapping = buffer.map()
    assert isinstance(mapping, LocalMemoryMap)
    view = memoryview(mapping)
    assert lets_go(mapping.unmap, BufferError)
    view.release()
    assert lets_go(lambda: md.BufferMemoryDescriptor(1 << 46), md.AllocationError)
    assert lets_go(lambda: md.BufferMemoryDescriptor(0), md.InvalidArgument)
    zone = md.Zone("errors", element_size=64, capacity=4096)
    element = zone.alloc()
    view = memoryview(element)
    assert lets_go(lambda: zone.free(element), BufferError)
    view.release()
    zone.free(element)
    assert lets_go(lambda: zone.free(element), md.DoubleFreeError)
    block = md.io_malloc_aligned(8192, 4096)
    view = memoryview(block)
    assert lets_go(lambda: md.io_free(block), BufferError)
    view.release()
    md.io_free(block)


def test_mapping_and_wiring() -> None:
    buffer = md.BufferMemoryDescriptor(4 * PAGE)
    both = md.MultiMemoryDescriptor([buffer, md.BufferMemoryDescriptor(PAGE)])
    mapping = buffer.map()
    assert isinstance(mapping, LocalMemoryMap)
    own = md.MemoryDescriptor.with_address_range(
        mapping.address, 4 * PAGE, md.Direction.OUT_IN, task=None
    )
    there = mapping.address
    for action in (
        lambda: buffer.map(length=5 * PAGE),
        lambda: buffer.map(at_address=there, unique=True),
        lambda: buffer.map(at_address=there + 1),
        lambda: buffer.map(at_address=(1 << 63) - PAGE),
        lambda: both.map(at_address=there),
        lambda: own.map(at_address=there),
    ):
        assert lets_go(action, md.MappingError)
    for name in ("map_memory", "madvise"):
        with failing(name, errno.ENOMEM):
            assert lets_go(lambda: buffer.map(prefault=True, unique=True), md.MappingError), name
    with failing("mlock", errno.ENOMEM):
        assert lets_go(buffer.prepare, md.WiringError)
    private = md.MemoryDescriptor.with_buffer(bytearray(100), md.Direction.OUT)
    with Puppet() as puppet, md.Task(puppet.pid) as task:
        assert lets_go(lambda: private.create_mapping_in_task(task), md.MappingError)

    def ask() -> None:
        why: list[md.MemdescError] = []
        assert iokit.IOBufferMemoryDescriptor.withOptions(3, 0, 1, why) is None
        assert why
        raise LookupError

    assert lets_go(ask, LookupError)


def test_other_tasks() -> None:
    room = bytearray(3 * PAGE)
    with Puppet() as puppet, md.Task(puppet.pid) as task, md.Task.current() as own:
        here = _core.buffer_address(room)[0]
        for action in (
            lambda: md.copyin(task, 16, 100),
            lambda: md.copyout(b"bytes", task, 16),
            lambda: md.copyinstr(task, 16, 100),
            lambda: md.copyio.copy_between(task, 16, own, here, 100),
            lambda: md.copyio.copy_between(own, here, task, 16, 100),
        ):
            assert lets_go(action, md.CopyError)
        buffer = md.BufferMemoryDescriptor(100)
        assert lets_go(lambda: buffer.create_mapping_in_task(task, timeout=0), md.MappingError)
        assert lets_go(lambda: look_at(task, "divide", divide), ZeroDivisionError)
    assert lets_go(lambda: md.Task(puppet.pid), md.TaskGoneError)


def test_files(tmp_path: Path) -> None:
    contents: dict[str, bytes] = {"none.npy": b"noise", "none.npz": b"PK\3\4" + bytes(100)}
    np.savez_compressed(tmp_path / "whole.npz", a=np.arange(1000))
    whole = (tmp_path / "whole.npz").read_bytes()
    contents["damaged.npz"] = whole[:100] + b"\1" * 16 + whole[116:]
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        assert lets_go(lambda path=tmp_path / name: files.load(path), md.MemdescError), name
    assert lets_go(lambda: files.load(tmp_path / "missing.npy"), md.MemdescError, OSError)
    with DirectFile(tmp_path / "none.npy") as disk, md.BufferMemoryDescriptor(PAGE) as buffer:
        assert lets_go(lambda: disk.read_into(buffer, file_offset=1 << 40), md.MemdescError)


def test_what_another_thread_raised() -> None:
    loop()
    assert lets_go(lambda: loop().run(divide), ZeroDivisionError)
    assert lets_go(lambda: in_parallel(divide, 10, 1, 2), ZeroDivisionError)
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        theirs.close()
        assert lets_go(lambda: receive_descriptor(ours), md.PeerGoneError)

    async def main() -> None:
        assert await lets_go_async(lambda: in_thread(divide), ZeroDivisionError)

    asyncio.run(main())


def test_names(tmp_path: Path) -> None:
    with md.Service("taken"):
        for action in (
            lambda: md.Service("taken"),
            lambda: md.Service(f"{tmp_path}/none/none"),
            lambda: md.Service("x" * 200),
            lambda: md.connect("nobody", timeout=0),
            lambda: md.connect("nobody", timeout=0, reconnect=True),
            lambda: md.connect(f"{tmp_path}/none/none", timeout=0),
        ):
            assert lets_go(action, md.MemdescError)
    bound = tmp_path / "refuses"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(bound))  # and does not listen: ECONNREFUSED
        assert lets_go(lambda: md.connect(str(bound), timeout=0), md.ServiceNotFoundError)

    async def main() -> None:
        assert await lets_go_async(
            lambda: md.connect_async("nobody", timeout=0.01), md.ServiceNotFoundError
        )

    asyncio.run(main())


def test_services(monkeypatch: pytest.MonkeyPatch) -> None:
    # Else pytest keeps the records, and they what the handler failed with.
    monkeypatch.setattr(logging.getLogger("memdesc.services"), "disabled", True)
    with md.Service("errors", limits=md.Limits(loans=0)) as service:

        @service.method
        def fail() -> None:
            raise ZeroDivisionError

        @service.method
        def add(one: int, other: int) -> int:
            return one + other

        service.stream("video", nbytes=10)
        with md.connect("errors") as connection:
            for action, kind in {
                lambda: connection.map("nothing", timeout=0): NOT_THERE,
                lambda: connection.subscribe("nothing", timeout=0): NOT_THERE,
                lambda: connection.subscribe("video", timeout=0): md.LimitError,
                lambda: connection.call("nothing"): md.MethodNotFoundError,
                lambda: connection.call("add", "one", 2): md.InvalidArgument,
                lambda: connection.call("fail"): md.RemoteError,
                lambda: connection.begin("fail").result(10): md.RemoteError,
                lambda: connection.begin("add", 1, 2, returns=str).result(10): md.InvalidArgument,
            }.items():
                assert lets_go(action, kind), kind
            assert lets_go(lambda: asked(connection.begin("add", 1, 2, returns=str)), LookupError)

            async def main() -> None:
                for action in (
                    lambda: connection.map_async("nothing", timeout=0),
                    lambda: connection.call_async("fail"),
                ):
                    assert await lets_go_async(action, md.MemdescError)

            asyncio.run(main())
        assert lets_go(lambda: connection.call("fail"), md.ClosedError)


def asked(call: Future[str]) -> None:
    assert isinstance(call.exception(10), md.InvalidArgument)
    raise LookupError
