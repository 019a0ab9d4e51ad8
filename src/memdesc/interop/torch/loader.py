"""SharedDataLoader: torch's `DataLoader`, whose batches lie in slots of shared memory.

Workers, samplers, seeding, prefetching, order and errors are torch's. Ours is where a batch lies,
and so what travels through torch's queue: a few bytes.
"""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from memdesc.errors import InvalidArgument
from memdesc.interop.torch.batches import FilledBatch, SlotCollate
from memdesc.interop.torch.moving import MOST_IN_FLIGHT, CopyStream, CudaStream, Moving
from memdesc.interop.torch.needed import DataLoader, default_collate
from memdesc.interop.torch.slots import Flow, SlotPool
from memdesc.vm.pages import check_integer

if TYPE_CHECKING:
    from memdesc.dma.cuda import CudaDevice


@dataclass(slots=True)
class _Counts:
    batches: int = 0
    left_out: int = 0
    copied_bytes: int = 0


@final
@dataclass(frozen=True, slots=True)
class LoaderStatistics:
    """What a `SharedDataLoader` did since it was made.

    Attributes
    ----------
    batches : int
        Batches that came from the workers.
    left_out : int
        Of them, those with a tensor that found no room in a slot, and so took torch's own way: the
        first ones, until the size of a batch is known; larger ones than before; and all for which
        no slot was free, since the program holds so many batches.
    copied_bytes : int
        Bytes that workers copied into slots, since a collate function of the program's had put
        them elsewhere. The default one stacks samples in the slot.
    slots, slot_nbytes : int
        How many slots there are, and of how many bytes new ones are made.
    """

    batches: int
    left_out: int
    copied_bytes: int
    slots: int
    slot_nbytes: int


class SharedDataLoader(DataLoader):  # type: ignore[misc]
    """Torch's `DataLoader`, whose workers write batches into shared slots.

    Parameters
    ----------
    dataset, batch_size, **options
        As of `torch.utils.data.DataLoader`, all of them but `pin_memory`.
    device : CudaDevice, optional
        Batches arrive on this GPU. Slots are registered with it, so that copies come straight
        from what the workers wrote: there is no pinning thread and no copy on the CPU. The
        copies of the next batch run while the program works with this one.
    slots : int, optional
        At most so many. Default: as many as can be filled at a time
        (`prefetch_factor * num_workers`), and two that the program holds, or with a device those
        that are being copied.
    slot_nbytes : int, optional
        Bytes that a slot has at the start. Default: what the first batch takes. Slots are made
        larger when a larger batch comes.

    Raises
    ------
    InvalidArgument
        `pin_memory`, which `device` takes the place of; `slots` below 1 (EINVAL).
    AllocationError
        There is no memory for a slot; raised where a batch is asked for.

    Notes
    -----
    Tensors of a batch lie over its slot. The slot is filled again when the last of them, and of
    their views, is gone: nothing is ever overwritten. Who keeps more batches than there are slots
    gets further ones by torch's own way, copied, never an error and never a wait; so do tensors
    that do not fit, are sparse, nested or quantized, or require gradients, and what is inside of
    classes of the program's own. `statistics` tells how many.

    Without a device the slots are ordinary memory, from which ``tensor.to("cuda",
    non_blocking=True)`` returns when CUDA has taken the bytes. Batches in registered memory never
    leave the loader, as torch does not know when copies out of memory of others are done.

    A worker's death, an exception in the dataset and `timeout` are torch's: the same errors. What
    a worker had taken is given up, and no memory is left behind. With several iterations of one
    loader at a time the slots go to whichever asks first.

    Threads: one at a time. Fork and spawn: workers may be started by any method. Linux: memfd,
    SCM_RIGHTS; no privilege, with a device what `CudaDevice.registered` asks for. I/O Kit: none.

    Examples
    --------
    >>> import torch
    >>> loader = SharedDataLoader(torch.arange(10), batch_size=4)
    >>> [batch.tolist() for batch in loader]
    [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    """

    collate_fn: Any

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        *,
        device: CudaDevice | None = None,
        slots: int | None = None,
        slot_nbytes: int = 0,
        **options: Any,
    ) -> None:
        if options.get("pin_memory"):
            raise InvalidArgument(
                "pin_memory copies each batch once more: give device=CudaDevice(...), and the "
                "slots themselves are pinned",
                errno=errno.EINVAL,
            )
        super().__init__(dataset, batch_size, **options)
        if slots is None:
            filled = self.num_workers * (self.prefetch_factor or 1)
            slots = filled + (2 if device is None else MOST_IN_FLIGHT + 1)
        if check_integer(slots, "slots") < 1 or check_integer(slot_nbytes, "slot_nbytes") < 0:
            raise InvalidArgument(
                f"{slots} slots of {slot_nbytes} bytes: give at least 1, and at least 0 bytes",
                errno=errno.EINVAL,
            )
        self._device = device
        self._stream: CopyStream | None = None
        self._counts = _Counts()
        self._pool = SlotPool(slots, slot_nbytes, device)
        self._lasting: Flow | None = None

    def __iter__(self) -> Iterator[Any]:
        flow = self._lasting or Flow(self._pool)
        if self.persistent_workers:
            self._lasting = flow
        if self._device is not None and self._stream is None:
            self._stream = CudaStream(self._device)
        flow.grant()
        collate_fn = self.collate_fn
        stacks = collate_fn is default_collate
        # Torch reads it when it starts the workers; it stays what the program gave.
        self.collate_fn = SlotCollate(collate_fn, stacks, flow.key, flow.theirs)
        try:
            inner = super().__iter__()
        finally:
            self.collate_fn = collate_fn
        moving = None if self._stream is None else Moving(self._stream)
        return Batches(inner, flow, self._counts, moving, lasting=self._lasting is flow)

    def statistics(self) -> LoaderStatistics:
        """Tell what it did so far."""
        counts = self._counts
        return LoaderStatistics(
            batches=counts.batches,
            left_out=counts.left_out,
            copied_bytes=counts.copied_bytes,
            slots=self._pool.living,
            slot_nbytes=self._pool.nbytes,
        )


class Batches:
    """An iteration of a `SharedDataLoader`."""

    def __init__(
        self, inner: Any, flow: Flow, counts: _Counts, moving: Moving | None, *, lasting: bool
    ) -> None:
        self._inner = inner
        self._flow = flow
        self._counts = counts
        self._moving = moving
        self._lasting = lasting
        self._ahead: tuple[Any, Exception | None] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __len__(self) -> int:
        return len(self._inner)

    def __next__(self) -> Any:
        if self._moving is None:
            return self._next()
        self._moving.let_go()
        started, failure = self._ahead or self._start(self._moving)
        self._ahead = None
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # which knows this frame by now
        batch = self._moving.hand_over(started)
        self._ahead = self._start(self._moving)
        return batch

    def _start(self, moving: Moving) -> tuple[Any, Exception | None]:
        """Start the copies of the next batch; what goes wrong is for the call that asks for it."""
        try:
            return moving.start(self._next()), None
        except Exception as error:  # noqa: BLE001 (raised when its turn comes)
            return None, error

    def _next(self) -> Any:
        """Give the next batch as it lies in memory."""
        self._flow.grant()
        try:
            batch: FilledBatch = next(self._inner)
        except StopIteration:
            if not self._lasting:
                self._flow.end()
            raise
        self._counts.batches += 1
        self._counts.copied_bytes += batch.copied
        self._counts.left_out += batch.left_out > 0
        self._flow.pool.fit(batch.needed)
        return batch.open(self._flow)

    def __del__(self) -> None:
        if not hasattr(self, "_ahead") or self._flow.foreign or sys.is_finalizing():
            return  # torch's own iterator does what it must
        self._ahead = None
        if self._moving is not None:
            self._moving.end()
        with contextlib.suppress(AttributeError):
            del self._inner  # torch ends its workers, unless they stay
        if not self._lasting:
            self._flow.end()
