"""Services that take a name over from one another, either killed at a random moment.

Thirty rounds, a thousand with MEMDESC_STORM=long.
"""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
import warnings

import pytest
from children import die_with_parent
from puppets import count_fds, wait_until

import memdesc as md
from memdesc.services import folder, service  # noqa: F401 (before any fork)

LONG = os.environ.get("MEMDESC_STORM") == "long"
ROUNDS = 1000 if LONG else 30
LONGEST = 0.04
"""Seconds between the start of a successor and a kill: what taking over takes, about."""


def serve() -> int:
    """Fork a process that has the name, from whomever, and serves; give its pid."""
    with warnings.catch_warnings():
        # CPython 3.12 warns where threads are about (the watchdog of the tests is one).
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    try:
        die_with_parent()
        camera = md.Service("camera", take_over=True)
        if "frame" not in camera.inherited:  # who had it was killed
            camera.share("frame", md.BufferMemoryDescriptor(4096))
        camera.wait_superseded()
        time.sleep(1000)  # for the clients that it has
    except BaseException:  # noqa: BLE001 (the process ends here, and the test says so)
        traceback.print_exc()
    os._exit(1)


def kill(pid: int) -> None:
    """It must not have ended before."""
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.timeout(1800 if LONG else 120)
def test_the_name_is_served_or_free_for_the_next(runtime_dir) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    current = serve()
    with md.connect("camera", timeout=20, reconnect=True) as moving:
        before = count_fds()
        for _ in range(ROUNDS):
            successor = serve()
            time.sleep(rng.uniform(0, LONGEST))
            if rng.random() < 0.5:
                kill(current)
                current = successor
            else:
                kill(successor)
                if not folder.is_served(
                    "camera"
                ):  # the old one had let go, and the new one has gone
                    kill(current)
                    current = serve()
            with md.connect("camera", timeout=20) as connection:
                assert connection.task.pid == current
                assert len(connection.map("frame", timeout=20)) == 4096
        del connection  # it holds a task
        wait_until(lambda: len(moving.map("frame", timeout=20)) == 4096)
        assert moving.task.pid == current
        wait_until(lambda: count_fds() <= before)
    kill(current)
    (runtime_dir / "camera").unlink()
