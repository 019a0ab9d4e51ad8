"""What whoever is trusted can do, and what a hostile peer can not: the lines of docs/security.md.

The seals bind peers. They do not bind whoever may trace the owner, nor a fork child: that boundary
is the kernel's, and each side of it is a test here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from children import in_child
from memory_cgroup import ENTER, memory_cgroup
from privilege import Privilege, run_as

from memdesc import (
    Access,
    BufferMemoryDescriptor,
    MappingError,
    MappingReason,
    SealedError,
    _core,
    page_size,
    receive_descriptor,
    send_descriptor,
)
from memdesc.memory.lifecycle import Recycling
from memdesc.memory.memfd import reopen

DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"
TESTS = Path(__file__).parents[1]
EVIL = b"evil"


def test_every_line_of_the_page_names_a_test_that_is_there() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", DOCUMENT.read_text())
    assert len(named) > 25
    for file, function in named:
        assert f"def {function}(" in (TESTS / file).read_text(), f"{file}::{function}"


@contextmanager
def handed(buffer: BufferMemoryDescriptor, **options: object) -> Iterator[object]:
    """What a peer gets by `send_descriptor`."""
    left, right = socket.socketpair()
    with left, right:
        send_descriptor(left, buffer, **options)  # type: ignore[arg-type]
        with receive_descriptor(right) as received:
            yield received


def descriptor_of(received: object) -> int:
    fd: int = received._parts[0].object.fileno()  # type: ignore[attr-defined]
    return fd


# ── Whoever may trace the owner ──────────────────────────────────────────────────────────────

OWNER = """
import ctypes, sys
import memdesc as md
buffer = md.BufferMemoryDescriptor(100)
import os; os.close(buffer.memory.grant(md.Access.READ_ONLY, user=0))  # sealed
if sys.argv[1] == "hidden":
    ctypes.CDLL(None).prctl(4, 0)  # PR_SET_DUMPABLE
print(os.getpid(), buffer.address, flush=True)
sys.stdin.readline()
print(buffer.read_bytes(0, 4), flush=True)
"""

TRACER = f"""
import errno, os, subprocess, sys
from memdesc import _core
owner = subprocess.Popen([sys.executable, "-c", {OWNER!r}, sys.argv[1]], stdin=-1, stdout=-1,
                         text=True)
pid, address = map(int, owner.stdout.readline().split())
def by_process_vm():
    _core.process_vm_writev(pid, b"evil", address)
def by_mem():
    fd = os.open(f"/proc/{{pid}}/mem", os.O_RDWR)
    os.pwrite(fd, b"evil", address)
for way in by_process_vm, by_mem:
    try:
        way()
        print("done")
    except OSError as error:
        print(errno.errorcode[error.errno])
print(owner.communicate("\\n", timeout=20)[0].strip())
"""


def trace(privilege: Privilege, owner: str) -> list[str]:
    """What became of each way into the owner's mapping, and what the owner then has."""
    done = run_as(privilege, TRACER, owner)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:3]


WRITTEN = ["done", "done", "b'evil'"]
UNTOUCHED = r"b'\x00\x00\x00\x00'"


@pytest.mark.parametrize("privilege", Privilege)
def test_a_tracer_writes_into_the_owner_s_own_mapping(privilege: Privilege) -> None:
    *ways, content = trace(privilege, "dumpable")
    if ways[0] == "EPERM":
        assert content == UNTOUCHED
        pytest.skip("process_vm_writev: EPERM to a process of the same user (yama, or seccomp)")
    assert [*ways, content] == WRITTEN


def test_an_owner_that_is_not_dumpable_is_out_of_reach_for_its_own_user() -> None:
    *ways, content = trace(Privilege.USER, "hidden")
    assert ways == ["EPERM", "EACCES"]
    assert content == UNTOUCHED


def test_an_owner_that_is_not_dumpable_is_within_reach_of_root() -> None:
    assert trace(Privilege.ROOT, "hidden") == WRITTEN


# ── Fork children ────────────────────────────────────────────────────────────────────────────


def test_a_fork_child_writes_through_what_it_inherited() -> None:
    with BufferMemoryDescriptor(100) as buffer:
        os.close(buffer.memory.grant(Access.READ_ONLY, user=os.geteuid()))  # sealed
        in_child(lambda: buffer.write_bytes(0, EVIL))
        assert buffer.read_bytes(0, 4) == EVIL


def test_a_fork_child_makes_no_new_way_to_write() -> None:
    with BufferMemoryDescriptor(100) as buffer:
        os.close(buffer.memory.grant(Access.READ_ONLY, user=os.geteuid()))

        def child() -> list[str]:
            fd, found = buffer.memory.fileno(), []
            for try_it in (
                lambda: os.pwrite(fd, EVIL, 0),
                lambda: _core.map_memory(
                    0, page_size, _core.PROT_READ | _core.PROT_WRITE, _core.MAP_SHARED, fd, 0
                ),
            ):
                try:
                    try_it()
                    found.append("done")
                except OSError as error:
                    found.append(errno.errorcode[error.errno or 0])
            return found

        assert in_child(child) == ["EPERM", "EPERM"]
        assert buffer.read_bytes(0, 4) == bytes(4)


# ── Peers ────────────────────────────────────────────────────────────────────────────────────


def test_a_grant_to_write_can_be_punched_but_kills_nobody() -> None:
    """Base pages come back as zeros; the owner loses bytes that the peer could have overwritten."""
    with BufferMemoryDescriptor(2 * page_size, max_access=Access.READ_WRITE) as buffer:
        buffer.write_bytes(0, b"x" * 2 * page_size)
        with handed(buffer) as received:
            _core.fallocate(descriptor_of(received), 3, 0, page_size)  # PUNCH_HOLE | KEEP_SIZE
        assert buffer.read_bytes(0, page_size) == bytes(page_size)
        assert buffer.read_bytes(page_size) == b"x" * page_size
        buffer.write_bytes(0, b"and the owner stores on")


def test_huge_memory_is_never_granted_for_writing() -> None:
    from memdesc import InvalidArgument, PageKind

    with pytest.raises(InvalidArgument):
        BufferMemoryDescriptor(1, pages=PageKind.HUGE, max_access=Access.READ_WRITE)


def test_a_grant_to_write_can_be_passed_on_to_anyone() -> None:
    with BufferMemoryDescriptor(100, max_access=Access.READ_WRITE) as buffer:
        with handed(buffer) as received, handed(received) as further:  # type: ignore[arg-type]
            further.write_bytes(0, EVIL)  # type: ignore[attr-defined]
        assert buffer.read_bytes(0, 4) == EVIL


def test_a_grant_to_read_is_passed_on_as_no_more() -> None:
    with BufferMemoryDescriptor(100) as buffer, handed(buffer) as received:
        with pytest.raises(MappingError) as caught:
            with handed(received, access=Access.READ_WRITE):  # type: ignore[arg-type]
                pass
        assert caught.value.reason is MappingReason.ACCESS
        with handed(received) as further:  # type: ignore[arg-type]
            with pytest.raises(SealedError):
                further.write_bytes(0, EVIL)  # type: ignore[attr-defined]


def test_nobody_takes_back_what_a_peer_has_mapped() -> None:
    buffer = BufferMemoryDescriptor(100)
    buffer.write_bytes(0, b"kept")
    with handed(buffer) as received:
        mapping = received.map()  # type: ignore[attr-defined]
        buffer.close()
        del buffer
        assert bytes(memoryview(mapping)[:4]) == b"kept"
        del mapping, received


def test_a_peer_of_the_same_user_takes_the_pages_of_lazy_memory() -> None:
    """It opens the file again for writing, and may allocate, not store."""
    with BufferMemoryDescriptor(8 * page_size, lazy=True) as buffer:
        with handed(buffer) as received:
            fd = reopen(descriptor_of(received), Access.READ_WRITE)
            before = os.fstat(fd).st_blocks
            _core.fallocate(fd, 0, 0, 8 * page_size)
            assert (before, os.fstat(fd).st_blocks * 512) == (0, 8 * page_size)
            with pytest.raises(PermissionError):
                os.pwrite(fd, EVIL, 0)
            os.close(fd)
        assert buffer.read_bytes() == bytes(8 * page_size)


def test_a_peer_of_the_same_user_can_lock_the_owner_out_of_further_grants() -> None:
    """It may change the mode of the file: who is not root then gets EACCES at the next grant."""
    with BufferMemoryDescriptor(100) as buffer:
        with handed(buffer) as received:
            os.fchmod(descriptor_of(received), 0)
            try:
                os.close(buffer.memory.grant(Access.READ_ONLY, user=os.geteuid()))
            except PermissionError as error:
                assert error.errno == errno.EACCES
        buffer.write_bytes(0, b"its own view goes on")


def test_a_peer_keeps_a_handle_that_no_lease_sees() -> None:
    """So memory that another user was given is never given to anyone else."""
    with BufferMemoryDescriptor(100) as buffer:
        with handed(buffer) as received:
            handle = os.open(f"/proc/self/fd/{descriptor_of(received)}", os.O_PATH)
        fd = buffer.memory.own_fd()
        before = signal.signal(signal.SIGRTMIN, signal.SIG_IGN)
        try:
            fcntl.fcntl(fd, 10, signal.SIGRTMIN)  # F_SETSIG: a broken lease would kill
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)  # "nobody else has it"
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        finally:
            signal.signal(signal.SIGRTMIN, before)
        again = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY)
        assert os.pread(again, 4, 0) == bytes(4)
        os.close(again)
        os.close(handle)
        assert buffer.memory.lifecycle.recycling() is Recycling.TRUSTED
        buffer.memory.lifecycle.grantees.add(os.geteuid() + 1)
        assert buffer.memory.lifecycle.recycling() is Recycling.NOBODY


SPARSE = (
    "import sys\n"
    + ENTER
    + """
import fcntl, os
import memdesc as md
from memdesc.memory.foreign import ForeignObject
from memdesc.mapping import Extent, map_extents
size = 256 << 20
fd = os.memfd_create("sparse", os.MFD_ALLOW_SEALING)
os.ftruncate(fd, size)
fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 6)
theirs = ForeignObject(fd, md.Access.READ_ONLY)
if sys.argv[2] == "read":
    at = sum(len(os.pread(fd, 1 << 20, offset)) for offset in range(0, size, 1 << 20))
else:
    view = memoryview(map_extents([Extent(theirs, 0, size)], md.Access.READ_ONLY))
    at = sum(view[offset] for offset in range(0, size, md.page_size))
print("lived")
"""
)


@pytest.mark.parametrize(("how", "killed"), [("read", False), ("map", True)])
def test_looking_at_a_peer_s_sparse_memory_is_charged_to_who_looks(how: str, killed: bool) -> None:
    """A page that was never there is allocated by the task that touches it through a mapping."""
    with memory_cgroup(64 << 20) as group:
        command = [sys.executable, "-c", SPARSE, str(group.folder), how]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if killed:
        assert done.returncode == -signal.SIGKILL, done.stderr
    else:
        assert (done.returncode, done.stdout) == (0, "lived\n"), done.stderr


def test_a_peer_is_killed_and_the_owner_does_not_notice() -> None:
    with BufferMemoryDescriptor(100, max_access=Access.READ_WRITE) as buffer:
        left, right = socket.socketpair()
        code = (
            "import socket, sys, time, memdesc as md\n"
            "d = md.receive_descriptor(socket.socket(fileno=int(sys.argv[1])))\n"
            "m = d.map(); memoryview(m)[:4] = b'last'; print('wrote', flush=True); time.sleep(60)"
        )
        with left, right:
            program = subprocess.Popen(
                [sys.executable, "-c", code, str(right.fileno())],
                pass_fds=[right.fileno()],
                stdout=subprocess.PIPE,
            )
            send_descriptor(left, buffer)
            assert program.stdout is not None
            assert program.stdout.readline() == b"wrote\n"
            program.kill()
            program.communicate()
        assert buffer.read_bytes(0, 4) == b"last"
        buffer.write_bytes(0, b"goes on")
