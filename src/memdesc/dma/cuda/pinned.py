"""PinnedMemory: memory of a descriptor that is registered with CUDA."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, final

from memdesc.descriptors.base import MemoryDescriptor
from memdesc.dma.cuda.copies import Copy, Handle, Span, settle, under_way
from memdesc.dma.cuda.driver import Kind
from memdesc.dma.cuda.registrations import Claim, Registration, books
from memdesc.dma.targets import Memory, Target, name_of
from memdesc.errors import InvalidArgument, NotPreparedError, SealedError
from memdesc.mapping import check_range, view_as_array
from memdesc.vm.forks import lock_for
from memdesc.vm.pages import Access, add_run, check_integer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from memdesc.dma.cuda.device import CudaDevice


_UNKNOWN = 16
"""Copies whose end nobody asked for, before a new one looks at them: that takes a while."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes at one address, in one registration: CUDA promises no copy out of two."""

    start: int
    nbytes: int
    address: int
    device_pointer: int


@dataclass(frozen=True, slots=True)
class PinnedStatistics:
    """What registered memory was used for.

    Attributes
    ----------
    nbytes : int
        Registered.
    parts : int
        Pieces that CUDA copies by a call each.
    copies, copied_bytes : int
        Started so far, and what they were of.
    in_flight : int
        Copies that are under way.
    """

    nbytes: int
    parts: int
    copies: int
    copied_bytes: int
    in_flight: int


@final
class PinnedMemory:
    """Memory that is registered with CUDA in this process. Made by `CudaDevice.registered`.

    The pages are those that the descriptor's views in this process show, and that other
    processes have mapped. They are pinned until the last who registered them has closed.

    Leaving a ``with`` block waits for the copies that are under way, then closes. If it is
    dropped instead, what is under way goes on, and the memory stays registered until it is over.

    Attributes
    ----------
    memory : MemoryDescriptor or LocalMemoryMap
    device : CudaDevice
    nbytes : int
    access : Access
        READ_ONLY: no copy from the device writes it.

    Notes
    -----
    The bytes stay where they are when the descriptor is closed or the mapping's block left.

    Threads: safe. Fork: closed in the child; the registration is the parent's.
    """

    def __init__(
        self,
        device: CudaDevice,
        memory: Memory,
        target: Target,
        registrations: list[Registration],
        claim: Claim,
        access: Access,
    ) -> None:
        self.device, self.memory, self.access = device, memory, access
        self.nbytes = sum(piece.nbytes for piece in target.pieces)
        self._target: Target | None = target
        self._claim: Claim | None = claim
        self._lock = lock_for(self)
        self._copies = self._copied_bytes = 0
        with device.current() as driver:
            pointers = {known: driver.device_pointer(known.address) for known in registrations}
        self._parts = list(_cut(target, pointers))

    # -- where it lies ---------------------------------------------------------------------------

    @property
    def address(self) -> int:
        """Of the first byte, in this process.

        Raises
        ------
        InvalidArgument
            The memory lies in several places (EINVAL).
        """
        return self._one_place([(part.address, part.nbytes) for part in self._parts])

    @property
    def device_pointer(self) -> int:
        """Where the device sees the first byte: kernels read the memory there, by the bus.

        Raises
        ------
        InvalidArgument
            The device sees it in several places (EINVAL); `device_segments` tells them.
        """
        return self._one_place(self.device_segments())

    def device_segments(self) -> list[tuple[int, int]]:
        """Give (device pointer, bytes) for each part that the device sees in one place."""
        self._check_registered()
        return _merged([(part.device_pointer, part.nbytes) for part in self._parts])

    def _one_place(self, places: list[tuple[int, int]]) -> int:
        self._check_registered()
        ((first, _), *others) = _merged(places)
        if others:
            raise InvalidArgument(
                f"{self.nbytes:,} bytes of {name_of(self.memory)} lie in {1 + len(others)} places: "
                "register its members, or ask for device_segments()",
                errno=errno.EINVAL,
            )
        return first

    def array(
        self,
        shape: int | tuple[int, ...] | None = None,
        dtype: npt.DTypeLike | None = None,
        *,
        order: str = "C",
        offset: int = 0,
    ) -> np.ndarray[Any, Any]:
        """View the registered pages as a NumPy array; see `memdesc.mapping.view_as_array`.

        It stays valid after `close`, when it shows memory that is not registered any more.
        """
        start, target = self.address, self._target
        assert target is not None
        piece = target.pieces[0]
        at = start - piece.base
        if self.nbytes > piece.nbytes:  # members side by side have views of their own
            raise InvalidArgument(
                f"{name_of(self.memory)} is of several descriptors: view them one by one",
                errno=errno.EINVAL,
            )
        view = piece.view[at : at + self.nbytes]
        if not self.access.writable:
            view = view.toreadonly()
        return view_as_array(view, self.nbytes, shape, dtype, order=order, offset=offset)

    # -- copies ----------------------------------------------------------------------------------

    def copy_to_device(
        self,
        device_pointer: int,
        offset: int = 0,
        nbytes: int | None = None,
        *,
        stream: int | None = None,
    ) -> Copy:
        """Start a copy of bytes into memory of the device, and return.

        Parameters
        ----------
        device_pointer : int
            Of memory of the device, as ``tensor.data_ptr()``. It has to stay allocated until the
            copy is over, and to have room: CUDA is told so on trust.
        offset, nbytes : int
            Of this memory; to its end by default. Do not store there before the copy is over.
        stream : int, optional
            Handle of a stream of this device, as ``torch.cuda.current_stream().cuda_stream``: the
            copy is done after what that was given before, and before what it is given later. By
            default a stream of the device object's own, which waits for none. Not one that is
            being captured into a graph.

        Returns
        -------
        Copy

        Raises
        ------
        RangeError, InvalidArgument
        NotPreparedError
            It was closed: the memory is not registered any more.
        DeviceError
            CUDA refused it; nothing is under way.
        ClosedError
            In a fork child.
        """
        to = _check_pointer(device_pointer)
        offset, nbytes = check_range(offset, nbytes, self.nbytes, "the memory")
        spans = [
            (to + at - offset, address, size) for at, address, size in self._spans(offset, nbytes)
        ]
        return self._start(Kind.TO_DEVICE, spans, nbytes, stream)

    def copy_from_device(
        self,
        device_pointer: int,
        offset: int = 0,
        nbytes: int | None = None,
        *,
        stream: int | None = None,
    ) -> Copy:
        """Start a copy out of memory of the device; as `copy_to_device`.

        Raises
        ------
        SealedError
            The memory is read-only in this process (EACCES).
        WiringError
            NOT_WRITABLE: the descriptor is prepared for being read only.
        """
        source = _check_pointer(device_pointer)
        offset, nbytes = check_range(offset, nbytes, self.nbytes, "the memory")
        self._check_registered()
        if not self.access.writable:
            raise SealedError(
                f"{name_of(self.memory)} is registered for reading: no device may write it; only "
                "its owner fills it",
                errno=errno.EACCES,
            )
        if isinstance(self.memory, MemoryDescriptor) and not self.memory.closed:
            self.memory._check_store(offset, nbytes)
        spans = [
            (address, source + at - offset, size)
            for at, address, size in self._spans(offset, nbytes)
        ]
        return self._start(Kind.FROM_DEVICE, spans, nbytes, stream)

    def hold_for(self, stream: int) -> Copy:
        """Hold the memory until a stream has done all that it was given so far.

        For copies that others make out of it or into it, or kernels that use it, of which this
        knows nothing: closing is refused until then, and leaving a ``with`` block waits.

        Parameters
        ----------
        stream : int
            Handle of a stream of this device.

        Returns
        -------
        Copy
            Of 0 bytes: over when the stream is done with what it has now.

        Raises
        ------
        NotPreparedError, DeviceError, InvalidArgument, ClosedError
            As `copy_to_device`.
        """
        return self._start(Kind.TO_DEVICE, [], 0, _check_stream(stream))

    def _spans(self, offset: int, nbytes: int) -> Iterator[Span]:
        """Give (where in the memory, address, bytes) for each part of a range."""
        for part in self._parts:
            low, high = max(offset, part.start), min(offset + nbytes, part.start + part.nbytes)
            if low < high:
                yield low, part.address + low - part.start, high - low

    def _start(self, kind: Kind, spans: list[Span], nbytes: int, stream: int | None) -> Copy:
        settle(_UNKNOWN)
        line: Handle | int = self.device._own_stream() if stream is None else _check_stream(stream)
        with self._lock:  # close() sees it, or it sees that
            copy = Copy(self.device, self._check_registered(), line, kind, nbytes)
            copy._begin(spans)
            if spans:
                self._copies += 1
                self._copied_bytes += nbytes
        return copy

    @property
    def in_flight(self) -> int:
        """How many copies are under way."""
        return 0 if self._claim is None else len(under_way(self._claim))

    def statistics(self) -> PinnedStatistics:
        """Tell what it was used for; also once it is closed."""
        return PinnedStatistics(
            self.nbytes, len(self._parts), self._copies, self._copied_bytes, self.in_flight
        )

    # -- lifetime --------------------------------------------------------------------------------

    def _check_registered(self) -> Claim:
        self.device.place.check_open()
        claim = self._claim
        if claim is None:
            raise NotPreparedError(
                f"{name_of(self.memory)} is not registered any more: register it again, and keep "
                "that open while a device has the memory",
                errno=errno.EINVAL,
            )
        return claim

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or this is a fork child's copy."""
        return self._claim is None or self.device.place.inherited

    def close(self) -> None:
        """Unregister it, unless somebody else has the same pages registered. Again is a no-op.

        Raises
        ------
        InvalidArgument
            Copies are under way (EBUSY): wait for them, or leave a ``with`` block instead.
        DeviceError
            CUDA did not let go of the pages. They stay mapped as long as this process lives.
        """
        with self._lock:
            claim = self._claim
            if claim is None or self.device.place.inherited:
                return
            count = len(under_way(claim))
            if count:
                raise InvalidArgument(
                    f"{count} cop{'y is' if count == 1 else 'ies are'} under way from or to "
                    f"{name_of(self.memory)}: wait() for them before it is closed",
                    errno=errno.EBUSY,
                )
            self._claim = None
            target, self._target = self._target, None
        assert target is not None
        books.end(claim, target)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        if self.closed:
            return
        with self._lock:  # no copy begins any more
            claim, self._claim = self._claim, None
            target, self._target = self._target, None
        if claim is None or target is None:
            return
        failed: Copy | None = None
        while copies := under_way(claim):  # interrupted, these hold the claim until they are over
            for copy in copies:
                copy._wait(None)
                if copy.failed and not copy._seen:
                    failed = failed or copy
        books.end(claim, target)
        if failed is not None and kind is None:
            failed._result()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.nbytes:,} bytes, {self.access.value}"
        return f"<PinnedMemory of {name_of(self.memory)}: {state}>"


def _cut(target: Target, pointers: dict[Registration, int]) -> Iterator[_Part]:
    """Give the parts of a target, cut where one registration ends and the next begins."""
    for piece in target.pieces:
        for known, pointer in pointers.items():
            low = max(piece.address, known.address)
            high = min(piece.address + piece.nbytes, known.end)
            if low < high:
                start = piece.start + low - piece.address
                yield _Part(start, high - low, low, pointer + low - known.address)


def _merged(places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, nbytes in places:
        add_run(merged, start, nbytes)
    return merged


def _check_pointer(pointer: int) -> int:
    pointer = check_integer(pointer, "device_pointer")
    if pointer <= 0:
        raise InvalidArgument(
            f"device_pointer is {pointer:#x}: give the address of memory of the device",
            errno=errno.EINVAL,
        )
    return pointer


def _check_stream(stream: int) -> int:
    stream = check_integer(stream, "stream")
    if stream < 0:
        raise InvalidArgument(
            f"stream is {stream}: give a handle, 0 for the default one", errno=errno.EINVAL
        )
    return stream
