"""NumPy arrays that live in descriptors: made as NumPy makes them, found again, shared as they are.

They are plain arrays. What is special is the object at the end of their `base` chain, a `Keeper`:
it keeps the descriptor open as long as any view lives, so that the memory can be shared for as
long as it can be seen. A view made by `MemoryDescriptor.array` keeps the memory alone.

Linux: as `BufferMemoryDescriptor`; no privilege. Fork: the child inherits the memory, which both
then write.
"""

from __future__ import annotations

import errno
import math
import os
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack, final

from memdesc import _core
from memdesc.descriptors.base import MemoryDescriptor
from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.descriptors.homes import descriptor_of as descriptor_of, home_of
from memdesc.descriptors.received import ReceivedMemoryDescriptor
from memdesc.errors import AllocationError, ClosedError, InvalidArgument
from memdesc.mapping import Extent
from memdesc.memory.kept import Contents
from memdesc.memory.lifecycle import State
from memdesc.memory.page_kinds import PageKind
from memdesc.vm.forks import lock_for
from memdesc.vm.pages import Access, add_run, check_integer, check_length

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = np.ndarray[Any, Any]
    Shape = int | tuple[int, ...] | list[int]

__all__ = [
    "Slab",
    "asarray",
    "descriptor_of",
    "empty",
    "empty_like",
    "zeros",
    "zeros_like",
]

ALIGNMENT = 64
"""Bytes that pieces of a slab begin at multiples of: a cache line, and any vector register."""


class Options(TypedDict, total=False):
    """What of `BufferMemoryDescriptor` can be said of an array's memory."""

    name: str
    max_access: Access
    pages: PageKind
    lazy: bool


class Keeper(_core.Exporter):
    """The base of an array: shows its descriptor's bytes, and keeps it as long as views live."""

    def __init__(self, descriptor: MemoryDescriptor) -> None:
        self.descriptor = descriptor
        self._window = descriptor._export()

    def _export(self) -> _core.Window | memoryview:
        return self._window


_mapped: weakref.WeakValueDictionary[tuple[Any, ...], Keeper] = weakref.WeakValueDictionary()
"""By device, inode and access: what of others' memory is mapped here, for their next arrays."""


def keeper_of(received: ReceivedMemoryDescriptor) -> tuple[Keeper, int]:
    """Map what a peer gave, or find it mapped: (what keeps it, where in that the bytes begin)."""
    if len(received._parts) != 1:
        return Keeper(received), 0
    (extent,) = received._parts
    key = *extent.object.identity, received.max_access
    keeper = _mapped.get(key)
    if keeper is not None and not keeper.descriptor.closed:
        received.close()
        return keeper, extent.offset
    # All of the object: its other parts may come, too, and who has one can map the rest.
    whole = ReceivedMemoryDescriptor(
        [Extent(extent.object, 0, extent.object.size)],
        direction=received.direction,
        name=received.name,
    )
    keeper = _mapped[key] = Keeper(whole)
    return keeper, extent.offset


def empty(
    shape: Shape, dtype: npt.DTypeLike = float, order: str = "C", **options: Unpack[Options]
) -> Array:
    """Make an array in a descriptor of its own, of no certain contents.

    As `numpy.empty`; what comes back is a plain array, of which others can be given the very pages
    (`descriptor_of`, `memdesc.interop.multiprocessing`).

    Parameters
    ----------
    shape
        An int, or a tuple or list of them.
    dtype
        Any but those that hold Python objects; structured ones too.
    order : {"C", "F"}
        Row-major or column-major.
    **options
        `name`, `max_access` (what others get at most: READ_ONLY), `pages`, `lazy`: as of
        `BufferMemoryDescriptor`.

    Returns
    -------
    numpy.ndarray
        Writable. It keeps the descriptor open, and so does every view of it; with the last one
        the memory goes. An array of no elements lies in none.

    Raises
    ------
    InvalidArgument
    AllocationError
        ENOMEM; EMFILE: each array costs a file descriptor. Many small ones: `Slab`.

    Examples
    --------
    >>> from memdesc.interop.arrays import descriptor_of, zeros
    >>> frame = zeros((1080, 1920, 3), "u1")
    >>> descriptor_of(frame).length
    6220800
    >>> descriptor_of(frame[1]).offset
    5760
    """
    return _make(shape, dtype, order, Contents.UNDEFINED, options)


def zeros(
    shape: Shape, dtype: npt.DTypeLike = float, order: str = "C", **options: Unpack[Options]
) -> Array:
    """Make an array of zeros in a descriptor of its own; otherwise as `empty`."""
    return _make(shape, dtype, order, Contents.ZEROED, options)


def empty_like(
    prototype: npt.ArrayLike,
    dtype: npt.DTypeLike | None = None,
    order: str = "K",
    **options: Unpack[Options],
) -> Array:
    """Make an array of another one's shape, dtype and, by default, order of axes; as `empty`."""
    return _make_like(prototype, dtype, order, Contents.UNDEFINED, options)


def zeros_like(
    prototype: npt.ArrayLike,
    dtype: npt.DTypeLike | None = None,
    order: str = "K",
    **options: Unpack[Options],
) -> Array:
    """Make an array of zeros as `empty_like`."""
    return _make_like(prototype, dtype, order, Contents.ZEROED, options)


def asarray(
    values: npt.ArrayLike | MemoryDescriptor,
    dtype: npt.DTypeLike | None = None,
    order: str | None = None,
    **options: Unpack[Options],
) -> Array:
    """Give values as an array that lies in a descriptor: itself where it does, else a copy.

    Parameters
    ----------
    values
        What `numpy.asarray` takes. A descriptor is seen as its bytes, and kept open by the array.
    dtype, order
        As of it; what lies in a descriptor is copied too if it has to be converted.
    **options
        Of the copy, as of `empty`.

    Raises
    ------
    InvalidArgument, AllocationError
        As of `empty`.
    """
    import numpy as np

    if isinstance(values, MemoryDescriptor):
        values = placed(Keeper(values), (values.length,), "u1")
    convert: Any = np.asarray
    array: Array = convert(values, dtype, order)
    if home_of(array) is not None:
        return array
    made = _make_like(array, None, order or "K", Contents.UNDEFINED, options)
    made[...] = array
    return made


def _make(
    shape: Shape, dtype: npt.DTypeLike, order: str, contents: Contents, options: Options
) -> Array:
    import numpy as np

    extents, kind, nbytes = _form(shape, dtype, order)
    if not nbytes:
        return np.empty(extents, kind, order)  # type: ignore[call-overload,no-any-return]
    with_name: Any = {"name": "array", **options}
    buffer = BufferMemoryDescriptor(nbytes, contents=contents, **with_name)
    return placed(Keeper(buffer), extents, kind, order=order)


def _make_like(
    prototype: npt.ArrayLike,
    dtype: npt.DTypeLike | None,
    order: str,
    contents: Contents,
    options: Options,
) -> Array:
    import numpy as np

    like = np.asarray(prototype)
    kind = like.dtype if dtype is None else dtype
    if order == "A":
        order = "F" if like.flags.fnc else "C"
    if order != "K":
        return _make(like.shape, kind, order, contents, options)
    # The axes in the order in which they lie in memory, the one with the largest steps first.
    axes = sorted(range(like.ndim), key=lambda axis: -abs(like.strides[axis]))
    made = _make([like.shape[axis] for axis in axes], kind, "C", contents, options)
    if axes == list(range(like.ndim)):
        return made
    back = [axes.index(axis) for axis in range(like.ndim)]
    return made.transpose(back + list(range(like.ndim, made.ndim)))


def placed(
    keeper: Keeper,
    shape: tuple[int, ...],
    dtype: Any,
    *,
    offset: int = 0,
    strides: tuple[int, ...] | None = None,
    order: str = "C",
) -> Array:
    """Give a plain array on the bytes of a keeper, which is its base. `ValueError` if none fits."""
    import numpy as np

    make: Any = np.ndarray  # any buffer will do, which its types do not say
    array: Array = make(shape, dtype, buffer=keeper, offset=offset, strides=strides, order=order)
    return array


def _form(
    shape: Shape, dtype: npt.DTypeLike, order: str
) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Check what an array is to be: (shape, dtype, bytes)."""
    import numpy as np

    try:
        kind = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError) as error:
        raise InvalidArgument(f"{dtype!r} is no dtype: {error}", errno=errno.EINVAL) from error
    extents = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    extents = tuple(check_integer(extent, "shape") for extent in extents)
    if kind.subdtype is not None:
        kind, inner = kind.subdtype
        extents += inner
    if kind.hasobject:
        raise InvalidArgument(
            f"dtype {kind} holds Python objects, which live in one process only", errno=errno.EINVAL
        )
    if not kind.itemsize:
        raise InvalidArgument(
            f"dtype {kind} has no size: say how many characters or bytes", errno=errno.EINVAL
        )
    if any(extent < 0 for extent in extents):
        raise InvalidArgument(f"shape {extents} has a negative extent", errno=errno.EINVAL)
    if order not in ("C", "F"):
        raise InvalidArgument(f"order is {order!r}: give 'C' or 'F'", errno=errno.EINVAL)
    return extents, kind, math.prod(extents) * kind.itemsize


@final
class Slab:
    """Makes many small arrays in one descriptor, for one file descriptor together.

    What protects memory is the file. So whoever is given one array of a slab can see all of it,
    with what lies between: put together what goes to the same receivers.

    Parameters
    ----------
    capacity : int
        Bytes. Each array takes a multiple of 64.
    **options
        As of `empty`.

    Attributes
    ----------
    descriptor : BufferMemoryDescriptor
        Of all of it.

    Notes
    -----
    The room of an array that has gone is used again only while no other task was ever given the
    slab's memory, no device has it, and this task has not forked: else somebody may see it still.
    Then the slab goes as a whole, with its last array. What `descriptor_of` gives of one keeps the
    slab, not the array's room.

    Threads: safe. Fork: the child keeps its arrays and makes no new ones.

    Examples
    --------
    >>> from memdesc.interop.arrays import Slab, descriptor_of
    >>> slab = Slab(1 << 20)
    >>> rows = [slab.zeros(100, "f4") for _ in range(50)]
    >>> len({descriptor_of(row).parent for row in rows})
    1
    """

    def __init__(self, capacity: int, **options: Unpack[Options]) -> None:
        with_name: Any = {"name": "slab", **options}
        self.descriptor = BufferMemoryDescriptor(check_length(capacity, "capacity"), **with_name)
        # (offset, bytes), sorted, none adjacent. Never changed in place: see `_piece`.
        self._free: tuple[tuple[int, int], ...] = ((0, self.descriptor.capacity),)
        self._came_back: deque[tuple[int, int]] = deque()
        self._lock = lock_for(self)
        self._pid = os.getpid()

    @property
    def free(self) -> int:
        """Bytes that are left for arrays, in one piece or several."""
        with self._lock:
            self._take_back()
            return sum(nbytes for _, nbytes in self._free)

    def empty(self, shape: Shape, dtype: npt.DTypeLike = float, order: str = "C") -> Array:
        """Make an array in the slab, as `memdesc.empty` does.

        Raises
        ------
        AllocationError
            No piece that is large enough is left (ENOMEM).
        ClosedError
            It was closed, or is the parent's of this fork child.
        """
        return self._make(shape, dtype, order, clear=False)

    def zeros(self, shape: Shape, dtype: npt.DTypeLike = float, order: str = "C") -> Array:
        """Make an array of zeros in the slab; errors as of `empty`."""
        return self._make(shape, dtype, order, clear=True)

    def _make(self, shape: Shape, dtype: npt.DTypeLike, order: str, *, clear: bool) -> Array:
        import numpy as np

        extents, kind, nbytes = _form(shape, dtype, order)
        if not nbytes:
            return np.empty(extents, kind, order)  # type: ignore[call-overload,no-any-return]
        piece = self._piece(nbytes)
        if clear:
            _core.zero_memory(piece.memory, piece.offset, nbytes)
        return placed(piece, extents, kind, order=order)

    def _piece(self, nbytes: int) -> _Piece:
        with self._lock:
            if os.getpid() != self._pid:
                raise ClosedError(
                    "the slab is the parent's of this forked process, which fills it too: make "
                    "one here"
                )
            while True:
                self._take_back()
                free = self._free
                fits = (index for index, (_, room) in enumerate(free) if room >= nbytes)
                at = next(fits, None)
                if at is None:
                    raise AllocationError(
                        f"no {nbytes:,} bytes in one piece are left in a slab of "
                        f"{self.descriptor.capacity:,}: make another one, or an array of its own",
                        errno=errno.ENOMEM,
                        requested=nbytes,
                        available=max((room for _, room in free), default=0),
                    )
                offset, room = free[at]
                used = min(_rounded(nbytes), room)
                left = [(offset + used, room - used)] if room > used else []
                if self._free is free:  # else a signal handler made an array here just now
                    self._free = (*free[:at], *left, *free[at + 1 :])
                    return _Piece(self.descriptor, offset, nbytes, self._came_back)

    def _take_back(self) -> None:
        """Have the room of arrays that have gone again, if nobody else can see it."""
        life = self.descriptor.memory.lifecycle
        marked = life.forked or life.exposed or life.registrations
        unseen = life.state is State.PRIVATE and not marked
        while self._came_back:
            try:
                offset, nbytes = self._came_back.popleft()
            except IndexError:  # a signal handler took the last one
                return
            nbytes = min(_rounded(nbytes), self.descriptor.capacity - offset)
            while unseen:
                free = self._free
                more = _merged([*free, (offset, nbytes)])
                if self._free is free:
                    self._free = more
                    break

    def close(self) -> None:
        """Make no new arrays, and share no more; those that exist live on. Again is a no-op."""
        self.descriptor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _merged(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sort (offset, bytes) ranges, adjacent ones made one."""
    merged: list[tuple[int, int]] = []
    for offset, nbytes in sorted(ranges):
        add_run(merged, offset, nbytes)
    return tuple(merged)


class _Piece(Keeper):
    """The base of an array in a slab. Gives its room back, without waiting for a lock."""

    def __init__(
        self,
        slab: BufferMemoryDescriptor,
        offset: int,
        nbytes: int,
        came_back: deque[tuple[int, int]],
    ) -> None:
        super().__init__(slab)
        whole = slab._export()
        self.memory, self.offset = whole.memory, whole.offset + offset
        self._window = _core.Window(self.memory, self.offset, nbytes, True)
        self._back = came_back, offset, nbytes

    def __del__(self) -> None:
        came_back, offset, nbytes = self._back
        came_back.append((offset, nbytes))
