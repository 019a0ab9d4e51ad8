"""What becomes of a command whose reader has gone (`memdesc ls | head -1`), or that fails.

As of any program of the system: it ends at once and says nothing, with the status that a shell
gives to those that SIGPIPE ends. The signal itself stays ignored: the library writes to sockets.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator
from typing import Any

import click

from memdesc.cli.words import harmless
from memdesc.errors import MemdescError

STATUS = 128 + signal.SIGPIPE


class Commands(click.Group):
    """The group of all commands: errors of the family are one line on stderr, exit status 1."""

    def make_context(self, *arguments: Any, **more: Any) -> click.Context:
        """Read the command line; `--help` and `--version` are told here."""
        with _reader_may_go():
            return super().make_context(*arguments, **more)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was given."""
        with _reader_may_go():
            try:
                return super().invoke(ctx)
            except MemdescError as error:
                name = f"memdesc {ctx.invoked_subcommand}"
                print(f"{name}: {harmless(str(error))}", file=sys.stderr)
                sys.exit(1)


@contextlib.contextmanager
def _reader_may_go() -> Iterator[None]:
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # else the interpreter's end would be the first to notice
    except BrokenPipeError:
        if not any(map(_has_no_reader, (1, 2))):
            raise
        _discard_the_rest()
        sys.exit(STATUS)


def _has_no_reader(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, 0)
    return any(events & select.POLLERR for _, events in poller.poll(0))


def _discard_the_rest() -> None:
    """Let what lies in the buffers still go nowhere, without a word."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):
        if _has_no_reader(fd):
            os.dup2(nowhere, fd)
    os.close(nowhere)
