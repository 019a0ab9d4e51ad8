"""The programs of the acts, each a process of its own: driver, client, and one that wires.

    python -m memdesc.cli.demo_client driver SERVICE
    python -m memdesc.cli.demo_client client SERVICE
    python -m memdesc.cli.demo_client wirer LIMIT

Each answers requests on its standard input; see `demo_processes`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import resource
import struct
import sys
from collections.abc import Callable

import memdesc as md
from memdesc import _core
from memdesc.cli.demo_processes import Answer, say, serve
from memdesc.vm.regions import task_status

FRAME_SHAPE = (8, 1080, 1920, 3)
_CAP_IPC_LOCK = 14  # linux/capability.h
_CAPABILITY_VERSION_3 = 0x20080522
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2  # linux/falloc.h


def driver(name: str) -> None:
    """Listing 1: allocate a buffer that can be shared, and share it."""
    count, height, width, colours = FRAME_SHAPE
    frames = md.BufferMemoryDescriptor(
        count * height * width * colours,
        direction=md.Direction.OUT_IN,
        pages=md.PageKind.BASE,  # others are not in Shmem, by which the last act counts
        name="frames",
    )
    view = memoryview(frames)
    view[:: md.page_size] = bytes(n % 251 for n in range(len(view[:: md.page_size])))

    def store(offset: int, value: int) -> Answer:
        view[offset] = value
        return {}

    def digest() -> Answer:
        return {"sha256": hashlib.sha256(view).hexdigest()}

    with md.Service(name) as camera:
        camera.share("frames", frames, shape=FRAME_SHAPE, dtype="u1")
        say({"address": frames.address, "length": frames.length, "socket": str(camera.path)})
        serve({"store": store, "digest": digest})


def client(name: str) -> None:
    """Map what the driver shares, read it, and, when told to, try all that would write to it."""
    with md.connect(name) as camera:
        mapping = camera.map("frames")
        received = camera.descriptor("frames")
        view = memoryview(mapping)
        touched = sum(view[:: md.page_size])  # brings every page into this task's page table
        say({"address": mapping.address, "length": mapping.length, "touched": touched})

        def load(offset: int) -> Answer:
            return {"value": view[offset]}

        def attack() -> Answer:
            return {"attempts": _attempts(_descriptor_of("frames"), mapping.address)}

        serve({"load": load, "attack": attack})
        received.close()


def _descriptor_of(name: str) -> int:
    """Find the descriptor of a memfd among this process's own, as an attacker would."""
    for number in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{number}").startswith(f"/memfd:{name} "):
                return int(number)
        except FileNotFoundError:  # the listing's own, closed by now
            continue
    raise RuntimeError(f"no descriptor of a memfd {name!r} here")


def _attempts(fd: int, address: int) -> list[list[str]]:
    """Try to write to shared memory in every way: [[what, the kernel's answer], ...]."""
    size = md.page_size
    found: list[list[str]] = []

    def attempt(what: str, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            found.append([what, errno.errorcode.get(error.errno or 0, str(error.errno))])
        else:
            found.append([what, ""])

    attempt("mmap writable", lambda: mmap.mmap(fd, size))
    attempt("mprotect", lambda: _core.mprotect(address, size, _core.PROT_READ | _core.PROT_WRITE))
    attempt("pwrite", lambda: os.pwrite(fd, b"x", 0))
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        attempt("/proc/self/mem", lambda: os.pwrite(memory.fileno(), b"x", address))
    try:
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    except OSError as error:
        found.append(["re-open", errno.errorcode.get(error.errno or 0, str(error.errno))])
        return found
    punch = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    attempt("re-open and mmap", lambda: mmap.mmap(again, size))
    attempt("re-open and pwrite", lambda: os.pwrite(again, b"x", 0))
    attempt("truncate", lambda: os.ftruncate(again, 0))
    attempt("grow", lambda: os.ftruncate(again, 1 << 30))
    attempt("punch a hole", lambda: _core.fallocate(again, punch, 0, size))
    attempt("add a seal", lambda: fcntl.fcntl(again, fcntl.F_ADD_SEALS, _core.F_SEAL_WRITE))
    os.close(again)
    return found


def wirer(limit: int) -> None:
    """Wire two buffers as one, of which the second does not fit under the limit."""
    dropped = _drop_lock_capability()
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
    base = md.PageKind.BASE  # reserved huge pages are always wired
    small = md.BufferMemoryDescriptor(limit // 4, pages=base, name="fits")
    large = md.BufferMemoryDescriptor(limit * 4, pages=base, name="too-large")
    both = md.MultiMemoryDescriptor([small, large])
    answer: Answer = {"capability_dropped": dropped, "asked": both.length, "limit": limit}
    own = md.Task.current()
    small.prepare()
    answer["locked_alone"] = task_status(own).locked
    small.complete()
    answer["locked_before"] = task_status(own).locked
    try:
        both.prepare()
    except md.WiringError as error:
        answer |= {"reason": error.reason.name, "message": str(error)}
        answer["errno"] = errno.errorcode.get(error.errno or 0, str(error.errno))
    else:
        both.complete()
    say(answer)
    serve({})


def _drop_lock_capability() -> bool:
    """Give up CAP_IPC_LOCK, which lifts the limit; whether this process had it."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)  # twice (effective, permitted, inheritable)
    if libc.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    words = list(struct.unpack("=6I", data.raw))
    bit = 1 << _CAP_IPC_LOCK
    if not words[0] & bit:
        return False
    words[:3] = [word & ~bit for word in words[:3]]
    if libc.capset(header, struct.pack("=6I", *words)):
        raise OSError(ctypes.get_errno(), "capset")
    return True


if __name__ == "__main__":
    role, argument = sys.argv[1:]
    if role == "wirer":
        wirer(int(argument))
    else:
        {"driver": driver, "client": client}[role](argument)
