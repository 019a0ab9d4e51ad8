"""Devices on the same pages that other tasks see: disks by O_DIRECT and io_uring, GPUs by CUDA.

* `DirectFile`     reads a file into descriptors, and writes it from them, past the page cache
* `DMACommand`     pins memory for a device, and tells where it physically lies
* `CudaDevice`     registers descriptors with a GPU, and copies from and to it
"""

from typing import TYPE_CHECKING

from memdesc.dma.command import DMACommand as DMACommand
from memdesc.dma.direct_file import (
    DirectFile as DirectFile,
    DirectFileStatistics as DirectFileStatistics,
)
from memdesc.dma.segments import DMASpecification as DMASpecification
from memdesc.dma.transfers import Transferred as Transferred, Way as Way
from memdesc.vm.later import later
from memdesc.vm.physical import PhysicalSegment as PhysicalSegment

if TYPE_CHECKING:
    from memdesc.dma.cuda import (
        Copy as Copy,
        CudaDevice as CudaDevice,
        PinnedMemory as PinnedMemory,
    )

if not TYPE_CHECKING:  # for GPUs: who reads files does without
    __getattr__, __dir__ = later(
        __name__, dict.fromkeys(("Copy", "CudaDevice", "PinnedMemory"), "memdesc.dma.cuda")
    )

__all__ = [
    "Copy",
    "CudaDevice",
    "DMACommand",
    "DMASpecification",
    "DirectFile",
    "DirectFileStatistics",
    "PhysicalSegment",
    "PinnedMemory",
    "Transferred",
    "Way",
]
