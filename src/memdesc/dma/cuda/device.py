"""CudaDevice: a GPU, as this process uses it."""

from __future__ import annotations

import contextlib
import errno
from typing import final

from memdesc.descriptors.base import check_descriptor
from memdesc.dma.cuda.copies import Handle, new_stream, settle
from memdesc.dma.cuda.driver import (
    NO_DEVICE,
    NOT_INITIALIZED,
    OLD_DRIVER,
    READ_ONLY,
    STUB,
    Attribute,
    Driver,
    load_driver,
)
from memdesc.dma.cuda.pinned import PinnedMemory
from memdesc.dma.cuda.place import Current, Place
from memdesc.dma.cuda.registrations import Claim, books
from memdesc.dma.targets import Memory, Piece, Target
from memdesc.errors import (
    DeviceError,
    InvalidArgument,
    SealedError,
    UnsupportedError,
)
from memdesc.mapping import LocalMemoryMap
from memdesc.vm.forks import lock_for
from memdesc.vm.pages import Access, check_integer
from memdesc.vm.regions import regions_in
from memdesc.vm.task import Task

_NONE = {
    NO_DEVICE: "this machine, or this container, has no GPU that CUDA could use",
    OLD_DRIVER: "no NVIDIA driver is installed, or one that is older than cuda-bindings asks for",
    STUB: "the libcuda that was found is a stub: no NVIDIA driver is installed",
    NOT_INITIALIZED: "the driver could not be initialized, as in a process that was forked from "
    "one that used CUDA already: start it with spawn",
}


@final
class CudaDevice:
    """A GPU, as this process uses it.

    `registered` pins the very pages that a descriptor's views show, and that other processes
    have mapped, so that copies between them and the GPU need no bounce buffer. Nothing is
    registered in other processes, which need no GPU, nor CUDA.

    Parameters
    ----------
    index : int
        Of the GPU, as CUDA numbers those that this process may use.
    driver : Driver, optional
        What the calls go to; CUDA itself by default.

    Raises
    ------
    UnsupportedError
        cuda-bindings is not installed, there is no driver or no GPU, or this process was forked
        from one that used CUDA. The message says which.
    InvalidArgument
        There is no GPU of that index (ENODEV).
    DeviceError

    Notes
    -----
    Threads: safe. Which device is current in the calling thread is as before after every call.
    Fork: CUDA does not survive it; in the child everything is closed, nothing is unregistered.

    Linux and CUDA: cudaHostRegister, cudaMemcpyAsync; no privilege. CUDA pins by itself: nothing
    is mlocked, so RLIMIT_MEMLOCK is not asked. I/O Kit: IODMACommand, as a driver of that device
    would use it.
    """

    def __init__(self, index: int = 0, *, driver: Driver | None = None) -> None:
        index = check_integer(index, "index")
        driver = load_driver() if driver is None else driver
        count = _count(driver)
        if not 0 <= index < count:
            raise InvalidArgument(
                f"there is no GPU {index}: this process may use {count}, from 0 on",
                errno=errno.ENODEV,
            )
        self.place = Place(driver, index, driver.device_name(index))
        self._lock = lock_for(self)
        self._stream: Handle | None = None
        self._events: list[Handle] = []

    @property
    def driver(self) -> Driver:
        """What the calls go to."""
        return self.place.driver

    @property
    def index(self) -> int:
        """Of the GPU."""
        return self.place.index

    @property
    def name(self) -> str:
        """Of the GPU, as CUDA has it."""
        return self.place.name

    def attribute(self, attribute: Attribute) -> int:
        """Tell what CUDA says of the device."""
        self.place.check_open()
        return self.driver.attribute(attribute, self.index)

    @property
    def registers_read_only(self) -> bool:
        """Whether memory can be registered that is read-only in this process."""
        return bool(
            self.attribute(Attribute.READ_ONLY_REGISTER)
            or self.attribute(Attribute.HOST_PAGE_TABLES)
        )

    def registered(self, memory: Memory, *, access: Access | None = None) -> PinnedMemory:
        """Register memory with CUDA in this process: pinned, and to be copied without a bounce.

        Whole pages of what the views of `memory` in this process show: of a buffer its own
        view, of several descriptors each one's. Pages that are registered already, for this
        device or another, are shared and counted. While they are, a snapshot of the memory is
        copied, and it is not recycled.

        Parameters
        ----------
        memory : MemoryDescriptor or LocalMemoryMap
            Any descriptor; a mapping in this task; of a stream its ``memory``, and with that all
            of its slots at once.
        access : Access, optional
            READ_ONLY: no copy from the device shall write it. By default as the memory allows.

        Returns
        -------
        PinnedMemory
            Owned by the caller. Keeps the memory mapped.

        Raises
        ------
        SealedError
            READ_WRITE was asked for, and the memory is read-only in this task (EACCES).
        UnsupportedError
            The device can not register memory, or none that is read-only (EOPNOTSUPP).
        DeviceError
            ENOMEM: the pages could not be pinned; EBUSY: something else in this process has
            registered them. Nothing stays registered.
        MappingError
            The memory can not be seen from this task.
        InvalidArgument
            It has 0 bytes, or is neither a descriptor nor a mapping.
        ClosedError
        """
        self.place.check_open()
        if not isinstance(memory, LocalMemoryMap):
            check_descriptor(memory, "memory")._check_open()
        length = memory.length
        if not length:
            raise InvalidArgument("0 bytes can not be registered", errno=errno.EINVAL)
        access = None if access is None else Access(access)
        settle()
        target = Target(memory, 0, length, writes_memory=False)
        claim = Claim()
        try:
            writable = not any(piece.view.readonly for piece in target.pieces)
            if access is None:
                access = Access.READ_WRITE if writable else Access.READ_ONLY
            elif access.writable and not writable:
                raise SealedError(
                    "memory that is read-only in this task can not be registered for writing",
                    errno=errno.EACCES,
                )
            registrations = books.take(self, target, claim)
            return PinnedMemory(self, memory, target, registrations, claim, access)
        except BaseException:
            # What CUDA does not let go of stays mapped, and is told to the log.
            with contextlib.suppress(DeviceError):
                books.end(claim, target)
            raise

    def _flags_for(self, piece: Piece) -> int:
        """Give the flag for memory that is read-only here, if it needs one."""
        if not self.attribute(Attribute.HOST_REGISTER):
            raise UnsupportedError(
                f"{self.name} can not register memory of a process", errno=errno.EOPNOTSUPP
            )
        if _maps_writable(piece):
            return 0
        if self.attribute(Attribute.READ_ONLY_REGISTER):
            return READ_ONLY
        if self.attribute(Attribute.HOST_PAGE_TABLES):
            return 0
        raise UnsupportedError(
            f"{self.name} can not register memory that is read-only in this process: register it "
            "in the process that writes it, or give this one a buffer that it may write",
            errno=errno.EOPNOTSUPP,
        )

    # -- what the copies need --------------------------------------------------------------------

    def current(self) -> Current:
        """Have the device current in this thread for the length of a block."""
        return self.place.current()

    def _own_stream(self) -> Handle:
        with self._lock:
            if self._stream is None:
                self._stream = new_stream(self.place)
            return self._stream

    def __repr__(self) -> str:
        return f"<CudaDevice {self.index}: {self.name}>"


def _maps_writable(piece: Piece) -> bool:
    """Whether the pages themselves are writable here, whatever this view of them is.

    So one page is always registered the same way, whoever asks for it first.
    """
    return not piece.view.readonly or all(
        "w" in region.permissions
        for region in regions_in(Task.current(), piece.address, piece.nbytes)
    )


def _count(driver: Driver) -> int:
    """Count the GPUs, or say why there is none."""
    try:
        return driver.device_count()
    except DeviceError as error:
        why = _NONE.get(error.code)
        if why is None:
            raise
        raise UnsupportedError(f"{error.message}: {why}", errno=error.errno) from error
