"""Engines: a ring of io_uring for one file, which carries transfers and keeps registered buffers.

An engine is driven by one thread at a time: a call that waits, or an event loop. Memory that the
kernel was told of stays where it is until the kernel is done with it, whatever happens here.
"""

from __future__ import annotations

import contextlib
import errno
import weakref
from collections import deque
from collections.abc import Callable

from memdesc import _core
from memdesc.descriptors.base import MemoryDescriptor
from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.descriptors.received import ReceivedMemoryDescriptor
from memdesc.dma.files import OpenedFile
from memdesc.dma.targets import GIB, Mark, Piece
from memdesc.dma.transfers import Request, Transfer
from memdesc.errors import ClosedError, describe_errno

_SLOTS = 256
"""Places for registered buffers in one ring, each of up to 1 GiB."""
_CANCELLING = 2**64 - 1
_parked: list[Engine] = []
"""Left alone by a second interrupt, with the memory that the kernel may still use."""
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


class Registration:
    """Memory of a descriptor, registered with a ring: its pages are pinned.

    Ends with the descriptor, with the engine, or by `release`.
    """

    def __init__(self, engine: Engine, piece: Piece) -> None:
        self._uring = engine.uring
        self._free = engine.free_slots
        self._address, self._length = piece.base, piece.view.nbytes
        self.slots: tuple[int, ...] = ()
        leaf = piece.leaf
        self._mark = Mark(leaf.memory) if isinstance(leaf, BufferMemoryDescriptor) else None

    def begin(self) -> None:
        """Register all of it, or raise OSError; what is registered by then is to be released."""
        for at in range(0, self._length, 1 << GIB):
            if not self._free:
                raise OSError(errno.ENOSPC, f"the ring: its {_SLOTS} places are taken")
            self.slots += (self._free.pop(),)
            size = min(self._length - at, 1 << GIB)
            _core.uring_update_buffer(self._uring, self.slots[-1], self._address + at, size)

    def covers(self, piece: Piece) -> bool:
        """Whether it is of the bytes that the descriptor shows now, or more of them."""
        return self._address == piece.base and self._length >= piece.view.nbytes

    def release(self) -> None:
        """Unregister it; again is a no-op. Waits for nothing: the collector may call it."""
        slots, self.slots = self.slots, ()
        for slot in slots:
            with contextlib.suppress(OSError, ValueError):  # the ring, and all it has, is gone
                _core.uring_update_buffer(self._uring, slot, 0, 0)
                self._free.append(slot)
        mark, self._mark = self._mark, None
        if mark is not None:
            mark.release()


class Engine:
    """A ring, the transfers that it carries, and what is registered with it.

    Parameters
    ----------
    file : OpenedFile
    depth : int
        Requests in flight at most.
    registers : bool
        Whether to register the descriptors that are transferred.

    Raises
    ------
    OSError
        The kernel gives no ring: EPERM, ENOSYS, ENOMEM, EMFILE.
    """

    def __init__(self, file: OpenedFile, depth: int, *, registers: bool) -> None:
        self.file = file
        self.depth = depth
        self.uring = _open(depth)
        self.free_slots: list[int] = []
        self._has_table = False
        self.active: deque[Transfer] = deque()
        self._in_flight: dict[int, tuple[Transfer, Request]] = {}
        self._tag = 0
        self._step = max(depth // 8, 2)
        self._registers = registers
        self._kept: list[Transfer] = []
        self._registered: dict[weakref.ref[MemoryDescriptor], Registration] = {}
        self._refused: weakref.WeakSet[MemoryDescriptor] = weakref.WeakSet()
        self.why_not_registered = ""
        self._fds = (0, 1)
        self._flags = _core.URING_FIXED_FILE
        try:
            _core.uring_register_files(self.uring, [file.buffered, file.direct])
        except OSError:  # then each request looks the descriptor up
            self._fds = (file.buffered, file.direct)
            self._flags = 0
        if file.may_block:
            self._flags |= _core.URING_ASYNC
        _engines.add(self)

    # -- registered buffers ----------------------------------------------------------------------

    @property
    def registrations(self) -> int:
        """How many descriptors are registered."""
        return len(self._registered)

    def register(self, piece: Piece) -> None:
        """Have a piece go by registered buffers if that can be; `why_not_registered` else."""
        leaf = piece.leaf
        if not self._registers or not isinstance(
            leaf, BufferMemoryDescriptor | ReceivedMemoryDescriptor
        ):
            return
        if piece.view.readonly or leaf in self._refused:  # pinning asks for a writable mapping
            return
        key: weakref.ref[MemoryDescriptor] = weakref.ref(leaf)
        known = self._registered.get(key)
        if known is not None and known.covers(piece):
            piece.slots = known.slots
            return
        self._drop(key)
        try:
            registration = self._new_registration(piece)
        except OSError as error:
            self._refused.add(leaf)  # not to be tried for each transfer: that pins pages first
            self.why_not_registered = f"registering {piece.view.nbytes:,} bytes: " + _why(error)
            return
        self._registered[weakref.ref(leaf, _dropping(weakref.ref(self)))] = registration
        piece.slots = registration.slots

    def _new_registration(self, piece: Piece) -> Registration:
        if not self._has_table:
            _core.uring_register_buffers(self.uring, _SLOTS)
            self._has_table = True
            self.free_slots += range(_SLOTS)
        registration = Registration(self, piece)
        try:
            registration.begin()
        except BaseException:
            registration.release()
            raise
        return registration

    def _drop(self, key: weakref.ref[MemoryDescriptor]) -> None:
        registration = self._registered.pop(key, None)
        if registration is not None:
            registration.release()

    def _forget_closed(self) -> None:
        for key in list(self._registered):
            leaf = key()
            if leaf is not None and leaf.closed:
                self._drop(key)

    # -- carrying --------------------------------------------------------------------------------

    def start(self, transfer: Transfer) -> None:
        """Take a transfer up."""
        self._forget_closed()
        for target in transfer.targets:
            for piece in target.pieces:
                self.register(piece)
        self.active.append(transfer)

    def fill(self) -> None:
        """Prepare requests of the active transfers, in turn, until the ring is full."""
        empty, in_flight, active = 0, self._in_flight, self.active
        prepare, fds, flags = self.uring.prepare, self._fds, self._flags
        while empty < len(active) and len(in_flight) < self.depth:
            transfer = active[0]
            request = transfer.next()
            if request is None:
                empty += 1
                active.rotate(-1)
                continue
            empty = 0
            self._tag = tag = self._tag + 1
            _, direct, address, nbytes, offset, slot = request
            in_flight[tag] = (transfer, request)  # first: what the kernel has must be known
            if not prepare(
                transfer.writing, fds[direct], flags, address, nbytes, offset, tag, slot
            ):
                del in_flight[tag]
                transfer.put_back(request)
                return
            if len(active) > 1:
                active.rotate(-1)

    def enter(self, wait: int) -> None:
        """Submit what is prepared, and wait for so many completions or a signal."""
        try:
            _core.uring_enter(self.uring, wait, -1)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EBUSY):
                raise

    def reap(self) -> list[Transfer]:
        """Tell transfers what completed; gives those that are finished by it, now inactive."""
        in_flight, ended, completions = self._in_flight, [], self.uring.reap()
        for number, (tag, result) in enumerate(completions, 1):
            known = in_flight.pop(tag, None)
            if known is not None:
                transfer, request = known
                transfer.completed(request, result)
                if not transfer.in_flight and transfer.finished:
                    ended.append(transfer)
            if number % self._step == 0 and number < len(completions):
                # Completions come in heaps: the device is not to idle while they are counted. Of
                # random blocks, 32 in flight, that makes a third more.
                self.fill()
                self.enter(0)
        for transfer in ended:
            with contextlib.suppress(ValueError):
                self.active.remove(transfer)
            if transfer in self._kept:
                self._kept.remove(transfer)
                transfer.release()
        return ended

    def run(self, transfer: Transfer) -> None:
        """Carry one transfer to its end, waiting; what interrupts it waits for the kernel too."""
        try:
            self.start(transfer)
            while not transfer.finished:
                if self.uring.closed:
                    raise ClosedError("a fork child has no part in its parent's transfers")
                self.fill()
                if self._in_flight:
                    self.enter(1)
                self.reap()
                transfer.tell()
        except BaseException as error:
            transfer.stop(error)
            self.drain(transfer)
            raise
        finally:
            with contextlib.suppress(ValueError):
                self.active.remove(transfer)

    def cancel(self, transfer: Transfer) -> None:
        """Ask the kernel to give up what it has of a transfer. What a device has it finishes."""
        for tag, (owner, _) in list(self._in_flight.items()):
            if owner is transfer and not self.uring.prepare_cancel(tag, _CANCELLING):
                break
        self.enter(0)

    def drain(self, transfer: Transfer) -> None:
        """Cancel what is in flight and wait until the memory is ours again.

        A second interrupt ends the waiting: engine and memory are then left to the kernel.
        """
        if self.uring.closed:
            return  # in a fork child: what is in flight is the parent's
        try:
            self.cancel(transfer)
            while self.uring.in_flight:
                self.enter(1)
                self.reap()
        except BaseException:
            self.keep(transfer)
            raise

    def keep(self, transfer: Transfer) -> None:
        """Hold a transfer that nobody waits for any more, until the kernel is done with it."""
        self._kept.append(transfer)

    @property
    def idle(self) -> bool:
        """Whether the kernel has nothing of it."""
        return self.uring.closed or not self.uring.in_flight

    def close(self) -> bool:
        """Unregister everything and let go of the ring; False if that is left for later.

        As it is where the kernel still has something in flight.
        """
        for key in list(self._registered):
            self._drop(key)
        if self.idle:
            self.uring.close()
            return True
        _parked.append(self)
        return False

    def recovered(self) -> bool:
        """Whether the kernel has at last let go of what an interrupt left behind."""
        self.reap()
        if not self.idle:
            return False
        for transfer in self._kept:
            transfer.release()
        self._kept.clear()
        self.uring.close()
        return True

    def forked(self) -> None:
        """In a fork child: the ring and what it has are the parent's."""
        self.uring.close()
        self._registered.clear()
        self.active.clear()
        self._in_flight.clear()


def _dropping(engine: weakref.ref[Engine]) -> Callable[[weakref.ref[MemoryDescriptor]], None]:
    """What ends a registration when its descriptor is collected; it does not hold the engine."""

    def drop(key: weakref.ref[MemoryDescriptor]) -> None:
        known = engine()
        if known is not None:
            known._drop(key)

    return drop


def forked() -> None:
    """In a fork child: let go of all rings, which are the parent's."""
    for engine in list(_engines):
        engine.forked()


def _open(depth: int) -> _core.Uring:
    try:
        return _core.open_uring(depth, 4 * depth, _core.URING_COOP_TASKRUN)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return _core.open_uring(depth, 4 * depth, 0)  # before Linux 5.19


def open_engine(file: OpenedFile, depth: int, *, registers: bool) -> tuple[Engine | None, str]:
    """Open an engine, or say why there is none."""
    for parked in [*_parked]:
        if parked.recovered():
            _parked.remove(parked)
    try:
        return Engine(file, depth, registers=registers), ""
    except OSError as error:
        return None, "no io_uring: " + _why(error)


def _why(error: OSError) -> str:
    remedies = {
        errno.EPERM: "kernel.io_uring_disabled, or a container's filter, denies it",
        errno.ENOSYS: "this kernel, or a container's filter, has none",
        errno.ENOMEM: "RLIMIT_MEMLOCK (`ulimit -l`) leaves no room for it, or memory is short",
        errno.EMFILE: "no file descriptor is left (`ulimit -n`)",
    }
    remedy = remedies.get(error.errno or 0)
    return describe_errno(error) + (f" ({remedy})" if remedy else "")


def run_without_ring(transfer: Transfer) -> None:
    """Carry a transfer by pread and pwrite, one request after the other."""
    file = transfer.file
    call = "pwrite" if transfer.writing else "pread"
    while not transfer.finished:
        request = transfer.next()
        if request is None:
            continue
        if file.closed and file.buffered < 0:
            raise ClosedError("a fork child has no part in its parent's transfers")
        fd = file.direct if request.direct else file.buffered
        try:
            result: int = getattr(_core, call)(fd, request.address, request.nbytes, request.offset)
        except OSError as error:
            result = -(error.errno or errno.EIO)
        except BaseException as error:
            transfer.put_back(request)
            transfer.stop(error)
            raise
        transfer.completed(request, result)
        transfer.tell()
