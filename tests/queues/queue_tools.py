"""Forked processes for the tests of queues: ended by their number, and with their parent."""

from __future__ import annotations

import os
import signal
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from children import die_with_parent


def start(function: Callable[..., object], *arguments: Any) -> int:
    """Run a function in a forked child, which exits with 0 if it returns."""
    with warnings.catch_warnings():
        # CPython 3.12 warns where threads are about (the watchdog of the tests is one).
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        die_with_parent()
        function(*arguments)
        code = 0
    except BaseException:  # noqa: BLE001 (shown, and told by the exit code)
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(pid: int) -> int:
    """Wait for a child: its exit code; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert finish(pid) == -signal.SIGKILL
