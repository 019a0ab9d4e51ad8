"""memdesc.records: to everyone else they are what `dataclass(slots=True)` makes."""

import copy
import dataclasses
import inspect
import json
import pickle
import subprocess
import sys
from typing import Any, Generic, TypeVar

import msgspec
import pytest

from memdesc.records import record, replace, types_of

T = TypeVar("T")


@record
class Point:
    """A place."""

    x: int
    y: "int | None" = None

    def sum(self) -> int:
        return self.x + (self.y or 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Twin:
    """A place."""

    x: int
    y: "int | None" = None


@record
class Named(Point):
    name: str = "it"

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("no name")


@record(frozen=False)
class Counter:
    n: int = 0


@record(eq=False)
class Same:
    n: int


@record(kw_only=True)
class Limits:
    most: int = 1
    least: int


@record
class Box(Generic[T]):
    it: T


@record
class Nothing:
    pass


def test_it_has_what_a_dataclass_has() -> None:
    assert repr(Point(1, y=2)) == "Point(x=1, y=2)"
    assert Point(1) == Point(1, None) != Point(1, 2)
    assert Point(1) != Twin(1)
    assert hash(Point(1)) == hash(Point(1)) == hash(Twin(1))
    assert inspect.signature(Point).parameters == inspect.signature(Twin).parameters
    assert Point.__match_args__ == Twin.__match_args__
    assert Point.__slots__ == ("x", "y")  # type: ignore[attr-defined]
    assert not hasattr(Point(1), "__dict__")
    assert Point(1, 2).sum() == 3
    assert repr(Nothing()) == "Nothing()"
    match Point(3, 4):
        case Point(x, y=4):
            assert x == 3
        case _:
            pytest.fail("it does not match")


def test_the_standard_library_takes_it_for_a_dataclass() -> None:
    assert dataclasses.is_dataclass(Point)
    told = [(f.name, f.type, f.default) for f in dataclasses.fields(Named)]
    assert told[0] == ("x", int, dataclasses.MISSING)
    assert told[1:] == [("y", "int | None", None), ("name", str, "it")]
    named: Any = Named(1)
    assert dataclasses.asdict(named) == {"x": 1, "y": None, "name": "it"}
    assert dataclasses.replace(named, y=2) == replace(named, y=2) == Named(1, 2)
    assert Named.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert msgspec.json.decode(msgspec.json.encode(Point(1, 2)), type=Point) == Point(1, 2)
    assert json.loads(msgspec.json.encode(Counter(3))) == {"n": 3}

    @dataclasses.dataclass(frozen=True)
    class More(Point):
        z: int = 0

    assert repr(More(1, 2, 3)).endswith("More(x=1, y=2, z=3)")
    with pytest.raises(TypeError):
        dataclasses.dataclass(type("Thawed", (Point,), {}))


def test_frozen_is_frozen_and_what_is_not_changes() -> None:
    point, counter = Point(1), Counter()
    with pytest.raises(dataclasses.FrozenInstanceError):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        del point.x
    counter.n += 1
    assert counter == Counter(1)
    with pytest.raises(TypeError):
        hash(counter)
    with pytest.raises(AttributeError):
        counter.m = 1  # type: ignore[attr-defined]


def test_it_is_copied_and_pickled() -> None:
    for it in (Point(1, 2), Named(1, name="n"), Counter(4)):
        assert copy.copy(it) == copy.deepcopy(it) == pickle.loads(pickle.dumps(it)) == it


def test_fields_come_from_the_bases_first_and_what_is_wrong_is_refused() -> None:
    assert Named(1, 2, "three").name == "three"
    with pytest.raises(ValueError, match="no name"):
        Named(1, name="")
    with pytest.raises(TypeError):
        Point()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Limits(1)  # type: ignore[call-arg, misc]
    assert Limits(least=2) == Limits(most=1, least=2)
    assert replace(Limits(least=2), most=3).most == 3
    with pytest.raises(TypeError):
        replace(Point(1), z=1)
    assert Same(1) != Same(1)
    assert len({Same(1), Same(1)}) == 2
    assert Box[int](3).it == 3
    assert types_of(Named(1)) == {"x": int, "y": "int | None", "name": str}


@pytest.mark.parametrize("use", ["BufferMemoryDescriptor(1).close()", "connect", "Service"])
def test_what_programs_begin_with_comes_without_dataclasses(use: str) -> None:
    """They, and what they bring, would take as long as all the rest of a buffer's."""
    code = f"""
import sys
sys.modules["typing_extensions"] = None  # msgspec takes it where it is, and it takes inspect
import memdesc as md
md.{use}
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    assert not {"dataclasses", "inspect"} & {*done.stdout.decode().split()}
