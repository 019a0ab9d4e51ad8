"""Devices on the same pages that other tasks see: a disk by O_DIRECT and io_uring.

* `DirectFile`     reads a file into descriptors, and writes it from them, past the page cache
"""

from memdesc.dma.direct_file import DirectFile as DirectFile
from memdesc.dma.transfers import Transferred as Transferred, Way as Way
