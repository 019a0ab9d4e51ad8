"""GPUs on the same pages: descriptors registered with CUDA in this process, and copies.

* `CudaDevice`     a GPU as this process uses it; `registered` pins a descriptor's memory for it
* `PinnedMemory`   what is registered: its addresses on both sides, and copies from and to it
* `Copy`           one copy under way: waited for, or awaited
* `CudaDriver`     the boundary to CUDA's runtime, a call for each method

Nothing here imports `cuda` before a `CudaDevice` is made.
"""

from memdesc.dma.cuda.copies import Copy as Copy
from memdesc.dma.cuda.device import CudaDevice as CudaDevice
from memdesc.dma.cuda.driver import Attribute as Attribute, CudaDriver as CudaDriver
from memdesc.dma.cuda.pinned import (
    PinnedMemory as PinnedMemory,
    PinnedStatistics as PinnedStatistics,
)
