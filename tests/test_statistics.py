"""Every long-lived object tells of itself by `statistics()`: a frozen record, true just then."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memdesc as md
from memdesc import dma, files, mapping, wiring
from memdesc.memory.lifecycle import State


def test_each_record_is_frozen_and_has_no_dict() -> None:
    records: list[Any] = [
        mapping.MappingStatistics,
        dma.DirectFileStatistics,
        files.FileServerStatistics,
        type(md.recycler.statistics()),
        type(md.zone_map.statistics()),
        type(wiring.statistics()),
        type(md.Zone("z", 64, 64).statistics()),
    ]
    with md.BufferMemoryDescriptor(1) as buffer, md.Service("camera") as camera:
        with md.connect("camera") as client, camera.stream("video", nbytes=1) as video:
            camera.wait_client(10)
            seat = client.subscribe("video")
            things: list[Any] = [
                buffer,
                camera,
                client,
                video,
                seat,
                md.SubMemoryDescriptor(buffer, 0, 1),
            ]
            records += [type(thing.statistics()) for thing in things]
            seat.close()
    for record in records:
        assert dataclasses.is_dataclass(record)
        assert record.__dataclass_params__.frozen, record
        assert "__slots__" in vars(record), record


def test_a_buffer_tells_of_its_mappings_views_and_grants() -> None:
    with md.BufferMemoryDescriptor(100, reserve=9000, name="frames") as buffer:
        told = buffer.statistics()
        assert (told.name, told.nbytes, told.capacity, told.reserve) == ("frames", 100, 100, 9000)
        assert (told.mappings, told.views, told.grantees, told.prepares) == (0, 0, 0, 0)
        assert told.state is State.PRIVATE
        image = buffer.array()
        first, second = buffer.map(), buffer.map(length=10)
        told = buffer.statistics()
        assert (told.mappings, told.mapped_bytes, told.remote_mappings) == (2, 110, 0)
        assert told.views == 1
        del image
        first.unmap()
        second.unmap()
        buffer.set_length(50)
        told = buffer.statistics()
        assert (told.nbytes, told.mappings, told.views) == (50, 0, 0)
    with pytest.raises(md.ClosedError):
        buffer.statistics()


def test_what_was_given_to_another_task_is_told() -> None:
    with md.Service("camera") as camera, md.BufferMemoryDescriptor(100) as buffer:
        camera.share("frames", buffer)
        with md.connect("camera") as client:
            seen = client.map("frames")
            told = buffer.statistics()
            assert (told.state, told.grantees) == (State.SHARED_READ, 1)
            assert seen.statistics().nbytes == 100


def test_prepares_are_counted() -> None:
    with md.BufferMemoryDescriptor(100) as buffer:
        try:
            buffer.prepare()
        except md.WiringError as error:
            assert error.reason in (md.WiringReason.LIMIT, md.WiringReason.NOT_PRIVILEGED)
            pytest.skip(f"this process may not wire: {error}")
        buffer.prepare()
        assert buffer.statistics().prepares == 2
        buffer.complete()
        buffer.complete()
        assert buffer.statistics().prepares == 0


def test_a_mapping_tells_of_its_own_views_and_wires() -> None:
    with md.BufferMemoryDescriptor(100) as buffer:
        shown = buffer.map()
        lent = buffer.map()
        image = shown.array()
        assert shown.statistics() == mapping.MappingStatistics(100, 1, 0, 0)
        assert lent.statistics().views == 0
        with pytest.raises(BufferError):
            shown.unmap()
        del image
        try:
            token = shown.wire()
        except md.WiringError as error:
            pytest.skip(f"this process may not wire: {error}")
        assert shown.statistics() == mapping.MappingStatistics(100, 0, 1, token.length)
        token.release()
        assert shown.statistics().wires == 0
        shown.unmap()
        assert shown.statistics() == mapping.MappingStatistics(0, 0, 0, 0)


def push(user: md.UserClient, buffer: md.BufferMemoryDescriptor) -> mapping.RemoteMemoryMap:
    """As `create_mapping_in_task`, which would map into this very task without a connection."""
    return user.map_in_peer(
        buffer._extents(0, 100, md.Access.READ_ONLY),
        access=md.Access.READ_ONLY,
        enforced=True,
        placement=mapping.Placement(),
        offset=0,
        owner=buffer,
        timeout=10,
    )


@pytest.fixture
def camera() -> Iterator[md.Service]:
    with md.Service("camera") as camera:
        yield camera


def test_a_service_and_its_connections_tell_what_they_did(camera: md.Service) -> None:
    buffer = md.BufferMemoryDescriptor(100)
    camera.share("frames", buffer)

    @camera.method
    def double(value: int) -> int:
        return 2 * value

    video = camera.stream("video", nbytes=10)
    with md.connect("camera") as client:
        user = camera.wait_client(10)
        client.map("frames")
        client.map("frames")
        assert client.call("double", 21) == 42
        video.publish(b"0123456789")
        pushed = push(user, buffer)
        told = camera.statistics()
        assert (told.clients, told.shares, told.streams, told.queues) == (1, 1, 1, 0)
        assert (told.opens, told.opened_bytes) == (2, 200)
        assert (told.calls, told.calls_in_flight, told.methods) == (1, 0, 1)
        assert (told.slots, told.slot_bytes, told.mappings) == (1, 10, 1)
        assert not told.superseded
        assert user.statistics().remote_mappings == 1
        mine = client.statistics()
        assert (mine.mappings, mine.mapped_bytes, mine.remote_mappings) == (1, 100, 0)
        assert (mine.requests, mine.unread) == (0, 0)
        pushed.unmap()
        assert client.statistics().mappings == 0
    camera.close()
    assert camera.statistics().clients == 0
    assert camera.statistics().opens == 2
    assert client.statistics().mappings == 0


def test_a_file_tells_what_went_through_it(tmp_path: Path) -> None:
    path = tmp_path / "clip.raw"
    with md.BufferMemoryDescriptor(8192) as buffer:
        with md.dma.DirectFile(path, "w") as disk:
            assert disk.statistics() == dma.DirectFileStatistics(0, 0, 0, 0, 0, 0, 0)
            written = disk.write_from(buffer)
            read = disk.read_into(buffer, length=4096)
            told = disk.statistics()
            assert (told.transfers, told.read_bytes, told.written_bytes) == (2, 4096, 8192)
            assert told.requests == written.requests + read.requests
            assert told.bounced_bytes == written.bounced_bytes + read.bounced_bytes
            with pytest.raises(md.RangeError):
                disk.read_into(buffer, file_offset=1 << 20)
            assert disk.statistics() == told
        assert disk.statistics() == told


def test_a_file_tells_what_went_through_it_in_an_event_loop(tmp_path: Path) -> None:
    import asyncio

    path = tmp_path / "clip.raw"
    path.write_bytes(bytes(4096))
    with md.BufferMemoryDescriptor(4096) as buffer, md.dma.DirectFile(path) as disk:
        asyncio.run(disk.read_into_async(buffer))
        assert (disk.statistics().transfers, disk.statistics().read_bytes) == (1, 4096)


def test_a_file_server_tells_what_it_serves(tmp_path: Path) -> None:
    path = tmp_path / "weights.npy"
    np.save(path, np.arange(6.0))
    with md.files.FileServer("model", path) as server, md.connect("model") as client:
        assert client["weights"].shape == (6,)
        told = server.statistics()
        assert (told.version, told.arrays, told.clients) == (1, 1, 1)
        assert told.nbytes >= 48
        assert told.opens >= 1
        assert told.opened_bytes >= 48
        server.reload()
        assert server.statistics().version == 2
    with pytest.raises(md.ClosedError):
        server.statistics()
