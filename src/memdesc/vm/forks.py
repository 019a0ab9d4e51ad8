"""Locks and fork: a fork child gets new ones, and a fork can be held off.

Of a lock that another thread of the parent held at that moment the child has a copy that nobody
will ever release: that thread is not in the child.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Locked(Protocol):
    """What keeps its lock as `_lock`."""

    _lock: Any


_gate: Any = threading.RLock()
_holders: weakref.WeakSet[Locked] = weakref.WeakSet()
_hooked = False


def lock_for(holder: Locked) -> Any:
    """Make the reentrant lock of an object, which in a fork child is replaced by a new one.

    Reentrant, as a signal handler may call what its own thread is in the middle of.
    """
    _hook()
    _holders.add(holder)
    return threading.RLock()


@contextmanager
def no_fork() -> Iterator[None]:
    """Let `os.fork` of other threads wait: what is done inside is in a child whole, or not at all.

    A signal handler of this thread that forks is not held off. Only for what takes milliseconds.
    """
    _hook()
    with _gate:
        yield


def _hook() -> None:
    global _hooked
    if not _hooked:
        _hooked = True
        # No functions of ours, at whose head the interrupt strikes that came during the fork.
        os.register_at_fork(
            before=_gate.acquire, after_in_parent=_gate.release, after_in_child=_gate.release
        )
        os.register_at_fork(after_in_child=_renew)


def _renew() -> None:
    if _gate.acquire(blocking=False):
        _gate.release()
    else:  # an interrupt ended the waiting for another thread, which is not in the child
        _gate._at_fork_reinit()
    for holder in list(_holders):
        holder._lock = threading.RLock()
