"""What becomes of a command whose reader has gone (`memdesc ls | head -1`), or that fails.

As of any program of the system: it ends at once and says nothing, with the status that a shell
gives to those that SIGPIPE ends. The signal itself stays ignored: the library writes to sockets.
Output that can not be written (a full disk) is told in one line, with the status 1.
"""

from __future__ import annotations

import contextlib
import errno
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
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Why output is not written. What the library raises of such numbers is of its own family."""


class Commands(click.Group):
    """The group of all commands: errors of the family are one line on stderr, exit status 1."""

    def make_context(self, *arguments: Any, **more: Any) -> click.Context:
        """Read the command line; `--help` and `--version` are told here."""
        with _reader_may_go(), _mistakes_told():
            return super().make_context(*arguments, **more)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was given."""
        with _reader_may_go(), _mistakes_told():
            try:
                return super().invoke(ctx)
            except MemdescError as error:
                name = f"memdesc {ctx.invoked_subcommand}"
                print(f"{name}: {harmless(str(error))}", file=sys.stderr)
                sys.exit(1)


@contextlib.contextmanager
def _mistakes_told() -> Iterator[None]:
    """Tell of wrong arguments here: where click does, a reader that has gone is an error."""
    try:
        yield
    except click.ClickException as error:
        error.show()
        sys.stderr.flush()
        sys.exit(error.exit_code)


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
    except OSError as error:
        if isinstance(error, MemdescError) or error.errno not in _FULL:
            raise
        _discard_the_rest(always=(1,))
        print(f"memdesc: standard output: {error.strerror}", file=sys.stderr)
        sys.exit(1)


def _has_no_reader(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, 0)
    return any(events & select.POLLERR for _, events in poller.poll(0))


def _discard_the_rest(always: tuple[int, ...] = ()) -> None:
    """Let what lies in the buffers still go nowhere, without a word."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):
        if fd in always or _has_no_reader(fd):
            os.dup2(nowhere, fd)
    os.close(nowhere)
