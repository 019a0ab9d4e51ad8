"""What is done at the end of a process that sent handles: once the threads of its queues have.

Such a thread may send the first handle when the finalizers of `multiprocessing` run already, and
start the holder with it: too late for one more of them. So there is one from the beginning on, of
each process that has both `multiprocessing` (not imported for this) and us.
"""

from __future__ import annotations

import os
import sys

_LAST = -100
"""Priority at exit: after the threads of queues were waited for (-5), and all children."""

_process = 0


def prepare() -> None:
    """Have `Ways.end` called at the end of this process and of its children; again a no-op."""
    util = sys.modules.get("multiprocessing.util")
    if util is not None and _process != os.getpid():
        if not _process:
            # Children start with no finalizers, also such as have imported us by then.
            util.register_after_fork(_end, _at_exit)
        _at_exit()


def _at_exit(_: object = None) -> None:
    global _process
    _process = os.getpid()
    sys.modules["multiprocessing.util"].Finalize(None, _end, exitpriority=_LAST)


def _end() -> None:
    transit = sys.modules.get("memdesc.handover.transit")
    if transit is not None:
        transit.ways.end()


prepare()
os.register_at_fork(before=prepare)  # by then `multiprocessing` is there, if it is who forks
