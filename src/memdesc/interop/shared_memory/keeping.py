"""What this process holds of blocks, and for how long.

A block that it attached to: while any of its addresses show it, so that an array which outlives
its `SharedMemory` still answers for the name. A block that it made: until the name is gone too,
whether or not anything shows it. Then who makes, fills and closes a block can send the name, and
the other side finds the memory. That another process removed the name is seen at the next look;
the pages are freed before that, by the last who used them.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections import deque
from multiprocessing import util
from typing import Final

from memdesc import _core
from memdesc.descriptors.base import MemoryDescriptor
from memdesc.descriptors.homes import note_home
from memdesc.interop.shared_memory import names
from memdesc.interop.shared_memory.holders import Holding
from memdesc.vm.forks import tell_child

_LOOKS = 16
"""Blocks whose names are looked after at each call: so a call never costs more with many."""

_held: set[Holding] = set()

_awaiting: dict[str, Holding] = {}
"""By token: blocks that nothing shows here any more, held until their names are gone."""

_unnamed: deque[Holding] = deque()
"""Blocks without a name that this process has let go: who leaves last frees their pages."""


def keep(holding: Holding, window: _core.Window, descriptor: MemoryDescriptor) -> None:
    """Hold a block at least as long as memory that shows it, and so long let arrays be traced."""
    _hook()
    _held.add(holding)
    holding.pins.append(descriptor)
    note_home(window, descriptor, 0)
    weakref.finalize(window.memory, _unpin, holding).atexit = False


def _unpin(holding: Holding) -> None:
    holding.pins.pop()
    if holding.pins or holding.fd < 0:
        return
    if not holding.named:
        _let_go(holding)
        _unnamed.append(holding)  # for later: what takes a lock is not for the collector
    elif holding.made_here:
        with contextlib.suppress(OSError):  # no descriptor for the handle: as it is, then
            holding.rest()
        _awaiting[holding.token] = holding
    else:
        _let_go(holding)


def _let_go(holding: Holding) -> None:
    _held.discard(holding)
    holding.let_go()


def name_gone(holding: Holding) -> None:
    """Hold a block no longer only for its name, which this process removed."""
    waiting = _awaiting.pop(holding.token, None)
    if waiting is not None:
        _let_go(waiting)
    _unnamed.append(holding)


def look_after() -> None:
    """Let go of what other processes unlinked; a few at each call, in turn."""
    while _unnamed:
        with contextlib.suppress(OSError, IndexError):  # no leases here; another thread was faster
            names.free_unused(_unnamed.popleft())
    for token in list(itertools.islice(_awaiting, _LOOKS)):
        holding = _awaiting.pop(token, None)
        if holding is None:
            continue  # another thread was faster
        if holding.named:
            _awaiting[token] = holding
        else:
            _let_go(holding)


def _end() -> None:
    """At the end of the process: let go, and take names along that lead nowhere now."""
    names.remove_last([holding for holding in list(_held) if holding.leave()])
    _held.clear()
    _awaiting.clear()


class _Child:
    """What is to be done in a fork child: it holds what its memory shows, and no more."""

    def _inherit(self) -> None:
        for holding in list(_held):
            holding.made_here = False
            if holding.token in _awaiting:
                holding.disown()
                _let_go(holding)
            else:
                holding.inherit()
        _awaiting.clear()
        _unnamed.clear()
        _at_exit()


_child: Final = _Child()
_hooked = False


def _hook() -> None:
    global _hooked
    if not _hooked:
        _hooked = True
        tell_child(_child)
        util.register_after_fork(_child, lambda _: _at_exit())  # its children forget the others
        _at_exit()


def _at_exit() -> None:
    """Have `_end` called at exit, after this process has waited for children of multiprocessing.

    They may still look for the names; so not by `atexit`, which could come before that.
    """
    util.Finalize(None, _end, exitpriority=-100)
