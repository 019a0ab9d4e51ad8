"""Locks and fork: a fork child gets new ones.

Of a lock that another thread of the parent held at that moment the child has a copy that nobody
will ever release: that thread is not in the child.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, Protocol


class Locked(Protocol):
    """What keeps its lock as `_lock`."""

    _lock: Any


_holders: weakref.WeakSet[Locked] = weakref.WeakSet()
_hooked = False


def lock_for(holder: Locked) -> Any:
    """Make the reentrant lock of an object, which in a fork child is replaced by a new one.

    Reentrant, as a signal handler may call what its own thread is in the middle of.
    """
    global _hooked
    if not _hooked:
        _hooked = True
        os.register_at_fork(after_in_child=_renew)
    _holders.add(holder)
    return threading.RLock()


def _renew() -> None:
    for holder in list(_holders):
        holder._lock = threading.RLock()
