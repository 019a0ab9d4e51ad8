"""What an array's elements are, and whether an array of them fits. NumPy is asked only where it
must be: a program that hands arrays over and views none (`memdesc serve`) does without it, and is
a third as large for that.
"""

from __future__ import annotations

import errno
import sys
from typing import TYPE_CHECKING, NamedTuple

from memdesc.errors import InvalidArgument, RangeError
from memdesc.vm.pages import check_integer

if TYPE_CHECKING:
    import numpy.typing as npt

_SIZES = {"b": (1,), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8), "c": (8, 16)}
_KNOWN = {f"{kind}{size}": size for kind, sizes in _SIZES.items() for size in sizes}
_NATIVE = "<" if sys.byteorder == "little" else ">"


class Elements(NamedTuple):
    """What a dtype says of an array's elements.

    Attributes
    ----------
    dtype : str
        NumPy's string for it ("<f4").
    itemsize : int
        Bytes.
    alignment : int
        Bytes, that the address of one should be a multiple of.
    """

    dtype: str
    itemsize: int
    alignment: int

    def __str__(self) -> str:
        return self.dtype


def elements_of(dtype: npt.DTypeLike) -> Elements:
    """Tell what a dtype says; refuse those whose elements are not plain.

    Raises
    ------
    InvalidArgument
        It is none, or its elements have fields, Python objects, no size, or are arrays (EINVAL).
    """
    found = _known(dtype) if isinstance(dtype, str) else None
    return _as_numpy_says(dtype) if found is None else found


def _known(text: str) -> Elements | None:
    """What NumPy would say of the common ones; None: ask it."""
    order, code = (text[0], text[1:]) if text[:1] in ("<", ">", "=") else ("=", text)
    size = _KNOWN.get(code)
    if size is None:
        return None
    order = "|" if size == 1 else _NATIVE if order == "=" else order
    return Elements(order + code, size, size // 2 if code[0] == "c" else size)


def _as_numpy_says(dtype: npt.DTypeLike) -> Elements:
    import numpy as np

    try:
        kind = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError, OverflowError) as error:
        raise InvalidArgument(f"{dtype!r} is no dtype: {error}", errno=errno.EINVAL) from error
    if kind.hasobject:
        raise InvalidArgument(
            f"dtype {kind} holds Python objects, which live in one process only",
            errno=errno.EINVAL,
        )
    if kind.names or kind.subdtype or not kind.itemsize:
        raise InvalidArgument(
            f"dtype {kind} has fields, or no size: only plain elements are shared with their "
            "dtype; share bytes, and give the dtype to array()",
            errno=errno.EINVAL,
        )
    return Elements(kind.str, kind.itemsize, kind.alignment)


def fit(
    shape: int | tuple[int, ...] | None, dtype: object, itemsize: int, room: int
) -> tuple[tuple[int, ...], int]:
    """Check that an array fits into so many bytes: (its shape, its elements).

    Without a shape it has one dimension, as long as whole elements fit.

    Raises
    ------
    InvalidArgument
        An extent is negative, or none.
    RangeError
        It takes more.
    """
    if isinstance(shape, str):
        raise InvalidArgument(
            f"shape is {shape[:80]!r}: give integers, or None for all that fits; the dtype comes "
            "second, or as dtype=",
            errno=errno.EINVAL,
        )
    if shape is None:
        shape = (room // itemsize,)
    elif not isinstance(shape, (tuple, list)):
        shape = (check_integer(shape, "shape"),)
    shape = tuple(check_integer(extent, "shape") for extent in shape)
    count = 1
    for extent in shape:
        if extent < 0:
            raise InvalidArgument(
                f"shape {shape} has a negative extent: give all extents, or None for one dimension "
                "of all that fits, and reshape() that",
                errno=errno.EINVAL,
            )
        count *= extent
    if count * itemsize > room:
        raise RangeError(
            f"an array of shape {shape} and dtype {dtype} takes {count * itemsize:,} bytes, "
            f"{room:,} are there, which have room for {room // itemsize:,} such elements: give a "
            "smaller shape, or another dtype",
            errno=errno.EINVAL,
        )
    return shape, count


def check_order(order: str) -> None:
    """Refuse what is no order of an array's elements."""
    if order not in ("C", "F"):
        raise InvalidArgument(f"order is {order!r}: give 'C' or 'F'", errno=errno.EINVAL)
