"""docs/asyncio.md lists every public call that waits, and what it lists is there."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import memdesc as md
from memdesc import dma, files, interop, queues, streams
from memdesc.dma import cuda

PAGE = (Path(__file__).parents[2] / "docs/asyncio.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|\n").split("|")]
    for line in re.findall(r"^\|.*\|$", PAGE, re.M)[2:]
]
AMONG_THEMSELVES = {
    f"{name}{twin}"
    for name in ("request", "map_in_peer", "unmap_in_peer")
    for twin in ("", "_async")
}
"""Of services and connections, without an underscore since other modules call them."""


def named(column: int) -> set[str]:
    return {name for row in ROWS for name in re.findall(r"(?<!\[)`([\w.]+)`", row[column])}


def faces() -> dict[str, Any]:
    found = {name: getattr(md, name) for name in md._LATER}
    for room in (dma, cuda, streams, interop.multiprocessing, interop.shared_memory, files, queues):
        names = getattr(room, "__all__", None) or [one for one in dir(room) if one[0] != "_"]
        found |= {one: getattr(room, one) for one in names if inspect.isclass(getattr(room, one))}
    del found["ReconnectingConnection"]  # a Connection, whose every call it has
    return found


def waits(call: Any) -> bool:
    if not (getattr(call, "__module__", None) or "memdesc").startswith("memdesc"):
        return False  # what a base of the standard library has
    if inspect.iscoroutinefunction(call):
        return True
    try:
        return "timeout" in inspect.signature(call).parameters
    except (TypeError, ValueError):
        return False


def calls() -> Iterator[tuple[str, Any]]:
    """Every public function and method; of a family of classes once, where it begins."""
    known = faces()
    classes = {face for face in known.values() if inspect.isclass(face)}
    for name, face in known.items():
        if not inspect.isclass(face):
            yield name, face
            continue
        for member in dir(face):
            above = [base for base in face.__mro__[1:] if base in classes]
            if not member.startswith("_") and not any(hasattr(base, member) for base in above):
                yield f"{name}.{member}", inspect.getattr_static(face, member)


WAITING = sorted(
    name for name, call in calls() if waits(call) and name.split(".")[-1] not in AMONG_THEMSELVES
)


def test_every_call_that_waits_is_in_the_table() -> None:
    twins = {name for name in WAITING if name.endswith("_async")}
    assert set(WAITING) - twins - named(0) == set()
    assert twins - named(2) == set()


def test_what_the_table_names_is_there() -> None:
    for name in named(0) | named(2) | named(3):
        kind, _, member = name.partition(".")
        if member and kind != "asyncio":
            assert hasattr(faces()[kind], member), name


def test_the_test_sees_those_that_wait() -> None:
    assert len(WAITING) > 50
    assert {"connect", "Consumer.dequeue", "Stream.loan", "Stream.loan_async"} <= set(WAITING)


def test_a_twin_takes_what_the_other_takes() -> None:
    found = dict(calls())
    for name in WAITING:
        twin = found.get(f"{name}_async")
        if twin is None:
            continue
        theirs = inspect.signature(twin).parameters
        if any(one.kind is one.VAR_KEYWORD for one in theirs.values()):
            continue  # it hands them on
        assert list(theirs) == list(inspect.signature(found[name]).parameters), name
