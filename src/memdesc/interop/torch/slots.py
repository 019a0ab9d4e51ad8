"""The slots that batches lie in, as the training process keeps them.

Nobody but the training process says whose a slot is. It grants free ones to the workers of an
iteration: each is a message on a socket that all of these workers read from, with the descriptor
of the memory, so that no slot is taken twice, no lock is left behind by a killed worker, and
slots can be made, and made larger, while the workers run. A slot comes back when nothing looks at
the batch in it any more. One that a worker of an ended iteration took is given up: the worker may
still be writing.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket as sockets
import sys
import weakref
from collections import deque
from typing import TYPE_CHECKING

from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.errors import TimedOutError
from memdesc.handover import receive_descriptor, send_descriptor
from memdesc.vm.pages import Access, round_page

if TYPE_CHECKING:
    from memdesc.dma.cuda import CudaDevice


class Slot:
    """Memory for one batch, registered with the device for as long as it is there."""

    def __init__(self, place: int, generation: int, nbytes: int, device: CudaDevice | None) -> None:
        self.place = place
        self.name = f"batch-{place}.{generation}"
        self.nbytes = nbytes
        self._buffer: BufferMemoryDescriptor | None = BufferMemoryDescriptor(
            nbytes, max_access=Access.READ_WRITE, name=self.name
        )
        self._pinned = None
        if device is not None:
            try:
                self._pinned = device.registered(self._buffer)
            except BaseException:
                self._buffer.close()
                raise

    @property
    def buffer(self) -> BufferMemoryDescriptor:
        """What the workers are given."""
        assert self._buffer is not None
        return self._buffer

    def lend(self, back: deque[Slot]) -> memoryview:
        """Give a view of the bytes; when nothing is left of it, the slot is put `back`."""
        view = memoryview(self.buffer)
        weakref.finalize(view, back.append, self).atexit = False
        return view

    def close(self) -> None:
        """End the registration, then let the memory go."""
        buffer, self._buffer = self._buffer, None
        pinned, self._pinned = self._pinned, None
        try:
            if pinned is not None:
                pinned.close()
        finally:
            if buffer is not None:
                buffer.close()

    def __del__(self) -> None:
        # With the interpreter CUDA ends too, and what it has registered.
        if getattr(self, "_buffer", None) is not None and not sys.is_finalizing():
            self.close()


class SlotPool:
    """Up to `count` slots of one process, made when a batch's size is known."""

    def __init__(self, count: int, nbytes: int, device: CudaDevice | None) -> None:
        self.count = count
        self.nbytes = 0
        self._device = device
        self._generations = itertools.count(1)
        self._begin()
        self.fit(nbytes)

    def _begin(self) -> None:
        """Have no slots."""
        self._pid = os.getpid()
        self.back: deque[Slot] = deque()  # filled by whichever thread lets go of a batch
        self._free: deque[Slot] = deque()
        self._living: weakref.WeakValueDictionary[int, Slot] = weakref.WeakValueDictionary()

    def __reduce__(self) -> tuple[type[SlotPool], tuple[int, int, CudaDevice | None]]:
        return SlotPool, (self.count, self.nbytes, self._device)

    @property
    def living(self) -> int:
        """How many slots there are."""
        return len(self._living)

    def fit(self, nbytes: int) -> None:
        """Have slots for batches of so many bytes from now on."""
        self.nbytes = max(self.nbytes, round_page(nbytes))

    def take(self) -> Slot | None:
        """Give a free slot that is large enough; None where there is none."""
        if os.getpid() != self._pid:
            self._begin()  # those that were inherited are the parent's: it fills them
        while self.back:
            self._free.append(self.back.popleft())
        while self._free:
            slot = self._free.popleft()
            if slot.nbytes >= self.nbytes:
                return slot
            self.give_up(slot)
        place = next((n for n in range(self.count) if n not in self._living), None)
        if not self.nbytes or place is None:
            return None
        slot = Slot(place, next(self._generations), self.nbytes, self._device)
        self._living[place] = slot
        return slot

    def put(self, slot: Slot) -> None:
        """Take back one that was not used."""
        self._free.append(slot)

    def give_up(self, slot: Slot) -> None:
        """Let a slot's memory go as soon as nobody has it; another may take its place."""
        self._living.pop(slot.place, None)
        slot.close()


flows: weakref.WeakValueDictionary[int, Flow] = weakref.WeakValueDictionary()
"""By key: the iterations of this process, for the batches that arrive."""

_keys = itertools.count(1)


class Flow:
    """One iteration's slots: those granted to its workers, and not seen filled yet."""

    def __init__(self, pool: SlotPool) -> None:
        self.key = next(_keys)
        self.pool = pool
        self._nbytes = pool.nbytes
        self._pid = os.getpid()
        self._granted: dict[str, Slot] = {}
        self._ours, self.theirs = sockets.socketpair(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self.theirs.setblocking(False)
        flows[self.key] = self

    @property
    def foreign(self) -> bool:
        """Whether this is a worker's copy of it, inherited by fork."""
        return os.getpid() != self._pid

    def grant(self) -> None:
        """Give all free slots to whichever worker takes them first."""
        if self._ours.fileno() < 0:
            return  # it has ended
        if self._nbytes != self.pool.nbytes:
            self._take_back()  # larger ones are wanted by now
            self._nbytes = self.pool.nbytes
        while (slot := self.pool.take()) is not None:
            try:
                send_descriptor(self._ours, slot.buffer, access=Access.READ_WRITE)
            except BaseException as error:
                self.pool.put(slot)
                if isinstance(error, TimedOutError):  # as many lie there as the socket takes
                    return
                raise
            self._granted[slot.name] = slot

    def claim(self, name: str) -> memoryview:
        """Give the bytes of a slot that a worker has filled. It is free again with the view."""
        return self._granted.pop(name).lend(self.pool.back)

    def _take_back(self) -> None:
        """Take back what no worker took."""
        with contextlib.suppress(TimedOutError):  # there are no more
            while True:
                with receive_descriptor(self.theirs) as received:
                    self.pool.put(self._granted.pop(received.name))

    def end(self) -> None:
        """Take back what no worker took, and give up the rest. Again is a no-op."""
        if self.foreign or self._ours.fileno() < 0:
            return
        flows.pop(self.key, None)
        try:
            self._take_back()
        finally:
            for slot in self._granted.values():
                self.pool.give_up(slot)
            self._granted.clear()
            self._ours.close()
            self.theirs.close()

    def __del__(self) -> None:
        if hasattr(self, "theirs") and not sys.is_finalizing():
            self.end()
