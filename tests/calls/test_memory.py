"""Memory in calls: by value or as the very pages, both ways, and never one copy too many."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memdesc as md
from memdesc import _core
from memdesc.crossing import Thresholds, set_thresholds
from memdesc.descriptors.homes import descriptor_of
from memdesc.testing import failing

LARGE = 200_000


def inode_at(view: Any) -> int:
    """The VM object that a view of this task lies in."""
    address = _core.buffer_address(memoryview(view).cast("B"))[0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, _, _, _, inode = line.split()[:5]
        low, high = (int(end, 16) for end in bounds.split("-"))
        if low <= address < high:
            return int(inode)
    raise AssertionError(f"{address:#x} is not mapped")


@pytest.fixture
def echo(service: md.Service) -> md.Service:
    @service.method
    def length(data: bytes) -> int:
        assert type(data) is bytes
        return len(data)

    @service.method
    def ends(data: memoryview) -> list[int]:
        assert data.readonly
        return [data[0], data[-1], len(data)]

    @service.method
    def same(data: bytes) -> bytes:
        return data

    @service.method
    def array(values: np.ndarray[Any, Any]) -> list[Any]:
        return [values.shape, values.dtype.str, int(values.sum()), inode_at(values)]

    return service


@pytest.mark.parametrize("nbytes", [0, 1, 4000, 4096, 4097, LARGE])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_of_any_size_arrive(
    echo: md.Service, client: md.Connection, nbytes: int, kind: Callable[[bytes], Any]
) -> None:
    data = kind(os.urandom(nbytes))
    assert client.call("length", data) == nbytes
    assert client.call("same", data) == data
    assert bytes(client.call("same", data, returns=memoryview)) == data
    if nbytes:
        assert client.call("ends", data) == [data[0], data[-1], nbytes]


@pytest.mark.parametrize("readable", [True, False])
def test_private_memory_goes_with_and_without_the_right_to_copy_it(
    echo: md.Service, client: md.Connection, readable: bool
) -> None:
    """Where the kernel denies it, through a buffer made for it: then it lies in an object there."""
    client._service_copies = readable
    for values in (np.arange(LARGE, dtype="u2"), np.arange(LARGE, dtype="u2")[::3].reshape(-1, 1)):
        shape, kind, total, inode = client.call("array", values)
        assert (tuple(shape), kind, total) == (values.shape, values.dtype.str, int(values.sum()))
        assert bool(inode) is not (readable and values.flags.c_contiguous)
    assert client.call("length", bytes(LARGE)) == LARGE


def test_a_large_record_travels_beside_the_message(echo: md.Service, client: md.Connection) -> None:
    @echo.method
    def count(words: list[str], table: dict[str, int]) -> dict[str, int]:
        return {word: table[word] for word in words}

    words = [f"word {number}" for number in range(20_000)]
    table = {word: number for number, word in enumerate(words)}
    for readable in (True, False):
        client._service_copies = readable
        assert client.call("count", words, table) == table


@pytest.mark.slow
def test_a_record_has_a_largest_size(echo: md.Service, client: md.Connection) -> None:
    with pytest.raises(md.InvalidArgument) as caught:
        client.call("length", ["x" * (1 << 20)] * 65)
    assert caught.value.errno == errno.E2BIG


def test_the_threshold_decides_what_is_inline(echo: md.Service, client: md.Connection) -> None:
    seen: list[int] = []
    client.call("length", b"")
    original = client._put

    def spy(message: Any, fds: Any) -> bool:
        seen.append(len(message.memory))
        return original(message, fds)

    client._put = spy  # type: ignore[method-assign]
    try:
        for limit in (100, 4096):
            set_thresholds(Thresholds(inline=limit))
            client.call("length", bytes(1000))
        set_thresholds(Thresholds(inline=1 << 30))  # no more than a message holds
        client.call("length", bytes(300_000))
    finally:
        set_thresholds(None)
        del client._put
    assert seen == [1, 0, 1]


def test_what_lies_in_a_descriptor_goes_as_those_pages(
    echo: md.Service, client: md.Connection
) -> None:
    frames = md.BufferMemoryDescriptor(LARGE * 2)
    pixels = frames.array(dtype="u2")
    pixels[:] = 3
    inode = inode_at(pixels)
    mapping = frames.map()
    for values in (
        pixels,
        pixels[1000:-1000].reshape(2, -1),
        mapping.array(dtype="u1")[4096:],
        md.SubMemoryDescriptor(frames, 4096).array(),
    ):
        shape, _, total, there = client.call("array", values)
        assert (tuple(shape), total) == (values.shape, int(values.sum()))
        assert there == inode
    seen = []

    @echo.method
    def keep(values: np.ndarray[Any, Any], view: memoryview) -> None:
        seen.extend([values, view])

    client.call("keep", pixels, mapping)
    pixels[0] = 9  # not a copy: what the owner stores shows
    assert seen[0][0] == 9
    assert seen[1][0] == 9
    with pytest.raises(ValueError, match="read-only"):
        seen[0][0] = 1


def test_a_result_that_lies_in_a_descriptor_comes_as_those_pages(
    service: md.Service, client: md.Connection
) -> None:
    frames = md.BufferMemoryDescriptor(LARGE)
    frames.write_bytes(0, b"first")
    service.method(lambda: frames.array(), name="all")
    service.method(lambda: memoryview(frames)[4096:], name="rest")
    service.method(lambda: frames, name="descriptor")
    service.method(lambda: np.arange(LARGE), name="fresh")
    service.method(lambda: np.arange(10, dtype="f4").reshape(2, 5), name="small")
    every = client.call("all")
    assert every[:5].tobytes() == b"first"
    assert not every.flags.writeable
    assert inode_at(every) == inode_at(frames) == inode_at(client.call("rest"))
    frames.write_bytes(0, b"later")
    assert every[:5].tobytes() == b"later"
    described = client.call("descriptor")
    assert (described.read_bytes(0, 5), described.max_access) == (b"later", md.Access.READ_ONLY)
    assert np.array_equal(client.call("fresh"), np.arange(LARGE))
    small = client.call("small")
    assert small.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert client.call("descriptor", returns=md.MemoryDescriptor).length == LARGE


def test_descriptor_of_finds_the_bytes_or_nothing() -> None:
    frames = md.BufferMemoryDescriptor(LARGE)
    pixels = frames.array(dtype="f4")
    assert descriptor_of(pixels) is frames
    found = descriptor_of(memoryview(pixels[10:30].reshape(4, 5)))
    assert isinstance(found, md.SubMemoryDescriptor)
    assert (found.parent, found.offset, found.length) == (frames, 40, 80)
    part = frames.map(offset=100, length=50)
    found = descriptor_of(part.array()[1:])
    assert isinstance(found, md.SubMemoryDescriptor)
    assert (found.offset, found.length) == (101, 49)
    for private in (b"abc", bytearray(9), np.zeros(9), memoryview(bytes(9)), pixels.copy()):
        assert descriptor_of(private) is None
    frozen = frames.snapshot()
    view = frozen.array()
    assert descriptor_of(view) is frozen
    del frozen
    assert descriptor_of(view) is None
    frames.set_length(100)
    assert descriptor_of(pixels) is None
    frames.close()
    assert descriptor_of(pixels) is None


# -- a client's private memory -----------------------------------------------------------------


@pytest.fixture
def kernel(service: md.Service) -> md.Service:
    """A service that reads and fills what its clients describe."""

    @service.method
    def read(memory: md.MemoryDescriptor) -> list[Any]:
        return [type(memory).__name__, memory.direction.name, memory.read_bytes(0, 5)]

    @service.method
    def fill(memory: md.MemoryDescriptor, value: int) -> None:
        memory.write_bytes(0, bytes([value]) * memory.length)

    @service.method
    def put(memory: md.MemoryDescriptor) -> bytes:
        memory.write_bytes(0, b"answer")
        return memory.read_bytes()

    return service


def lent(text: bytearray, direction: md.Direction) -> md.MemoryDescriptor:
    return md.MemoryDescriptor.with_buffer(text, direction)


def test_private_memory_is_lent_by_its_address(kernel: md.Service, client: md.Connection) -> None:
    text = bytearray(b"hello world")
    for direction in (md.Direction.OUT, md.Direction.OUT_IN):
        kind, way, data = client.call("read", lent(text, direction))
        assert (kind, way, data) == ("AddressRangeDescriptor", direction.name, b"hello")
    client.call("fill", lent(text, md.Direction.IN), 7)
    assert text == bytes([7]) * 11
    address = _core.buffer_address(text)[0]
    ours = md.MemoryDescriptor.with_address_range(address, 11, md.Direction.IN)
    client.call("fill", ours, 8)
    assert text == bytes([8]) * 11
    with pytest.raises(md.CopyError) as caught:
        client.call("read", md.MemoryDescriptor.with_address_range(4096, 9, md.Direction.OUT))
    assert caught.value.errno == errno.EFAULT
    with pytest.raises(md.InvalidArgument):
        client.call("fill", lent(b"constant", md.Direction.IN), 1)  # type: ignore[arg-type]
    with pytest.raises(md.InvalidArgument):
        client.call("read", lent(text, md.Direction.NONE))


def test_what_is_lent_from_a_descriptor_is_that(kernel: md.Service, client: md.Connection) -> None:
    frames = md.BufferMemoryDescriptor(LARGE, max_access=md.Access.READ_WRITE)
    kind, _, _ = client.call("read", lent(frames.array(), md.Direction.OUT))
    assert kind == "ReceivedMemoryDescriptor"
    client.call("fill", lent(frames.array()[100:200], md.Direction.IN), 5)
    assert frames.read_bytes(98, 4) == b"\0\0\5\5"
    client.call("fill", frames, 6)
    assert frames.read_bytes(LARGE - 1) == b"\6"
    sealed = md.BufferMemoryDescriptor(LARGE)
    with pytest.raises(md.SealedError):
        client.call("fill", sealed, 1)
    client.call("fill", lent(sealed.array(), md.Direction.IN), 4)  # by its owner's own view
    assert sealed.read_bytes(0, 1) == b"\4"


def test_lent_memory_is_copied_by_the_connection_where_the_kernel_denies_it(
    remote: Callable[..., Any],
) -> None:
    """The denial is injected into the service's process; its client's is asked over the socket."""
    one = remote(
        "import errno; from memdesc.testing import failing",
        "@s.method\ndef read(memory: md.MemoryDescriptor) -> bytes: return memory.read_bytes()",
        "@s.method\ndef fill(memory: md.MemoryDescriptor) -> None:\n"
        "    memory.write_bytes(0, b'x' * memory.length)",
        "@s.method\ndef peek(client: md.UserClient, address: int) -> bytes:\n"
        "    return md.copyin(client.task, address, 5)",
        "@s.method\ndef poke(client: md.UserClient, address: int) -> int:\n"
        "    return md.copyout(b'xx', client.task, address)",
        "@s.method\ndef both(memory: md.MemoryDescriptor) -> list:\n"
        "    try: memory.write_bytes(0, b'y')\n"
        "    except md.AccessDeniedError as e: return [e.errno, memory.read_bytes(0, 5)]",
        "@s.method\ndef blob(n: int) -> bytes: return b'z' * n",
        "denied = failing('process_vm_readv', errno.EPERM, times=10**9)",
        "denied2 = failing('process_vm_writev', errno.EPERM, times=10**9)",
        "denied.__enter__(), denied2.__enter__()",
    )
    connection = one.connection
    connection._service_copies = False  # as it would have been told
    text = bytearray(os.urandom(LARGE))
    assert connection.call("read", lent(text, md.Direction.OUT)) == text
    address = _core.buffer_address(text)[0]
    for method in ("peek", "poke"):  # the same memory, but lent to nobody now
        with pytest.raises(md.AccessDeniedError) as caught:
            connection.call(method, address)
        assert caught.value.errno == errno.EACCES
    assert connection.call("both", lent(text, md.Direction.OUT)) == [errno.EACCES, text[:5]]
    connection.call("fill", lent(text, md.Direction.IN))
    assert text == b"x" * LARGE
    assert connection.call("blob", LARGE, into=text) == LARGE
    assert text == b"z" * LARGE
    assert connection._lent.is_empty


# -- results in place --------------------------------------------------------------------------


@pytest.fixture
def blobs(service: md.Service) -> md.Service:
    @service.method
    def blob(nbytes: int) -> bytes:
        return bytes(range(256)) * (nbytes // 256)

    @service.method
    async def later(nbytes: int) -> np.ndarray[Any, Any]:
        return np.arange(nbytes // 4, dtype="u4")

    service.method(lambda: "text", name="word")
    return service


def test_a_result_is_stored_in_place(blobs: md.Service, client: md.Connection) -> None:
    for target in (
        bytearray(LARGE),
        np.zeros(LARGE, "u1"),
        md.BufferMemoryDescriptor(LARGE),
        md.BufferMemoryDescriptor(LARGE, max_access=md.Access.READ_WRITE),
        md.SubMemoryDescriptor(md.BufferMemoryDescriptor(2 * LARGE), 1000),
        md.BufferMemoryDescriptor(LARGE).array(),
        lent(bytearray(LARGE), md.Direction.IN),
    ):
        assert client.call("blob", 1024, into=target) == 1024
        view = memoryview(target).cast("B")
        assert bytes(view[:1025]) == bytes(range(256)) * 4 + b"\0"
        assert client.call("later", 4096, into=target) == 4096
        assert bytes(view[4092:4097]) == (1023).to_bytes(4, "little") + b"\0"
        del view


def test_what_does_not_fit_in_place_is_refused_whole(
    blobs: md.Service, client: md.Connection
) -> None:
    room = bytearray(300)
    with pytest.raises(md.RangeError):
        client.call("blob", 512, into=room)
    assert room == bytes(300)
    with pytest.raises(md.InvalidArgument):
        client.call("word", into=room)
    with pytest.raises(md.SealedError):
        client.call("blob", 256, into=md.BufferMemoryDescriptor(100).snapshot())


@pytest.mark.slow
def test_no_second_buffer_for_a_large_result(remote: Callable[..., Any]) -> None:
    """Row 9: 64 MiB from the service's array into the client's buffer; neither process grows."""
    size = 64 << 20
    one = remote(
        "import numpy as np",
        f"data = np.ones({size}, 'u1')",
        "@s.method\ndef get() -> object: return data",
    )
    room = bytearray(os.urandom(16)) + bytearray(size - 16)
    before = [peak(pid) for pid in (os.getpid(), one.puppet.pid)]
    try:
        assert one.connection.call("get", into=room, timeout=60) == size
    except md.AccessDeniedError as error:
        pytest.skip(f"{error}")
    after = [peak(pid) for pid in (os.getpid(), one.puppet.pid)]
    assert room.count(1) == size
    assert all(now - then < size // 4 for now, then in zip(after, before, strict=True))


def peak(pid: int) -> int:
    """Bytes that a process has in memory now at most since this was last asked, shmem too."""
    status = Path(f"/proc/{pid}/status").read_text()
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) << 10


def test_a_handler_maps_into_its_caller(remote: Callable[..., Any]) -> None:
    """While the caller waits, its I/O thread answers."""
    one = remote(
        f"frames = md.BufferMemoryDescriptor({LARGE})",
        "frames.write_bytes(0, b'pushed')",
        "@s.method\ndef push(caller: md.UserClient) -> int:\n"
        "    global mapping; mapping = frames.create_mapping_in_task(caller.task)\n"
        "    return mapping.address",
    )
    address = one.connection.call("push")
    (mine,) = one.connection.mappings()
    assert mine.address == address
    assert bytes(memoryview(mine)[:6]) == b"pushed"
    one.puppet.do("mapping.unmap()")
    assert not mine.is_mapped


def test_memory_beside_calls_is_bounded(remote: Callable[..., Any]) -> None:
    remote(
        "s.close()",
        "s = md.Service('remote', limits=md.Limits(call_bytes=100_000))",
        "@s.method\ndef length(x: bytes) -> int: return len(x)",
    )
    with md.connect("remote") as connection:
        assert connection.call("length", bytes(90_000)) == 90_000
        with pytest.raises(md.LimitError) as caught:
            connection.call("length", bytes(110_000))
        assert caught.value.errno == errno.EDQUOT
        assert connection.call("length", bytes(90_000)) == 90_000


def test_arguments_in_messages_count_as_those_beside_them() -> None:
    begun, go_on = threading.Event(), threading.Event()
    with (
        md.Service("counted", limits=md.Limits(call_bytes=5000)) as service,
        md.connect("counted") as client,
    ):

        @service.method
        def hold(x: bytes) -> int:
            begun.set()
            go_on.wait(60)
            return len(x)

        @service.method
        def length(x: bytes) -> int:
            return len(x)

        pending = client.begin("hold", bytes(3000))
        begun.wait(60)
        assert client.call("length", bytes(1000)) == 1000
        for large in (3000, 50_000):  # in the message; beside it
            with pytest.raises(md.LimitError, match="call_bytes") as caught:
                client.call("length", bytes(large))
            assert caught.value.errno == errno.EDQUOT
        go_on.set()
        assert pending.result(60) == 3000
        assert client.call("length", bytes(3000)) == 3000  # it counts until it is answered


def test_too_many_blocks_of_one_call_are_refused_here(
    echo: md.Service, client: md.Connection
) -> None:
    @echo.method
    def many(values: list[np.ndarray[Any, Any]]) -> int:
        return len(values)

    assert client.call("many", [np.zeros(5000)] * 64) == 64
    with pytest.raises(md.InvalidArgument) as caught:
        client.call("many", [np.zeros(5000)] * 65)
    assert caught.value.errno == errno.E2BIG


def test_no_descriptor_left_for_the_answer_is_an_error(
    service: md.Service, client: md.Connection
) -> None:
    service.method(lambda: bytes(LARGE), name="blob")
    with failing("fallocate", errno.ENOSPC), pytest.raises(md.AllocationError) as caught:
        client.call("blob")
    assert caught.value.errno == errno.ENOSPC
    assert client.call("blob") == bytes(LARGE)
