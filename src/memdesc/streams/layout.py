"""What lies where in the memory of a stream. Native byte order; offsets in bytes.

The pool, which subscribers see read-only: a header of `HEADER` bytes for each slot, rounded up to
pages, then the slots, each on a page border.

| header | type | name      | what                                                     |
|--------|------|-----------|----------------------------------------------------------|
| 0      | u64  | sequence  | which publication it is, from 1                          |
| 8      | u64  | timestamp | ns of CLOCK_MONOTONIC when it was published              |
| 16     | u64  | nbytes    | of the slot, that were published                         |
| 24     | u64  | metadata  | bytes of MessagePack that follow; 0: none                |

A header is written before its slot is offered, and not again until nobody has the slot.

The line, between the publisher and one subscriber; both may write all of it:

| line | type        | name              | written by | ordering                             |
|------|-------------|-------------------|------------|--------------------------------------|
| 0    | u64         | written           | publisher  | release, after the cell; acquire     |
| 8    | u64         | wanted            | publisher  | a full fence before the next look    |
| 16   | u32         | bell              | publisher  | sequential; futex                    |
| 20   | u32         | ended             | publisher  | sequential; acquire                  |
| 24   | u64         | magic             | publisher  | before it is handed over             |
| 64   | u64         | read              | both       | compare-and-swap, sequential         |
| 128  | u64         | subscriber_wanted | subscriber | a full fence before the next look    |
| 136  | u32         | subscriber_bell   | subscriber | sequential; futex                    |
| 140  | u32         | subscriber_ended  | subscriber | sequential; acquire                  |
| 192  | u64[slots]  | released          | subscriber | release, after the last look; acquire |
| then | cell[depth] | cells             | publisher  | before `written`                     |

* `written`, `read`: offers put in and taken out since the line was made; they only grow, and are
  at most `depth` apart. Offer number n is in cell n modulo `depth`: its sequence number (u64) and
  its slot (u64). Who moves `read` from n to n + 1 has offer n: the subscriber, who then holds that
  slot, or the publisher, who takes it back.
* `released`: of each slot, the sequence number with which the subscriber last gave it back.
* `wanted`: the value of `read` that is to wake the publisher; `subscriber_wanted`: that of
  `written` that is to wake the subscriber; 0 for none.
* `bell`, `subscriber_bell`: another value each time that this side wakes the other.
* `ended`: 1: the stream was closed; 2: the subscriber was too slow; 3: it wrote what can not be;
  4: the publisher wants it no more.
* `subscriber_ended`: not 0 once the subscriber takes no more. What it holds it still holds.
"""

from __future__ import annotations

import errno
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from memdesc import _core
from memdesc.errors import InvalidArgument
from memdesc.vm.pages import MAX_LENGTH, check_integer, check_length, round_page

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

HEADER = 1024
METADATA_LIMIT = HEADER - 32
"""Bytes of metadata, as MessagePack, that a slot carries at most."""

MAX_SLOTS = 4096


@dataclass(frozen=True, slots=True)
class StreamForm:
    """What a stream's memory is: all that a subscriber must know to read it.

    Attributes
    ----------
    slots : int
    nbytes : int
        Of each slot.
    shape : tuple of int or None
    dtype : str or None
        In the notation of NumPy's array protocol; with None slots are bytes.
    """

    slots: int
    nbytes: int
    shape: tuple[int, ...] | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= check_integer(self.slots, "slots") <= MAX_SLOTS:
            raise InvalidArgument(
                f"slots is {self.slots}: a stream has 1 to {MAX_SLOTS:,}", errno=errno.EINVAL
            )
        if check_length(self.nbytes, "nbytes") * self.slots > MAX_LENGTH // 4:
            raise InvalidArgument(
                f"{self.slots} slots of {self.nbytes:,} bytes do not fit into an address space",
                errno=errno.EINVAL,
            )
        if self.dtype is None:
            if self.shape is not None:
                raise InvalidArgument("a shape without a dtype", errno=errno.EINVAL)
        elif self.shape is None or _array_bytes(self.shape, self.dtype) != self.nbytes:
            raise InvalidArgument(
                f"an array of shape {self.shape} and dtype {self.dtype!r} has not {self.nbytes:,} "
                "bytes",
                errno=errno.EINVAL,
            )

    @property
    def stride(self) -> int:
        """Bytes from one slot to the next."""
        return round_page(self.nbytes)

    @property
    def pool_bytes(self) -> int:
        """Of the memory of all slots, with their headers."""
        return round_page(self.slots * HEADER) + self.slots * self.stride

    def line_bytes(self, depth: int) -> int:
        """Of the memory between the publisher and one subscriber."""
        return _core.OFFERS_OFFSETS["released"] + 8 * self.slots + 16 * depth

    def array_maker(self) -> Callable[[Any], np.ndarray[Any, Any]]:
        """Give what views a slot's buffer as an array; it keeps nothing of the stream alive."""
        import numpy as np

        # Not frombuffer and reshape: views of an array hold its base where that is an array, and
        # whether this very array is held tells whether the slot is looked at.
        if self.dtype is None or self.shape is None:
            return partial(_array, np.ndarray, (self.nbytes,), np.dtype("u1"))
        return partial(_array, np.ndarray, self.shape, np.dtype(self.dtype))


def _array(make: Any, shape: tuple[int, ...], dtype: np.dtype[Any], buffer: Any) -> Any:
    return make(shape, dtype, buffer=buffer)


def form_of(
    slots: int, nbytes: int | None, shape: int | tuple[int, ...] | None, dtype: npt.DTypeLike | None
) -> StreamForm:
    """Make the form of a stream of bytes, or of arrays."""
    if (nbytes is None) == (shape is None and dtype is None):
        raise InvalidArgument(
            "give either nbytes, for slots of bytes, or shape and dtype, for arrays",
            errno=errno.EINVAL,
        )
    if nbytes is not None:
        return StreamForm(slots, nbytes)
    import numpy as np

    shape = (shape,) if isinstance(shape, int) else () if shape is None else tuple(shape)
    try:
        kind = np.dtype("u1" if dtype is None else dtype)
    except (TypeError, ValueError, SyntaxError) as error:
        raise InvalidArgument(f"{dtype!r} is no dtype: {error}", errno=errno.EINVAL) from error
    if kind.names:
        raise InvalidArgument(f"dtype {kind} can not travel: use bytes", errno=errno.EINVAL)
    return StreamForm(slots, _array_bytes(shape, kind.str), shape, kind.str)


def _array_bytes(shape: tuple[int, ...], dtype: str) -> int:
    import numpy as np

    try:
        kind = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError) as error:  # a stranger's word, perhaps
        raise InvalidArgument(f"{dtype!r} is no dtype: {error}", errno=errno.EINVAL) from error
    if kind.hasobject or not kind.itemsize or kind.subdtype:
        raise InvalidArgument(
            f"dtype {kind} is no plain one of a size, as slots need", errno=errno.EINVAL
        )
    if len(shape) > 32 or any(check_integer(extent, "shape") < 1 for extent in shape):
        raise InvalidArgument(f"shape {shape} has no elements", errno=errno.EINVAL)
    return math.prod(shape) * kind.itemsize
