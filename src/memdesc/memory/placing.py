"""Where a mapping lies: at addresses that huge pages fit."""

from __future__ import annotations

from memdesc import _core
from memdesc.vm.pages import page_size


def map_aligned(
    length: int,
    prot: int,
    fd: int,
    offset: int,
    alignment: int,
    phase: int = 0,
    flags: int = _core.MAP_SHARED,
) -> tuple[_core.MappedMemory, int]:
    """Map at an address that is `phase` past a multiple of `alignment`.

    Returns
    -------
    MappedMemory, int
        The addresses, and where the mapping begins in them.
    """
    room = _core.reserve_memory(length + alignment - page_size)
    skip = (phase - room.address) % alignment
    at = room.address + skip
    del room  # free again: the kernel takes the hint, unless another thread comes in between
    memory = _core.map_memory(at, length, prot, flags, fd, offset)
    if memory.address % alignment == phase % alignment:
        return memory, 0
    del memory
    room = _core.reserve_memory(length + alignment - page_size)
    start = (phase - room.address) % alignment
    _core.place_memory(room, start, length, prot, flags, fd, offset)
    return room, start
