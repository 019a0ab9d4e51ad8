"""What all messages have in common, the greeting, and the answers that any question can get."""

from __future__ import annotations

import errno
from typing import Annotated

import msgspec

from memdesc.errors import InvalidArgument
from memdesc.portable import Natural

VERSION = 3
MAX_MESSAGE = 128 * 1024
"""Bytes of a packet at most; below the socket buffer's default (net.core.wmem_default)."""
MAX_COPY = 64 * 1024
"""Bytes of another task's memory that one message carries at most."""
MAX_NAME = 1024
ALL = "*"
"""The share that has all arrays of a version in it: what `Connection.arrays` opens."""
Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME)]
Text = Annotated[str, msgspec.Meta(max_length=8192)]
Shape = Annotated[tuple[Natural, ...], msgspec.Meta(max_length=64)]


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Client → service, first of all."""

    version: Natural


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """Service → client: admitted."""

    version: Natural
    service: Name
    copies: bool = False
    """Whether the service may copy from and to the client's memory as it is (process_vm)."""


class Done(msgspec.Struct, frozen=True, tag=True):
    """The answer to what returns nothing."""

    id: Natural


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The answer that it failed: the class's name in the family, and its fields."""

    id: Natural
    error: Name
    message: Text
    errno: int | None = None
    reason: Name | None = None


def check_name(name: str, what: str = "a share") -> str:
    """Give a name back if it can travel, else raise `InvalidArgument`. `what` has that name."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not _can_be_encoded(name):
        raise InvalidArgument(
            f"the name of {what} is text of 1 to {MAX_NAME:,} characters, not {str(name)[:80]!r}",
            errno=errno.EINVAL,
        )
    return name


def _can_be_encoded(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # lone surrogates
        return False
    return True
