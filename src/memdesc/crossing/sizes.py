"""The sizes that decide how a block crosses."""

from __future__ import annotations

import errno
from dataclasses import dataclass, fields

from memdesc.errors import InvalidArgument
from memdesc.vm.pages import check_integer


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The sizes at which one way becomes better than another. Bytes; None is never.

    The defaults were measured: docs/copying.md has the figures and the machine.

    Attributes
    ----------
    inline : int
        Up to here a block goes in the message.
    mapping : int or None
        From here mapping a block and using it once in place takes less time than copying it
        into new memory.
    copy_on_write : int or None
        From here a snapshot takes less time than a copy into new memory.
    copy_by_mapping : int or None
        From here `copyin` of mappable memory maps it, and copies from the mapping.

    Raises
    ------
    InvalidArgument
        A size below 0, or `inline` None.
    """

    inline: int = 4096
    mapping: int | None = 128 << 10
    copy_on_write: int | None = 128 << 10
    copy_by_mapping: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if value is None and name != "inline":
                continue
            if isinstance(value, bool) or check_integer(value, name) < 0:
                raise InvalidArgument(
                    f"{name} is {value}: give bytes, 0 or more", errno=errno.EINVAL
                )
