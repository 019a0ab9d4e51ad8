"""The boundary to CUDA: one small class, each method one call of `cuda.bindings.runtime`.

Everything that crosses it is an int, so that a driver that is no CUDA can stand in for it. It
decides nothing, but for what an error is called.

From cuda-bindings 12.9.1 on each call releases the GIL (its release notes): so waiting holds
nobody up, and no lock order between CUDA's and the interpreter's arises.
"""

from __future__ import annotations

import errno
import os
from enum import Enum
from typing import Any, Protocol

from memdesc.errors import DeviceError, UnsupportedError

PORTABLE, MAPPED, READ_ONLY = 1, 2, 8
"""Flags of `register`: pinned for every device; with an address there; not written by any."""

NON_BLOCKING = 1
"""Flag of a stream: it does not wait for the default stream, nor that for it."""

BLOCKING_SYNC, NO_TIMING = 1, 2
"""Flags of an event: who waits for it sleeps; it is no clock."""

INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED, UNLOADING = 1, 2, 3, 4
STUB, OLD_DRIVER, NO_DEVICE, NO_SUCH_DEVICE = 34, 35, 100, 101
NOT_READY, ALREADY_REGISTERED, NOT_REGISTERED, NOT_SUPPORTED = 600, 712, 713, 801
"""CUDA's numbers of errors (cudaError_t) that something is done about."""

CAPTURING = range(900, 909)
"""What CUDA answers to who asks while a stream is being captured into a graph."""

_SINCE = (12, 9, 1)

_ERRNOS = {
    INVALID_VALUE: errno.EINVAL,
    OUT_OF_MEMORY: errno.ENOMEM,
    STUB: errno.ENODEV,
    OLD_DRIVER: errno.ENODEV,
    NO_DEVICE: errno.ENODEV,
    NO_SUCH_DEVICE: errno.ENODEV,
    ALREADY_REGISTERED: errno.EBUSY,
    NOT_REGISTERED: errno.ENOENT,
    NOT_SUPPORTED: errno.EOPNOTSUPP,
}

_REMEDIES = {
    OUT_OF_MEMORY: "the pages could not be pinned, or the GPU's memory is full: register less, "
    "free some, or look at the limits of this container",
    NOT_INITIALIZED: "CUDA does not survive a fork: start processes that use it with spawn",
    ALREADY_REGISTERED: "something else in this process has registered some of these pages "
    "already, as torch's cudart() may: it has to unregister them first",
    NOT_REGISTERED: "something else in this process has unregistered it",
}


class Attribute(Enum):
    """What a device is asked for, by CUDA's names."""

    HOST_REGISTER = "cudaDevAttrHostRegisterSupported"
    READ_ONLY_REGISTER = "cudaDevAttrHostRegisterReadOnlySupported"
    HOST_POINTER = "cudaDevAttrCanUseHostPointerForRegisteredMem"
    HOST_PAGE_TABLES = "cudaDevAttrPageableMemoryAccessUsesHostPageTables"


class Kind(Enum):
    """Which way a copy goes."""

    TO_DEVICE = "cudaMemcpyHostToDevice"
    FROM_DEVICE = "cudaMemcpyDeviceToHost"


class Driver(Protocol):
    """What `CudaDevice` needs of a driver: `CudaDriver`, or what stands in for it in tests.

    Streams and events are handles. Every method raises `DeviceError`; those that ask whether
    something is done answer False while it is not.
    """

    def device_count(self) -> int: ...
    def get_device(self) -> int: ...
    def set_device(self, index: int) -> None: ...
    def device_name(self, index: int) -> str: ...
    def attribute(self, attribute: Attribute, index: int) -> int: ...
    def register(self, address: int, nbytes: int, flags: int) -> None: ...
    def unregister(self, address: int) -> None: ...
    def device_pointer(self, address: int) -> int: ...
    def copy(self, to: int, source: int, nbytes: int, kind: Kind, stream: int) -> None: ...
    def create_stream(self) -> int: ...
    def stream_done(self, stream: int) -> bool: ...
    def destroy_stream(self, stream: int) -> None: ...
    def create_event(self) -> int: ...
    def record_event(self, event: int, stream: int) -> None: ...
    def event_done(self, event: int) -> bool: ...
    def wait_event(self, event: int) -> None: ...
    def destroy_event(self, event: int) -> None: ...
    def allocate(self, nbytes: int) -> int: ...
    def free(self, pointer: int) -> None: ...


class CudaDriver:
    """CUDA's runtime, by cuda-bindings. Addresses, device pointers and handles are ints.

    Raises
    ------
    UnsupportedError
        cuda-bindings is not installed, or too old.

    Notes
    -----
    Threads: safe; which device is current is each thread's own. Fork: CUDA does not survive it,
    so every call in the child is refused (`DeviceError`, cudaErrorInitializationError), and none
    reaches CUDA.
    """

    def __init__(self) -> None:
        self._runtime: Any = _import_runtime()
        self._kinds = {kind: getattr(self._runtime.cudaMemcpyKind, kind.value) for kind in Kind}
        self._pid = os.getpid()

    # -- devices ---------------------------------------------------------------------------------

    def device_count(self) -> int:
        """Count the GPUs that this process may use."""
        return int(self._call("cudaGetDeviceCount"))

    def get_device(self) -> int:
        """Tell which device is current in this thread."""
        return int(self._call("cudaGetDevice"))

    def set_device(self, index: int) -> None:
        """Make a device current in this thread; makes its context where there is none yet."""
        self._call("cudaSetDevice", index)

    def device_name(self, index: int) -> str:
        """Give a device's name."""
        name: bytes = self._call("cudaGetDeviceProperties", index).name
        return name.split(b"\0", 1)[0].decode(errors="replace")

    def attribute(self, attribute: Attribute, index: int) -> int:
        """Tell what a device can."""
        wanted = getattr(self._runtime.cudaDeviceAttr, attribute.value)
        return int(self._call("cudaDeviceGetAttribute", wanted, index))

    # -- memory ----------------------------------------------------------------------------------

    def register(self, address: int, nbytes: int, flags: int) -> None:
        """Pin memory of this process: whole pages, none of which is registered already."""
        self._call("cudaHostRegister", address, nbytes, flags)

    def unregister(self, address: int) -> None:
        """Undo it, by the address that it was registered with."""
        self._call("cudaHostUnregister", address)

    def device_pointer(self, address: int) -> int:
        """Tell where the current device sees registered memory."""
        return int(self._call("cudaHostGetDevicePointer", address, 0))

    def allocate(self, nbytes: int) -> int:
        """Allocate memory of the current device."""
        return int(self._call("cudaMalloc", nbytes))

    def free(self, pointer: int) -> None:
        """Free memory of a device."""
        self._call("cudaFree", pointer)

    def allocate_host(self, nbytes: int) -> int:
        """Allocate pinned memory of CUDA's own."""
        return int(self._call("cudaHostAlloc", nbytes, PORTABLE))

    def free_host(self, address: int) -> None:
        """Free that."""
        self._call("cudaFreeHost", address)

    def copy(self, to: int, source: int, nbytes: int, kind: Kind, stream: int) -> None:
        """Have bytes copied by a stream; returns at once where the memory is pinned."""
        self._call("cudaMemcpyAsync", to, source, nbytes, self._kinds[kind], stream)

    # -- streams and events ----------------------------------------------------------------------

    def create_stream(self) -> int:
        """Make a stream of the current device that does not wait for the default one."""
        return self._handle(self._call("cudaStreamCreateWithFlags", NON_BLOCKING))

    def stream_done(self, stream: int) -> bool:
        """Tell whether all that a stream was given is done."""
        return self._is_done("cudaStreamQuery", stream)

    def destroy_stream(self, stream: int) -> None:
        """Let go of a stream; what it was given is done all the same."""
        self._call("cudaStreamDestroy", stream)

    def create_event(self) -> int:
        """Make an event of the current device; who waits for it sleeps."""
        return self._handle(self._call("cudaEventCreateWithFlags", BLOCKING_SYNC | NO_TIMING))

    def record_event(self, event: int, stream: int) -> None:
        """Have an event stand for all that a stream of the same device was given so far."""
        self._call("cudaEventRecord", event, stream)

    def event_done(self, event: int) -> bool:
        """Tell whether that is done."""
        return self._is_done("cudaEventQuery", event)

    def wait_event(self, event: int) -> None:
        """Sleep until that is done. No signal ends it."""
        self._call("cudaEventSynchronize", event)

    def destroy_event(self, event: int) -> None:
        """Let go of an event."""
        self._call("cudaEventDestroy", event)

    # -- calling ---------------------------------------------------------------------------------

    def _is_done(self, call: str, handle: int) -> bool:
        (code,) = self._answer(call, handle)
        if int(code) == NOT_READY:
            self._runtime.cudaGetLastError()  # CUDA keeps it like any other error
            return False
        self._check(call, code)
        return True

    def _handle(self, made: Any) -> int:
        from cuda.bindings.utils import get_cuda_native_handle

        return int(get_cuda_native_handle(made))

    def _call(self, call: str, *arguments: Any) -> Any:
        answer = self._answer(call, *arguments)
        self._check(call, answer[0])
        return answer[1] if len(answer) > 1 else None

    def _answer(self, call: str, *arguments: Any) -> tuple[Any, ...]:
        if os.getpid() != self._pid:
            raise device_error(call, NOT_INITIALIZED, "cudaErrorInitializationError")
        try:
            answer: tuple[Any, ...] = getattr(self._runtime, call)(*arguments)
        except RuntimeError as error:  # a library of CUDA's is missing
            raise UnsupportedError(f"{call}: {error}") from error
        return answer

    def _check(self, call: str, code: Any) -> None:
        if code:
            # Forget it: whoever asks for the thread's last error next would take it for his own.
            self._runtime.cudaGetLastError()
            raise device_error(call, int(code), code.name)


def device_error(call: str, code: int, name: str) -> DeviceError:
    """Make the error for what CUDA answered."""
    remedy = _REMEDIES.get(code)
    return DeviceError(
        f"{call} answered {name} ({code})" + (f": {remedy}" if remedy else ""),
        errno=_ERRNOS.get(code, errno.EIO),
        code=code,
        name=name,
    )


def _import_runtime() -> Any:
    try:
        import cuda.bindings
        from cuda.bindings import runtime
    except ImportError as error:
        raise UnsupportedError(
            f"GPUs are reached by cuda-bindings, which can not be imported ({error}): "
            "pip install 'memdesc[cuda]'"
        ) from error
    version: str = cuda.bindings.__version__
    if tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) < _SINCE:
        raise UnsupportedError(
            f"cuda-bindings {version} holds the interpreter up while it waits for a GPU: "
            "pip install 'cuda-bindings>=12.9.1'"
        )
    return runtime


_loaded: CudaDriver | None = None


def load_driver() -> CudaDriver:
    """Give the one of this process."""
    global _loaded
    if _loaded is None:
        _loaded = CudaDriver()
    return _loaded
