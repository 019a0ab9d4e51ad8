"""The switch: what a program imports of `multiprocessing.shared_memory` becomes ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import managers, shared_memory, spawn
from typing import Any, Final

from memdesc.interop.shared_memory.block import SharedMemory
from memdesc.interop.shared_memory.manager import SharedMemoryManager
from memdesc.interop.shared_memory.shareable_list import ShareableList

_OURS: Final[tuple[tuple[Any, str, object], ...]] = (
    (shared_memory, "SharedMemory", SharedMemory),
    (shared_memory, "ShareableList", ShareableList),
    (managers, "SharedMemoryManager", SharedMemoryManager),
)

_replaced: list[tuple[Any, str, object]] = []


class _Too:
    """Has a child of multiprocessing install it too, before it imports the program's main."""

    def __reduce__(self) -> Any:
        return install, ()


def install() -> None:
    """Put our classes in the place of the standard library's, here and in children to come.

    Before the program says ``from multiprocessing.shared_memory import SharedMemory``, which
    keeps what is there at that moment. Children of every start method have it too. Again is a
    no-op.

    Notes
    -----
    Replaced are `SharedMemory` and `ShareableList` of `multiprocessing.shared_memory` and
    `SharedMemoryManager` of `multiprocessing.managers`, and nothing else. Blocks that exist stay
    what they are, and neither sees the other's names.
    """
    if _replaced:
        return
    prepare = spawn.get_preparation_data

    def prepared(name: str) -> dict[str, Any]:
        # What a child unpickles first; it ignores what it does not know.
        return {**prepare(name), "memdesc.interop.shared_memory": _Too()}

    for module, name, ours in (*_OURS, (spawn, "get_preparation_data", prepared)):
        _replaced.append((module, name, getattr(module, name)))
        setattr(module, name, ours)


def uninstall() -> None:
    """Put back what was there before `install`. Again is a no-op."""
    while _replaced:
        module, name, theirs = _replaced.pop()
        setattr(module, name, theirs)


@contextmanager
def installed() -> Iterator[None]:
    """Install it for the length of a ``with`` block; where it is installed already, it stays so."""
    if _replaced:
        yield
        return
    install()
    try:
        yield
    finally:
        uninstall()
