"""Programs that the demo starts, and how it speaks with them: a line of JSON each way.

A program reads requests from its standard input and ends when that ends, so none outlives the
demo, however the demo dies. Programs are in process groups of their own: Ctrl-C reaches the demo
alone, which then ends them, each by its pid.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, Self, final

from memdesc.vm.task import Task

Answer = dict[str, Any]
Progress = Callable[["Program", Answer], None]


class ProgramFailed(Exception):
    """A program of the demo ended, or did not answer; the text has the last that it said."""


@final
class Program:
    """A process that the demo started: a module of this package, or a foreign program."""

    def __init__(self, name: str, command: Sequence[str], pass_fds: Sequence[int] = ()) -> None:
        self.name = name
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the program)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                pass_fds=tuple(pass_fds),
                process_group=0,
            )
        except BaseException:
            self._said.close()
            raise
        self.pid = self._process.pid
        self.task = Task(self.pid)
        self._rest = b""

    @property
    def _input(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    def fileno(self) -> int:
        """Give the descriptor that it answers on."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def write(self, text: bytes) -> None:
        """Send it bytes as they are."""
        try:
            self._input.write(text)
            self._input.flush()
        except BrokenPipeError as error:
            raise self._failed("has ended") from error

    def tell(self, do: str, **what: Any) -> None:
        """Send it a request, and do not wait."""
        self.write(json.dumps({"do": do, **what}).encode() + b"\n")

    def ask(self, do: str, *, timeout: float = 20, **what: Any) -> Answer:
        """Send it a request and wait for the answer."""
        self.tell(do, **what)
        return self.read_json(timeout)

    def read_json(self, timeout: float = 20) -> Answer:
        """Wait for its next answer."""
        return json.loads(self.read_line(timeout))  # type: ignore[no-any-return]

    def read_line(self, timeout: float = 20) -> bytes:
        """Wait for its next line."""
        until = time.monotonic() + timeout
        while (line := self.next_line()) is None:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self], [], [], left)[0]:
                raise self._failed(f"did not answer within {timeout:g} s")
            self.receive()
        return line

    def next_line(self) -> bytes | None:
        """Give the next line that has been received whole, or None."""
        line, end, rest = self._rest.partition(b"\n")
        if not end:
            return None
        self._rest = rest
        return line

    def receive(self) -> None:
        """Take what there is to read; wait if there is nothing."""
        more = os.read(self.fileno(), 1 << 16)
        if not more:
            raise self._failed("ended")
        self._rest += more

    def _failed(self, what: str) -> ProgramFailed:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        last = lines[-1] if lines else ""
        return ProgramFailed(f"{self.name} (pid {self.pid}) {what}: {last or 'it said nothing'}")

    def kill(self) -> None:
        """SIGKILL, and wait until the kernel has taken it apart."""
        self._process.kill()
        self._let_go()

    def end_input(self) -> None:
        """Tell it to end, and do not wait."""
        try:
            self._input.close()
        except BrokenPipeError:  # something was still to be written, and it ended before
            return

    def end(self, timeout: float = 5) -> None:
        """End its input and wait until it has ended by itself; then SIGKILL."""
        self.end_input()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._let_go()

    def _let_go(self) -> None:
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:  # something was still to be written to it
                    continue
        self.task.close()

    @property
    def ended(self) -> bool:
        """Whether it was ended, and waited for."""
        return self._process.returncode is not None


@final
class Programs:
    """All programs of the demo: leaving the block ends them (at once, if by an exception)."""

    def __init__(self) -> None:
        self._all: list[Program] = []

    def module(
        self, name: str, module: str, *arguments: str, pass_fds: Sequence[int] = ()
    ) -> Program:
        """Start a module of this package as a program of its own."""
        command = [sys.executable, "-P", "-m", f"memdesc.cli.{module}", *arguments]
        return self.start(name, command, pass_fds)

    def start(self, name: str, command: Sequence[str], pass_fds: Sequence[int] = ()) -> Program:
        """Start a program."""
        program = Program(name, command, pass_fds)
        self._all.append(program)
        return program

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # One after another, each to its end; a second Ctrl-C must not stop this.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        living = [program for program in self._all if not program.ended]
        try:
            for program in living:
                program.kill() if kind else program.end_input()
            for program in living:
                if not program.ended:
                    program.end()
        finally:
            signal.signal(signal.SIGINT, before)


def answers(programs: Sequence[Program], timeout: float, progress: Progress) -> list[Answer]:
    """Wait for the final answer of each; those with a `progress` go to the function meanwhile."""
    found: dict[int, Answer] = {}
    until = time.monotonic() + timeout
    while True:
        for program in programs:
            while program.pid not in found and (line := program.next_line()) is not None:
                answer = json.loads(line)
                if "progress" in answer:
                    progress(program, answer)
                else:
                    found[program.pid] = answer
        waited = [program for program in programs if program.pid not in found]
        if not waited:
            return [found[program.pid] for program in programs]
        left = until - time.monotonic()
        ready = select.select(waited, [], [], left)[0] if left > 0 else []
        if not ready:
            names = ", ".join(program.name for program in waited)
            raise ProgramFailed(f"no answer within {timeout:g} s from {names}")
        for program in ready:
            program.receive()


# -- in the program itself -------------------------------------------------------------------------


def say(answer: Answer) -> None:
    """Send the demo a line."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def serve(requests: Mapping[str, Callable[..., Answer]]) -> None:
    """Answer requests until the demo ends the input."""
    for line in sys.stdin:
        request = json.loads(line)
        say(requests[request.pop("do")](**request))
