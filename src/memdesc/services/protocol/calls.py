"""Calls: a method of the service with its arguments, and what it returned.

Arguments and results are records of MessagePack inside the message: of a call an array of the
positional ones and a map of the named ones, of an answer the value. Small memory is in the record
itself; larger memory travels beside it (`memory`), and the record names it by its place there, in
extension types (`EXT_*`). A record that is itself too large travels so too (`record`).
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from memdesc.portable import Natural, Portable
from memdesc.services.protocol.basics import Name, Shape

EXT_BYTES = 1
"""Bytes: the place in `memory` (an integer)."""
EXT_VIEW = 2
"""As EXT_BYTES, of what was a view and no bytes object."""
EXT_ARRAY = 3
"""An array: an `ArrayForm`."""
EXT_DESCRIPTOR = 4
"""A descriptor: the place in `memory`."""

MAX_MEMORY = 64
"""Blocks of memory that travel beside one call at most, and file descriptors of all of them."""

MAX_RECORD = 64 << 20
"""Bytes of a record at most: decoded it takes many times as much. Arrays and bytes lie beside."""

NOTHING = msgspec.Raw(b"\xc0")


class ArrayForm(msgspec.Struct, frozen=True, array_like=True):
    """An array: NumPy's string for the type, the shape in C's order, and its bytes.

    Those are a place in `memory`, or the bytes themselves.
    """

    dtype: Name
    shape: Shape
    source: Natural | bytes


class Given(msgspec.Struct, frozen=True, tag=True):
    """Memory with the next `files` of the file descriptors that came with the message."""

    files: Annotated[int, msgspec.Meta(ge=1, le=MAX_MEMORY)]
    portable: Portable


class Lent(msgspec.Struct, frozen=True, tag=True):
    """Private memory of the calling task, to be copied from or to while the call lasts."""

    address: Natural
    length: Natural
    direction: Annotated[int, msgspec.Meta(ge=1, le=3)]


Memory = Annotated[tuple[Given | Lent, ...], msgspec.Meta(max_length=MAX_MEMORY)]


class Call(msgspec.Struct, frozen=True, tag=True):
    """Client → service: call that. `into` is where the bytes that it returns are to be stored."""

    id: Natural
    method: Name
    arguments: msgspec.Raw
    memory: Memory = ()
    record: Natural | None = None
    into: Natural | None = None


class Returned(msgspec.Struct, frozen=True, tag=True):
    """The answer, with the descriptors of its memory. With `into` the value is how many bytes."""

    id: Natural
    value: msgspec.Raw
    memory: Memory = ()
    record: Natural | None = None


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Client → service: nobody waits for the answer any more. The call is answered all the same."""

    id: Natural


Message = Call | Returned | Cancel
Answer = Returned
