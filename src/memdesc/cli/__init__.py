"""The command line: `memdesc COMMAND`. Needs the `cli` extra (click, rich).

`commands` holds the commands; `demo` the main job, with its acts (`demo_acts`), its comparison
(`demo_compare`), the programs that both start (`demo_client`, `demo_worker`), how they are spoken
with (`demo_processes`), what is read of the kernel (`demo_kernel`), the files (`demo_files`) and
the screen (`demo_screen`); `doctor` what this machine allows, and `doctor_screen` its screen;
`serve` what serves files, `serve_screen` its screen and `serve_command` its options. Only the
commands, `printer` and the screens import click and rich.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; exit status 2 and the remedy where the `cli` extra is missing."""
    try:
        from memdesc.cli.commands import memdesc
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        print(
            f"memdesc: the command line needs {error.name}, which is not installed: "
            "pip install 'memdesc[cli]', or '.[cli]' in a clone",
            file=sys.stderr,
        )
        sys.exit(2)
    _open_what_is_closed()
    memdesc()


def _open_what_is_closed() -> None:
    """Have what goes to a standard stream that was closed (``>&-``) go nowhere.

    Else a socket or a file that is opened later would have its number, and be written to.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
