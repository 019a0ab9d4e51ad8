"""Recycling: the memory of freed buffers, kept warm for the next ones.

A fresh page costs a fault; a kept one costs nothing, or being cleared. What is kept, and for whom,
the lifecycle says, and the kernel is asked each time whether anyone else still has it. The faces
are `configure`, `trim` and `statistics`; `docs/recycling.md` tells the rules.

Linux: fcntl(F_SETLEASE), /proc/meminfo, the memory cgroups, /proc/pressure/memory. No privilege.
"""

from __future__ import annotations

import atexit
import errno
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from types import EllipsisType
from typing import TypeVar

from memdesc import _core
from memdesc.errors import AllocationError, ClosedError, InvalidArgument
from memdesc.memory.kept import (
    Block,
    Contents,
    Kind,
    RecyclerStatistics,
    Refusal,
    Settings,
    Want,
    clear,
    fits,
)
from memdesc.memory.lifecycle import Recycling
from memdesc.memory.limits import available
from memdesc.memory.memfd import OwnedObject
from memdesc.memory.pressure import Watch, is_stalling
from memdesc.vm.forks import lock_for
from memdesc.vm.pages import check_integer

__all__ = ["Contents", "RecyclerStatistics", "Refusal", "configure", "statistics", "trim"]

MOST_BLOCKS = 64
"""Each holds a file descriptor, of 1,024 that a process may have by default."""
_MOST_BYTES = 1 << 30
_SHARE = 8
"""By default at most this part of what is available is kept."""
_FRESH = 0.25
"""Seconds for which a reading of what is available is good enough."""

T = TypeVar("T")


class Recycler:
    """The blocks of one process.

    Memory comes back at any instruction: from the collector or a signal handler, also while the
    same thread is in the middle of a change here. So coming back never waits. It is put into an
    inbox, and taken in by whoever is inside (before leaving, or just after: `_settle` looks again
    once the lock is free) or, when nobody is, at once. The lock is reentrant, and `_busy` tells a
    thread that it has met itself: then the frame below does the work. What is dropped is unmapped
    outside of the lock.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.hits = self.misses = self.busy = self.trimmed = 0
        self.refused: Counter[Refusal] = Counter()
        self._blocks: list[Block] = []  # the oldest first
        self._inbox: deque[Block | Refusal] = deque()
        self._dropped: deque[Block] = deque()
        self._lock = lock_for(self)
        self._busy = False
        self._room = (-_FRESH, 0)  # when it was read, and bytes
        self._watch = Watch(self._look)

    # -- getting in and out ----------------------------------------------------------------------

    def _inside(self, work: Callable[[], T], otherwise: T) -> T:
        """Do work alone; `otherwise` where this thread is inside already, further down."""
        try:
            with self._lock:
                if self._busy:
                    return otherwise
                self._busy = True
                try:
                    self._take_in()
                    return work()
                finally:
                    self._busy = False
        finally:
            self._settle()

    def _settle(self) -> None:
        """Take in what came meanwhile, unless somebody is inside, who then will."""
        while self._inbox:
            with _core.Attempt(self._lock) as free:
                if not free:
                    break
                if self._busy:
                    return
                self._busy = True
                try:
                    self._take_in()
                finally:
                    self._busy = False
        while self._dropped and not self._busy:
            try:
                self._dropped.popleft()  # unmapped here, without the interpreter lock
            except IndexError:  # another thread took the last one
                return

    def hand_in(self, what: Block | Refusal) -> None:
        """Take freed memory in, or count that it was refused. Never waits."""
        self._inbox.append(what)
        self._settle()

    def _take_in(self) -> None:
        while self._inbox:
            block = self._inbox.popleft()
            if isinstance(block, Refusal):
                self.refused[block] += 1
            elif refusal := self.refusal(block.object) or self._unfit(block):
                self._drop(block, refusal)
            else:
                self._blocks.append(block)
                self._shrink(self._limit())
        if self._blocks and not self._watch.start():
            self._shrink(0)  # no thread to be had: then nobody would see memory get short

    def _drop(self, block: Block, refusal: Refusal | None = None) -> None:
        if refusal is None:
            self.trimmed += block.size
        else:
            self.refused[refusal] += 1
        self._dropped.append(block)

    # -- how much, and what ----------------------------------------------------------------------

    def refusal(self, object_: OwnedObject) -> Refusal | None:
        """Tell why the memory of an object may not become another buffer's; None where it may."""
        recycling = object_.lifecycle.recycling()
        trusted = recycling is Recycling.TRUSTED and self.settings.trust_same_user
        if recycling is Recycling.THIS_PROGRAM or trusted:
            return None
        return Refusal.NOT_ALLOWED

    def _unfit(self, block: Block) -> Refusal | None:
        if not block.object.retired:
            return Refusal.SPOILED
        return Refusal.TOO_LARGE if block.size > self._limit() else None

    @property
    def _kept(self) -> int:
        """Bytes of all blocks. Not counted as they come and go: interrupts may strike between."""
        return sum(block.size for block in self._blocks)

    def _limit(self) -> int:
        """Bytes that may be kept now: never more than is still free besides."""
        if time.monotonic() - self._room[0] >= _FRESH:
            self._measure()
        room = self._room[1]
        if self.settings.limit is not None:
            return min(self.settings.limit, room)
        return min(_MOST_BYTES, (room + self._kept) // _SHARE, room)

    def _measure(self) -> None:
        try:
            room = available().nbytes
        except (OSError, KeyError, ValueError):  # what can not be read is taken for full
            room = 0
        self._room = time.monotonic(), room

    def _shrink(self, most: int) -> int:
        """Drop the oldest until `most` bytes are left; tell how many were dropped.

        Where it is the number of blocks that is too large, a smallest one: it is made anew soonest.
        """
        before = kept = self._kept
        while self._blocks and (kept > most or len(self._blocks) > MOST_BLOCKS):
            block = self._blocks[0 if kept > most else self._smallest()]
            self._blocks.remove(block)
            self._drop(block)
            kept -= block.size
        return before - kept

    def _smallest(self) -> int:
        return min(range(len(self._blocks)), key=lambda index: self._blocks[index].size)

    def _look(self) -> bool:
        """Look at the machine, as the watching thread; False when nothing is left to watch."""
        stalling = is_stalling()

        def look() -> bool:
            self._measure()
            self._shrink(0 if stalling else self._limit())
            return bool(self._blocks) or self._watch.stop()

        return self._inside(look, True)

    # -- handing on ------------------------------------------------------------------------------

    def take(self, want: Want) -> tuple[OwnedObject, _core.MappedMemory, int] | None:
        """Make memory for a buffer of a kept block; None where none fits."""
        picked = self._inside(lambda: self._pick(want), None)
        if picked is None:
            return None
        block, object_ = picked
        kept = 0 if want.contents is Contents.ZEROED else want.capacity
        clear(block.memory, block.start + kept, block.size - kept)
        return object_, block.memory, block.start

    def _pick(self, want: Want) -> tuple[Block, OwnedObject] | None:
        """Take the best block out that nobody else has: the smallest, and the warmest of those."""
        fitting = [block for block in reversed(self._blocks) if fits(block, want)]
        for block in sorted(fitting, key=lambda block: block.size):
            successor = None
            refusal = self.refusal(block.object)
            if refusal is None:
                try:
                    if block.object.is_held_by_others():
                        self.busy += 1
                        continue
                    successor = block.object.successor(want.kind.max_access)
                except ClosedError:
                    refusal = Refusal.SPOILED
                except OSError:
                    refusal = Refusal.NO_LEASE
            self._blocks.remove(block)
            if successor is not None:
                self.hits += 1
                return block, successor
            self._drop(block, refusal)
        self.misses += 1
        return None

    def end_watch(self) -> None:
        """Have the watching thread end, where there is nothing to watch."""
        self._watch.end()

    # -- the faces -------------------------------------------------------------------------------

    def trim(self, to_bytes: int) -> int:
        """Drop the oldest blocks; tell how many bytes were given back."""
        return self._inside(lambda: self._shrink(to_bytes), 0)

    def configure(self, settings: Settings) -> None:
        """Follow new settings, and drop what they forbid."""

        def change() -> None:
            self.settings = settings
            for block in list(self._blocks):
                if refusal := self.refusal(block.object):
                    self._blocks.remove(block)
                    self._drop(block, refusal)
            self._shrink(self._limit())

        self._inside(change, None)

    def statistics(self) -> RecyclerStatistics:
        """Tell what there is."""
        return RecyclerStatistics(
            self._limit(),
            self._kept,
            len(self._blocks),
            dict(Counter(block.size for block in self._blocks)),
            self.hits,
            self.misses,
            self.busy,
            self.trimmed,
            dict(self.refused),
        )


_recycler = Recycler(Settings())
_hooked = False


def _hook() -> None:
    """See to forks and to the end of the program."""
    global _hooked
    if not _hooked:
        _hooked = True
        os.register_at_fork(before=_give_all_back, after_in_child=_after_fork)
        atexit.register(_at_end)


def _give_all_back() -> None:
    """Before a fork: both processes would hold what is kept."""
    trim()
    _recycler.end_watch()


def _at_end() -> None:
    configure(limit=0)
    _give_all_back()


def _after_fork() -> None:
    # What another thread freed just before the fork is marked forked, and dropped with the old one.
    global _recycler
    _recycler = Recycler(_recycler.settings)


# -- for those who allocate --------------------------------------------------------------------


def take(want: Want) -> tuple[OwnedObject, _core.MappedMemory, int] | None:
    """Give kept memory that fits, cleared as wanted: object, addresses, where it begins in them."""
    if _recycler.settings.limit == 0:
        return None
    _hook()
    return _recycler.take(want)


def offer(kind: Kind, object_: OwnedObject, memory: _core.MappedMemory, start: int) -> bool:
    """Keep the memory of a freed buffer once its last view is gone; False where it is not kept.

    Then the caller closes the object as ever. Else it is closed by now, for everyone.
    """
    if sys.is_finalizing() or _recycler.settings.limit == 0:
        return False
    if refusal := _recycler.refusal(object_):
        _recycler.hand_in(refusal)
        return False
    _hook()
    if not object_.retire():
        return False
    heir = _Heir(kind, object_, start)
    memory.leave_to(heir)
    _heirs.add(heir)  # last: one that inherits nothing would keep the object for good
    return True


_heirs: set[_Heir] = set()


class _Heir:
    """Takes over the addresses of a closed buffer when its last view is gone.

    Held from here until then: of an heir or an object in its garbage the collector would leave an
    empty shell.
    """

    __slots__ = ("_kind", "_object", "_start")

    def __init__(self, kind: Kind, object_: OwnedObject, start: int) -> None:
        self._kind = kind
        self._object = object_
        self._start = start

    def __call__(
        self,
        memory: _core.MappedMemory,
        ending: Callable[[], bool] = sys.is_finalizing,  # bound: modules are taken apart at the end
    ) -> None:
        if not ending() and self in _heirs:  # it is called once more after an interrupt
            _heirs.discard(self)
            _recycler.hand_in(Block(self._kind, self._object, memory, self._start))


# -- for the program ---------------------------------------------------------------------------


def configure(
    *, limit: int | EllipsisType | None = ..., trust_same_user: bool | EllipsisType = ...
) -> None:
    """Say how much may be kept, and of what. What is not given stays as it is.

    Parameters
    ----------
    limit : int, optional
        Bytes at most; 0 turns recycling off. None, as at first: 1 GiB, or an eighth of what is
        available where that is less. Never more is kept than is still available besides.
    trust_same_user : bool
        Whether memory that was granted to tasks of this same user is kept too. Not at first: such a
        task can have kept a handle that no lease sees, and with it read, or where it was given
        that, write, what the next buffer holds.

    Raises
    ------
    AllocationError
        ENOMEM: the limit is more than this machine, or its memory cgroup, has; with `requested`
        and `available`. Nothing is changed.
    InvalidArgument
    """
    settings = _recycler.settings
    if not isinstance(limit, EllipsisType):
        settings = replace(settings, limit=None if limit is None else _check_limit(limit))
    if not isinstance(trust_same_user, EllipsisType):
        settings = replace(settings, trust_same_user=bool(trust_same_user))
    _recycler.configure(settings)


def _check_limit(limit: int) -> int:
    limit = check_integer(limit, "limit")
    if limit < 0:
        raise InvalidArgument(
            f"limit is {limit}: give bytes, or 0 to keep nothing", errno=errno.EINVAL
        )
    if not limit:
        return 0
    room = available()
    most = room.nbytes + _recycler.statistics().kept_bytes
    if limit > most:
        raise AllocationError(
            f"recycling up to {limit:,} bytes: {room.limit} leaves {most:,}, what is kept now "
            "included; give a lower limit, or None for a share of what there is",
            errno=errno.ENOMEM,
            requested=limit,
            available=most,
        )
    return limit


def trim(to_bytes: int = 0) -> int:
    """Give kept memory back to the kernel, the oldest first, until `to_bytes` are left.

    Returns
    -------
    int
        Bytes given back.

    Examples
    --------
    >>> import memdesc
    >>> memdesc.BufferMemoryDescriptor(1 << 20).close()
    >>> memdesc.recycler.trim() >= 0
    True
    >>> memdesc.recycler.statistics().kept_bytes
    0
    """
    if check_integer(to_bytes, "to_bytes") < 0:
        raise InvalidArgument(f"to_bytes is {to_bytes}: give 0 or more", errno=errno.EINVAL)
    return _recycler.trim(to_bytes)


def statistics() -> RecyclerStatistics:
    """Tell what is kept, and what recycling has done since the process began."""
    return _recycler.statistics()
