"""The books: where each thing that is open was made, in which thread, and when."""

from __future__ import annotations

import functools
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

from memdesc import _core
from memdesc.debug.views import find_holders, memory_of
from memdesc.errors import MemdescError
from memdesc.vm.tracing import Told

_BLAMED = 10
"""Lines that are added to an error at most."""


@dataclass(frozen=True, slots=True)
class Site:
    """A line of a program."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


@dataclass(frozen=True, slots=True)
class Live:
    """One thing that is open: a descriptor, a mapping, a connection.

    Attributes
    ----------
    kind : str
        Its class; ``MappedMemory``: memory that outlives its descriptor, since views of it do;
        ``TakenSlot``: a slot that its subscriber has, by its handle or by views of it.
    name : str
    nbytes : int
        That it keeps or describes; 0 where that has no meaning.
    site : Site
        Where it was made: the innermost line that is not of memdesc.
    stack : tuple of Site
        From there outwards.
    age : float
        Seconds since.
    thread : str
        That it was made in.
    """

    kind: str
    name: str
    nbytes: int
    site: Site
    stack: tuple[Site, ...]
    age: float
    thread: str
    _thing: weakref.ref[Any] = field(repr=False, compare=False)

    @property
    def thing(self) -> Any:
        """The thing itself; None where it has gone meanwhile."""
        return self._thing()

    def __str__(self) -> str:
        nbytes = f", {self.nbytes:,} bytes" if self.nbytes else ""
        return f"{self.kind} {self.name!r}{nbytes}, made at {self.site}"


@dataclass(frozen=True, slots=True)
class _Note:
    thing: weakref.ref[Any]
    told: Callable[[Any], Told]
    lines: tuple[tuple[CodeType, int], ...]  # not the frames, which keep their variables alive
    made: float
    thread: str


class Ledger:
    """What is noted while debugging is on. Needs no lock: each step is one of a dict's."""

    def __init__(self, frames: int) -> None:
        self.frames = frames
        self._notes: dict[int, _Note] = {}

    def note(self, thing: Any, told: Callable[[Any], Told]) -> None:
        """Note where a thing is made."""
        key, notes = id(thing), self._notes

        def gone(_: object) -> None:
            notes.pop(key, None)

        lines = _lines_of_program(self.frames)
        thread = threading.current_thread().name
        notes[key] = _Note(weakref.ref(thing, gone), told, lines, time.monotonic(), thread)

    def note_slot(self, slot: Any, end: Any) -> None:
        """Note where a slot of a stream is loaned or taken."""
        self.note(slot, functools.partial(_told_slot, end.name))

    def live(self) -> list[Live]:
        """List what is open, the oldest first."""
        now = time.monotonic()
        found = []
        for note in list(self._notes.values()):
            thing = note.thing()
            try:
                told = None if thing is None else note.told(thing)
            except (AttributeError, MemdescError):  # it is just being made, or closed
                told = None
            if told is None:
                continue
            stack = tuple(Site(code.co_filename, n, code.co_qualname) for code, n in note.lines)
            # What its views keep, and its handle while that lives.
            is_slot = isinstance(thing, _core.SlotMemory)
            kind, (name, nbytes) = "TakenSlot" if is_slot else type(thing).__name__, told
            age = now - note.made
            found.append(Live(kind, name, nbytes, stack[0], stack, age, note.thread, note.thing))
        # Memory that a mapping shows which is open is that one's.
        shown = {id(memory_of(one.thing)) for one in found if one.kind != "MappedMemory"}
        return [one for one in found if one.kind != "MappedMemory" or id(one.thing) not in shown]

    def blame(
        self, error: BaseException, *, views_of: object = None, of: Collection[str] = ()
    ) -> None:
        """Add notes to an error: they are shown with it, and do not travel to other tasks."""
        if views_of is not None:
            told = [str(holder) for holder in find_holders(views_of, exactly=True)]
            _add(error, "who holds the views", told or ["nothing that the collector can see"])
        if of:
            largest = sorted(self.live(), key=lambda one: -one.nbytes)
            _add(error, "what is held", [str(one) for one in largest if one.kind in of])


def _told_slot(stream: str, slot: Any) -> Told:
    return (stream, slot.nbytes) if slot.held else None


def _add(error: BaseException, what: str, lines: list[str]) -> None:
    if lines:
        more = [f"and {len(lines) - _BLAMED:,} more"] if len(lines) > _BLAMED else []
        error.add_note("\n  ".join([f"memdesc.debug: {what}", *lines[:_BLAMED], *more]))


def _lines_of_program(most: int) -> tuple[tuple[CodeType, int], ...]:
    """The innermost lines that are not of this package; of its own threads, those that are.

    What `multiprocessing` does on the way to them is passed over too; not what its threads do.
    """
    inner = sys._getframe(2)
    frame = _beyond(inner, ("memdesc", "contextlib"))
    if _module_of(frame) == "threading":
        frame = inner
    elif _module_of(further := _beyond(frame, ("multiprocessing",))) != "threading":
        frame = further
    lines: list[tuple[CodeType, int]] = []
    at: Any = frame
    while at is not None and len(lines) < most:
        lines.append((at.f_code, at.f_lineno))
        at = at.f_back
    return tuple(lines)


def _beyond(frame: FrameType, packages: tuple[str, ...]) -> FrameType:
    while frame.f_back is not None and _module_of(frame).partition(".")[0] in packages:
        frame = frame.f_back
    return frame


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))
