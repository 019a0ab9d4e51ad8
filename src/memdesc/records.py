"""Dataclasses with slots, made without `dataclasses`: their parts come when they are first used.

A program that makes one buffer defines some thirty of them and uses ten. `dataclasses` compiles
six functions for each, and imports `inspect`: half of what the first buffer took. Here a class gets
its slots; its `__init__` is compiled when it is first called or looked at, and the other methods
are the same functions for all. To everyone else they are dataclasses: `dataclasses.fields`,
`replace` and `asdict`, `match`, pickle, msgspec and type checkers see no difference.

What it does not know: `field()` and all that goes with it. Such a class is for `dataclasses`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar, cast, dataclass_transform, overload

_Kind = TypeVar("_Kind", bound=type)
_Record = TypeVar("_Record")


@overload
def record(cls: _Kind, /) -> _Kind: ...
@overload
def record(
    *, frozen: bool = True, eq: bool = True, kw_only: bool = False
) -> Callable[[_Kind], _Kind]: ...
@dataclass_transform(frozen_default=True)
def record(
    cls: type | None = None, /, *, frozen: bool = True, eq: bool = True, kw_only: bool = False
) -> Any:
    """Make of a class what `dataclass(slots=True, ...)` would, frozen unless told otherwise."""

    def make(given: type) -> type:
        return _made(given, frozen=frozen, eq=eq, kw_only=kw_only)

    return make if cls is None else make(cls)


def replace(given: _Record, /, **changes: object) -> _Record:
    """Give a record with other values, as `dataclasses.replace` does."""
    kind: Any = type(given)
    for name in kind.__record__.names:
        changes.setdefault(name, getattr(given, name))
    changed: _Record = kind(**changes)
    return changed


def types_of(given: object) -> dict[str, Any]:
    """Give the names of a record's fields, and what each is annotated with."""
    shape: _Shape = cast("Any", given).__record__
    return dict(shape.annotations)


class _Shape:
    """What a record is made of: what its parts are made from when they are first used."""

    def __init__(self, cls: type, *, frozen: bool, eq: bool, kw_only: bool) -> None:
        self.own = tuple(cls.__annotations__)
        self.annotations: dict[str, Any] = {}
        self.defaults: dict[str, Any] = {}
        for base in reversed(cls.__mro__[1:]):
            if isinstance(inherited := base.__dict__.get("__record__"), _Shape):
                self.annotations |= inherited.annotations
                self.defaults |= inherited.defaults
        self.annotations |= cls.__annotations__
        self.defaults |= {name: cls.__dict__[name] for name in self.own if name in cls.__dict__}
        self.names = tuple(self.annotations)
        self.how = {"frozen": frozen, "eq": eq, "kw_only": kw_only}
        self.cls = cls

    def values(self, instance: object) -> tuple[object, ...]:
        return tuple([getattr(instance, name) for name in self.names])

    def init(self) -> FunctionType:
        """Compile `__init__`: what is called for each instance is what one would write by hand."""
        takes = [
            f"{name}=_default_{name}" if name in self.defaults else name for name in self.names
        ]
        takes[:0] = ["*"] if self.how["kw_only"] and takes else []
        does = [
            f"_set_{name}(self, {name})" if self.how["frozen"] else f"self.{name} = {name}"
            for name in self.names
        ]
        if hasattr(self.cls, "__post_init__"):
            does.append("self.__post_init__()")
        given: dict[str, Any] = {f"_default_{name}": it for name, it in self.defaults.items()}
        given |= {f"_set_{name}": getattr(self.cls, name).__set__ for name in self.names}
        source = (
            f"def _make({', '.join(given)}):\n"
            f" def __init__({', '.join(['self', *takes])}):\n  {'; '.join(does or ['pass'])}\n"
            " return __init__"
        )
        made: dict[str, Any] = {}
        exec(source, vars(sys.modules[self.cls.__module__]), made)
        init: FunctionType = made["_make"](**given)
        init.__qualname__ = f"{self.cls.__qualname__}.__init__"
        init.__annotations__ = {**self.annotations, "return": None}
        return init

    def as_dataclass(self) -> Any:
        """Give a dataclass of the same fields, for those who ask what a dataclass is asked."""
        from dataclasses import dataclass

        space = {"__module__": self.cls.__module__, "__annotations__": self.annotations}
        return dataclass(**self.how)(type(self.cls.__name__, (), space | self.defaults))


class _Later:
    """A part of a class that is made, and takes this one's place, when it is first looked at."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner, self._name = owner, name

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        made = self._make()
        setattr(self._owner, self._name, made)
        return made.__get__(instance, owner) if isinstance(made, FunctionType) else made


def _made(cls: type, *, frozen: bool, eq: bool, kw_only: bool) -> type:
    shape = _Shape(cls, frozen=frozen, eq=eq, kw_only=kw_only)
    space: dict[str, Any] = {
        "__init__": _Later(shape.init),
        "__repr__": _repr,
        "__replace__": replace,
        "__match_args__": () if kw_only else shape.names,
    }
    if eq:
        space |= {"__eq__": _eq, "__hash__": _hash if frozen else None}
    if frozen:
        space |= {"__setattr__": _refuse_to_set, "__delattr__": _refuse_to_delete}
        space |= {"__getstate__": _getstate, "__setstate__": _setstate}
    dropped = {*shape.own, "__dict__", "__weakref__"}
    space |= {name: value for name, value in cls.__dict__.items() if name not in dropped}
    space |= {
        "__slots__": shape.own,
        "__qualname__": cls.__qualname__,
        "__record__": shape,
        "__dataclass_fields__": _Later(lambda: shape.as_dataclass().__dataclass_fields__),
        "__dataclass_params__": _Later(lambda: shape.as_dataclass().__dataclass_params__),
    }
    shape.cls = type(cls)(cls.__name__, cls.__bases__, space)
    return shape.cls


def _repr(self: Any) -> str:
    told = ", ".join([f"{name}={getattr(self, name)!r}" for name in self.__record__.names])
    return f"{self.__class__.__qualname__}({told})"


def _eq(self: Any, other: Any) -> Any:
    if other.__class__ is not self.__class__:
        return NotImplemented
    values = self.__record__.values
    return values(self) == values(other)


def _hash(self: Any) -> int:
    return hash(self.__record__.values(self))


def _getstate(self: Any) -> list[object]:
    return list(self.__record__.values(self))


def _setstate(self: Any, state: list[object]) -> None:
    for name, value in zip(self.__record__.names, state, strict=True):
        object.__setattr__(self, name, value)


def _refuse_to_set(self: object, name: str, value: object) -> None:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_to_delete(self: object, name: str) -> None:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot delete field {name!r}")
