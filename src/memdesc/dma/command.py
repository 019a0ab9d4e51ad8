"""DMACommand: memory pinned for a device, and where it physically lies."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Self, final

from memdesc import _core
from memdesc.descriptors.base import MemoryDescriptor, check_descriptor
from memdesc.dma.segments import DMASpecification, part_of_runs, segments_of
from memdesc.dma.targets import GIB, Target
from memdesc.errors import (
    InvalidArgument,
    NotPreparedError,
    RangeError,
    SegmentError,
    SegmentReason,
    WiringError,
    WiringReason,
    describe_errno,
)
from memdesc.mapping import check_range
from memdesc.vm.physical import PhysicalSegment, physical_runs

_ANY = DMASpecification()


@final
class DMACommand:
    """Memory of a descriptor, pinned and laid out for a device (I/O Kit: IODMACommand).

    Wired memory may still move between frames; pinned memory does not. A command prepares the
    descriptor, pins the pages by a registration with io_uring, and cuts them to what the device
    can take. Where the memory does not meet the specification `prepare` fails and nothing is
    prepared, pinned or active; nothing is ever bounced.

    Parameters
    ----------
    descriptor : MemoryDescriptor
        Kept alive. Of memory that this task may write: the kernel pins no other.
    specification : DMASpecification, optional
        What the device can take; anything by default.

    Notes
    -----
    As a context manager: prepared for the whole descriptor, completed on leaving.

    Linux: io_uring registration (RLIMIT_MEMLOCK, or CAP_IPC_LOCK), /proc/self/pagemap with
    CAP_SYS_ADMIN. Not for several threads at a time. Fork: the child has no part in it.

    Against I/O Kit: a failed `prepare` leaves the command as it was (there it stays active); a
    length that is left out reaches to the end behind `offset` (there it is the descriptor's).
    """

    def __init__(
        self, descriptor: MemoryDescriptor, specification: DMASpecification = _ANY
    ) -> None:
        self.descriptor = check_descriptor(descriptor, "descriptor")
        self.specification = specification
        self._range = (0, 0)
        self._active = 0
        self._held: _Pinned | None = None
        self._runs: list[PhysicalSegment] = []

    @property
    def active(self) -> int:
        """How many `prepare` await their `complete`."""
        return self._active

    def prepare(self, offset: int = 0, length: int | None = None) -> None:
        """Prepare the descriptor, pin a range of it and look where it lies. Counted.

        Raises
        ------
        RangeError
            The range leaves the descriptor (EINVAL), or is longer than the device takes (ENOSPC).
        InvalidArgument
            It is empty, its length is not aligned, or it is not the range that is active already.
        SegmentError
            The memory does not lie as the device needs it.
        WiringError
            It can not be wired, or not pinned: LIMIT, NOT_PRIVILEGED, PROTECTION (it is read-only
            here), NO_MEMORY.
        NotPrivilegedError
            This process is not shown page frames (EPERM).
        """
        descriptor = self.descriptor
        descriptor._check_open()
        offset, length = check_range(offset, length, descriptor.length, "the descriptor")
        if self._active:
            if (offset, length) != self._range:
                raise InvalidArgument(
                    f"the command is active for {self._range[1]:,} bytes at "
                    f"{self._range[0]:,}: complete() it before another range is prepared",
                    errno=errno.EBUSY,
                )
            self._active += 1
            return
        self._check_length(length)
        descriptor.prepare()
        held: _Pinned | None = None
        try:
            held = _Pinned(descriptor, offset, length)
            runs = held.runs()
            for _ in segments_of(runs, self.specification):
                pass
        except BaseException:
            _undo(descriptor, held)
            raise
        self._held, self._runs, self._range, self._active = held, runs, (offset, length), 1

    def _check_length(self, length: int) -> None:
        longest = self.specification.max_transfer_length
        if longest is not None and length > longest:
            raise RangeError(
                f"a transfer of {length:,} bytes: the device takes {longest:,} at a time",
                errno=errno.ENOSPC,
            )
        if not length or length % self.specification.length_alignment:
            raise InvalidArgument(
                f"a transfer of {length:,} bytes: the device takes multiples of "
                f"{self.specification.length_alignment:,}, and not none",
                errno=errno.EINVAL,
            )

    def segments(self, offset: int = 0) -> Iterator[PhysicalSegment]:
        """Give the segments, (physical address, length), from a byte of the prepared range on.

        Raises
        ------
        NotPreparedError
            The command is not active.
        RangeError
            `offset` is not in the prepared range (EOVERFLOW).
        SegmentError
            From `offset` on, which is not aligned, a segment does not meet the specification.
        """
        self._check_active("segments()")
        length = self._range[1]
        if not 0 <= offset < length:
            raise RangeError(
                f"offset {offset:,} is outside the prepared {length:,} bytes",
                errno=errno.EOVERFLOW,
            )
        runs = part_of_runs(self._runs, offset, length - offset)
        return segments_of(list(runs), self.specification, offset)

    def complete(self) -> None:
        """Undo one `prepare`; the last one looks at the memory again, and lets go of it.

        Raises
        ------
        NotPreparedError
            There is none to undo.
        SegmentError
            MOVED: the pages are not those that were pinned; somebody mapped others over them, or
            took them away. Everything is released all the same.
        """
        self._check_active("complete()")
        self._active -= 1
        if self._active:
            return
        held, runs = self._held, self._runs
        self._held, self._runs = None, []
        assert held is not None
        try:
            now = held.runs()
        finally:
            _undo(self.descriptor, held)
        if now != runs:
            raise SegmentError(
                f"the {self._range[1]:,} bytes of {self.descriptor.name!r} do not lie where they "
                "were pinned: what the device transferred is not in them",
                reason=SegmentReason.MOVED,
                errno=errno.EIO,
                offset=self._range[0],
                address=runs[0].address,
            )

    def _check_active(self, doing: str) -> None:
        if not self._active:
            raise NotPreparedError(
                f"{doing} of a command that is not active: prepare() it first", errno=errno.EINVAL
            )

    def __enter__(self) -> Self:
        self.prepare()
        return self

    def __exit__(self, *exc: object) -> None:
        self.complete()

    def __del__(self) -> None:
        held = getattr(self, "_held", None)
        if held is not None:
            _undo(self.descriptor, held)


class _Pinned:
    """A range of a descriptor that can not move: registered with a ring of its own."""

    def __init__(self, descriptor: MemoryDescriptor, offset: int, length: int) -> None:
        self._uring: _core.Uring | None = None
        self._slots = 0
        writes = descriptor.direction.writes_memory
        self._target = Target(descriptor, offset, length, writes_memory=writes)
        try:
            self._pin(descriptor.name)
        except OSError as error:
            self.release()
            if isinstance(error, WiringError):
                raise
            raise _why_not(error, descriptor.name, length) from error
        except BaseException:
            self.release()
            raise

    def _pin(self, name: str) -> None:
        places = [
            (address + at, min(nbytes - at, 1 << GIB))
            for _, address, nbytes in self._target.spans(0, 1 << 62)
            for at in range(0, nbytes, 1 << GIB)
        ]
        self._uring = _core.open_uring(1, 2, 0)
        _core.uring_register_buffers(self._uring, len(places))
        for slot, (address, nbytes) in enumerate(places):
            _core.uring_update_buffer(self._uring, slot, address, nbytes)
            self._slots = slot + 1

    def runs(self) -> list[PhysicalSegment]:
        """Tell where it lies now."""
        spans = [(address, nbytes) for _, address, nbytes in self._target.spans(0, 1 << 62)]
        return physical_runs(spans)

    def release(self) -> None:
        """Let go of it; again is a no-op."""
        uring, self._uring = self._uring, None
        if uring is not None and not uring.closed:
            for slot in range(self._slots):  # what a closed ring has goes some time later
                with contextlib.suppress(OSError):
                    _core.uring_update_buffer(uring, slot, 0, 0)
            uring.close()
        self._target.release()


def _undo(descriptor: MemoryDescriptor, held: _Pinned | None) -> None:
    if held is not None:
        held.release()
    if descriptor.prepare_count:  # closing it may have undone it
        descriptor.complete()


def _why_not(error: OSError, name: str, length: int) -> WiringError:
    reasons = {
        errno.EFAULT: (WiringReason.PROTECTION, "the kernel pins only what this task may write"),
        errno.ENOMEM: (WiringReason.LIMIT, "raise `ulimit -l`, or run with CAP_IPC_LOCK"),
        errno.EPERM: (WiringReason.NOT_PRIVILEGED, "kernel.io_uring_disabled, or a filter"),
        errno.ENOSYS: (WiringReason.NOT_PRIVILEGED, "this kernel, or a filter, has no io_uring"),
    }
    reason, remedy = reasons.get(
        error.errno or 0, (WiringReason.NO_MEMORY, "the pages could not be had")
    )
    return WiringError(
        f"pinning {length:,} bytes of {name!r}: {describe_errno(error)}; {remedy}",
        reason=reason,
        errno=error.errno,
    )
