"""Who holds the views of some memory: told by the collector, put into words.

Arrays are not among what the collector knows, so it is asked what everything that it knows refers
to, and each running function for its variables. It looks at the whole heap: some us an object.
What it can not see: what a C extension holds, and a value that an expression is in the middle of.
"""

from __future__ import annotations

import gc
import sys
import types
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from memdesc import _core
from memdesc.errors import ClosedError

_DEPTH = 4
"""How far holders of holders are followed, until one has a name."""
_RESUMED = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)
_FRAMES = (types.FrameType, *_RESUMED)
_CO_OPTIMIZED = 1  # of a function: its variables are not in a dict
_SLOTS = (_core.TakenSlot, _core.LoanedSlot)


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds one view.

    Attributes
    ----------
    view : str
        What it holds: an array, a memoryview, a slot, a mapping.
    holder : str
        In words, as ``local variable `image` of show() at camera.py:12 (MainThread)``.
    """

    view: str
    holder: str

    def __str__(self) -> str:
        return f"{self.view}: {self.holder}"


def memory_of(thing: object) -> _core.MappedMemory | None:
    """The addresses that a descriptor, mapping, subscription or window shows; None: it has none."""
    if isinstance(thing, _core.MappedMemory):
        return thing
    window = thing
    for name in ("_window", "_pool"):
        window = getattr(thing, name, window)
    return window.memory if isinstance(window, _core.Window) else None


def find_holders(thing: Any, *, exactly: bool = False) -> list[Holder]:
    """Find who holds views of a thing's memory.

    `exactly`: only those that count as the thing's own, not those of others on the same addresses.
    """
    search = _Search(_matcher(thing, exactly=exactly))
    try:
        return search.run()
    finally:
        search.forget()


def _matcher(thing: Any, *, exactly: bool) -> Callable[[Any], bool]:
    """What says whether a view is one of the thing's memory."""
    memories = [memory_of(thing)]
    if not exactly:
        memories += [memory_of(one) for one in getattr(thing, "mappings", list)()]
    spans = [(one.address, one.address + one.length) for one in memories if one is not None]
    if isinstance(thing, _core.SlotMemory):
        spans.append((thing.address, thing.address + thing.nbytes))

    def is_inside(view: Any) -> bool:
        if view is thing:
            return False
        if isinstance(view, _core.Exporter):
            memory = memory_of(view)
            return not exactly and memory is not None and memory in memories
        if isinstance(view, _SLOTS):
            address = _address_of_slot(view)
            return any(low <= address < high for low, high in spans)
        exporter, address = _origin(view)
        if exporter is thing:
            return True
        if exactly and isinstance(thing, _core.Window) and isinstance(exporter, _core.Window):
            return False
        return any(low <= address < high for low, high in spans)

    return is_inside


def _address_of_slot(slot: Any) -> int:
    try:
        return int(slot.address)
    except ClosedError:  # it was given back, or published
        return 0


def _origin(view: Any) -> tuple[object, int]:
    """What a view's memory belongs to, behind all views of views, and its first byte's address."""
    if _is_of("torch", "Tensor", view):
        return None, view.data_ptr()
    if isinstance(view, memoryview):
        try:
            return _origin_of_exporter(view.obj), _core.buffer_address(view)[0]
        except (ValueError, BufferError):  # released; not contiguous
            return None, 0
    address: int = view.__array_interface__["data"][0]
    found: Any = view
    while _is_of("numpy", "ndarray", found):
        found = found.base
    try:
        return _origin_of_exporter(found.obj if isinstance(found, memoryview) else found), address
    except ValueError:
        return None, address


def _origin_of_exporter(found: Any) -> object:
    while _is_of("numpy", "ndarray", found) or isinstance(found, memoryview):
        found = found.obj if isinstance(found, memoryview) else found.base
    return found


def _is_of(module: str, kind: str, value: object) -> bool:
    there = sys.modules.get(module)
    # Not isinstance, which asks proxies what they stand for.
    return there is not None and issubclass(type(value), getattr(there, kind, ()))


class _Search:
    """One look at everything."""

    def __init__(self, is_inside: Callable[[Any], bool]) -> None:
        self._is_inside = is_inside
        self._views: set[type] = set()
        self._plain: set[type] = set()  # neither views nor what may hold some unseen: most
        self.variables = _variables()
        self._parents: dict[int, object] = {}  # of what the collector does not track
        # Containers of this search, which refer to everything, and are nobody's business.
        self._kept: list[object] = []
        self._own = {id(self), id(self.__dict__), id(self.variables), id(self._parents)}
        self._own |= {id(self._kept), *map(id, self.variables)}
        self._found: dict[tuple[int, str], Holder] = {}

    def run(self) -> list[Holder]:
        for where, value in self.variables:
            if self._is_view(value):
                self._note(value, where)
            elif type(value) in (dict, tuple) and not gc.is_tracked(value):
                self._look_into(value, 1)
        everything = gc.get_objects()
        self._own.add(id(everything))
        for module in list(sys.modules.values()):  # which gc.freeze() takes from the collector
            self._look_into(_dict_of(module), 0)
        for holder in everything:
            if id(holder) not in self._own and type(holder) not in _FRAMES:
                self._look_into(holder, 0)
        return list(self._found.values())

    def forget(self) -> None:
        """Keep nothing alive any more."""
        self.variables.clear()
        self._kept.clear()
        self._parents.clear()

    def _look_into(self, holder: object, depth: int) -> None:
        plain = self._plain
        for child in gc.get_referents(holder):
            if type(child) in plain:
                continue
            if self._is_view(child):
                if not self._is_cache(holder):
                    self._note(child, self._words(holder, child, 0))
            elif type(child) in (dict, tuple) and not gc.is_tracked(child) and depth < _DEPTH:
                self._parents[id(child)] = holder
                self._look_into(child, depth + 1)

    def _is_cache(self, holder: object) -> bool:
        """Whether it is where a stream's end keeps the arrays of its slots: that holds none."""
        if type(holder) is not list:
            return False
        for _, value in self.variables:
            if value is holder:
                return False
        return all(isinstance(one, _core.StreamPool) for one in self._referrers(holder))

    def _note(self, view: Any, where: str) -> None:
        self._found.setdefault((id(view), where), Holder(_name_view(view), where))

    def _is_view(self, value: Any) -> bool:
        kind = type(value)
        if kind in self._views:
            return self._is_inside(value)
        if kind in self._plain or kind in (dict, tuple):
            return False
        is_view = (
            issubclass(kind, (memoryview, _core.Exporter, *_SLOTS))
            or _is_of("numpy", "ndarray", value)
            or _is_of("torch", "Tensor", value)
        )
        (self._views if is_view else self._plain).add(kind)
        return is_view and self._is_inside(value)

    # -- words -----------------------------------------------------------------------------------

    def _words(self, holder: Any, held: object, depth: int) -> str:
        """Say what holds something."""
        if isinstance(holder, dict):
            return self._of_dict(holder, held, depth)
        if isinstance(holder, (list, tuple, deque)):
            at = next((i for i, value in enumerate(tuple(holder)) if value is held), None)
            which = "an element" if at is None else f"element {at}"
            return f"{which} of {_a(holder)}{self._up(holder, depth)}"
        if isinstance(holder, types.CellType):
            return f"variable of a closure{self._up(holder, depth)}"
        if isinstance(holder, types.FunctionType):
            return f"function {holder.__module__}.{holder.__qualname__}()"
        name = _attribute(holder, held)
        return f"attribute `{name}` of {_a(holder)}" if name else f"{_a(holder)}"

    def _of_dict(self, holder: dict[Any, Any], held: object, depth: int) -> str:
        key = next((key for key, value in tuple(holder.items()) if value is held), None)
        for name, module in list(sys.modules.items()):
            if _dict_of(module) is holder:
                return f"global variable `{key}` of {name}"
        for owner in self._referrers(holder):
            if _dict_of(owner) is holder:
                return f"attribute `{key}` of {_a(owner)}"
        return f"value of {key!r} in a dict{self._up(holder, depth)}"

    def _up(self, holder: object, depth: int) -> str:
        """Say who holds the holder, where that is more than an anonymous container."""
        for where, value in self.variables:
            if value is holder:
                return f", which is {where}"
        if depth < _DEPTH:
            for above in self._referrers(holder):
                return f", which is {self._words(above, holder, depth + 1)}"
        return ""

    def _referrers(self, thing: object) -> list[object]:
        parent = self._parents.get(id(thing))
        if parent is not None:
            return [parent]
        found = [
            one
            for one in gc.get_referrers(thing)
            if id(one) not in self._own and type(one) not in _FRAMES
        ]
        self._kept.append(found)
        self._own.add(id(found))
        return found


def _variables() -> list[tuple[str, Any]]:
    """Local variables of all functions that run or that a traceback keeps, but for our own."""
    names = {thread.ident: thread.name for thread in _threads()}
    found: list[tuple[str, Any]] = []
    seen: set[int] = set()
    frames = sys._current_frames()
    at: types.FrameType | None
    waiting = [_frame_of(one) for one in gc.get_objects() if type(one) in _RESUMED]
    kept = [one for one in gc.get_objects() if type(one) is types.FrameType]
    try:
        for ident, at in frames.items():
            while at is not None:
                seen.add(id(at))
                if not at.f_globals.get("__name__", "").startswith("memdesc.debug"):
                    found += _locals_of(at, names.get(ident, str(ident)))
                at = at.f_back
        for at in waiting:
            if at is not None and id(at) not in seen:
                seen.add(id(at))
                found += _locals_of(at, "waiting")
        for at in kept:
            if id(at) not in seen:
                found += _locals_of(at, "ended, kept by a traceback")
    finally:  # this very frame is among them: no cycle of it and its variables
        frames.clear()
        waiting.clear()
        kept.clear()
        at = None
    return found


def _threads() -> list[Any]:
    import threading

    return list(threading.enumerate())


def _locals_of(frame: types.FrameType, state: str) -> list[tuple[str, Any]]:
    if not frame.f_code.co_flags & _CO_OPTIMIZED:
        return []  # a module's variables are its globals
    variables = frame.f_locals
    found = [(_variable(name, frame, state), value) for name, value in variables.items()]
    # Up to Python 3.12 the frame keeps that dict, and by it what a variable was, until it ends.
    # Unless a debugger writes it back, or the program has it by `locals()`.
    if sys.version_info < (3, 13) and sys.gettrace() is None and sys.getrefcount(variables) <= 3:
        variables.clear()
    return found


def _frame_of(resumed: Any) -> types.FrameType | None:
    """Where a generator or coroutine waits; None once it has ended."""
    for name in ("gi_frame", "cr_frame", "ag_frame"):
        frame: types.FrameType | None = getattr(resumed, name, None)
        if frame is not None:
            return frame
    return None


def _variable(name: str, frame: types.FrameType, state: str) -> str:
    code = frame.f_code
    return (
        f"local variable `{name}` of {code.co_qualname}() at {code.co_filename}:{frame.f_lineno} "
        f"({state})"
    )


def _dict_of(owner: object) -> object:
    try:
        return object.__getattribute__(owner, "__dict__")
    except AttributeError:
        return None


def _attribute(owner: object, held: object) -> str | None:
    values = _dict_of(owner)
    if isinstance(values, dict):
        for name, value in tuple(values.items()):
            if value is held:
                return str(name)
    for kind in type(owner).__mro__:
        for name, member in vars(kind).items():
            if isinstance(member, types.MemberDescriptorType):
                try:
                    if member.__get__(owner) is held:
                        return name
                except AttributeError:  # not set
                    continue
    return None


def _a(value: object) -> str:
    kind = type(value)
    name = kind.__qualname__
    if kind.__module__ != "builtins":
        name = f"{kind.__module__}.{name}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _name_view(view: Any) -> str:
    if isinstance(view, memoryview):
        return f"memoryview of {view.nbytes:,} bytes"
    if isinstance(view, (_core.Exporter, *_SLOTS)):
        return repr(view)
    if _is_of("numpy", "ndarray", view):
        return f"array of shape {view.shape} and dtype {view.dtype}"
    return f"{_a(view)[2:].lstrip()} of shape {tuple(view.shape)}"
