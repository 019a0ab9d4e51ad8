"""What a service shares: lists, descriptors and lengths."""

from __future__ import annotations

from typing import Annotated

import msgspec

from memdesc.portable import Natural, Portable
from memdesc.services.protocol.basics import Name, Shape


class Share(msgspec.Struct, frozen=True):
    """What a service tells of one thing that it shares.

    `dtype` is NumPy's string for it; `ruled` says that the share has a rule of its own for who
    may open it; `column_major` that the first index of the array varies fastest; `content` what is
    in it, where that is no array: "arrow", an Arrow stream or file.
    """

    name: Name
    nbytes: Natural
    writable: bool
    shape: Shape | None = None
    dtype: Name | None = None
    ruled: bool = False
    column_major: bool = False
    content: Name = ""


class ListShares(msgspec.Struct, frozen=True, tag=True):
    """Client → service: what is there, from the `start`-th on?"""

    id: Natural
    start: Natural = 0


class Shares(msgspec.Struct, frozen=True, tag=True):
    """The answer; `more` says that the list goes on."""

    id: Natural
    shares: Annotated[tuple[Share, ...], msgspec.Meta(max_length=128)]
    more: bool


class OpenShare(msgspec.Struct, frozen=True, tag=True):
    """Client → service: give me that."""

    id: Natural
    name: Name


class Opened(msgspec.Struct, frozen=True, tag=True):
    """The answer, with the descriptors of its objects."""

    id: Natural
    share: Share
    portable: Portable


class WatchLength(msgspec.Struct, frozen=True, tag=True):
    """Client → service: how many bytes has that, and tell me from now on when it changes."""

    id: Natural
    name: Name


class Length(msgspec.Struct, frozen=True, tag=True):
    """The answer."""

    id: Natural
    name: Name
    nbytes: Natural


class LengthChanged(msgspec.Struct, frozen=True, tag=True):
    """Service → client: what it watches has so many bytes now. Only the latest is told."""

    name: Name
    nbytes: Natural


Message = ListShares | Shares | OpenShare | Opened | WatchLength | Length | LengthChanged
Answer = Shares | Opened | Length
