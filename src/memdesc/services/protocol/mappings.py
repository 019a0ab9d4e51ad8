"""Mappings that one side makes in the other, and copies through the connection."""

from __future__ import annotations

from typing import Annotated

import msgspec

from memdesc.portable import Natural, Piece
from memdesc.services.protocol.basics import MAX_COPY, Name


class PushMapping(msgspec.Struct, frozen=True, tag=True):
    """Either side: map this, with the descriptors of its objects (create_mapping_in_task)."""

    id: Natural
    token: Natural
    name: Name
    writable: bool
    pieces: Annotated[tuple[Piece, ...], msgspec.Meta(min_length=1, max_length=4096)]
    offset: Natural
    at_address: Natural | None
    guard_pages: Natural
    prefault: bool


class Mapped(msgspec.Struct, frozen=True, tag=True):
    """The answer: where it lies in the answering task. A claim."""

    id: Natural
    address: Natural


class PullMapping(msgspec.Struct, frozen=True, tag=True):
    """Either side: unmap that; an error while views of it are alive."""

    id: Natural
    token: Natural


class ReleaseMapping(msgspec.Struct, frozen=True, tag=True):
    """Either side: that mapping may go as soon as your views allow. No answer."""

    token: Natural


class MappingEnded(msgspec.Struct, frozen=True, tag=True):
    """Either side: my program ended that mapping by itself. No answer."""

    token: Natural


class ReadMemory(msgspec.Struct, frozen=True, tag=True):
    """Either side: copy that range of your memory to me (copyin where the kernel denies it)."""

    id: Natural
    address: Natural
    nbytes: Annotated[int, msgspec.Meta(ge=1, le=MAX_COPY)]


class MemoryRead(msgspec.Struct, frozen=True, tag=True):
    """The answer: the bytes up to the first that can not be read."""

    id: Natural
    data: Annotated[bytes, msgspec.Meta(max_length=MAX_COPY)]


class WriteMemory(msgspec.Struct, frozen=True, tag=True):
    """Either side: copy that into your memory (copyout)."""

    id: Natural
    address: Natural
    data: Annotated[bytes, msgspec.Meta(min_length=1, max_length=MAX_COPY)]


class MemoryWritten(msgspec.Struct, frozen=True, tag=True):
    """The answer: how many bytes were, up to the first that can not be written."""

    id: Natural
    nbytes: Natural


Message = (
    PushMapping
    | Mapped
    | PullMapping
    | ReleaseMapping
    | MappingEnded
    | ReadMemory
    | MemoryRead
    | WriteMemory
    | MemoryWritten
)
Answer = Mapped | MemoryRead | MemoryWritten
