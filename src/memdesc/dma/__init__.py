"""Devices on the same pages that other tasks see: a disk by O_DIRECT and io_uring.

* `DirectFile`     reads a file into descriptors, and writes it from them, past the page cache
* `DMACommand`     pins memory for a device, and tells where it physically lies
"""

from memdesc.dma.command import DMACommand as DMACommand
from memdesc.dma.direct_file import DirectFile as DirectFile
from memdesc.dma.segments import DMASpecification as DMASpecification
from memdesc.dma.transfers import Transferred as Transferred, Way as Way
from memdesc.vm.physical import PhysicalSegment as PhysicalSegment
