"""Messages there and back: by two ways, or by the least that Python, or C, can do."""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from ways import Way

MESSAGE = bytes(range(64))


class Trip:
    """Two ways of one kind. `ask` and `answer` go on with the message number `first`, from 1."""

    def __init__(self, kind: type[Way]) -> None:
        self.forth, self.back = kind(len(MESSAGE)), kind(len(MESSAGE))

    def open_asking(self) -> None:
        self.hears = self.back
        self.receive, self.send = self.back.receiver(), self.forth.sender()

    def open_answering(self) -> None:
        self.hears = self.forth
        self.receive, self.send = self.forth.receiver(), self.back.sender()

    def ask(self, first: int, count: int) -> None:
        send, receive = self.send, self.receive
        for _ in range(count):
            send(MESSAGE)
            message = receive()
        assert message == MESSAGE, message

    def answer(self, first: int, count: int) -> None:
        send, receive = self.send, self.receive
        for _ in range(count):
            send(receive())

    def sleeps(self) -> int:
        """How often this side has slept."""
        return self.hears.sleeps()

    def leave(self) -> None:
        del self.receive, self.send
        self.forth.leave()
        self.back.leave()

    def close(self) -> None:
        self.forth.close()
        self.back.close()


class BareSpin(Trip):
    """The least that Python can do: a word in shared memory tells that 64 bytes beside it are new.

    The bytes are copied in from a `bytes` and out to one. No call of a function, no length, no
    check, no way to sleep, to stop or to have two messages under way; no other thread gets to run.
    """

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, mmap.PAGESIZE)

    def open_asking(self) -> None:
        self.view = memoryview(self.memory)

    def open_answering(self) -> None:
        self.view = memoryview(self.memory)

    def ask(self, first: int, count: int) -> None:
        with self.view.cast("Q") as words, self.view[64:128] as forth, self.view[192:256] as back:
            for number in range(first, first + count):
                forth[:] = MESSAGE
                words[0] = number
                while words[16] != number:
                    pass
                message = bytes(back)
        assert message == MESSAGE, message

    def answer(self, first: int, count: int) -> None:
        with self.view.cast("Q") as words, self.view[64:128] as forth, self.view[192:256] as back:
            for number in range(first, first + count):
                while words[0] != number:
                    pass
                message = bytes(forth)
                back[:] = message
                words[16] = number

    def sleeps(self) -> int:
        return 0

    def leave(self) -> None:
        self.view.release()

    def close(self) -> None:
        self.memory.close()


@cache
def library() -> ctypes.CDLL | None:
    """`futex.c`, compiled; None without a compiler."""
    if shutil.which("gcc") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/futex.so"
        source = Path(__file__).with_name("futex.c")
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", target, source], check=True)
        return ctypes.CDLL(target)


class FutexInC(BareSpin):
    """The least that C can do to wake a sleeper: `futex.c`, which Python calls once a round."""

    def call(self, name: str, first: int, count: int) -> None:
        memory = (ctypes.c_char * len(self.view)).from_buffer(self.view)
        code = getattr(library(), name)(memory, ctypes.c_uint32(first), ctypes.c_uint32(count))
        assert code == 0, "the kernel refused a futex"

    def ask(self, first: int, count: int) -> None:
        self.call("ask", first, count)

    def answer(self, first: int, count: int) -> None:
        self.call("answer", first, count)

    def sleeps(self) -> int:
        return ctypes.c_long.in_dll(library(), "sleeps").value
