"""What a client tries with memory that it was given read-only: every way to write that Linux has.

Run in the client's process, told where the memory comes from and how large its pages are. Prints,
as JSON, what the kernel answered to each way: the errno's name, or "done" where it let us.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

sys.path.append(sys.argv[1])  # where msgspec lies, for an interpreter that has none

import memdesc as md
from memdesc import _core

MADV_DONTNEED, MADV_REMOVE = 4, 9
PUNCH = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
MREMAP_MAYMOVE = 1
PTRACE_TRACEME, PTRACE_POKEDATA, PTRACE_KILL = 0, 5, 8
IO_URING_SETUP, IO_URING_REGISTER = 425, 427  # the same on every machine
EVIL = b"evil"

libc = ctypes.CDLL(None, use_errno=True)
libc.mremap.restype = libc.ptrace.restype = ctypes.c_long


class Denied(Exception):
    """The means of a way is denied to this process altogether, memory or not."""


class Victim:
    """What the client has: a descriptor, a mapping, and how large its pages are."""

    def __init__(self, descriptor: md.ReceivedMemoryDescriptor, size: int) -> None:
        self.fd: int = descriptor._parts[0].object.fileno()  # type: ignore[attr-defined]
        self.mapping = descriptor.map()
        self.address = self.mapping.address
        self.page = size

    @contextmanager
    def reopened(self, flags: int = os.O_RDWR) -> Iterator[int]:
        fd = os.open(f"/proc/self/fd/{self.fd}", flags)
        try:
            yield fd
        finally:
            os.close(fd)


def call(function: Callable[..., int], *arguments: object) -> int:
    """Call into the C library; its errno is our OSError."""
    ctypes.set_errno(0)
    result = function(*arguments)
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def pointer(value: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(value)


def map_shared(victim: Victim, fd: int, prot: int) -> _core.MappedMemory:
    return _core.map_memory(0, victim.page, prot, _core.MAP_SHARED, fd, 0)


READ, READ_WRITE = _core.PROT_READ, _core.PROT_READ | _core.PROT_WRITE

# -- by the descriptor and the mapping that were given ---------------------------------


def map_given_writable(v: Victim) -> None:
    map_shared(v, v.fd, READ_WRITE)


def protect_given_mapping(v: Victim) -> None:
    _core.mprotect(v.address, v.page, READ_WRITE)


def protect_own_mapping(v: Victim) -> None:
    mapping = map_shared(v, v.fd, READ)
    _core.mprotect(mapping.address, v.page, READ_WRITE)


def protect_duplicate(v: Victim) -> None:
    mapping = _core.duplicate_memory(v.address, v.page)
    _core.mprotect(mapping.address, v.page, READ_WRITE)


def write_given(v: Victim) -> None:
    os.pwrite(v.fd, EVIL, 0)


def punch_given(v: Victim) -> None:
    _core.fallocate(v.fd, PUNCH, 0, v.page)


def seal_given(v: Victim) -> None:
    fcntl.fcntl(v.fd, fcntl.F_ADD_SEALS, _core.F_SEAL_WRITE)


def truncate_given(v: Victim) -> None:
    os.ftruncate(v.fd, 0)


def truncate_by_path(v: Victim) -> None:
    os.truncate(f"/proc/self/fd/{v.fd}", 0)


def remove_pages(v: Victim) -> None:
    _core.madvise(v.address, v.page, MADV_REMOVE)


def remap_pages(v: Victim) -> None:
    call(libc.remap_file_pages, pointer(v.address), v.page, 0, 1, 0)


def force_by_mem(v: Victim) -> None:
    fd = os.open("/proc/self/mem", os.O_RDWR)
    try:
        os.pwrite(fd, EVIL, v.address)
    finally:
        os.close(fd)


def copy_to_itself(v: Victim) -> None:
    _core.process_vm_writev(os.getpid(), EVIL, v.address)


def poke_child(v: Victim) -> None:
    """ptrace writes by force, as a debugger does; here into a child that shares the mapping."""
    pid = os.fork()
    if pid == 0:
        if libc.ptrace(PTRACE_TRACEME, 0, None, None) == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSTOPPED(status):
        raise Denied("a child may not be traced")
    try:
        call(libc.ptrace, PTRACE_POKEDATA, pid, pointer(v.address), pointer(0x6C697665))
    finally:
        libc.ptrace(PTRACE_KILL, pid, None, None)
        os.waitpid(pid, 0)


def read_into(v: Victim) -> None:
    """Have the kernel store for us: read() from a pipe into the pages."""
    reader, writer = os.pipe()
    try:
        os.write(writer, EVIL)
        call(libc.read, reader, pointer(v.address), len(EVIL))
    finally:
        os.close(reader)
        os.close(writer)


def register_with_uring(v: Victim) -> None:
    """Register the pages as a buffer: the kernel pins them, to write into them later."""
    parameters = ctypes.create_string_buffer(120)
    try:
        ring = call(libc.syscall, IO_URING_SETUP, 1, parameters)
    except OSError as error:
        raise Denied(f"io_uring_setup: {error.strerror}") from error
    try:
        iovec = struct.pack("QQ", v.address, v.page)
        call(libc.syscall, IO_URING_REGISTER, ring, 0, iovec, 1)
    finally:
        os.close(ring)


def answer_faults(v: Victim) -> None:
    """Have userfaultfd ask us what a missing page shall hold."""
    number = {"x86_64": 323, "aarch64": 282}.get(os.uname().machine)
    if number is None:
        raise Denied("the number of userfaultfd is not known here")
    try:
        fd = call(libc.syscall, number, 1)  # UFFD_USER_MODE_ONLY
    except OSError as error:
        raise Denied(f"userfaultfd: {error.strerror}") from error
    try:
        fcntl.ioctl(fd, 0xC018AA3F, struct.pack("QQQ", 0xAA, 0, 0))  # UFFDIO_API
        fcntl.ioctl(fd, 0xC020AA00, struct.pack("QQQQ", v.address, v.page, 1, 0))  # _REGISTER
    finally:
        os.close(fd)


# -- by another opening of it, writable ---------------------------------


def reopen_truncating(v: Victim) -> None:
    with v.reopened(os.O_RDWR | os.O_TRUNC):
        pass


def reopen_and_map(v: Victim) -> None:
    with v.reopened() as fd:
        map_shared(v, fd, READ_WRITE)


def reopen_map_and_protect(v: Victim) -> None:
    with v.reopened() as fd:
        mapping = map_shared(v, fd, READ)
        _core.mprotect(mapping.address, v.page, READ_WRITE)


def reopen_map_and_force(v: Victim) -> None:
    with v.reopened() as fd:
        mapping = map_shared(v, fd, READ)
        mem = os.open("/proc/self/mem", os.O_RDWR)
        try:
            os.pwrite(mem, EVIL, mapping.address)
        finally:
            os.close(mem)


def reopen_and_write(v: Victim) -> None:
    with v.reopened() as fd:
        os.write(fd, EVIL)


def reopen_and_append(v: Victim) -> None:
    with v.reopened(os.O_RDWR | os.O_APPEND) as fd:
        os.write(fd, EVIL)


def reopen_and_pwritev(v: Victim) -> None:
    with v.reopened() as fd:
        os.pwritev(fd, [EVIL], 0)


def reopen_and_punch(v: Victim) -> None:
    with v.reopened() as fd:
        _core.fallocate(fd, PUNCH, 0, v.page)


def reopen_and_shrink(v: Victim) -> None:
    with v.reopened() as fd:
        os.ftruncate(fd, 0)


def reopen_and_grow(v: Victim) -> None:
    with v.reopened() as fd:
        os.ftruncate(fd, os.fstat(fd).st_size + v.page)


def reopen_and_grow_by_fallocate(v: Victim) -> None:
    with v.reopened() as fd:
        _core.fallocate(fd, 0, os.fstat(fd).st_size, v.page)


def reopen_and_allocate(v: Victim) -> None:
    """Take the pages that lazy memory has not: allowed, and charged to us."""
    with v.reopened() as fd:
        _core.fallocate(fd, 0, 0, v.page)


def reopen_and_seal(v: Victim) -> None:
    with v.reopened() as fd:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _core.F_SEAL_WRITE)


def reopen_and_sendfile(v: Victim) -> None:
    with v.reopened() as fd:
        source = os.memfd_create("source")
        try:
            os.write(source, EVIL)
            os.sendfile(fd, source, 0, len(EVIL))
        finally:
            os.close(source)


def reopen_and_copy_range(v: Victim) -> None:
    with v.reopened() as fd:
        source = os.memfd_create("source")
        try:
            os.write(source, EVIL * 1024)
            os.copy_file_range(source, fd, len(EVIL) * 1024, 0, 0)
        finally:
            os.close(source)


def reopen_and_splice(v: Victim) -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, EVIL)
        with v.reopened() as fd:
            os.splice(reader, fd, len(EVIL), offset_dst=0)
    finally:
        os.close(reader)
        os.close(writer)


def reopen_map_and_remove(v: Victim) -> None:
    with v.reopened() as fd:
        mapping = map_shared(v, fd, READ)
        _core.madvise(mapping.address, v.page, MADV_REMOVE)


def hand_on_and_write(v: Victim) -> None:
    """Send the descriptor to ourselves: what arrives is no better."""
    left, right = socket.socketpair(socket.AF_UNIX)
    with left, right:
        rights = array.array("i", [v.fd])
        left.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        _, ancillary, _, _ = right.recvmsg(1, socket.CMSG_SPACE(4))
        fd = array.array("i", ancillary[0][2])[0]
        try:
            os.pwrite(fd, EVIL, 0)
        finally:
            os.close(fd)


def open_path_then_write(v: Victim) -> None:
    """An O_PATH handle asks for no rights; opening it for writing does."""
    path = os.open(f"/proc/self/fd/{v.fd}", os.O_PATH)
    try:
        fd = os.open(f"/proc/self/fd/{path}", os.O_RDWR)
        try:
            os.pwrite(fd, EVIL, 0)
        finally:
            os.close(fd)
    finally:
        os.close(path)


# -- what is allowed, and is harmless ---------------------------------


def write_private_copy(v: Victim) -> None:
    mapping = _core.map_memory(0, v.page, READ_WRITE, _core.MAP_PRIVATE, v.fd, 0)
    ctypes.memmove(mapping.address, EVIL, len(EVIL))
    assert ctypes.string_at(mapping.address, len(EVIL)) == EVIL


def force_private_copy(v: Victim) -> None:
    """A forced write into a private mapping makes a copy, as a debugger's breakpoint does."""
    mapping = _core.map_memory(0, v.page, READ, _core.MAP_PRIVATE, v.fd, 0)
    mem = os.open("/proc/self/mem", os.O_RDWR)
    try:
        os.pwrite(mem, EVIL, mapping.address)
    finally:
        os.close(mem)


def drop_own_pages(v: Victim) -> None:
    _core.madvise(v.address, v.page, MADV_DONTNEED)


def move_own_mapping(v: Victim) -> None:
    mapping = _core.duplicate_memory(v.address, v.page)
    call(libc.mremap, pointer(mapping.address), v.page, v.page, MREMAP_MAYMOVE)


def vmsplice_pages(v: Victim) -> None:
    """Gift the pages to a pipe, and read them back: a copy comes out."""
    reader, writer = os.pipe()
    try:
        iovec = struct.pack("QQ", v.address, 4)
        call(libc.vmsplice, writer, iovec, 1, 8)  # SPLICE_F_GIFT
        os.read(reader, 4)
    finally:
        os.close(reader)
        os.close(writer)


WAYS = [
    value
    for name, value in list(globals().items())
    if callable(value)
    and getattr(value, "__module__", None) == __name__
    and list(getattr(value, "__annotations__", {})) == ["v", "return"]
]


def outcome(way: Callable[[Victim], None], victim: Victim) -> str:
    try:
        way(victim)
    except Denied as denied:
        return f"denied: {denied}"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "done"


def receive(how: str, where: str) -> md.ReceivedMemoryDescriptor:
    if how == "service":
        connection = md.connect(where, timeout=20)
        return connection.descriptor("frames", timeout=20)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(where)
    return md.receive_descriptor(sock)


def main(how: str, where: str, size: str) -> None:
    victim = Victim(receive(how, where), int(size))
    seen = bytes(memoryview(victim.mapping)[:16]).hex()
    outcomes = {way.__name__: outcome(way, victim) for way in WAYS}
    print(json.dumps({"seen": seen, "outcomes": outcomes}), flush=True)
    os._exit(0)  # what it holds goes with the process, as after a kill


if __name__ == "__main__":
    main(*sys.argv[2:])
