"""A disk that fails: a file system of one file, in a process of its own, by the FUSE protocol.

The file `disk` shows at each offset what `pattern` gives. A read that touches the offset `bad` is
EIO; one that touches `hang` is answered only when the kernel interrupts it, or never.

What opens it with O_DSYNC goes past the page cache (FOPEN_DIRECT_IO). It has a second name,
`memfd:disk`, and can be "deaf": who asks for its attributes (stat) is never answered. It can be
"sticky" for one process, in which closing it never ends.

As a program: fuse_disk.py MOUNTPOINT SIZE BAD HANG STICKY, "stubborn" for never, and "deaf".
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

NOWHERE = -1
_libc = ctypes.CDLL(None, use_errno=True)
_DETACH = 2  # MNT_DETACH
# linux/fuse.h
_LOOKUP, _FORGET, _GETATTR, _SETATTR, _OPEN, _READ, _WRITE = 1, 2, 3, 4, 14, 15, 16
_DIRECT_IO = 1  # FOPEN_DIRECT_IO
_RELEASE, _FSYNC, _FLUSH, _INIT, _INTERRUPT, _DESTROY, _BATCH_FORGET = 18, 20, 25, 26, 36, 38, 42


def pattern(offset: int, nbytes: int) -> bytes:
    """What the file has there: each page of 4 KiB its own number, over and over."""
    first, last = offset // 4096, (offset + nbytes - 1) // 4096
    pages = b"".join(struct.pack("<Q", page) * 512 for page in range(first, last + 1))
    return pages[offset - first * 4096 :][:nbytes]


class NoDisk(Exception):
    """This process can not have one; says why."""


@contextmanager
def failing_disk(
    folder: Path,
    size: int,
    *,
    bad: int = NOWHERE,
    hang: int = NOWHERE,
    stubborn: bool = False,
    deaf: bool = False,
    sticky: int = NOWHERE,
) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """Mount one: gives the file and the process that serves it."""
    command = [sys.executable, "-I", "-S", __file__, str(folder), str(size), str(bad), str(hang)]
    command += [str(sticky)]
    command += ["stubborn"] * stubborn + ["deaf"] * deaf
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        told = server.stdout.readline().strip()
        if told != "ready":
            raise NoDisk(told)
        yield folder / "disk", server
    finally:
        _libc.umount2(os.fsencode(folder), _DETACH)
        server.kill()
        server.wait()
        server.stdout.close()


class _Server:
    def __init__(
        self, fd: int, size: int, bad: int, hang: int, sticky: int, how: Collection[str]
    ) -> None:
        self.fd, self.size, self.bad, self.hang, self.sticky = fd, size, bad, hang, sticky
        self.stubborn, self.deaf = "stubborn" in how, "deaf" in how
        self.waiting: set[int] = set()

    def serve(self) -> None:
        while True:
            try:
                message = os.read(self.fd, 1 << 18)
            except OSError:  # unmounted
                return
            _, opcode, unique, node, _, _, thread = struct.unpack_from("<IIQQIII", message)
            if opcode == _FLUSH and os.path.exists(f"/proc/{self.sticky}/task/{thread}"):
                continue
            self.handle(opcode, unique, node, message[40:])

    def answer(self, unique: int, body: bytes = b"", error: int = 0) -> None:
        try:
            os.write(self.fd, struct.pack("<IiQ", 16 + len(body), -error, unique) + body)
        except FileNotFoundError:
            pass  # interrupted by now

    def attributes(self, node: int) -> bytes:
        mode = stat.S_IFDIR | 0o755 if node == 1 else stat.S_IFREG | 0o666
        times = bytes(24 + 12)
        size = 0 if node == 1 else self.size
        return (
            struct.pack("<QQQ", node, size, size // 512)
            + times
            + struct.pack("<IIIIIII", mode, 1, os.getuid(), os.getgid(), 0, 4096, 0)
        )

    def handle(self, opcode: int, unique: int, node: int, body: bytes) -> None:
        if opcode == _INIT:
            head = struct.pack("<IIIIHHIIHHI", 7, 31, 1 << 17, 0, 64, 48, 1 << 17, 1, 32, 0, 0)
            self.answer(unique, head + bytes(28))
        elif opcode == _LOOKUP:
            if body.rstrip(b"\0") in (b"disk", b"memfd:disk"):
                self.answer(unique, struct.pack("<QQQQII", 2, 0, 0, 0, 0, 0) + self.attributes(2))
            else:
                self.answer(unique, error=errno.ENOENT)
        elif opcode in (_GETATTR, _SETATTR):
            if not self.deaf or node == 1:
                self.answer(unique, struct.pack("<QII", 0, 0, 0) + self.attributes(node))
        elif opcode == _OPEN:
            (flags,) = struct.unpack_from("<I", body)
            self.answer(unique, struct.pack("<QII", 1, _DIRECT_IO if flags & os.O_DSYNC else 0, 0))
        elif opcode == _READ:
            self.read(unique, *struct.unpack_from("<QQI", body)[1:])
        elif opcode == _WRITE:
            _, offset, size = struct.unpack_from("<QQI", body)
            if offset <= self.bad < offset + size:
                self.answer(unique, error=errno.EIO)
            else:
                self.answer(unique, struct.pack("<II", size, 0))
        elif opcode == _INTERRUPT:
            (interrupted,) = struct.unpack_from("<Q", body)
            if interrupted in self.waiting and not self.stubborn:
                self.answer(interrupted, error=errno.EINTR)
        elif opcode in (_RELEASE, _FLUSH, _FSYNC, _DESTROY):
            self.answer(unique)
        elif opcode not in (_FORGET, _BATCH_FORGET):
            self.answer(unique, error=errno.ENOSYS)

    def read(self, unique: int, offset: int, size: int) -> None:
        if offset <= self.hang < offset + size:
            self.waiting.add(unique)
        elif offset <= self.bad < offset + size:
            self.answer(unique, error=errno.EIO)
        else:
            self.answer(unique, pattern(offset, max(min(size, self.size - offset), 0)))


def main(folder: str, size: str, bad: str, hang: str, sticky: str, *how: str) -> None:
    try:
        fd = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        print(f"/dev/fuse: {error.strerror}", flush=True)
        return
    options = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    if _libc.mount(b"disk", os.fsencode(folder), b"fuse", 6, options.encode()):  # NOSUID | NODEV
        print(f"mounting FUSE: {os.strerror(ctypes.get_errno())}", flush=True)
        return
    _libc.prctl(1, 9)  # PR_SET_PDEATHSIG: a test's watchdog may end the parent
    print("ready", flush=True)
    _Server(fd, int(size), int(bad), int(hang), int(sticky), how).serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
