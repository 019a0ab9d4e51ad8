"""The three ways from a driver to its clients that are compared, each as people use it.

* memdesc: the driver reads files into shared buffers, past the page cache where the file system
  allows that, and maps those into its clients.
* Pipe: it reads them into bytes and sends those down a `multiprocessing.Pipe` to each client.
* shared_memory: it reads them into bytes, creates a segment, copies them in, and tells its clients
  the name; they attach by name, close, and the driver unlinks.

The two others get their best plain form: the pipes are written by a thread for each client, and
the driver lets go of a file's bytes as soon as they are in a segment. (A segment could be filled
in place too; then its one copy falls away, and the rest of the table stays.)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Protocol

import memdesc as md
from memdesc import _core
from memdesc.mapping import LocalMemoryMap

Pipe = Connection  # what multiprocessing.Pipe gives two of


class DriverSide(Protocol):
    """What the driver does in a way."""

    copied: int
    """Bytes copied since the filling: counted at each statement that copies."""
    lost: list[str]
    """What went wrong with clients, or with what the driver had made, in words."""

    def fill(self, paths: Sequence[Path]) -> None:
        """Bring files into this process."""

    def give(self) -> None:
        """Hand all of them to every client."""

    def places(self) -> list[tuple[int, int]]:
        """Where they lie in this task: (address, length)."""

    def drop(self) -> None:
        """Let go of them; the clients have."""


class ClientSide(Protocol):
    """What a client does in a way."""

    def take(self, count: int) -> Iterator[memoryview]:
        """Give each file as soon as it is here, and keep it until `drop`."""

    def drop(self) -> None:
        """Let go of them."""


class MemdescDriver:
    """Shared buffers, filled in place and mapped into each client."""

    def __init__(self, name: str, clients: int, stack: ExitStack) -> None:
        self.copied = 0
        self.lost: list[str] = []
        service = stack.enter_context(md.Service(name))
        self._clients = [service.wait_client(20) for _ in range(clients)]
        self._buffers: list[md.BufferMemoryDescriptor] = []
        self._mappings: list[md.MemoryMap] = []
        self.inputs: list[md.dma.Transferred] = []

    def fill(self, paths: Sequence[Path]) -> None:
        """Read each file into a buffer of its own."""
        self.inputs = []
        for path in paths:
            with md.dma.DirectFile(path) as file:
                buffer = md.BufferMemoryDescriptor(
                    file.size,
                    pages=md.PageKind.BASE,  # as the other ways have
                    name=path.name[:100],
                )
                self._buffers.append(buffer)
                self.inputs.append(file.read_into(buffer))

    def give(self) -> None:
        """Map each buffer into each client."""
        for buffer in self._buffers:
            for client in self._clients:
                try:
                    mapping = buffer.create_mapping_in_task(client.task, timeout=10)
                except md.MappingError as error:
                    self.lost.append(f"client {client.task.pid}: {error.reason.name}")
                else:
                    self._mappings.append(mapping)

    def places(self) -> list[tuple[int, int]]:
        """Where the buffers lie."""
        return [(buffer.address, buffer.length) for buffer in self._buffers]

    def drop(self) -> None:
        """Close the buffers."""
        self._mappings.clear()
        for buffer in self._buffers:
            buffer.close()
        self._buffers.clear()


class MemdescClient:
    """Uses what the driver maps into this task."""

    def __init__(self, name: str, stack: ExitStack) -> None:
        self._connection = stack.enter_context(md.connect(name, timeout=20))
        self._mappings: list[LocalMemoryMap] = []

    def take(self, count: int) -> Iterator[memoryview]:
        """Give the mappings as they are made."""
        for _ in range(count):
            mapping = self._connection.wait_mapping(60)
            self._mappings.append(mapping)
            yield memoryview(mapping)

    def drop(self) -> None:
        """Unmap them."""
        for mapping in self._mappings:
            mapping.unmap()
        self._mappings.clear()


class PipeDriver:
    """Bytes, sent to each client."""

    def __init__(self, pipes: Sequence[Pipe]) -> None:
        self.copied = 0
        self.lost: list[str] = []
        self._pipes = pipes
        self._files: list[bytes] = []
        self._lock = threading.Lock()

    def fill(self, paths: Sequence[Path]) -> None:
        """Read each file."""
        self._files = [path.read_bytes() for path in paths]

    def give(self) -> None:
        """Send every file down every pipe, all pipes at the same time."""
        threads = [threading.Thread(target=self._send, args=(pipe,)) for pipe in self._pipes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _send(self, pipe: Pipe) -> None:
        sent = 0
        try:
            for data in self._files:
                pipe.send_bytes(data)
                sent += 2 * len(data)  # into the kernel, and out of it at the other end
        except (BrokenPipeError, ConnectionResetError) as error:
            with self._lock:
                self.lost.append(type(error).__name__)
        with self._lock:
            self.copied += sent

    def places(self) -> list[tuple[int, int]]:
        """Where the bytes lie."""
        return [_core.buffer_address(data)[:2] for data in self._files]

    def drop(self) -> None:
        """Forget them."""
        self._files.clear()


class PipeClient:
    """Receives bytes."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._files: list[bytes] = []

    def take(self, count: int) -> Iterator[memoryview]:
        """Receive them, one after the other."""
        for _ in range(count):
            data = self._pipe.recv_bytes()
            self._files.append(data)
            yield memoryview(data)

    def drop(self) -> None:
        """Forget them."""
        self._files.clear()


def _view(segment: SharedMemory) -> memoryview:
    assert segment.buf is not None  # only after close()
    return segment.buf


class SegmentDriver:
    """Segments of multiprocessing.shared_memory, told to each client by name."""

    def __init__(self, pipes: Sequence[Pipe]) -> None:
        self.copied = 0
        self.lost: list[str] = []
        self._pipes = pipes
        self._files: list[bytes] = []
        self._segments: list[tuple[SharedMemory, int]] = []

    def fill(self, paths: Sequence[Path]) -> None:
        """Read each file."""
        self._files = [path.read_bytes() for path in paths]

    def give(self) -> None:
        """Create a segment for each file, copy the file in, tell its name."""
        while self._files:
            data = self._files.pop(0)
            segment = SharedMemory(create=True, size=len(data))
            self._segments.append((segment, len(data)))
            _view(segment)[: len(data)] = data
            self.copied += len(data)
            for pipe in self._pipes:
                try:
                    pipe.send((segment.name, len(data)))
                except (BrokenPipeError, ConnectionResetError) as error:
                    self.lost.append(type(error).__name__)

    def names(self) -> list[str]:
        """Give the segments' names."""
        return [segment.name for segment, _ in self._segments]

    def places(self) -> list[tuple[int, int]]:
        """Where the segments are mapped."""
        return [
            (_core.buffer_address(_view(segment))[0], nbytes) for segment, nbytes in self._segments
        ]

    def drop(self) -> None:
        """Close and unlink them."""
        for segment, _ in self._segments:
            segment.close()
            try:
                segment.unlink()
            except FileNotFoundError:
                self.lost.append(f"{segment.name}: gone before its owner unlinked it")
        self._segments.clear()


class SegmentClient:
    """Attaches by name."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._segments: list[tuple[SharedMemory, memoryview]] = []

    def take(self, count: int) -> Iterator[memoryview]:
        """Attach to each as it is told."""
        for _ in range(count):
            name, nbytes = self._pipe.recv()
            segment = SharedMemory(name=name)
            view = _view(segment)[:nbytes]
            self._segments.append((segment, view))
            yield view

    def drop(self) -> None:
        """Close them."""
        for segment, view in self._segments:
            view.release()
            segment.close()
        self._segments.clear()
