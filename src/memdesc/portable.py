"""The form in which a descriptor travels, beside the file descriptors of its VM objects."""

from __future__ import annotations

from typing import Annotated

import msgspec

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding a stranger's bytes raises: also for text that is none, and for endless nesting."""

UNENCODABLE = (TypeError, ValueError, OverflowError, RecursionError)
"""What encoding raises for what MessagePack can not carry."""

Natural = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Piece = tuple[Natural, Natural, Natural]
"""Which object (a place in the list of descriptors), offset in it, length: bytes."""


class Portable(msgspec.Struct, frozen=True):
    """A descriptor, by value. Types and bounds are checked when it is decoded."""

    version: Natural
    name: Annotated[str, msgspec.Meta(max_length=1024)]
    direction: Natural
    writable: bool
    pieces: Annotated[tuple[Piece, ...], msgspec.Meta(max_length=4096)]
