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

SOURCE = Path(memdesc.__file__).parent


def faces() -> list[str]:
    """What a program imports by these names: all that say what they have for others.

    What memdesc.iokit has stands in docs/iokit.md; PyTorch need not be there.
    """
    listing = {
        ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in SOURCE.rglob("*.py")
        if re.search(r"^__all__ = ", path.read_text(), re.M)
    }
    within = {one for one in listing if one.endswith(".needed") or ".torch" in one}
    return sorted(listing - within | {"memdesc", "memdesc.dma", "memdesc.files"})


def resolve(path: str) -> Any:
    """The module, class or function of a dotted name."""
    parts = path.split(".")
    found: Any = memdesc
    for index, part in enumerate(parts[1:], 2):
        found = getattr(found, part, None) or importlib.import_module(".".join(parts[:index]))
    return found


def public(module: ModuleType) -> dict[str, Any]:
    """What of ours a module has for its users; of one that does not list it, no constants."""
    listed = getattr(module, "__all__", None)
    found = {name: getattr(module, name) for name in listed or dir(module) if name[0] != "_"}
    return {
        name: value
        for name, value in found.items()
        if (listed or inspect.isclass(value) or inspect.isroutine(value))
        and str(getattr(value, "__module__", "memdesc")).startswith("memdesc")
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


@pytest.mark.parametrize("face", faces())
def test_every_public_name_is_there(face: str) -> None:
    module = resolve(face)
    names = public(module)
    assert names
    there = documented()
    missing = [name for name, one in names.items() if not is_there(one, name, module, there)]
    assert not missing


def is_there(thing: Any, name: str, module: ModuleType, there: set[int]) -> bool:
    if inspect.ismodule(thing):
        return True  # what it has is asked for by itself
    if inspect.isclass(thing) or inspect.isroutine(thing):
        return id(thing) in there
    home = memdesc._LATER.get(name, module.__name__) if module is memdesc else module.__name__
    told = {(kind, path) for kind, path, _ in DIRECTIVES}
    return ("data", f"{home}.{name}") in told or ("module", home) in told


def test_the_model_s_names_have_a_page_of_their_own() -> None:
    page = (DOCS / "iokit.md").read_text()
    for name in public(resolve("memdesc.iokit")):
        assert name in page, name
