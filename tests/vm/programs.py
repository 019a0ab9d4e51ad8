"""What starts programs for the tests of tasks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

Start = Callable[..., "subprocess.Popen[str]"]

_STAY = "\nprint('ready', flush=True)\nimport sys; sys.stdin.read()"


def start_program(code: str = "", *arguments: str) -> subprocess.Popen[str]:
    """Start a Python that runs some code, says so, and stays until it is killed."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-I", "-S", "-c", code + _STAY, *arguments]
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    if not child.stdout or child.stdout.readline() != "ready\n":
        child.kill()
        child.communicate()
        raise AssertionError("the program did not get ready")
    return child
