"""Copying between a buffer here and an address in a task, either way: copyin and copyout.

The kernel copies (process_vm_readv, process_vm_writev), so an address is never dereferenced in
the wrong space, and memory that can not be reached is an error, never a signal. Where the
kernel denies this process the other one's memory, a task that is connected with us may copy
for us: the room above registers a `Copier` for it. `route` tells which of the two it would be.

Protections hold: what the task itself may not read can not be copied in (also memory that is
mapped for writing only, which its processor could read), and read-only memory can not be
written. Pages that are not there yet are brought in. Device memory (VM_IO) can not be reached.

A task that ended has no memory, and its pid may be given to another process. So the task is
looked at after each copy, too: data that may be a stranger's is never returned.
"""

from memdesc.copyio.between import copy_between as copy_between
from memdesc.copyio.calls import (
    copyin as copyin,
    copyin_into as copyin_into,
    copyinstr as copyinstr,
    copyout as copyout,
)
from memdesc.copyio.copiers import (
    Copier as Copier,
    Route as Route,
    register_copier as register_copier,
    renew_lock as renew_lock,
    route as route,
    unregister_copier as unregister_copier,
)
from memdesc.copyio.transfer import bytes_of as bytes_of

__all__ = [
    "Copier",
    "Route",
    "copy_between",
    "copyin",
    "copyin_into",
    "copyinstr",
    "copyout",
    "register_copier",
    "route",
    "unregister_copier",
]
