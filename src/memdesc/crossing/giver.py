"""The other side of a calibration: a helper process that hands blocks over when it is asked.

It is the giver and the process that calibrates the receiver, since the kernel lets a parent read
its child's memory where it lets nobody else (yama 1). Started as a program of its own, never
forked: the process that calibrates may have threads.

Orders and answers go over one socket, blocks over another. A block is taken only when the answer
says that it was handed over, so that no time is spent waiting: waking a task takes 30 to 60 us,
the same for every way, and would drown what differs. What a crossing costs is the giver's time,
which the answer tells, and the receiver's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket as sockets
import struct
import time

from memdesc import _core
from memdesc.crossing.ways import Way
from memdesc.vm.pages import page_size, round_page
from memdesc.vm.task import Task

ORDER = struct.Struct("<BBQ")
"""What the receiver asks for: PREPARE or HAND_OVER, the index of the way, and nbytes."""

ANSWER = struct.Struct("<Q")
"""Nanoseconds that it took."""

HEADER = struct.Struct("<QQ")
"""What begins each block: nbytes, and the address for PROCESS_VM, else 0."""

PREPARE, HAND_OVER = 0, 1
_LARGEST_MESSAGE = 128 << 10
_MALLOC_MAPS = 128 << 10  # mallopt(3), M_MMAP_THRESHOLD
WAYS = tuple(Way)
_SEALS = _core.F_SEAL_WRITE | _core.F_SEAL_SHRINK | _core.F_SEAL_GROW


class Block:
    """Some bytes of shared memory, present, as a buffer that was made to be shared has them."""

    def __init__(self, nbytes: int) -> None:
        self.length = round_page(nbytes)
        self.fd = os.memfd_create("memdesc-calibration", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, self.length)
            self.memory = _core.reserve_memory(self.length)
            self._map(_core.MAP_SHARED)
            _core.madvise(self.memory.address, self.length, _core.MADV_POPULATE_WRITE)
        except BaseException:
            os.close(self.fd)
            raise

    def _map(self, flags: int) -> None:
        access = _core.PROT_READ | _core.PROT_WRITE
        _core.place_memory(self.memory, 0, self.length, access, flags, self.fd, 0)

    def freeze(self) -> None:
        """Go copy-on-write: what a snapshot costs its giver. Once only."""
        self._map(_core.MAP_PRIVATE)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)

    def close(self) -> None:
        """Let go of it."""
        del self.memory
        os.close(self.fd)


def hand_over(sock: sockets.socket, way: Way, block: Block, nbytes: int) -> None:
    """Give the block to the receiver by one way."""
    if way is Way.INLINE:
        window = _core.Window(block.memory, 0, nbytes, False)
        sock.sendall(HEADER.pack(nbytes, 0) + bytes(window))
    elif way is Way.PROCESS_VM:
        sock.sendall(HEADER.pack(nbytes, block.memory.address))
    else:
        if way is Way.COPY_ON_WRITE:
            block.freeze()
        sockets.send_fds(sock, [HEADER.pack(nbytes, 0)], [block.fd])


def serve(orders: sockets.socket, sock: sockets.socket) -> None:
    """Obey until the other side has gone."""
    blocks: dict[tuple[bool, int], Block] = {}
    while len(order := orders.recv(ORDER.size, sockets.MSG_WAITALL)) == ORDER.size:
        kind, index, nbytes = ORDER.unpack(order)
        way = WAYS[index]
        once = way is Way.COPY_ON_WRITE  # a frozen block is used up, all others serve every way
        key = once, nbytes
        if kind == PREPARE:
            if once and key in blocks:
                blocks.pop(key).close()
            if key not in blocks:
                blocks[key] = Block(nbytes)
        start = time.perf_counter_ns()
        if kind == HAND_OVER:
            hand_over(sock, way, blocks[key], nbytes)
        orders.sendall(ANSWER.pack(time.perf_counter_ns() - start))


def order(orders: sockets.socket, kind: int, way: Way, nbytes: int) -> int:
    """Ask the giver, and wait until it has done it; give the nanoseconds that it took."""
    orders.sendall(ORDER.pack(kind, WAYS.index(way), nbytes))
    answer = orders.recv(ANSWER.size, sockets.MSG_WAITALL)
    if len(answer) < ANSWER.size:
        raise ConnectionResetError(errno.ECONNRESET, "no answer came")
    return int(ANSWER.unpack(answer)[0])


def take(sock: sockets.socket, way: Way, task: Task) -> None:
    """Receive one block and use it once: the receiver's part, beside `hand_over`.

    Using it is to load one byte of each page. What is copied goes into new memory, and the task
    is looked at before and after, as `copyin` does; what was inline is decoded by a copy.
    """
    if way is Way.INLINE:
        message = sock.recv(_LARGEST_MESSAGE)
        nbytes, _ = HEADER.unpack_from(message)
        while len(message) < HEADER.size + nbytes:
            message += sock.recv(_LARGEST_MESSAGE)
        touch(message[HEADER.size :])
        return
    nbytes, address, fd = take_header(sock)
    if way is Way.PROCESS_VM:
        room = new_memory(nbytes)
        task.check_alive("calibrate")
        _core.process_vm_readv(task.pid, room, address)
        task.check_alive("calibrate")
        touch(room)
        return
    try:
        touch(map_block(fd, nbytes))
    finally:
        os.close(fd)


def new_memory(nbytes: int) -> bytearray | _core.Window:
    """Give memory as a receiver first gets it: from 128 KiB on, of pages that are not there yet.

    Not all from malloc: what it keeps warm for the next block depends on what was freed before.
    """
    if nbytes < _MALLOC_MAPS:
        return bytearray(nbytes)
    flags = _core.MAP_PRIVATE | _core.MAP_ANONYMOUS
    memory = _core.map_memory(0, nbytes, _core.PROT_READ | _core.PROT_WRITE, flags, -1, 0)
    return _core.Window(memory, 0, nbytes, True)


def take_header(sock: sockets.socket) -> tuple[int, int, int]:
    """Receive what begins each block: (nbytes, address, file descriptor or -1)."""
    wanted = sockets.MSG_WAITALL | sockets.MSG_CMSG_CLOEXEC
    header, fds, flags, _ = sockets.recv_fds(sock, HEADER.size, 1, wanted)
    if flags & sockets.MSG_CTRUNC:
        raise OSError(errno.EMFILE, "recvmsg: no file descriptor is left")
    if len(header) < HEADER.size:
        raise ConnectionResetError(errno.ECONNRESET, "a block was cut short")
    nbytes, address = HEADER.unpack(header)
    return nbytes, address, fds[0] if fds else -1


def map_block(fd: int, nbytes: int) -> _core.Window:
    """Map a block that was handed over."""
    length = round_page(nbytes)
    memory = _core.map_memory(0, length, _core.PROT_READ, _core.MAP_SHARED, fd, 0)
    return _core.Window(memory, 0, nbytes, False)


def touch(block: bytes | bytearray | _core.Window) -> None:
    """Load one byte of each page."""
    with memoryview(block) as view:
        bytes(view[::page_size])
