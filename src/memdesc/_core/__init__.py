"""The compiled core, as one list. Rooms call it as `_core.name(...)`.

That spelling is a rule: it lets `memdesc.testing.faults` make any of these fail with any
errno, which is how the error paths of the rooms above are tested.
"""

from memdesc._core._native import (
    F_SEAL_EXEC as F_SEAL_EXEC,
    F_SEAL_FUTURE_WRITE as F_SEAL_FUTURE_WRITE,
    F_SEAL_GROW as F_SEAL_GROW,
    F_SEAL_SEAL as F_SEAL_SEAL,
    F_SEAL_SHRINK as F_SEAL_SHRINK,
    F_SEAL_WRITE as F_SEAL_WRITE,
    MADV_DONTDUMP as MADV_DONTDUMP,
    MADV_POPULATE_READ as MADV_POPULATE_READ,
    MADV_POPULATE_WRITE as MADV_POPULATE_WRITE,
    MAP_ANONYMOUS as MAP_ANONYMOUS,
    MAP_FIXED_NOREPLACE as MAP_FIXED_NOREPLACE,
    MAP_PRIVATE as MAP_PRIVATE,
    MAP_SHARED as MAP_SHARED,
    MFD_NOEXEC_SEAL as MFD_NOEXEC_SEAL,
    PROT_NONE as PROT_NONE,
    PROT_READ as PROT_READ,
    PROT_WRITE as PROT_WRITE,
    Exporter as Exporter,
    MappedMemory as MappedMemory,
    Window as Window,
    buffer_address as buffer_address,
    copy_memory as copy_memory,
    duplicate_memory as duplicate_memory,
    fallocate as fallocate,
    madvise as madvise,
    map_memory as map_memory,
    mincore as mincore,
    mlock as mlock,
    mprotect as mprotect,
    munlock as munlock,
    pidfd_getfd as pidfd_getfd,
    place_memory as place_memory,
    process_vm_readv as process_vm_readv,
    process_vm_writev as process_vm_writev,
    reserve_memory as reserve_memory,
    zero_memory as zero_memory,
)
