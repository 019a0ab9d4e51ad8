"""Fuzzes a live service over its socket: what a client of it may send, and never should.

    fuzz_service.py [CORPUS …] [libFuzzer's options]

Atheris (libFuzzer for Python) guides it by the branches of the library that an input takes, those
on the service's I/O thread too. Each input is a client (`clients.py`). In the end the service must
have answered or ended that connection; nothing of the client may be left; and the service may not
have logged a failure of its own.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from importlib.machinery import ModuleSpec, SourceFileLoader

import atheris


class FromFiles:
    """Finds an editable install's modules as files: Atheris sees into no other loader's."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        for finder in sys.meta_path[2:] if name.partition(".")[0] == "memdesc" else []:
            spec = finder.find_spec(name, path, target)  # type: ignore[arg-type]
            if spec is not None and spec.origin is not None:
                if spec.origin.endswith(".py"):
                    spec.loader = SourceFileLoader(name, spec.origin)
                return spec
        return None


sys.meta_path.insert(0, FromFiles)  # type: ignore[arg-type]
with atheris.instrument_imports(include=["memdesc"]):
    from clients import run
    from server import serve

    import memdesc as md

    SERVED = md.Service, md.Connection  # names of `memdesc` are imported where first asked for

CHECKED_EVERY = 500
"""Inputs between two looks at what is left of them."""
SLACK = 16
"""Descriptors that are made once, when first needed (an event loop has three)."""


class Failures(logging.Handler):
    """Notes what the library logs as a failure of its own."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or record.levelno >= logging.ERROR:
            self.seen.append(self.format(record))


class Target:
    """A service of this process, and what it had before any client came."""

    def __init__(self) -> None:
        self.failures = Failures()
        log = logging.getLogger("memdesc")
        log.addHandler(self.failures)
        log.propagate = False
        self.service = self.opened()
        self.inputs = 0
        run(self.service.path, b"\1")  # what is made once is there from now on
        self.fds = self.settled()

    def opened(self) -> md.Service:
        return serve("fuzzed", limits=md.Limits(connections_per_second=None))

    def settled(self) -> int:
        """Count descriptors once the last client is forgotten."""
        until = time.monotonic() + 20
        while self.service.clients():
            if time.monotonic() > until:
                raise AssertionError("clients are left that have closed their sockets")
            time.sleep(0.001)
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    def one(self, data: bytes) -> None:
        self.inputs += 1
        run(self.service.path, data)
        if self.failures.seen:
            raise AssertionError(self.failures.seen.pop())
        if self.service.superseded:  # it let that client have its name
            self.service.close()
            self.service = self.opened()
        if self.inputs % CHECKED_EVERY == 0:
            self.check()

    def check(self) -> None:
        until = time.monotonic() + 20
        while (fds := self.settled()) > self.fds + SLACK:
            if time.monotonic() > until:
                raise AssertionError(f"{fds} descriptors are open, {self.fds} at first")
            time.sleep(0.01)


if __name__ == "__main__":
    target = Target()
    atheris.Setup(sys.argv, target.one)
    atheris.Fuzz()
