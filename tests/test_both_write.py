"""Stores of one task, seen by the others: through one and the same frames."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest
from listing2_program import read_line

import memdesc as md
from memdesc.vm.physical import same_pages

PAGES = 5

# Maps a share, tells where; then reads or stores as each line of its input says.
CLIENT = """
import sys
import memdesc as md
with md.connect("both", timeout=20) as connection:
    mapping = connection.map(sys.argv[1], prefault=True)
    view = memoryview(mapping)
    print(mapping.address, mapping.access.name, flush=True)
    for line in sys.stdin:
        offset, *store = (int(word) for word in line.split())
        try:
            if store:
                view[offset] = store[0]
            print(view[offset], flush=True)
        except TypeError as error:
            print(error, flush=True)
"""


@dataclass
class Client:
    process: subprocess.Popen[bytes]
    address: int
    access: str

    def _ask(self, line: str) -> str:
        assert self.process.stdin
        self.process.stdin.write(line.encode() + b"\n")
        return read_line(self.process)

    def load(self, offset: int) -> int:
        return int(self._ask(f"{offset}"))

    def store(self, offset: int, value: int) -> str:
        return self._ask(f"{offset} {value}")


@contextmanager
def client_of(share: str) -> Iterator[Client]:
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT, share],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    with process:
        try:
            address, access = read_line(process).split()
            yield Client(process, int(address), access)
        finally:
            process.kill()


def assert_same_frames(buffer: md.BufferMemoryDescriptor, client: Client) -> None:
    """One memory, by its frames where they can be seen, else by its object."""
    own = md.Task.current()
    with md.Task(client.process.pid) as task:
        proof = same_pages(own, buffer.address, task, client.address, buffer.length)
    assert proof, proof
    assert proof.denied or proof.proof == "frames"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_driver_and_clients_write_the_same_pages(stack: ExitStack) -> None:
    buffer = md.BufferMemoryDescriptor(PAGES * md.page_size, max_access=md.Access.READ_WRITE)
    service = stack.enter_context(md.Service("both"))
    service.share("pages", buffer)
    one, two = (stack.enter_context(client_of("pages")) for _ in range(2))
    view = memoryview(buffer)
    for page in range(PAGES):
        here, there = page * md.page_size, page * md.page_size + 100
        view[here] = 10 + page
        assert one.load(here) == two.load(here) == 10 + page
        one.store(there, 20 + page)
        assert view[there] == two.load(there) == 20 + page
        two.store(here, 30 + page)
        assert view[here] == one.load(here) == 30 + page
    assert (one.access, two.access) == ("READ_WRITE", "READ_WRITE")
    assert_same_frames(buffer, one)
    assert_same_frames(buffer, two)


def test_a_read_only_client_sees_the_drivers_stores(stack: ExitStack) -> None:
    buffer = md.BufferMemoryDescriptor(PAGES * md.page_size)
    service = stack.enter_context(md.Service("both"))
    service.share("pages", buffer)
    client = stack.enter_context(client_of("pages"))
    assert client.access == "READ_ONLY"
    view = memoryview(buffer)
    for page in range(PAGES):
        view[page * md.page_size] = 40 + page
        assert client.load(page * md.page_size) == 40 + page
    assert "read-only" in client.store(0, 1)
    assert view[0] == 40
    assert_same_frames(buffer, client)


def test_what_a_client_wrote_stays_when_it_is_killed(stack: ExitStack) -> None:
    buffer = md.BufferMemoryDescriptor(md.page_size, max_access=md.Access.READ_WRITE)
    service = stack.enter_context(md.Service("both"))
    service.share("pages", buffer)
    client = stack.enter_context(client_of("pages"))
    client.store(7, 77)
    client.process.kill()
    client.process.wait(20)
    assert memoryview(buffer)[7] == 77


def test_a_client_writes_memory_of_its_own_that_the_service_maps(stack: ExitStack) -> None:
    # Row 5 of the seeds' first document: what the application must modify, it allocates.
    code = """
import sys
import memdesc as md
mine = md.BufferMemoryDescriptor(5000, max_access=md.Access.READ_WRITE)
with md.connect("both", timeout=20) as connection:
    there = mine.create_mapping_in_task(connection.task)
    memoryview(mine)[:4] = b"mine"
    print(there.length, flush=True)
    sys.stdin.readline()
    print(bytes(mine)[:4].decode(), flush=True)
    sys.stdin.readline()
"""
    service = stack.enter_context(md.Service("both"))
    process = stack.enter_context(
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
    )
    stack.callback(process.kill)
    client = service.wait_client(20)
    mapping = client.wait_mapping(20)
    assert read_line(process) == "5000"
    view = memoryview(mapping)
    assert view[:4] == b"mine"
    view[:4] = b"ours"
    assert process.stdin
    process.stdin.write(b"\n")
    assert read_line(process) == "ours"
