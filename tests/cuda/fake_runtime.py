"""What `cuda.bindings.runtime` is to `CudaDriver`, over the fake driver: its own types and answers.

Each call gives (error, result), errors and enums are cuda-bindings' own, handles its objects, and
the last error of a thread stays until somebody asks for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from fake_driver import FakeDriver

from memdesc.dma.cuda.driver import NOT_READY, Attribute, Kind
from memdesc.errors import DeviceError


class FakeRuntime(ModuleType):
    """A module that stands in for `cuda.bindings.runtime`."""

    def __init__(self, fake: FakeDriver) -> None:
        from cuda.bindings import runtime

        super().__init__("cuda.bindings.runtime")
        self.fake = fake
        self.last = threading.local()
        self.cudaError_t = runtime.cudaError_t
        self.cudaDeviceAttr = runtime.cudaDeviceAttr
        self.cudaMemcpyKind = runtime.cudaMemcpyKind
        self._types = runtime
        none, one = self._of_none, self._of_one
        self.cudaGetDeviceCount = one(fake.device_count)
        self.cudaGetDevice = one(fake.get_device)
        self.cudaSetDevice = none(fake.set_device)
        self.cudaGetDeviceProperties = one(self._properties)
        self.cudaDeviceGetAttribute = one(
            lambda attribute, index: fake.attribute(Attribute(attribute.name), index)
        )
        self.cudaHostRegister = none(fake.register)
        self.cudaHostUnregister = none(fake.unregister)
        self.cudaHostGetDevicePointer = one(lambda address, _: fake.device_pointer(address))
        self.cudaMalloc = one(fake.allocate)
        self.cudaFree = none(fake.free)
        self.cudaHostAlloc = one(lambda nbytes, _: fake.allocate_host(nbytes))
        self.cudaFreeHost = none(fake.free_host)
        self.cudaMemcpyAsync = none(
            lambda to, source, nbytes, kind, stream: fake.copy(
                to, source, nbytes, Kind(kind.name), stream
            )
        )
        self.cudaStreamCreateWithFlags = one(lambda _: runtime.cudaStream_t(fake.create_stream()))
        self.cudaStreamQuery = none(lambda stream: self._ready(fake.stream_done(stream)))
        self.cudaStreamDestroy = none(fake.destroy_stream)
        self.cudaEventCreateWithFlags = one(lambda _: runtime.cudaEvent_t(fake.create_event()))
        self.cudaEventRecord = none(fake.record_event)
        self.cudaEventQuery = none(lambda event: self._ready(fake.event_done(event)))
        self.cudaEventSynchronize = none(fake.wait_event)
        self.cudaEventDestroy = none(fake.destroy_event)

    def cudaGetLastError(self) -> tuple[Any]:
        """Give it, and forget it."""
        code, self.last.code = getattr(self.last, "code", 0), 0
        return (self.cudaError_t(code),)

    def _of_none(self, call: Callable[..., None]) -> Callable[..., tuple[Any]]:
        return lambda *arguments: self._answered(call, arguments)[:1]

    def _of_one(self, call: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
        return lambda *arguments: self._answered(call, arguments)

    def _answered(self, call: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
        try:
            return self.cudaError_t(0), call(*arguments)
        except DeviceError as error:
            self.last.code = error.code
            return self.cudaError_t(error.code), None

    def _ready(self, done: bool) -> None:
        if not done:
            raise DeviceError("", errno=0, code=NOT_READY, name="cudaErrorNotReady")

    def _properties(self, index: int) -> Any:
        properties = self._types.cudaDeviceProp()
        properties.name = self.fake.device_name(index).encode().ljust(256, b"\0")
        return properties
