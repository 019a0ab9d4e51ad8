"""Memory given read-only is written by nobody: right x way x kind of page, and the errno of each.

The client is a real process that got the memory as any client does, by a service or by
`send_descriptor`, and then tries every way of `attacks.py`. The kernel refuses each; the owner's
bytes, the size and the seals are what they were.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from huge_pool import huge_pages
from privilege import Privilege, own_privilege, run_as

from memdesc import (
    Access,
    BufferMemoryDescriptor,
    MappingError,
    MappingReason,
    MemoryDescriptor,
    PageKind,
    SealedError,
    Service,
    Task,
    connect,
    receive_descriptor,
    send_descriptor,
)

ATTACKS = Path(__file__).with_name("attacks.py").read_text()

# What the kernel answers to each way, on base pages; and where huge pages differ.
GIVEN = {
    "map_given_writable": "EACCES",
    "protect_given_mapping": "EACCES",
    "protect_own_mapping": "EACCES",
    "protect_duplicate": "EACCES",
    "write_given": "EBADF",
    "punch_given": "EBADF",
    "seal_given": "EPERM",
    "truncate_given": "EINVAL",
    "remove_pages": "EACCES",
    "remap_pages": "EINVAL",
    "force_by_mem": "EIO",
    "copy_to_itself": "EFAULT",
    "poke_child": "EIO",
    "read_into": "EFAULT",
    "register_with_uring": "EFAULT",
    "answer_faults": "EPERM",
    "hand_on_and_write": "EBADF",
}
REOPENED = {
    "truncate_by_path": "EPERM",
    "reopen_truncating": "EPERM",
    "reopen_and_map": "EPERM",
    "reopen_map_and_protect": "EACCES",
    "reopen_map_and_force": "EIO",
    "reopen_and_write": "EPERM",
    "reopen_and_append": "EPERM",
    "reopen_and_pwritev": "EPERM",
    "reopen_and_punch": "EPERM",
    "reopen_and_shrink": "EPERM",
    "reopen_and_grow": "EPERM",
    "reopen_and_grow_by_fallocate": "EPERM",
    "reopen_and_seal": "EPERM",
    "reopen_and_sendfile": "EPERM",
    "reopen_and_copy_range": "EPERM",
    "reopen_and_splice": "EPERM",
    "reopen_map_and_remove": "EACCES",
    "open_path_then_write": "EPERM",
}
HARMLESS = {
    "write_private_copy": "done",
    "force_private_copy": "done",
    "drop_own_pages": "done",
    "move_own_mapping": "done",
    "vmsplice_pages": "done",
}
TAKES_PAGES = {"reopen_and_allocate": "done"}
HUGE = {
    "protect_duplicate": "EINVAL",  # mremap makes no second mapping of huge pages
    "move_own_mapping": "EINVAL",
    "reopen_and_write": "EINVAL",  # and write() is not there for them
    "reopen_and_append": "EINVAL",
    "reopen_and_pwritev": "EINVAL",
    "reopen_and_sendfile": "EINVAL",
    "reopen_and_copy_range": "EXDEV",
    "reopen_and_splice": "EINVAL",
    "open_path_then_write": "EINVAL",
}


def expected(pages: PageKind, may_reopen: bool) -> dict[str, str]:
    """The whole grid for one client; one that may not open the file again fails at that."""
    outcomes = GIVEN | REOPENED | HARMLESS | TAKES_PAGES
    if pages is PageKind.HUGE:
        outcomes |= HUGE
    if not may_reopen:
        outcomes |= dict.fromkeys([*REOPENED, *TAKES_PAGES], "EACCES")
    return outcomes


@pytest.fixture
def meeting(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder that every user may enter, with msgspec for an interpreter that has none."""
    with tempfile.TemporaryDirectory(prefix="md-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        source = Path(msgspec.__file__).parent
        shutil.copytree(source, folder / "msgspec", ignore=shutil.ignore_patterns("__pycache__"))
        for path in folder.rglob("*"):
            path.chmod(0o755)
        yield folder


@contextlib.contextmanager
def offered(how: str, folder: Path, buffer: MemoryDescriptor) -> Iterator[Path]:
    """Give the buffer to whoever comes to a socket, by a service or by `send_descriptor`."""
    path = folder / "socket"
    if how == "service":
        with Service(str(path), allow=lambda task: True) as service:
            service.share("frames", buffer)
            yield path
        return
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o666)
        listener.listen(1)
        stop = os.eventfd(0)
        thread = threading.Thread(target=_send_once, args=(listener, stop, buffer))
        thread.start()
        try:
            yield path
        finally:
            os.eventfd_write(stop, 1)
            thread.join(60)
            os.close(stop)


def _send_once(listener: socket.socket, stop: int, buffer: MemoryDescriptor) -> None:
    if listener in select.select([listener, stop], [], [], 60)[0]:
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(60)
            send_descriptor(sock, buffer)


def attack(
    client: Privilege, how: str, folder: Path, buffer: MemoryDescriptor, page_size: int
) -> dict[str, str]:
    """What came of every way, tried by a client of that privilege that was given the buffer."""
    before = buffer.read_bytes(0, 16).hex()
    with offered(how, folder, buffer) as path:
        done = run_as(client, ATTACKS, str(folder), how, str(path), str(page_size))
    if done.returncode:
        if "No module named 'msgspec" in done.stderr:
            pytest.skip("the interpreter that another user may run can not load msgspec")
        raise AssertionError(done.stderr)
    answer = json.loads(done.stdout)
    assert answer["seen"] == before  # it had the memory
    outcomes: dict[str, str] = answer["outcomes"]
    return outcomes


def differing(found: dict[str, str], wanted: dict[str, str]) -> dict[str, tuple[str, str]]:
    """The ways with another outcome: (found, wanted). A means that is denied altogether is none."""
    assert found.keys() == wanted.keys()
    return {
        way: (found[way], wanted[way])
        for way in wanted
        if found[way] != wanted[way] and not found[way].startswith("denied: ")
    }


@pytest.mark.slow
@pytest.mark.parametrize("pages", PageKind)
@pytest.mark.parametrize("how", ["service", "send_descriptor"])
@pytest.mark.parametrize("client", Privilege)
def test_no_way_writes_what_was_given_read_only(
    client: Privilege, how: str, pages: PageKind, meeting: Path
) -> None:
    enough = huge_pages(4) if pages is PageKind.HUGE else contextlib.nullcontext()
    with enough, BufferMemoryDescriptor(2 * pages.page_size, pages=pages, name="frames") as buffer:
        content = os.urandom(4096)
        buffer.write_bytes(0, content)
        buffer.write_bytes(pages.page_size, content)
        status = os.fstat(buffer.memory.fileno())

        found = attack(client, how, meeting, buffer, pages.page_size)

        same_user = client is not Privilege.USER or own_privilege() is Privilege.USER
        assert differing(found, expected(pages, may_reopen=same_user)) == {}
        assert buffer.read_bytes(0, 4096) == content
        assert buffer.read_bytes(pages.page_size, 4096) == content
        assert os.fstat(buffer.memory.fileno()).st_size == status.st_size
        assert os.fstat(buffer.memory.fileno()).st_blocks == status.st_blocks
        buffer.write_bytes(0, b"the owner goes on storing")
    del buffer


@pytest.mark.slow
def test_the_same_ways_do_write_what_was_given_read_write(meeting: Path) -> None:
    """The control: what is refused above is refused by the seal, not by a mistake of the test."""
    own = own_privilege()
    if own is None:
        pytest.skip("started with a mixture of privileges")
    with BufferMemoryDescriptor(8192, max_access=Access.READ_WRITE) as buffer:
        buffer.write_bytes(0, b"x" * 8192)
        found = attack(own, "service", meeting, buffer, 4096)
        stopped = {
            "seal_given": "EPERM",
            "truncate_given": "EPERM",
            "truncate_by_path": "EPERM",
            "reopen_truncating": "EPERM",
            "reopen_and_shrink": "EPERM",
            "reopen_and_grow": "EPERM",
            "reopen_and_grow_by_fallocate": "EPERM",
            "reopen_and_append": "EPERM",
            "reopen_and_seal": "EPERM",
            "reopen_map_and_force": "EIO",  # shared pages are never written by force
        }
        written = dict.fromkeys(expected(PageKind.BASE, may_reopen=True), "done")
        assert differing(found, written | stopped) == {}
        assert b"evil" in buffer.read_bytes()


# ── What we refuse ourselves, since the kernel could not ─────────────────────────────────────


@contextlib.contextmanager
def connected_client(service: Service) -> Iterator[Task]:
    """Another process that is connected to a service, and answers."""
    code = "import sys, memdesc; c = memdesc.connect(sys.argv[1], timeout=20); sys.stdin.read()"
    for earlier in service.clients():
        earlier.close()
    command = [sys.executable, "-c", code, service.name]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as program:
        try:
            yield next(c.task for c in iter(lambda: service.wait_client(20), None) if not c.closed)
        finally:
            program.kill()


def test_memory_for_all_to_write_is_not_shared_read_only() -> None:
    with (
        BufferMemoryDescriptor(100, max_access=Access.READ_WRITE) as buffer,
        Service("camera") as camera,
    ):
        with pytest.raises(SealedError):
            camera.share("frames", buffer, access=Access.READ_ONLY)
        left, right = socket.socketpair()
        with left, right:
            with pytest.raises(SealedError):
                send_descriptor(left, buffer, access=Access.READ_ONLY)
            right.setblocking(False)
            with pytest.raises(BlockingIOError):
                right.recv(1)  # nothing was sent
        with connected_client(camera) as task:
            with pytest.raises(MappingError) as caught:
                buffer.create_mapping_in_task(task, access=Access.READ_ONLY)
            assert caught.value.reason is MappingReason.NOT_ENFORCED
            with buffer.create_mapping_in_task(task) as there:
                assert there.access is Access.READ_WRITE


def test_a_courtesy_is_one_that_the_receiver_knows_of() -> None:
    with BufferMemoryDescriptor(100, max_access=Access.READ_WRITE) as buffer:
        left, right = socket.socketpair()
        with left, right:
            send_descriptor(left, buffer, access=Access.READ_ONLY, enforced=False)
            received = receive_descriptor(right)
        with received:
            assert received.max_access is Access.READ_ONLY
            assert not received.enforced
            with pytest.raises(MappingError) as caught:
                received.map(access=Access.READ_WRITE)
            assert caught.value.reason is MappingReason.ACCESS
            # It holds him who keeps to it: the file itself may be written by this user.
            fd = os.open(f"/proc/self/fd/{received._parts[0].object.fileno()}", os.O_RDWR)  # type: ignore[attr-defined]
            os.pwrite(fd, b"for all to write", 0)
            os.close(fd)
            assert buffer.read_bytes(0, 16) == b"for all to write"


def test_a_courtesy_by_share_and_by_push() -> None:
    with (
        BufferMemoryDescriptor(100, max_access=Access.READ_WRITE) as buffer,
        Service("camera") as camera,
    ):
        camera.share("frames", buffer, access=Access.READ_ONLY, enforced=False)
        with connect("camera") as client:
            with client.map("frames") as mapping:
                assert mapping.access is Access.READ_ONLY
                assert memoryview(mapping).readonly
        with connected_client(camera) as task:
            there = buffer.create_mapping_in_task(task, access=Access.READ_ONLY, enforced=False)
            assert (there.access, there.verified) in [(Access.READ_ONLY, v) for v in (True, None)]
            there.unmap()


def test_more_than_max_access_is_never_given() -> None:
    with BufferMemoryDescriptor(100) as buffer, Service("camera") as camera:
        with pytest.raises(SealedError):
            camera.share("frames", buffer, access=Access.READ_WRITE)
        left, right = socket.socketpair()
        with left, right, pytest.raises(SealedError):
            send_descriptor(left, buffer, access=Access.READ_WRITE, enforced=False)
        with pytest.raises(MappingError) as caught:
            buffer.create_mapping_in_task(Task.current(), access=Access.READ_WRITE)
        assert caught.value.reason is MappingReason.ACCESS
