"""Who still has my buffer? Where what is open was made, and who holds its views.

Off, it costs nothing and is not even imported. On, each descriptor, mapping, connection, service,
stream, subscription, slot, file, zone and claim on wired memory notes where it is made; an error
that says "in use" or "too many" then tells by whom (its notes, PEP 678); and what is still open
when the interpreter ends is listed on stderr. Switched on for a program as a whole by
``MEMDESC_DEBUG=1`` in its environment, or here:

>>> import memdesc as md
>>> with md.debug.tracing():
...     frames = md.BufferMemoryDescriptor(100, name="frames")
...     image = frames.array()
...     [(one.kind, one.name, one.nbytes) for one in md.debug.live()]
...     print(md.debug.holders(frames)[0].view)
[('BufferMemoryDescriptor', 'frames', 100)]
array of shape (100,) and dtype uint8

* `books`: what is noted
* `views`: who holds views, by the collector's knowledge
"""

from __future__ import annotations

import atexit
import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from memdesc import _core
from memdesc.debug.books import Ledger, Live as Live, Site as Site
from memdesc.debug.views import Holder as Holder, find_holders
from memdesc.errors import InvalidArgument
from memdesc.vm import tracing as _hook
from memdesc.vm.pages import check_integer

__all__ = [
    "start",
    "stop",
    "tracing",
    "is_on",
    "live",
    "holders",
    "report",
    "Live",
    "Site",
    "Holder",
]

_ledger: Ledger | None = None


def start(frames: int = 8) -> None:
    """Note from now on where things are made. What there is already stays unknown.

    Parameters
    ----------
    frames : int
        Lines of the stack to note, 1 to 100.

    Notes
    -----
    Costs some 5 us for each thing that is made, and a few hundred bytes as long as it lives; no
    frame and no variable is kept alive. Threads: safe. Fork: the child knows what it inherits.
    """
    global _ledger
    if not 1 <= check_integer(frames, "frames") <= 100:
        raise InvalidArgument(f"frames is {frames}: give 1 to 100", errno=errno.EINVAL)
    if _ledger is None:
        _ledger = _hook.books = Ledger(frames)
        _core.note_slots(_ledger.note_slot)
        atexit.register(_at_exit)
    _ledger.frames = frames


def stop() -> None:
    """Note nothing any more, and forget what was noted. Again is a no-op."""
    global _ledger
    _ledger = _hook.books = None
    _core.note_slots(None)
    atexit.unregister(_at_exit)


def is_on() -> bool:
    """Whether things are noted."""
    return _ledger is not None


@contextmanager
def tracing(frames: int = 8) -> Iterator[None]:
    """Note for the length of a ``with`` block; where one notes already, that goes on."""
    was_on = is_on()
    if not was_on:
        start(frames)
    try:
        yield
    finally:
        if not was_on:
            stop()


def live() -> list[Live]:
    """List what was made since `start` and is open, the oldest first.

    Memory is listed too that outlives its descriptor (kind ``MappedMemory``): someone has views. So
    are slots that were not given back (kind ``TakenSlot``: the handle is there, or a view), and
    those neither published nor discarded (``LoanedSlot``), under their stream's name.

    Raises
    ------
    InvalidArgument
        Debugging is off.
    """
    if _ledger is None:
        raise InvalidArgument(
            "nothing is noted: call memdesc.debug.start(), or set MEMDESC_DEBUG=1",
            errno=errno.EINVAL,
        )
    return _ledger.live()


def holders(thing: Any) -> list[Holder]:
    """Tell who holds views of a thing's memory: arrays, memoryviews, slots, tensors, mappings.

    Parameters
    ----------
    thing : MemoryDescriptor, LocalMemoryMap, Subscription or Live
        It need not have been noted: this works with debugging off, too.

    Raises
    ------
    InvalidArgument
        Something else was given, such as an array (EINVAL).

    Notes
    -----
    Looks at all that the garbage collector knows, which takes 0.1 s in a small program, and seconds
    in one of a million objects; for people, not for programs. Not seen: what C extensions hold.
    """
    if isinstance(thing, Live):
        thing = thing.thing
    elif not isinstance(thing, (_core.Exporter, _core.StreamSubscriber)):
        # No list: that would read as if nobody had it.
        raise InvalidArgument(
            f"who holds views of a {type(thing).__name__} can not be told: give a descriptor "
            "(descriptor_of(array) of an array), a mapping of this process, a subscription, or a "
            "record of live()",
            errno=errno.EINVAL,
        )
    return find_holders(thing)


def report(file: TextIO | None = None) -> None:
    """Print what is open, and who holds the memory of what is not, to a file (stderr)."""
    out = sys.stderr if file is None else file
    rows = live()
    print(f"memdesc.debug: {len(rows):,} open", file=out)
    for one in rows:
        where = f"  {one.age:8.1f} s  {one.thread}"
        print(f"  {one.kind:<24} {one.nbytes:>15,}  {one.name:<20} {where}", file=out)
        print(f"      made at {one.site}", file=out)
        if one.kind in ("MappedMemory", "TakenSlot"):
            for holder in holders(one):
                print(f"      held: {holder}", file=out)


def _at_exit() -> None:
    for one in live() if is_on() else ():
        print(f"memdesc.debug: still open at exit: {one}", file=sys.stderr)
