"""The model's own spelling: I/O Kit's names over ours, so that its code runs nearly to the letter.

It adds no behaviour; every name is one call of the rooms below, and `docs/iokit.md` has the table.
How C's ways are spelled in Python:

* NULL is None. Why, is in an out-argument: every call that may give NULL takes ``why``, a list
  that gets the exception which memdesc raised (``why = []``, then ``why[0].reason``). Nothing is
  kept in a variable of this module: there is no "last error" that another thread could change.
* An IOReturn or errno is the code itself; a count is a count; a C out-argument is a list.
* What the model gives no way to fail (`setLength`) raises.
* A pointer to memory of this task is a buffer; an address in another task is an integer.
* An option that has no counterpart is refused (`UnsupportedError`), never passed over.
* `release` ends what it is called on; Python counts the references, so there is no `retain`.

The service's process plays the kernel: `kernel_task` is the own task, as `current_task()` is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import memdesc.handover  # noqa: F401  (descriptors are arguments of multiprocessing's)
from memdesc.iokit.allocating import (
    IOFree as IOFree,
    IOFreeAligned as IOFreeAligned,
    IOFreeContiguous as IOFreeContiguous,
    IOFreePageable as IOFreePageable,
    IOMalloc as IOMalloc,
    IOMallocAligned as IOMallocAligned,
    IOMallocContiguous as IOMallocContiguous,
    IOMallocPageable as IOMallocPageable,
)
from memdesc.iokit.copying import copyin as copyin, copyinstr as copyinstr, copyout as copyout
from memdesc.iokit.memory import (
    IOBufferMemoryDescriptor as IOBufferMemoryDescriptor,
    IOMemoryDescriptor as IOMemoryDescriptor,
    IOMemoryMap as IOMemoryMap,
    IOMultiMemoryDescriptor as IOMultiMemoryDescriptor,
    IOSubMemoryDescriptor as IOSubMemoryDescriptor,
)
from memdesc.iokit.values import (
    KERN_PROTECTION_FAILURE as KERN_PROTECTION_FAILURE,
    Why as Why,
    kIODirectionIn as kIODirectionIn,
    kIODirectionInOut as kIODirectionInOut,
    kIODirectionNone as kIODirectionNone,
    kIODirectionOut as kIODirectionOut,
    kIODirectionOutIn as kIODirectionOutIn,
    kIOMapAnywhere as kIOMapAnywhere,
    kIOMapGuardedLarge as kIOMapGuardedLarge,
    kIOMapGuardedSmall as kIOMapGuardedSmall,
    kIOMapPrefault as kIOMapPrefault,
    kIOMapReadOnly as kIOMapReadOnly,
    kIOMapReference as kIOMapReference,
    kIOMapUnique as kIOMapUnique,
    kIOMemoryKernelUserShared as kIOMemoryKernelUserShared,
    kIOMemoryPageable as kIOMemoryPageable,
    kIOMemoryPhysicallyContiguous as kIOMemoryPhysicallyContiguous,
    kIOMemoryThreadSafe as kIOMemoryThreadSafe,
    kIOMemoryUnshared as kIOMemoryUnshared,
    kIOReturnBadArgument as kIOReturnBadArgument,
    kIOReturnBusy as kIOReturnBusy,
    kIOReturnCannotWire as kIOReturnCannotWire,
    kIOReturnError as kIOReturnError,
    kIOReturnNoMemory as kIOReturnNoMemory,
    kIOReturnNoResources as kIOReturnNoResources,
    kIOReturnNotAttached as kIOReturnNotAttached,
    kIOReturnNotPrivileged as kIOReturnNotPrivileged,
    kIOReturnNotReady as kIOReturnNotReady,
    kIOReturnNotWritable as kIOReturnNotWritable,
    kIOReturnSuccess as kIOReturnSuccess,
    kIOReturnTimeout as kIOReturnTimeout,
    kIOReturnUnsupported as kIOReturnUnsupported,
)
from memdesc.vm.pages import (
    page_size as page_size,
    round_page as round_page,
    trunc_page as trunc_page,
)
from memdesc.vm.task import Task

if TYPE_CHECKING:
    kernel_task: Task


def __getattr__(name: str) -> Task:
    if name == "kernel_task":  # at each use, so that in a fork child it is the child
        return Task.current()
    raise AttributeError(f"module 'memdesc.iokit' has no attribute {name!r}")


def current_task() -> Task:
    """Give the own task."""
    return Task.current()
