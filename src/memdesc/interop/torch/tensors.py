"""Tensors over memory that is described or mapped: no copy, and the memory lives as long as they.

PyTorch knows no read-only tensors. It stores through read-only memory without a word, and the
process dies by SIGSEGV. So read-only memory is given to it in a private mapping, whose pages the
kernel copies when they are stored to.
"""

from __future__ import annotations

import errno
import math
from typing import TYPE_CHECKING, Any

from memdesc.descriptors.base import MemoryDescriptor
from memdesc.descriptors.homes import descriptor_of
from memdesc.errors import InvalidArgument, RangeError, SealedError
from memdesc.interop.torch.needed import torch
from memdesc.mapping import LocalMemoryMap, Placement, check_range, map_extents
from memdesc.vm.pages import Access, check_integer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Memory = MemoryDescriptor | LocalMemoryMap | np.ndarray[Any, Any]


def tensor(
    memory: Memory,
    shape: int | tuple[int, ...] | None = None,
    dtype: torch.dtype | npt.DTypeLike | None = None,
    *,
    offset: int = 0,
    copy_on_write: bool | None = None,
) -> torch.Tensor:
    """Give a tensor over memory of ours. No byte is copied; not a copy of the memory.

    Parameters
    ----------
    memory : MemoryDescriptor, LocalMemoryMap or numpy.ndarray
        An array must lie in a descriptor or mapping of this task, without gaps.
    shape : int or tuple of int, optional
        Default: an array's own, what a mapping was shared as, else one dimension, as long as
        whole elements fit.
    dtype : torch.dtype, or what numpy.dtype takes, optional
        Default: as of the shape, else uint8.
    offset : int
        Bytes before the first element, a multiple of its size.
    copy_on_write : bool, optional
        Whether what is stored stays private to this tensor. Default: for read-only memory, which
        PyTorch could only store to in that way.

    Returns
    -------
    torch.Tensor
        On the CPU. It and every view of it keep the memory alive, and `unmap` of the mapping
        refuses meanwhile.

    Raises
    ------
    SealedError
        `copy_on_write=False`, and the memory is read-only (EACCES).
    InvalidArgument
        PyTorch has no such dtype (EINVAL); the array has gaps, or lies in no descriptor.
    RangeError
        It does not fit (EINVAL).
    MappingError
        The private mapping could not be had: NO_SPACE or NO_MEMORY, and for huge pages of the
        pool where the pool has none left for copies.

    Notes
    -----
    Copy-on-write is the kernel's (mmap, MAP_PRIVATE; no privilege). Making it costs a mapping;
    each page that is stored to costs a fault and a page, 4 KiB or a huge page's size, once. Pages
    that this tensor never stored to are the shared ones and follow their owner's later stores; of
    a `snapshot` nobody changes them. Each call makes a private mapping of its own.

    `torch.multiprocessing` copies what it sends into memory of its own, and lets the sender's
    tensor lie there too: send the descriptor instead, and make the tensor on the other side.
    Threads: safe. Fork: the child's tensor lies over the same memory, a copy-on-write one apart.

    Examples
    --------
    >>> import memdesc as md
    >>> frames = md.BufferMemoryDescriptor(4096)
    >>> ours = tensor(frames, (2, 3), "float32")
    >>> ours[1, 2] = 7.0
    >>> frozen = tensor(frames.snapshot(), (2, 3), "float32")
    >>> frozen += 1                                  # stays in this tensor
    >>> float(frozen[1, 2]), float(ours[1, 2])
    (8.0, 7.0)
    """
    view, private = _bytes(memory, copy_on_write)
    kind, wanted, column_major = _layout(memory, shape, dtype)
    offset, room = check_range(offset, None, view.nbytes, "the memory")
    if wanted is None:
        wanted = (room // kind.itemsize,)
    count = math.prod(wanted)
    if count * kind.itemsize > room:
        raise RangeError(
            f"a tensor of shape {wanted} and {kind} takes {count * kind.itemsize:,} bytes, "
            f"{room:,} are there",
            errno=errno.EINVAL,
        )
    if offset % kind.itemsize:
        raise InvalidArgument(
            f"offset {offset:,} is not a multiple of the {kind.itemsize} bytes of {kind}",
            errno=errno.EINVAL,
        )
    if not count:
        return torch.empty(wanted, dtype=kind)
    if private:
        view = _private(memory)
    # PyTorch holds on to the view that it is given, not to the buffer: so it is given one of ours.
    flat = torch.frombuffer(view, dtype=kind, count=count, offset=offset)
    if column_major:
        return flat.view(wanted[::-1]).permute(*range(len(wanted))[::-1])
    return flat.view(wanted)


def _layout(
    memory: Memory, shape: int | tuple[int, ...] | None, dtype: object
) -> tuple[torch.dtype, tuple[int, ...] | None, bool]:
    """Give (dtype, shape, whether the first index varies fastest)."""
    column_major = False
    if shape is None and dtype is None:
        if isinstance(memory, LocalMemoryMap) and memory.layout is not None:
            shape, dtype, order = memory.layout
            column_major = order == "F"
        elif not isinstance(memory, MemoryDescriptor | LocalMemoryMap):
            shape, dtype = memory.shape, memory.dtype
            column_major = not memory.flags.c_contiguous
    if shape is not None:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        for extent in shape:
            if check_integer(extent, "shape") < 0:
                raise InvalidArgument(f"shape {shape} has a negative extent", errno=errno.EINVAL)
    return _dtype_of(dtype), shape, column_major


def _dtype_of(dtype: Any) -> torch.dtype:
    """PyTorch's dtype for its own, for its name, and for one of NumPy's."""
    if dtype is None:
        return torch.uint8
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        import numpy as np

        try:
            kind = np.dtype(dtype)
        except (TypeError, ValueError, SyntaxError) as error:  # a service's word, perhaps
            raise InvalidArgument(f"{dtype!r} is no dtype: {error}", errno=errno.EINVAL) from error
        found = getattr(torch, kind.name, None) if kind.isnative else None
    if not isinstance(found, torch.dtype) or found in _QUANTIZED:
        raise InvalidArgument(
            f"a tensor over memory can not be of dtype {dtype!r}: give a torch.dtype of plain "
            "elements in this machine's byte order",
            errno=errno.EINVAL,
        )
    return found


# Their scale and zero point are not in the memory.
_QUANTIZED = (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4)


def _bytes(memory: Memory, copy_on_write: bool | None) -> tuple[memoryview, bool]:
    """Give the bytes of the memory, and whether the tensor's stores are to be its own."""
    if isinstance(memory, MemoryDescriptor | LocalMemoryMap):
        view = memoryview(memory)
    elif hasattr(memory, "__array_interface__"):
        flags = memory.flags
        if not (flags.c_contiguous or flags.f_contiguous):
            raise InvalidArgument(
                f"the array of shape {memory.shape} has gaps (strides {memory.strides}): give one "
                "without, or make the tensor of the whole and slice that",
                errno=errno.EINVAL,
            )
        flat: Any = memory.reshape(-1, order="A")
        view = memoryview(flat.view("u1"))
    else:
        raise InvalidArgument(
            f"memory is of type {type(memory).__name__}: give a descriptor, a mapping, or an "
            "array that lies in one",
            errno=errno.EINVAL,
        )
    if view.readonly and copy_on_write is False:
        raise SealedError(
            f"the memory of {view.nbytes:,} bytes is read-only, and PyTorch would store through "
            "it and die: leave out copy_on_write=False, or ask its owner for write access",
            errno=errno.EACCES,
        )
    return view, view.readonly if copy_on_write is None else copy_on_write


def _private(memory: Memory) -> memoryview:
    """Map the same bytes once more, so that what is stored stays there."""
    descriptor = memory if isinstance(memory, MemoryDescriptor) else descriptor_of(memory)
    if descriptor is None:
        raise InvalidArgument(
            "the memory lies in no descriptor of this task that is open, so it can not be mapped "
            "copy-on-write: give the descriptor or the mapping itself, or a copy",
            errno=errno.EINVAL,
        )
    extents = descriptor._extents(0, descriptor.length, Access.READ_ONLY)
    return memoryview(map_extents(extents, Access.READ_ONLY, Placement(private=True)))
