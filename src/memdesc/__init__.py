"""memdesc: describe memory once; let other processes, the kernel and devices use the same pages.

Where to begin; `help(memdesc.Service)` and so on tells more:

* `BufferMemoryDescriptor`         memory of our own, made to be shared; `array()` views it
* `Service`, `connect`             share it under a name; map it in another process
* `create_mapping_in_task`         of any descriptor: map it into a connected process
* `snapshot`                       of any descriptor: the bytes as they are now, for ever
* `SubMemoryDescriptor`, `MultiMemoryDescriptor`   a part; several as one
* `Task`, `MemoryDescriptor.with_address_range`    memory of any process, by its address
* `copyin`, `copyout`, `copyinstr`                 copies from and to any process
* `copy_between`                                   copies from one process to another
* `prepare`, `complete`            of any descriptor: keep it resident
* `Zone`, `zprint`, `zone_map`     small private memory, fast, from a limited pool
* `io_malloc`, `io_malloc_aligned`, `io_free` ...  memory by its size, as the model allocates it
* `send_descriptor`, `receive_descriptor`          over a Unix socket of your own
* `create_data_queue`, `Producer`, `Consumer`      a queue of entries in shared memory
* `dma.DirectFile`                 reads and writes descriptors past the page cache
* `dma.DMACommand`                 pins memory for a device, and tells where it physically lies
* `dma.CudaDevice`                 registers descriptors with a GPU, and copies from and to it
* `files.FileServer`, `files.load`  arrays of files, loaded once, served to any process
* `empty`, `zeros`, `asarray`, `Slab`, `descriptor_of`   NumPy arrays that live in descriptors
* `interop.multiprocessing`        such arrays as handles through Process, Queue, Pipe and Pool
* `interop.dask`                   such arrays as handles between the Dask workers of a host
* `interop.arrow`, `interop.torch`   tables of PyArrow, tensors of PyTorch, in descriptors
* `interop.shared_memory`          in the place of multiprocessing.shared_memory
* `recycler`                       what is kept of freed buffers for the next ones
* `debug`                          where what is open was made, and who holds its views
* `Access`, `Direction`, `PageKind`, `Contents`    words for arguments
* `MemdescError`                   the root of all errors; `MappingReason`, `WiringReason`

The house, from the top down; a room knows only those below it:

* `cli`, `testing`       the command line; the conformance suite, leak guard and fault injection
* `iokit`                the model's own spelling
* `interop`, `files`     our memory in what others made; arrays out of files, served
* `services`             services and connections: who may see which memory
* `dma`                  disks and GPUs on the same pages; physical segments
* `streams`              slots of shared memory, filled in place by one, seen in place by many
* `queues`               entries of any size from one task to another, through shared memory
* `alloc`                zones: small pieces of private memory, from a limited pool; io_malloc
* `handover`             descriptors over Unix sockets and multiprocessing (`portable`: their form)
* `loop`                 the one I/O thread of a process: sockets and deaths, while it computes
* `tables`               Arrow tables in memory, read in place
* `descriptors`          what describes memory: buffers, address ranges, parts, several as one
* `copyio`               copyin, copyout, copyinstr, copy_between
* `crossing`             how a block of so many bytes crosses; calibration
* `mapping`              what makes memory visible in a task
* `wiring`               what keeps it resident
* `memory`               memfds, their seals and their lifecycle
* `debug`                where what is open was made, and who holds it
* `vm`                   pages, tasks, regions, frames; what this kernel allows
* `errors`               the exceptions and their reasons
* `_core`                the compiled core
"""

import os as _os
import sys as _sys

if _sys.platform != "linux":
    raise ImportError(
        f"memdesc works on Linux only (this is {_sys.platform}): it is made of memfds, seals, "
        "pidfds and /proc, which other systems do not have"
    )

TYPE_CHECKING = False
if TYPE_CHECKING:
    from memdesc import (
        alloc as alloc,
        copyio as copyio,
        crossing as crossing,
        debug as debug,
        descriptors as descriptors,
        dma as dma,
        errors as errors,
        files as files,
        handover as handover,
        interop as interop,
        iokit as iokit,
        loop as loop,
        mapping as mapping,
        memory as memory,
        portable as portable,
        queues as queues,
        services as services,
        streams as streams,
        testing as testing,
        vm as vm,
        wiring as wiring,
    )
    from memdesc.alloc import (
        PageBlock as PageBlock,
        Zone as Zone,
        collect_zones as collect_zones,
        io_free as io_free,
        io_malloc as io_malloc,
        io_malloc_aligned as io_malloc_aligned,
        io_malloc_contiguous as io_malloc_contiguous,
        io_malloc_pageable as io_malloc_pageable,
        zprint as zprint,
    )
    from memdesc.copyio import (
        copy_between as copy_between,
        copyin as copyin,
        copyinstr as copyinstr,
        copyout as copyout,
    )
    from memdesc.descriptors.base import MemoryDescriptor as MemoryDescriptor
    from memdesc.descriptors.buffer import BufferMemoryDescriptor as BufferMemoryDescriptor
    from memdesc.descriptors.copy_on_write import SnapshotReason as SnapshotReason
    from memdesc.descriptors.multi import MultiMemoryDescriptor as MultiMemoryDescriptor
    from memdesc.descriptors.received import ReceivedMemoryDescriptor as ReceivedMemoryDescriptor
    from memdesc.descriptors.snapshot import SnapshotMemoryDescriptor as SnapshotMemoryDescriptor
    from memdesc.descriptors.sub import SubMemoryDescriptor as SubMemoryDescriptor
    from memdesc.errors import (
        AccessDeniedError as AccessDeniedError,
        AllocationError as AllocationError,
        BlockExistsError as BlockExistsError,
        BlockNotFoundError as BlockNotFoundError,
        ClosedError as ClosedError,
        CopyError as CopyError,
        DeviceError as DeviceError,
        DoubleFreeError as DoubleFreeError,
        Holding as Holding,
        InvalidArgument as InvalidArgument,
        LimitError as LimitError,
        MappingError as MappingError,
        MappingReason as MappingReason,
        MemdescError as MemdescError,
        MethodNotFoundError as MethodNotFoundError,
        NameInUseError as NameInUseError,
        NotPreparedError as NotPreparedError,
        NotPrivilegedError as NotPrivilegedError,
        PageKindError as PageKindError,
        PeerGoneError as PeerGoneError,
        ProtocolError as ProtocolError,
        RangeError as RangeError,
        RemoteError as RemoteError,
        SealedError as SealedError,
        SegmentError as SegmentError,
        SegmentReason as SegmentReason,
        ServiceNotFoundError as ServiceNotFoundError,
        ShareNotFoundError as ShareNotFoundError,
        StringTooLongError as StringTooLongError,
        TaskGoneError as TaskGoneError,
        TimedOutError as TimedOutError,
        TransferError as TransferError,
        UnsupportedError as UnsupportedError,
        UseAfterFreeError as UseAfterFreeError,
        WiringError as WiringError,
        WiringReason as WiringReason,
        ZoneExhausted as ZoneExhausted,
    )
    from memdesc.handover import (
        receive_descriptor as receive_descriptor,
        send_descriptor as send_descriptor,
    )
    from memdesc.interop.arrays import (
        Slab as Slab,
        asarray as asarray,
        descriptor_of as descriptor_of,
        empty as empty,
        empty_like as empty_like,
        zeros as zeros,
        zeros_like as zeros_like,
    )
    from memdesc.mapping import MemoryMap as MemoryMap
    from memdesc.memory import recycler as recycler, zone_map as zone_map
    from memdesc.memory.kept import Contents as Contents
    from memdesc.memory.page_kinds import PageKind as PageKind
    from memdesc.queues import (
        Consumer as Consumer,
        Producer as Producer,
        create_data_queue as create_data_queue,
    )
    from memdesc.services.calls.pending import PendingCall as PendingCall
    from memdesc.services.connecting import connect_async as connect_async
    from memdesc.services.connection import Connection as Connection, connect as connect
    from memdesc.services.limits import Limits as Limits
    from memdesc.services.listening import Event as Event, Events as Events
    from memdesc.services.queues import (
        ClientConsumers as ClientConsumers,
        ClientProducers as ClientProducers,
    )
    from memdesc.services.reconnect import ReconnectingConnection as ReconnectingConnection
    from memdesc.services.service import Service as Service
    from memdesc.services.user_client import UserClient as UserClient
    from memdesc.streams import (
        Backpressure as Backpressure,
        Stream as Stream,
        Subscription as Subscription,
    )
    from memdesc.vm.pages import (
        Access as Access,
        Direction as Direction,
        page_size as page_size,
        round_page as round_page,
        trunc_page as trunc_page,
    )
    from memdesc.vm.task import Task as Task

__version__ = "0.4.0"

# All of it comes when it is first asked for: a program that imports memdesc on its way pays for
# what it uses. (Services bring msgspec, and arrays NumPy, which importing memdesc must not.)
_EXPORTS = {
    "memdesc.copyio": "copy_between copyin copyinstr copyout",
    "memdesc.descriptors.base": "MemoryDescriptor",
    "memdesc.descriptors.buffer": "BufferMemoryDescriptor",
    "memdesc.descriptors.copy_on_write": "SnapshotReason",
    "memdesc.descriptors.multi": "MultiMemoryDescriptor",
    "memdesc.descriptors.received": "ReceivedMemoryDescriptor",
    "memdesc.descriptors.snapshot": "SnapshotMemoryDescriptor",
    "memdesc.descriptors.sub": "SubMemoryDescriptor",
    "memdesc.errors": (
        "AccessDeniedError AllocationError BlockExistsError BlockNotFoundError ClosedError "
        "CopyError DeviceError DoubleFreeError Holding InvalidArgument LimitError MappingError "
        "MappingReason MemdescError MethodNotFoundError NameInUseError NotPreparedError "
        "NotPrivilegedError PageKindError PeerGoneError ProtocolError RangeError RemoteError "
        "SealedError SegmentError SegmentReason ServiceNotFoundError ShareNotFoundError "
        "StringTooLongError TaskGoneError TimedOutError TransferError UnsupportedError "
        "UseAfterFreeError WiringError WiringReason ZoneExhausted"
    ),
    "memdesc.handover": "receive_descriptor send_descriptor",
    "memdesc.mapping": "MemoryMap",
    "memdesc.memory.kept": "Contents",
    "memdesc.memory.page_kinds": "PageKind",
    "memdesc.vm.pages": "Access Direction page_size round_page trunc_page",
    "memdesc.vm.task": "Task",
    "memdesc.services.connection": "Connection connect",
    "memdesc.services.connecting": "connect_async",
    "memdesc.services.queues": "ClientConsumers ClientProducers",
    "memdesc.services.listening": "Event Events",
    "memdesc.services.limits": "Limits",
    "memdesc.services.calls.pending": "PendingCall",
    "memdesc.services.reconnect": "ReconnectingConnection",
    "memdesc.services.service": "Service",
    "memdesc.services.user_client": "UserClient",
    "memdesc.streams": "Backpressure Stream Subscription",
    "memdesc.queues": "Consumer Producer create_data_queue",
    "memdesc.alloc": (
        "PageBlock Zone collect_zones io_free io_malloc io_malloc_aligned io_malloc_contiguous "
        "io_malloc_pageable zprint"
    ),
    "memdesc.interop.arrays": "Slab asarray descriptor_of empty empty_like zeros zeros_like",
}
_LATER = {name: module for module, names in _EXPORTS.items() for name in names.split()}
_ROOMS = (
    "alloc copyio crossing debug descriptors dma errors files handover interop iokit loop mapping "
    "memory portable queues services streams testing vm wiring"
)
_MODULES = {room: f"memdesc.{room}" for room in _ROOMS.split()} | {
    "recycler": "memdesc.memory.recycler",
    "zone_map": "memdesc.memory.zone_map",
}


def _load(name: str) -> object:
    home = _MODULES.get(name) or _LATER.get(name)
    if home is None:
        raise AttributeError(f"module 'memdesc' has no attribute {name!r}")
    import importlib

    # With the first thing that is used: descriptors are arguments of multiprocessing's processes.
    importlib.import_module("memdesc.handover")
    module = importlib.import_module(home)
    value: object = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


if not TYPE_CHECKING:  # who goes by the imports above, and so finds a name that is mistyped
    __getattr__ = _load
    # Of the rooms, those that the map above gives for use; the others are had by their names.
    __all__ = list(_LATER)
    __all__ += ["debug", "dma", "files", "interop", "recycler", "zone_map"]


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, *_MODULES} - {"TYPE_CHECKING"})


if _os.environ.get("MEMDESC_DEBUG", "0") not in ("", "0"):
    from memdesc import debug as debug

    debug.start()
