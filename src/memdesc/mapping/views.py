"""Ranges of a descriptor or mapping checked, and its bytes seen as a NumPy array."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from memdesc.errors import InvalidArgument, RangeError
from memdesc.mapping.elements import check_order, fit
from memdesc.vm.pages import check_integer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def check_range(offset: int, length: int | None, whole: int, what: str) -> tuple[int, int]:
    """Give (offset, length) with None filled in; `RangeError` where it leaves [0, whole]."""
    offset = check_integer(offset, "offset")
    length = whole - offset if length is None else check_integer(length, "length")
    if offset < 0 or length < 0 or offset > whole or length > whole - offset:
        raise RangeError(
            f"{length:,} bytes at offset {offset:,} do not lie within {what} of {whole:,} bytes",
            errno=errno.EINVAL,
        )
    return offset, length


def view_as_array(
    buffer: Any,
    nbytes: int,
    shape: int | tuple[int, ...] | None,
    dtype: npt.DTypeLike | None,
    *,
    order: str = "C",
    offset: int = 0,
) -> np.ndarray[Any, Any]:
    """View a buffer of ours as a NumPy array, without copying.

    Parameters
    ----------
    buffer : buffer
        A descriptor or mapping of ours.
    nbytes : int
        Its bytes.
    shape : int or tuple of int, optional
        Default: one dimension, as long as whole elements fit.
    dtype : optional
        Default: bytes (uint8).
    order : {"C", "F"}
        Row-major or column-major.
    offset : int
        Bytes before the first element, which need not be aligned.

    Returns
    -------
    numpy.ndarray
        Writable as the buffer is; keeps the memory alive.

    Raises
    ------
    RangeError
        The array does not fit.
    """
    import numpy as np

    try:
        kind = np.dtype("u1" if dtype is None else dtype)
    except (TypeError, ValueError, SyntaxError) as error:  # a service's word, perhaps
        raise InvalidArgument(f"{dtype!r} is no dtype: {error}", errno=errno.EINVAL) from error
    if kind.hasobject:
        raise InvalidArgument(
            f"dtype {kind} holds Python objects, which live in one process only", errno=errno.EINVAL
        )
    if not kind.itemsize or kind.subdtype:
        raise InvalidArgument(
            f"dtype {kind} is of no size, or an array itself: give the shape", errno=errno.EINVAL
        )
    check_order(order)
    offset, room = check_range(offset, None, nbytes, "the memory")
    shape, count = fit(shape, kind, kind.itemsize, room)
    if count == 0:
        return np.empty(shape, kind)
    flat = np.frombuffer(buffer, kind, count=count, offset=offset)
    return flat.reshape(shape, order="F" if order == "F" else "C")


class GivesArrays(ABC):
    """What can be viewed as an array gives that by DLPack too."""

    @abstractmethod
    def array(self) -> np.ndarray[Any, Any]:
        """View the memory as an array."""

    def __dlpack__(self, **options: Any) -> Any:
        """Give `array()` as DLPack: read-only memory is marked so, or refused to who can not see.

        Raises
        ------
        BufferError
            It is read-only, and the consumer did not say ``max_version=(1, 0)`` or later.
        """
        capsule: Any = self.array().__dlpack__(**options)
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        """Say that the memory is the processor's (kDLCPU)."""
        return 1, 0
