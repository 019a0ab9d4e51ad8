"""What descriptors tell of themselves."""

from __future__ import annotations

from dataclasses import dataclass

from memdesc.memory.lifecycle import State


@dataclass(frozen=True, slots=True)
class DescriptorStatistics:
    """What a descriptor has now.

    Attributes
    ----------
    name : str
    nbytes : int
        That it describes.
    mappings, mapped_bytes : int
        In this task, made by `map`; those on the same addresses count each.
    remote_mappings : int
        In other tasks, made by `create_mapping_in_task`.
    prepares : int
        That await their `complete`; from the first on it is wired.
    """

    name: str
    nbytes: int
    mappings: int
    mapped_bytes: int
    remote_mappings: int
    prepares: int


@dataclass(frozen=True, slots=True)
class BufferStatistics(DescriptorStatistics):
    """What a buffer has now, and what became of it. What it is made of: `page_kind`.

    Attributes
    ----------
    capacity, reserve : int
        Bytes allocated for, and those that it can grow to.
    views : int
        Arrays and memoryviews of the buffer itself, at its present length.
    state : State
        How far its memory has travelled.
    grantees : int
        Users that were ever given it.
    moves, moved_bytes : int
        As of the buffer.
    """

    capacity: int
    reserve: int
    views: int
    state: State
    grantees: int
    moves: int
    moved_bytes: int
