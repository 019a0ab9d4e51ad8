"""What do small operations cost, each beside its nearest peer?

Whole lives, with what ends them, in turns in one run: memory that is made, has one byte of each
page stored and is let go; a mapping of memory that is there; a share given and taken back; a
connection made and closed; a share opened by its name, mapped, read and unmapped; a call that does
nothing; 4 KiB copied out of another process. The other process serves all: a memdesc service, a
multiprocessing.connection listener, a socket that gives a descriptor for every byte it gets.

Each way has turns of 21 in a row. Warm are all but the first of a turn; cold is the first, that
comes after what the others did. Microseconds.

By hand is what one would write with `os`, `mmap` and `socket` alone, without a check, a seal or a
limit. PyTorch and pyzmq are measured where they are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import connection, shared_memory
from typing import Any

from common import finish, summary

import memdesc as md

PAGE = md.page_size
SIZES = {"4 KiB": 4096, "1 MiB": 1 << 20}
KEY = b"a key"
IN_A_ROW = 21
"""One cold, the others warm."""
Ways = dict[str, Callable[[], object]]
Times = dict[tuple[str, str], dict[str, list[float]]]

SERVER = """
import mmap, os, socket, sys, threading
from multiprocessing import connection, shared_memory
import memdesc as md

folder = sys.argv[1]
block = shared_memory.SharedMemory(create=True, size=4096)

def in_thread(function, *arguments):
    threading.Thread(target=function, args=arguments, daemon=True).start()

def accept(listener, serve):
    while True:
        one = listener.accept()
        in_thread(serve, one)

def answer(one):
    try:
        while True:
            one.recv()
            one.send(block.name)
    except (EOFError, ConnectionError):
        one.close()

def give(accepted):
    one, _ = accepted
    with one:
        while one.recv(64):
            socket.send_fds(one, [b"here"], [fd])

in_thread(accept, connection.Listener(folder + "/plain"), answer)
in_thread(accept, connection.Listener(folder + "/keyed", authkey=b"a key"), answer)
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind(folder + "/by-hand")
listener.listen()
fd = os.memfd_create("by hand")
os.ftruncate(fd, 4096)
in_thread(accept, listener, give)
if len(sys.argv) > 2:
    import zmq
    pairs = zmq.Context().socket(zmq.REP)
    pairs.bind("ipc://" + folder + "/zmq")
    def reply():
        while True:
            pairs.send(pairs.recv())
    in_thread(reply)
with md.Service(folder + "/memdesc") as service, md.BufferMemoryDescriptor(4096) as buffer:
    service.share("small", buffer)
    service.method(lambda: None, name="nothing")
    print(buffer.address, flush=True)
    sys.stdin.read()
block.close()
block.unlink()
"""


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def touch(memory: Any, nbytes: int) -> None:
    with memoryview(memory) as view:
        view[:nbytes:PAGE] = bytes(nbytes // PAGE)


def making(nbytes: int) -> Ways:
    def ours(recycle: bool) -> None:
        with md.BufferMemoryDescriptor(nbytes, recycle=recycle) as buffer:
            touch(buffer, nbytes)

    def by_hand() -> None:
        fd = os.memfd_create("by hand")
        os.ftruncate(fd, nbytes)
        with mmap.mmap(fd, nbytes) as memory:
            touch(memory, nbytes)
        os.close(fd)

    def anonymous() -> None:
        with mmap.mmap(-1, nbytes) as memory:
            touch(memory, nbytes)

    def block() -> None:
        memory = shared_memory.SharedMemory(create=True, size=nbytes)
        touch(memory.buf, nbytes)
        memory.close()
        memory.unlink()

    ways: Ways = {
        "memdesc, fresh": lambda: ours(False),
        "memdesc, recycled": lambda: ours(True),
        "by hand (memfd)": by_hand,
        "mmap(-1)": anonymous,
        "SharedMemory": block,
    }
    return ways


def by_torch(nbytes: int) -> Callable[[], object]:
    import torch

    return lambda: torch.zeros(nbytes, dtype=torch.uint8).share_memory_()


def mapping(stack: ExitStack) -> Ways:
    buffer = stack.enter_context(md.BufferMemoryDescriptor(4096))
    block = shared_memory.SharedMemory(create=True, size=4096)
    stack.callback(block.unlink)
    stack.callback(block.close)
    fd = os.memfd_create("by hand")
    stack.callback(os.close, fd)
    os.ftruncate(fd, 4096)
    return {
        "memdesc": lambda: buffer.map().unmap(),
        "by hand (mmap)": lambda: mmap.mmap(fd, 4096).close(),
        "SharedMemory": lambda: shared_memory.SharedMemory(block.name).close(),
    }


def sharing(stack: ExitStack, folder: str) -> Ways:
    buffer = stack.enter_context(md.BufferMemoryDescriptor(4096))
    service = stack.enter_context(md.Service(folder + "/here"))

    def ours() -> None:
        service.share("it", buffer)
        service.unshare("it")

    return {"memdesc": ours}


def connecting(folder: str) -> Ways:
    def by_hand() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as one:
            one.connect(folder + "/by-hand")
            one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            one.send(b"?")
            one.recv(64)  # it is there, as the others know, too

    def client(path: str, key: bytes | None) -> None:
        with connection.Client(path, authkey=key) as one:
            one.send(0)
            one.recv()

    return {
        "memdesc": lambda: md.connect(folder + "/memdesc").close(),
        "by hand (socket)": by_hand,
        "Client": lambda: client(folder + "/plain", None),
        "Client, authkey": lambda: client(folder + "/keyed", KEY),
    }


def opening(stack: ExitStack, folder: str, service: md.Connection) -> Ways:
    plain = stack.enter_context(connection.Client(folder + "/plain"))
    bare = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    bare.connect(folder + "/by-hand")

    def ours() -> None:
        with service.map("small") as memory:
            memoryview(memory)[0]

    def by_hand() -> None:
        bare.send(b"?")
        _, (fd,), _, _ = socket.recv_fds(bare, 64, 1)
        with mmap.mmap(fd, 4096, prot=mmap.PROT_READ) as memory:
            memory[0]
        os.close(fd)

    def block() -> None:
        plain.send("small")
        memory = shared_memory.SharedMemory(plain.recv())
        memory.buf[0]
        memory.close()

    return {"memdesc": ours, "by hand (SCM_RIGHTS)": by_hand, "Client and SharedMemory": block}


def calling(stack: ExitStack, folder: str, service: md.Connection) -> Ways:
    plain = stack.enter_context(connection.Client(folder + "/plain"))

    def ask() -> None:
        plain.send("nothing")
        plain.recv()

    ways: Ways = {"memdesc": lambda: service.call("nothing"), "Client": ask}
    if has("zmq"):
        ways["pyzmq"] = by_zmq(stack, folder)
    return ways


def by_zmq(stack: ExitStack, folder: str) -> Callable[[], object]:
    import zmq

    pair = stack.enter_context(stack.enter_context(zmq.Context()).socket(zmq.REQ))
    pair.connect("ipc://" + folder + "/zmq")

    def ask() -> None:
        pair.send(b"nothing")
        pair.recv()

    return ask


def copying(stack: ExitStack, service: md.Connection, address: int) -> Ways:
    memory = os.open(f"/proc/{service.task.pid}/mem", os.O_RDONLY)
    stack.callback(os.close, memory)
    return {
        "memdesc": lambda: md.copyin(service.task, address, 4096),
        "by hand (/proc/PID/mem)": lambda: os.pread(memory, 4096, address),
    }


@contextmanager
def server(folder: str) -> Iterator[int]:
    """The other process; gives the address of 4 KiB in it."""
    more = ["zmq"] if has("zmq") else []
    command = [sys.executable, "-c", SERVER, folder, *more]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        try:
            yield int(child.stdout.readline())
        finally:
            child.communicate(timeout=30)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e6


def in_turns(groups: dict[str, Ways], turns: int) -> Times:
    times: Times = {
        (group, way): {"warm": [], "cold": []} for group, ways in groups.items() for way in ways
    }
    for turn in range(turns + 1):
        for group, ways in groups.items():
            for way, work in ways.items():
                first, *others = [timed(work) for _ in range(IN_A_ROW)]
                if turn:  # the first turn warms up
                    times[group, way]["cold"].append(first)
                    times[group, way]["warm"] += others
    return times


def measure(turns: int, short: bool) -> Times:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        address = stack.enter_context(server(folder))
        service = stack.enter_context(md.connect(folder + "/memdesc"))
        groups = {
            **{f"make {size}": making(nbytes) for size, nbytes in SIZES.items()},
            "map 4 KiB": mapping(stack),
            "share": sharing(stack, folder),
            "connect": connecting(folder),
            "open a share, map it": opening(stack, folder, service),
            "call": calling(stack, folder, service),
            "copyin 4 KiB": copying(stack, service, address),
        }
        times = in_turns(groups, turns)
    if has("torch") and not short:  # last, as it makes the process larger for all others
        times |= in_turns({"make 4 KiB": {"torch, share_memory_": by_torch(4096)}}, turns)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--short", action="store_true", help="few turns, to see that it runs")
    arguments, _ = parser.parse_known_args()
    times = measure(2 if arguments.short else arguments.turns, arguments.short)
    results: dict[str, Any] = {}
    for (group, way), kinds in times.items():
        warm, cold = summary(kinds["warm"]), summary(kinds["cold"])
        least = min(kinds["warm"])
        results[f"{group}: {way}"] = {"warm_us": warm | {"least": least}, "cold_us": cold}
        print(
            f"{group:21} {way:24} {warm['median']:8.1f} us  ({least:.1f} to {warm['p90']:.1f}), "
            f"cold {cold['median']:.1f}"
        )
    medians = {name: row["warm_us"]["median"] for name, row in results.items()}
    finish("small", __doc__ or "", results, {} if arguments.short else judged(medians))


def judged(median: dict[str, float]) -> dict[str, bool]:
    def at_most(factor: float, group: str, ours: str, theirs: str) -> tuple[str, bool]:
        told = f"{group}: {ours} takes at most {factor:g} times as long as {theirs}"
        return told, median[f"{group}: {ours}"] <= factor * median[f"{group}: {theirs}"]

    return dict(
        [
            at_most(2, "make 4 KiB", "memdesc, recycled", "SharedMemory"),
            at_most(10, "make 4 KiB", "memdesc, fresh", "SharedMemory"),
            at_most(0.5, "make 1 MiB", "memdesc, recycled", "by hand (memfd)"),
            at_most(4, "map 4 KiB", "memdesc", "SharedMemory"),
            at_most(4, "connect", "memdesc", "Client, authkey"),
            at_most(8, "open a share, map it", "memdesc", "Client and SharedMemory"),
            at_most(10, "call", "memdesc", "Client"),
        ]
    )


if __name__ == "__main__":
    main()
