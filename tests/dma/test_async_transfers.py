"""Transfers awaited in an event loop: many at a time, cancelled, on a loop that ends."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from disk_tools import KIB, MIB, a_file, best_way, known, needs_uring
from fuse_disk import NoDisk, failing_disk

import memdesc as md
from memdesc import BufferMemoryDescriptor
from memdesc.dma import DirectFile, Way, rings
from memdesc.testing import failing

SMALL = {"queue_depth": 4, "block_size": 64 * KIB}


@pytest.fixture
def buffer() -> Iterator[BufferMemoryDescriptor]:
    with BufferMemoryDescriptor(MIB, recycle=False) as made:
        yield made


def test_several_at_a_time(tmp_path: Path, buffer: BufferMemoryDescriptor) -> None:
    async def main() -> None:
        part = 128 * KIB
        told: list[tuple[int, int]] = []
        with DirectFile(a_file(tmp_path, MIB), "r+", **SMALL) as disk:
            results = await asyncio.gather(
                *(
                    disk.read_into_async(
                        buffer, at, part, at, progress=lambda *now: told.append(now)
                    )
                    for at in range(0, MIB, part)
                )
            )
            assert [result.nbytes for result in results] == [part] * 8
            assert {result.way for result in results} == {best_way(disk)}
            assert buffer.read_bytes() == known(MIB)
            assert told.count((part, part)) == 8
            buffer.write_bytes(0, b"new")
            assert (await disk.write_from_async(buffer, length=3)).nbytes == 3
            asks = [(buffer, at, 100, at) for at in range(0, 1000, 100)]
            assert (await disk.read_many_async(asks)).nbytes == 1000
            assert (await disk.write_many_async(asks)).counts == (100,) * 10
            assert (await disk.read_into_async(buffer, length=0)).nbytes == 0
            assert buffer.read_bytes(0, 3) == b"new"

    asyncio.run(main())
    assert buffer.memory.lifecycle.registrations == 0


def test_the_loop_goes_on_meanwhile_and_knows_nothing_afterwards(
    tmp_path: Path, buffer: BufferMemoryDescriptor
) -> None:
    needs_uring()

    async def main() -> int:
        loop, ticks = asyncio.get_running_loop(), 0
        with DirectFile(a_file(tmp_path, MIB), **SMALL) as disk:
            reading = asyncio.ensure_future(disk.read_into_async(buffer))
            while not reading.done():
                await asyncio.sleep(0)
                ticks += 1
            known_engine = disk._loops[loop]
            assert not loop.remove_reader(known_engine._eventfd)
        return ticks

    assert asyncio.run(main()) > 1
    assert buffer.read_bytes() == known(MIB)


def test_another_loop_and_registered_buffers(
    tmp_path: Path, buffer: BufferMemoryDescriptor
) -> None:
    needs_uring()
    with DirectFile(a_file(tmp_path, MIB), register=True) as disk:
        for _ in range(2):
            result = asyncio.run(disk.read_into_async(buffer))
            assert result.registered_bytes == MIB
        assert disk.read_into(buffer).registered_bytes == MIB
    assert buffer.memory.lifecycle.registrations == 0


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_without_a_ring(tmp_path: Path, buffer: BufferMemoryDescriptor, number: int) -> None:
    async def main() -> None:
        with DirectFile(a_file(tmp_path, MIB), **SMALL) as disk:
            with failing("open_uring", number, times=None):
                result = await disk.read_into_async(buffer)
                assert result.way in (Way.PREAD_DIRECT, Way.PREAD_BUFFERED)
                assert errno.errorcode[number] in result.reasons[0]
                reading = asyncio.ensure_future(disk.read_into_async(buffer))
                await asyncio.sleep(0)
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
            with failing("uring_register_eventfd", errno.ENOMEM):
                if best_way(disk) is Way.URING_DIRECT:
                    result = await disk.read_into_async(buffer)
                    assert result.way is Way.PREAD_DIRECT

    asyncio.run(main())
    assert buffer.read_bytes() == known(MIB)
    assert buffer.memory.lifecycle.registrations == 0


def test_cancelled_it_ends_when_the_kernel_is_done(
    tmp_path: Path, buffer: BufferMemoryDescriptor
) -> None:
    async def main() -> None:
        with DirectFile(a_file(tmp_path, MIB), **SMALL) as disk:
            for turns in range(4):
                reading = asyncio.ensure_future(disk.read_into_async(buffer))
                for _ in range(turns):
                    await asyncio.sleep(0)
                if not reading.done():
                    reading.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await reading
                assert buffer.memory.lifecycle.registrations == 0
            assert (await disk.read_into_async(buffer)).nbytes == MIB

    asyncio.run(main())
    assert buffer.read_bytes() == known(MIB)


def test_what_progress_raises_is_raised_where_it_is_awaited(
    tmp_path: Path, buffer: BufferMemoryDescriptor
) -> None:
    def stop(done: int, total: int) -> None:
        raise LookupError("enough")

    async def main() -> None:
        with DirectFile(a_file(tmp_path, MIB), **SMALL) as disk:
            stopped, whole = await asyncio.gather(
                disk.read_into_async(buffer, progress=stop),
                disk.read_into_async(buffer),
                return_exceptions=True,
            )
            assert isinstance(stopped, LookupError)
            assert whole.nbytes == MIB
            assert buffer.memory.lifecycle.registrations == 0

    asyncio.run(main())


def test_a_hanging_disk_does_not_hold_up_the_loop(
    tmp_path: Path, buffer: BufferMemoryDescriptor
) -> None:
    needs_uring()
    (tmp_path / "mount").mkdir()

    async def main(path: Path, life: object) -> None:
        with DirectFile(path, **SMALL) as disk:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(disk.read_into_async(buffer), 0.1)
            assert buffer.memory.lifecycle.registrations == 0
            assert (await disk.read_into_async(buffer, length=128 * KIB)).nbytes == 128 * KIB

    try:
        with failing_disk(tmp_path / "mount", MIB, hang=300 * KIB) as (path, _):
            asyncio.run(main(path, buffer))
    except NoDisk as error:
        pytest.skip(f"no FUSE here: {error}")
    assert rings._parked == []


def test_cancelled_twice_it_leaves_a_dead_disk_alone(
    tmp_path: Path, buffer: BufferMemoryDescriptor
) -> None:
    needs_uring()
    (tmp_path / "mount").mkdir()
    life = buffer.memory.lifecycle

    async def main(path: Path) -> None:
        with DirectFile(path, **SMALL) as disk:
            reading = asyncio.ensure_future(disk.read_into_async(buffer))
            await asyncio.sleep(0.05)
            reading.cancel()
            await asyncio.sleep(0.05)
            assert not reading.done()
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            assert life.registrations == 1

    try:
        with failing_disk(tmp_path / "mount", MIB, hang=300 * KIB, stubborn=True) as (path, server):
            asyncio.run(main(path))
            assert len(rings._parked) == 1
            server.kill()
            server.wait()
            while rings._parked:
                with DirectFile(a_file(tmp_path, MIB)) as disk:
                    disk.read_into(buffer)
    except NoDisk as error:
        pytest.skip(f"no FUSE here: {error}")
    assert life.registrations == 0
    assert buffer.read_bytes() == known(MIB)


def test_closing_lets_what_is_awaited_end(tmp_path: Path, buffer: BufferMemoryDescriptor) -> None:
    path = a_file(tmp_path, MIB)

    async def main() -> None:
        disk = DirectFile(path, **SMALL)
        reading = asyncio.ensure_future(disk.read_into_async(buffer))
        await asyncio.sleep(0)
        disk.close()
        assert (await reading).nbytes == MIB
        with pytest.raises(md.ClosedError):
            await disk.read_into_async(buffer)

    fds = set(os.listdir("/proc/self/fd"))
    asyncio.run(main())
    assert set(os.listdir("/proc/self/fd")) - fds == set()
    assert buffer.read_bytes() == known(MIB)


def test_a_loop_that_ends_in_the_middle(tmp_path: Path, buffer: BufferMemoryDescriptor) -> None:
    """A coroutine that is dropped gives the memory back all the same."""
    with DirectFile(a_file(tmp_path, MIB), **SMALL) as disk:
        loop = asyncio.new_event_loop()
        reading = disk.read_into_async(buffer)
        loop.call_soon(loop.stop)

        async def begin() -> None:
            await reading

        task = loop.create_task(begin())
        loop.run_forever()
        if not task.done():
            reading.close()
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.close()
        del task
    assert buffer.memory.lifecycle.registrations == 0


def test_forking_with_transfers_awaited(tmp_path: Path, buffer: BufferMemoryDescriptor) -> None:
    from children import in_child

    path = a_file(tmp_path, MIB)

    async def main() -> None:
        with DirectFile(path, **SMALL) as disk:
            reading = asyncio.ensure_future(disk.read_into_async(buffer))
            await asyncio.sleep(0)
            assert in_child(lambda: (disk.closed, disk.registrations)) == (True, 0)
            assert (await reading).nbytes == MIB

    asyncio.run(main())
    assert buffer.read_bytes() == known(MIB)
