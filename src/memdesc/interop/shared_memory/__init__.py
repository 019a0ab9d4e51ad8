"""Shared memory by name: the interface of `multiprocessing.shared_memory` on sealed memfds.

The same classes with the same arguments, so that a program changes one line:

    from memdesc.interop.shared_memory import SharedMemory, ShareableList, SharedMemoryManager

or none of its own, where that line is the program's first: ``install()``. What changes with it,
and what to do about it, is in `docs/shared-memory.md`.

* `block`: `SharedMemory`
* `shareable_list`: `ShareableList`
* `manager`: `SharedMemoryManager`
* `switch`: `install`, `uninstall`, `installed`
* `folder`, `holders`, `names`: how a block is found by its name
* `keeping`: how long this process holds a block
"""

from memdesc.interop.shared_memory.block import SharedMemory as SharedMemory
from memdesc.interop.shared_memory.manager import SharedMemoryManager as SharedMemoryManager
from memdesc.interop.shared_memory.shareable_list import ShareableList as ShareableList
from memdesc.interop.shared_memory.switch import (
    install as install,
    installed as installed,
    uninstall as uninstall,
)

__all__ = [
    "SharedMemory",
    "ShareableList",
    "SharedMemoryManager",
    "install",
    "uninstall",
    "installed",
]
