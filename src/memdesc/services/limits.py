"""What one side of a connection lets the other take of it."""

from __future__ import annotations

import errno
from dataclasses import dataclass, fields

from memdesc.errors import InvalidArgument
from memdesc.vm.pages import check_integer


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a service lets each of its clients take at most, or a client its service.

    What goes beyond is refused with an error that names the limit, and the others notice nothing.

    Attributes
    ----------
    mappings : int
        Ranges that the other side may have mapped into this task at a time; 0 refuses all. A
        mapping is one, or as many as the pieces that it was put together from.
    mapped_bytes : int, optional
        Bytes that these may have together. None: the machine's memory.
    clients : int
        Of a service: clients that may be connected at a time.

    Raises
    ------
    InvalidArgument
        A limit that is negative, or no integer.
    """

    mappings: int = 64
    mapped_bytes: int | None = None
    clients: int = 4096

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and check_integer(value, field.name) < 0:
                raise InvalidArgument(
                    f"{field.name} is {value}: a limit is 0 or more", errno=errno.EINVAL
                )


def check_limits(limits: object) -> Limits:
    """Give limits back, or raise `InvalidArgument` for what is none."""
    if not isinstance(limits, Limits):
        raise InvalidArgument(f"limits are {limits!r}: give a Limits", errno=errno.EINVAL)
    return limits
