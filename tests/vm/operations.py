"""Does each operation of docs/privileges.md, and prints by which means it was done, as JSON.

Run as a program under each class of privilege; imports nothing but memdesc.
"""

import errno
import json
import mmap
import os
import resource
import socket
import subprocess
import sys

import memdesc as md
from memdesc.vm.physical import same_pages
from memdesc.vm.probe import probe
from memdesc.vm.regions import ObjectKind, regions

# A program that knows nothing of us: a memfd that it keeps open, and an anonymous shared mmap.
STRANGER = """
import mmap, os, sys
fd = os.memfd_create('theirs')
os.ftruncate(fd, mmap.PAGESIZE)
kept = mmap.mmap(fd, mmap.PAGESIZE)
anonymous = mmap.mmap(-1, mmap.PAGESIZE)
kept[:5] = anonymous[:5] = b'hello'
"""
# Undumpable, it is what a task of another user is: only CAP_SYS_PTRACE reaches it.
UNDUMPABLE = "import ctypes; ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)\n"
SAY_AND_STAY = "print(id(mark), flush=True); sys.stdin.read()"
MARK = b"memdesc was here"


def start(code):
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        f"import sys; mark = {MARK!r}\n{code}{SAY_AND_STAY}",
    ]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return child, int(child.stdout.readline()) + bytes.__basicsize__ - 1


def share():
    ours, theirs = socket.socketpair()
    with ours, theirs, md.BufferMemoryDescriptor(100) as buffer:
        buffer.write_bytes(0, b"hello")
        md.send_descriptor(ours, buffer)
        with md.receive_descriptor(theirs) as received, received.map() as mapping:
            assert bytes(mapping)[:5] == b"hello"
    return "descriptor"


def prove():
    with md.BufferMemoryDescriptor(mmap.PAGESIZE) as buffer, md.Task.current() as own:
        with buffer.map() as one, buffer.map(unique=True) as two:
            assert bytes(one) == bytes(two)  # touched, so that the pages are there on both sides
            proof = same_pages(own, one.address, own, two.address, mmap.PAGESIZE)
    assert proof.same
    return proof.proof


def map_theirs(task, kind):
    (region,) = [one for one in regions(task) if one.object.kind is kind]
    described = md.MemoryDescriptor.with_address_range(
        region.start, 5, md.Direction.OUT_IN, task=task, trust_size=True
    )
    try:
        with described.map() as mapping:
            assert bytes(mapping) == b"hello"
    except md.MappingError as error:
        assert error.reason is md.MappingReason.NOT_PRIVILEGED, error
        return "no"
    try:
        os.close(os.open(task.proc_path(f"map_files/{region.start:x}-{region.end:x}"), os.O_RDWR))
    except OSError as error:
        assert error.errno == errno.EPERM
        return "pidfd_getfd"
    return "map_files"


def copy(task, address):
    try:
        assert md.copyin(task, address, len(MARK)) == MARK
        md.copyout(MARK[::-1], task, address)
        assert md.copyin(task, address, len(MARK)) == MARK[::-1]
    except md.NotPrivilegedError:
        return "no"
    return "process_vm"


def wire_past_the_limit():
    length = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] + mmap.PAGESIZE
    with md.BufferMemoryDescriptor(length) as buffer:
        try:
            with buffer.prepared():
                return "mlock"
        except md.WiringError as error:
            assert error.reason is md.WiringReason.LIMIT, error
            return "no"


def operations():
    yield "share a buffer, map it, pass it on", share()
    yield "prove that two mappings are the same memory", prove()
    child, address = start(STRANGER)
    with child, md.Task(child.pid) as task:
        for name, kind in [
            ("map another task's memfd", ObjectKind.MEMFD),
            ("map another task's shared anonymous memory", ObjectKind.SHARED_ANONYMOUS),
        ]:
            yield name, map_theirs(task, kind)
        yield "copyin and copyout, a task of the same user", copy(task, address)
        child.kill()
    child, address = start(UNDUMPABLE)
    with child, md.Task(child.pid) as task:
        yield "copyin and copyout, a task of another user", copy(task, address)
        child.kill()
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        yield "wire more than RLIMIT_MEMLOCK", wire_past_the_limit()


if __name__ == "__main__":
    features = {one.name: {"available": one.available, "limit": one.limit} for one in probe()}
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    found = {"features": features, "operations": dict(operations()), "memlock": limit}
    print(json.dumps(found))
