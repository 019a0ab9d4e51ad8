"""The recycler under attack: a peer keeps something of a freed buffer, and waits for the next.

The peers are processes of their own. What each keeps is looked at again once the owner has made,
and filled, other buffers: it must never show them.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from children import NOBODY, in_child
from puppets import Puppet, Told
from runs import USER, interpreters, version_of, why_not

from memdesc import Access, BufferMemoryDescriptor, recycler, send_descriptor

sys.path.append(str(Path(__file__).parents[1] / "memory"))
from recycling import KIB, fresh_recycler, identity_of, statistics

SIZE = 256 * KIB
SECRET = b"the next buffer's secret"
RO, RW = Access.READ_ONLY, Access.READ_WRITE

KEEPS = {
    "a mapping": "kept = received.map()\nreceived.close()",
    "a descriptor": "kept = os.dup(fd)\nreceived.close()",
    "a descriptor opened again": (
        "kept = os.open(f'/proc/self/fd/{fd}', os.O_RDONLY)\nreceived.close()"
    ),
    "an O_PATH handle": "kept = os.open(f'/proc/self/fd/{fd}', os.O_PATH)\nreceived.close()",
}
SHOWS = {
    "a mapping": "bytes(memoryview(kept)[:24]).decode('latin1')",
    "a descriptor": "os.pread(kept, 24, 0).decode('latin1')",
    "a descriptor opened again": "os.pread(kept, 24, 0).decode('latin1')",
    "an O_PATH handle": (
        "(again := os.open(f'/proc/self/fd/{kept}', os.O_RDONLY)) and "
        "os.pread(again, 24, 0).decode('latin1')"
    ),
}
LETS_GO = dict.fromkeys(KEEPS, "os.close(kept)") | {"a mapping": "kept.unmap()\ndel kept"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    with fresh_recycler():
        yield


@contextmanager
def given(buffer: BufferMemoryDescriptor) -> Iterator[Puppet]:
    """A peer that was handed the buffer over a Unix socket."""
    address = f"\0memdesc-test-{os.getpid()}-{id(buffer)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, Puppet() as one:
        listener.bind(address)
        listener.listen(1)
        one.do("import socket")
        one.do(f"s = socket.socket(socket.AF_UNIX); s.connect({address!r})")
        connection, _ = listener.accept()
        with connection:
            send_descriptor(connection, buffer)
            one.do("received = md.receive_descriptor(s)")
            one.do("s.close()")
        one.do("fd = received._parts[0].object.fileno()")
        yield one


def next_buffers(identity: tuple[int, int]) -> list[BufferMemoryDescriptor]:
    """What the program makes next; none of it may be of that memory."""
    buffers = [BufferMemoryDescriptor(SIZE) for _ in range(3)]
    for buffer in buffers:
        buffer.write_bytes(0, SECRET)
    assert identity not in [identity_of(buffer) for buffer in buffers]
    return buffers


@pytest.mark.slow
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("max_access", Access)
def test_a_peer_keeps_what_it_was_given(keep: str, max_access: Access) -> None:
    buffer = BufferMemoryDescriptor(SIZE, max_access=max_access)
    buffer.write_bytes(0, b"for the peer")
    identity = identity_of(buffer)
    with given(buffer) as one:
        one.do(KEEPS[keep])
        buffer.close()
        assert statistics().kept_blocks == 0
        made = next_buffers(identity)
        assert one.do(SHOWS[keep]).startswith("for the peer")
        assert all(other.read_bytes(0, len(SECRET)) == SECRET for other in made)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [keep for keep in KEEPS if keep != "an O_PATH handle"])
@pytest.mark.parametrize("max_access", Access)
def test_a_trusted_peer_keeps_what_it_was_given(keep: str, max_access: Access) -> None:
    """The lease tells, for as long as it does."""
    recycler.configure(trust_same_user=True)
    buffer = BufferMemoryDescriptor(SIZE, max_access=max_access)
    buffer.write_bytes(0, b"for the peer")
    identity = identity_of(buffer)
    with given(buffer) as one:
        one.do(KEEPS[keep])
        buffer.close()
        del buffer
        assert statistics().kept_blocks == 1
        for _ in range(3):
            with BufferMemoryDescriptor(SIZE, max_access=max_access, recycle=True) as other:
                other.write_bytes(0, SECRET)
                assert identity_of(other) != identity
        assert statistics().busy > 0
        assert one.do(SHOWS[keep]).startswith("for the peer")
        recycler.trim()


@pytest.mark.slow
@pytest.mark.parametrize("max_access", Access)
def test_memory_that_a_trusted_peer_let_go_of_is_used_again(max_access: Access) -> None:
    recycler.configure(trust_same_user=True)
    with BufferMemoryDescriptor(SIZE, max_access=max_access) as buffer:
        buffer.write_bytes(0, b"\xff" * SIZE)
        identity = identity_of(buffer)
        with given(buffer) as one:
            one.do(KEEPS["a mapping"])
            buffer.close()
            with BufferMemoryDescriptor(SIZE, max_access=max_access, recycle=False):
                assert recycler._recycler._blocks[0].object.is_held_by_others()
            one.do(LETS_GO["a mapping"])
            one.do("import gc; gc.collect()")
            with BufferMemoryDescriptor(SIZE, max_access=max_access) as again:
                assert identity_of(again) == identity
                assert again.read_bytes() == bytes(SIZE)
                assert again.memory.lifecycle.grantees == {os.geteuid()}
                assert again.memory.lifecycle.row.peers_get is max_access
                again.write_bytes(0, b"the owner stores")
                again.memory.lifecycle.grant(max_access, enforced=True, name="again")


@pytest.mark.slow
def test_the_exception_of_trust_an_o_path_handle_reaches_the_next_buffer() -> None:
    """What `trust_same_user` says yes to."""
    recycler.configure(trust_same_user=True)
    buffer = BufferMemoryDescriptor(SIZE)
    identity = identity_of(buffer)
    with given(buffer) as one:
        one.do(KEEPS["an O_PATH handle"])
        one.do("import gc; gc.collect()")
        buffer.close()
        del buffer
        with BufferMemoryDescriptor(SIZE) as other:
            assert identity_of(other) == identity
            other.write_bytes(0, SECRET)
            assert one.do(SHOWS["an O_PATH handle"]) == SECRET.decode()


def test_a_program_that_trusts_no_longer_lets_go_of_what_others_had() -> None:
    recycler.configure(trust_same_user=True)
    with BufferMemoryDescriptor(SIZE) as buffer:
        os.close(buffer.memory.grant(RO, user=os.geteuid()))
    assert statistics().kept_blocks == 1
    recycler.configure(trust_same_user=False)
    assert statistics().kept_blocks == 0


@pytest.mark.parametrize("trust", [False, True])
def test_what_another_user_was_given_is_never_used_again(trust: bool) -> None:
    recycler.configure(trust_same_user=trust)
    buffer = BufferMemoryDescriptor(SIZE)
    os.close(buffer.memory.grant(RO, user=os.geteuid() + 1))
    buffer.close()
    assert statistics().kept_blocks == 0


@pytest.mark.parametrize("trust", [False, True])
def test_another_user_keeps_an_o_path_handle(trust: bool) -> None:
    recycler.configure(trust_same_user=trust)
    if denied := why_not(USER):
        pytest.skip(f"can not become another user: {denied}")
    python = next((path for path in interpreters() if version_of(path, USER)), None)
    if python is None:
        pytest.skip("no Python here that another user may run")
    buffer = BufferMemoryDescriptor(SIZE)
    identity = identity_of(buffer)
    fd = buffer.memory.grant(RO, user=NOBODY)
    asking, answering = socket.socketpair()
    code = (
        "import os, sys\n"
        f"fd, sock = {fd}, {answering.fileno()}\n"
        "handle = os.open(f'/proc/self/fd/{fd}', os.O_PATH)\n"
        "os.close(fd)\n"
        "os.write(sock, b'x')\n"
        "os.read(sock, 1)\n"
        "try:\n"
        "    again = os.open(f'/proc/self/fd/{handle}', os.O_RDONLY)\n"
        "    print(os.pread(again, 24, 0))\n"
        "except PermissionError:\n"
        "    print('denied')\n"
    )
    with asking, answering:
        child = subprocess.Popen(
            [*USER, str(python), "-c", code],
            pass_fds=[fd, answering.fileno()],
            cwd="/",
            stdout=subprocess.PIPE,
            text=True,
        )
        os.close(fd)
        asking.settimeout(30)
        assert asking.recv(1) == b"x"
        buffer.close()
        made = next_buffers(identity)
        asking.send(b"x")
        said, _ = child.communicate(timeout=30)
    assert child.returncode == 0
    assert SECRET.decode() not in said
    assert all(other.read_bytes(0, len(SECRET)) == SECRET for other in made)


# ── Who was given nothing, but may trace this process ────────────────────────────────────────

REACHES = {
    "/proc/PID/fd": "kept = os.open(f'/proc/{pid}/fd/{fd}', os.O_RDONLY)",
    "/proc/PID/fd, writable": "kept = os.open(f'/proc/{pid}/fd/{fd}', os.O_RDWR)",
    "/proc/PID/map_files": (
        "import glob\n"
        "names = [n for n in os.listdir(f'/proc/{pid}/map_files')"
        " if int(n.split('-')[0], 16) == address]\n"
        "kept = os.open(f'/proc/{pid}/map_files/{names[0]}', os.O_RDONLY)"
    ),
    "pidfd_getfd": (
        "from memdesc import _core\n"
        "pidfd = os.pidfd_open(pid)\n"
        "kept = os.open(f'/proc/self/fd/{_core.pidfd_getfd(pidfd, fd)}', os.O_RDONLY)"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("when", ["in use", "kept"])
def test_a_tracer_holds_a_handle(reach: str, when: str) -> None:
    """Of the kernel's own kind: seen by the lease, whoever opened it, and however."""
    buffer = BufferMemoryDescriptor(SIZE)
    identity = identity_of(buffer)
    with Puppet() as one:
        told = f"pid, fd, address = {os.getpid()}, {buffer.memory.own_fd()}, {buffer.address}"
        one.do(told)

        def tap() -> None:
            try:
                one.do(REACHES[reach])
            except Told as error:
                if error.kind in ("PermissionError", "NotPrivilegedError"):
                    pytest.skip(f"{reach}: this user may not trace ({error})")
                raise

        if when == "in use":
            tap()
            buffer.close()
        else:
            buffer.close()
            tap()
        next_buffers(identity)
        assert statistics().busy > 0
        assert one.do("os.pread(kept, 24, 0) == bytes(24)")
        one.do("os.close(kept)" + ("\nos.close(pidfd)" if "getfd" in reach else ""))


def test_a_fork_child_keeps_its_mapping() -> None:
    buffer = BufferMemoryDescriptor(SIZE)
    identity = identity_of(buffer)
    view = memoryview(buffer)
    release, held = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(held)
        os.read(release, 1)
        os._exit(0 if bytes(view[:24]) == bytes(24) else 1)
    os.close(release)
    view.release()
    buffer.close()
    assert statistics().kept_blocks == 0
    next_buffers(identity)
    os.close(held)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_fork_child_is_given_nothing_that_its_parent_kept() -> None:
    with BufferMemoryDescriptor(SIZE) as buffer:
        buffer.write_bytes(0, SECRET)
        identity = identity_of(buffer)
    assert statistics().kept_blocks == 1

    assert in_child(lambda: f" {identity[1]} " in Path("/proc/self/maps").read_text()) is False
