"""Mapping: memory made visible in a task.

A mapping knows extents of VM objects and an opaque owner that it keeps alive; it never knows a
descriptor's kind. In this task it is a buffer; in another it is a handle, made and unmade through
whoever is connected to that task.

* `place`: mmap extents into this task, one after the other, as one range
* `maps`: `MemoryMap`: the buffer here, the handle there
* `carriers`: the ways into other tasks, registered by the services room
* `elements`: what an array's elements are, and whether it fits
* `views`: ranges checked, bytes seen as arrays
"""

from memdesc.mapping.carriers import (
    Carrier as Carrier,
    add_carrier as add_carrier,
    carrier_to as carrier_to,
    forget_carriers as forget_carriers,
    remove_carrier as remove_carrier,
)
from memdesc.mapping.elements import (
    Elements as Elements,
    check_order as check_order,
    elements_of as elements_of,
    fit as fit,
)
from memdesc.mapping.maps import (
    LocalMemoryMap as LocalMemoryMap,
    MappingStatistics as MappingStatistics,
    MemoryMap as MemoryMap,
    RemoteMemoryMap as RemoteMemoryMap,
)
from memdesc.mapping.place import (
    Extent as Extent,
    Placement as Placement,
    explained as explained,
    has_hole as has_hole,
    is_immutable as is_immutable,
    map_extents as map_extents,
    part_of as part_of,
)
from memdesc.mapping.views import (
    GivesArrays as GivesArrays,
    check_range as check_range,
    view_as_array as view_as_array,
)
