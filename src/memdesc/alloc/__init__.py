"""Allocators: many small pieces of private memory, handed out fast from a limited pool.

* `layout`: how a zone's memory is cut into chunks and elements
* `chunks`: how it grows and shrinks
* `statistics`: what zones tell of themselves
* `zone`: `Zone`, elements of one size
* `iomalloc`: memory by its size, small from zones, large in pages

Zone memory is never shared: mapping it for another task refuses with `ZONE_MEMORY`. What is to be
shared is a `BufferMemoryDescriptor`.
"""

import memdesc.handover  # noqa: F401  (descriptors are arguments of multiprocessing's)
from memdesc.alloc.chunks import collect_zones
from memdesc.alloc.iomalloc import (
    PageBlock,
    io_free,
    io_malloc,
    io_malloc_aligned,
    io_malloc_contiguous,
    io_malloc_pageable,
)
from memdesc.alloc.statistics import ZoneStatistics, ZoneTable
from memdesc.alloc.zone import Zone, zprint

__all__ = [
    "PageBlock",
    "Zone",
    "ZoneStatistics",
    "ZoneTable",
    "collect_zones",
    "io_free",
    "io_malloc",
    "io_malloc_aligned",
    "io_malloc_contiguous",
    "io_malloc_pageable",
    "zprint",
]
