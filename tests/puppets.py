"""Puppets: real Python processes that do what a test tells them, line by line.

A puppet has `md`, `os`, `time`, `threading` and `signal` at hand, and keeps its
variables between lines. What it raises comes back as `Told`.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from memdesc.handover import transit
from memdesc.interop import multiprocessing
from memdesc.loop import Loop

_LOOP = """
import json, os, signal, sys, threading, time
import memdesc as md
out = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
names = {"md": md, "os": os, "time": time, "threading": threading, "signal": signal}
for line in sys.stdin:
    code = json.loads(line)
    try:
        try:
            compiled = compile(code, "<test>", "eval")
        except SyntaxError:
            exec(compile(code, "<test>", "exec"), names)
            answer = {"value": None}
        else:
            answer = {"value": eval(compiled, names)}
        text = json.dumps(answer, default=repr)
    except BaseException as error:
        reason = getattr(error, "reason", None)
        text = json.dumps({
            "error": type(error).__name__, "text": str(error),
            "errno": getattr(error, "errno", None), "reason": getattr(reason, "name", None),
        })
    out.write(text + "\\n")
"""


class Told(Exception):
    """What a puppet raised: the name of its class, its errno and its reason's name."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(f"{answer['error']}: {answer['text']}")
        self.kind: str = answer["error"]
        self.errno: int | None = answer["errno"]
        self.reason: str | None = answer["reason"]


class Puppet:
    """One such process; `with` ends it."""

    def __init__(self, *prefix: str) -> None:
        command = [*prefix, sys.executable, "-c", _LOOP]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe)

    @property
    def pid(self) -> int:
        return self.process.pid

    def begin(self, code: str) -> None:
        """Tell it, without waiting for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(code).encode() + b"\n")
        self.process.stdin.flush()

    def result(self, timeout: float = 30) -> Any:
        """Give the answer to what was begun."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            raise AssertionError(f"puppet {self.pid} did not answer within {timeout} s")
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"puppet {self.pid} ended")
        answer = json.loads(line)
        if "error" in answer:
            raise Told(answer)
        return answer["value"]

    def do(self, code: str, timeout: float = 30) -> Any:
        """Tell it and give the value."""
        self.begin(code)
        return self.result(timeout)

    def stop(self) -> None:
        """SIGSTOP, and wait until it has stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        wait_until(lambda: _state(self.pid) == "T")

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait for it."""
        self.process.kill()
        self.process.wait(30)

    def fds(self) -> int:
        return count_fds(self.pid)

    def finish(self) -> int:
        """Let its program come to its end; give the exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(30)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(30)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Puppet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def count_fds(pid: int | str = "self") -> int:
    """How many descriptors a process has, without that by which a new thread names itself."""
    folder = f"/proc/{pid}/fd"
    return sum(not _names_a_thread(f"{folder}/{name}") for name in os.listdir(folder))


def _names_a_thread(fd: str) -> bool:
    try:
        return os.readlink(fd).endswith("/comm")
    except FileNotFoundError:  # the listing's own
        return False


def memfds_mapped(pid: int | str, name: str) -> int:
    """How many regions of memfds of that name a process has mapped."""
    with open(f"/proc/{pid}/maps") as maps:
        return sum(f"/memfd:{name} " in line for line in maps)


def is_idle(loop: Loop) -> bool:
    """Whether nothing wakes it soon; what others of this process left may, once, in two minutes."""
    left = loop._until_next()
    return left is None or left > 10


def wait_until(condition: Callable[[], object], timeout: float = 30) -> None:
    """Wait for what another process or thread is about to bring about."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not within {timeout} s: {condition}"
        time.sleep(0.005)


def end_holder() -> None:
    """Have this process keep nothing that is on its way, as before it first sent something."""
    multiprocessing.forget_in_transit()
    transit.ways.close()
    wait_until(lambda: transit.ways.holder is None)


@contextmanager
def full_table() -> Iterator[list[int]]:
    """Let this process have no descriptor left; close some of those given to have a few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 17, hard))
    fillers: list[int] = []
    try:
        while True:
            try:
                fillers.append(os.open(os.devnull, os.O_RDONLY))
            except OSError as error:
                assert error.errno == errno.EMFILE
                break
        yield fillers
    finally:
        for fd in fillers:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
