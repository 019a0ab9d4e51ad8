"""Runs the command line as its users do: as a program, piped or on a terminal of 80 by 24."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from typing import Any

from children import finish, start

from memdesc.cli import commands as commands, main  # commands: once, before the forks

MEMDESC = [
    sys.executable,
    "-c",
    "import sys; sys.argv[0] = 'memdesc'; from memdesc.cli import main; main()",
]
ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[()][0-9A-B]|[=>78])")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "COLUMNS": "80", "TERM": "xterm", "PYTHONUTF8": "1", **more}


def memdesc(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run it in a forked child, which spares what starting an interpreter costs."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as told:
        words = [str(one) for one in arguments]
        pid = start(_main, words, environment(**more), out.fileno(), told.fileno())
        status = finish(pid)
        texts = []
        for file in (out, told):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(words, status, *texts)


def _main(words: list[str], variables: dict[str, str], out: int, told: int) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.dup2(out, 1)
    os.dup2(told, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = ["memdesc", *words]
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))


def program(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run it as its users do."""
    return subprocess.run(
        [*MEMDESC, *map(str, arguments)],
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def as_json(*arguments: object, status: int = 0) -> Any:
    done = memdesc(*arguments, "--json")
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout)


def check_plain(text: str) -> None:
    """What is piped is lines of ASCII of at most 80 columns, without escapes."""
    assert text.isascii()
    assert text.replace("\n", "").isprintable()
    assert max(map(len, text.splitlines())) <= 80, text


class Terminal:
    """A program on a terminal of 80 by 24."""

    def __init__(self, *arguments: object, **more: str) -> None:
        self.fd, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(theirs)
        kept = environment(**more)
        del kept["COLUMNS"]
        kept.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            [*MEMDESC, *map(str, arguments)],
            env={**kept, **more},
            pass_fds=[theirs],
            preexec_fn=lambda: os.login_tty(theirs),  # so that its keys make signals
        )
        self.theirs = theirs
        self.shown = ""

    def read_until(self, done: Callable[[str], object], timeout: float = 60) -> str:
        """Read what it shows until that is what one waits for."""
        end = time.monotonic() + timeout
        while not done(self.shown):
            if not select.select([self.fd], [], [], max(end - time.monotonic(), 0))[0]:
                raise AssertionError(f"not within {timeout} s: {self.shown!r}")
            self.shown += os.read(self.fd, 1 << 16).decode()
        return self.shown

    def press(self, key: bytes) -> None:
        os.write(self.fd, key)

    def end(self) -> int:
        """Wait for its end, reading on: nobody waits for a reader."""
        end = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it does not end: {self.shown!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                self.shown += os.read(self.fd, 1 << 16).decode()
        while select.select([self.fd], [], [], 0)[0]:
            self.shown += os.read(self.fd, 1 << 16).decode()
        return self.process.returncode

    def lines(self) -> list[str]:
        """What it wrote, line by line, also where it went back to the top."""
        shown = self.shown.replace("\r", "").replace("\x1b[H", "\n")
        return [ESCAPES.sub("", line) for line in shown.split("\n")]

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(30)
        os.close(self.fd)
        os.close(self.theirs)
