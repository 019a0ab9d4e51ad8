"""docs/reference.md has every public name."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import memdesc

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = (DOCS / "reference.md").read_text()
DIRECTIVES = re.findall(r"^\.\. auto(\w+):: (\S+)\n((?:   .*\n)*)", TEXT, re.M)

# What a program imports by these names. (What memdesc.iokit has stands in docs/iokit.md.)
FACES = [
    "memdesc",
    "memdesc.crossing",
    "memdesc.debug",
    "memdesc.dma",
    "memdesc.errors",
    "memdesc.files",
    "memdesc.interop.arrow",
    "memdesc.interop.dask",
    "memdesc.interop.multiprocessing",
    "memdesc.interop.shared_memory",
    "memdesc.queues",
    "memdesc.recycler",
    "memdesc.streams",
    "memdesc.testing",
    "memdesc.wiring",
]


def resolve(path: str) -> Any:
    """The module, class or function of a dotted name."""
    parts = path.split(".")
    found: Any = memdesc
    for index, part in enumerate(parts[1:], 2):
        found = getattr(found, part, None) or importlib.import_module(".".join(parts[:index]))
    return found


def public(module: ModuleType) -> dict[str, Any]:
    """What of ours a module has for its users: classes and functions."""
    names = getattr(module, "__all__", None) or [one for one in dir(module) if one[0] != "_"]
    found = {name: getattr(module, name) for name in names}
    return {
        name: value
        for name, value in found.items()
        if (inspect.isclass(value) or inspect.isroutine(value))
        and str(value.__module__).startswith("memdesc")
    }


def documented() -> set[int]:
    found = set()
    for kind, path, options in DIRECTIVES:
        if path.startswith("memdesc.interop.torch"):
            continue  # needs PyTorch
        named = resolve(path)
        found.add(id(named))
        if kind == "module" and ":no-members:" not in options:
            listed = hasattr(named, "__all__")  # what it lists, autodoc shows wherever it is from
            own = public(named).values()
            found |= {id(one) for one in own if listed or one.__module__ == named.__name__}
    return found


def test_every_directive_names_something() -> None:
    assert len(DIRECTIVES) > 100
    assert documented()


@pytest.mark.parametrize("face", FACES)
def test_every_public_name_is_there(face: str) -> None:
    names = public(resolve(face))
    there = documented()
    own = {name: one for name, one in names.items() if face == "memdesc" or _is_of(one, face)}
    assert own
    assert not [name for name, one in own.items() if one.__doc__ and id(one) not in there]


def _is_of(thing: Any, face: str) -> bool:
    """Whether it is of that room, and not of one below that it uses."""
    room = importlib.import_module("memdesc.memory.recycler" if face.endswith("recycler") else face)
    return str(thing.__module__).startswith(room.__name__)


def test_the_model_s_names_have_a_page_of_their_own() -> None:
    page = (DOCS / "iokit.md").read_text()
    for name in public(resolve("memdesc.iokit")):
        assert name in page, name
