"""Importing: nothing comes before it is used, and all that a use needs comes with it."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import memdesc

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(memdesc.__file__).parent
CHILD = [sys.executable, "-X", "importtime", "-c"]

# Ways to a descriptor that do not begin with the face: all are arguments of multiprocessing's.
WAYS = [
    "import memdesc as md; it = md.BufferMemoryDescriptor(1)",
    "import memdesc as md; it = md.descriptor_of(md.zeros(3))",
    "from memdesc.streams import Stream; it = Stream(nbytes=1).memory",
    "from memdesc.queues import create_data_queue; it = create_data_queue(4096)",
    "from memdesc.interop.arrays import descriptor_of, zeros; it = descriptor_of(zeros(3))",
    "from memdesc.alloc import io_malloc_aligned; it = io_malloc_aligned(8192, 8192).descriptor",
]


def modules(code: str) -> set[str]:
    """What Python imported for a line of code, as it tells itself."""
    done = subprocess.run([*CHILD, code], capture_output=True, text=True, timeout=60, check=True)
    return set(re.findall(r"^import time:\s+\d+ \|\s+\d+ \| +(\S+)$", done.stderr, re.M))


def test_importing_memdesc_brings_the_face_alone() -> None:
    brought = modules("import memdesc") - modules("pass")
    ours = {name for name in brought if name.partition(".")[0] == "memdesc"}
    assert ours == {"memdesc"}
    heavy = {"numpy", "msgspec", "asyncio", "logging", "multiprocessing", "ctypes", "click", "rich"}
    assert not heavy & {name.partition(".")[0] for name in brought}


def test_a_descriptor_brings_no_library_and_no_room_above_it() -> None:
    brought = modules("import memdesc as md; md.BufferMemoryDescriptor(100).close()")
    tops = {name.partition(".")[0] for name in brought}
    assert not tops & {"numpy", "msgspec", "asyncio", "subprocess", "statistics", "click", "rich"}
    rooms = {name.split(".")[1] for name in brought if name.startswith("memdesc.")}
    above = {"services", "streams", "queues", "dma", "files", "interop", "iokit", "testing", "cli"}
    assert not rooms & (above | {"debug", "alloc"})


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_descriptor_is_an_argument_of_multiprocessing_however_it_was_come_by(way: str) -> None:
    code = f"""
{way}
from multiprocessing.reduction import ForkingPickler
assert type(it) in ForkingPickler(__import__("io").BytesIO()).dispatch_table, type(it)
"""
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def test_every_name_of_the_face_is_where_the_face_says() -> None:
    """What type checkers are told and what is given at run time are one list."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (told,) = [node for node in tree.body if isinstance(node, ast.If) and _is_checking(node)]
    typed = {
        alias.asname or alias.name: node.module
        for node in told.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    given = {**memdesc._LATER, **dict.fromkeys(memdesc._MODULES)}
    assert {name: home for name, home in typed.items() if name in memdesc._LATER} == memdesc._LATER
    assert set(typed) == set(given)
    assert {*memdesc.__all__} <= {*given}
    assert {*given} <= {*dir(memdesc)}
    assert "TYPE_CHECKING" not in dir(memdesc)


def test_a_star_brings_all_names_that_are_listed() -> None:
    names: dict[str, object] = {}
    exec("from memdesc import *", names)
    assert {*memdesc._LATER, "debug", "dma", "files", "recycler"} <= {*names}
    assert names["dma"] is memdesc.dma


@pytest.mark.parametrize("room", ["dma", "interop", "crossing", "interop.dask", "interop.torch"])
def test_names_that_come_later_can_be_completed(room: str) -> None:
    module = importlib.import_module(f"memdesc.{room}")
    assert module.__all__
    assert {*module.__all__} <= {*dir(module)}
    told = f"module 'memdesc.{room}' has no attribute 'nothing'"
    with pytest.raises(AttributeError, match=re.escape(told)):
        module.nothing


def _is_checking(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
