"""The contract of the compiled core (one entry for each thing it exports).

Every call raises `OSError` with the kernel's errno and the call's name, checks nothing that
the kernel checks, and keeps no state. Addresses and lengths are bytes; a negative or too
large integer is `OverflowError`.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Any, Final, Self, final

from typing_extensions import Buffer

PROT_NONE: Final[int]
PROT_READ: Final[int]
PROT_WRITE: Final[int]
MAP_SHARED: Final[int]
MAP_PRIVATE: Final[int]
MAP_ANONYMOUS: Final[int]
MAP_FIXED_NOREPLACE: Final[int]
MADV_COLLAPSE: Final[int]
MADV_HUGEPAGE: Final[int]
MADV_NOHUGEPAGE: Final[int]
MADV_POPULATE_READ: Final[int]
MADV_POPULATE_WRITE: Final[int]
MADV_DONTDUMP: Final[int]
MADV_DONTFORK: Final[int]
F_SEAL_SEAL: Final[int]
F_SEAL_SHRINK: Final[int]
F_SEAL_GROW: Final[int]
F_SEAL_WRITE: Final[int]
F_SEAL_FUTURE_WRITE: Final[int]
F_SEAL_EXEC: Final[int]
MFD_NOEXEC_SEAL: Final[int]
OFFERS_MAGIC: Final[int]
OFFERS_OFFSETS: Final[dict[str, int]]
RING_MAGIC: Final[int]
RING_OFFSETS: Final[dict[str, int]]
URING_ASYNC: Final[int]
URING_COOP_TASKRUN: Final[int]
URING_FIXED_FILE: Final[int]

@final
class MappedMemory:
    """Owns a range of addresses of this task; munmap when it is let go. Never moves."""

    @property
    def address(self) -> int: ...
    @property
    def length(self) -> int: ...
    def leave_to(self, heir: Callable[[MappedMemory], object] | None) -> None:
        """Have `heir` called, in place of munmap, with a new owner of the range.

        By whatever thread lets go last, in the midst of anything: it must not wait for a lock. If
        it raises it is called once more, and that reported as unraisable; the range goes with
        the new owner, unless somebody took that.
        """

@final
class Attempt:
    """A context that takes a lock where that needs no waiting, and tells whether it did.

    No interrupt comes between taking it and being inside the ``with`` block.
    """

    def __new__(cls, lock: Any) -> Self: ...
    def __enter__(self) -> bool: ...
    def __exit__(self, *exc: object) -> None: ...

@final
class Window:
    """Exports `nbytes` at `offset` of a mapped range; counts its views in `exports`."""

    def __init__(self, memory: MappedMemory, offset: int, nbytes: int, writable: bool) -> None: ...
    @property
    def memory(self) -> MappedMemory: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def writable(self) -> bool: ...
    @property
    def exports(self) -> int: ...
    @property
    def address(self) -> int: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Exporter:
    """Base of the classes whose views are their window's."""

    def _export(self) -> Window | memoryview: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def map_memory(
    address: int, length: int, prot: int, flags: int, fd: int, offset: int
) -> MappedMemory: ...
def reserve_memory(length: int) -> MappedMemory:
    """Addresses without pages or rights (PROT_NONE, not reserved against the commit limit)."""

def place_memory(
    memory: MappedMemory, at: int, length: int, prot: int, flags: int, fd: int, offset: int
) -> None:
    """mmap(MAP_FIXED) inside a range that this process reserved, and nowhere else."""

def duplicate_memory(address: int, length: int) -> MappedMemory:
    """A second mapping of a shared range of this task (mremap, old size 0)."""

def mprotect(address: int, length: int, prot: int) -> None: ...
def madvise(address: int, length: int, advice: int) -> None: ...
def mlock(address: int, length: int) -> None: ...
def munlock(address: int, length: int) -> None: ...
def mincore(address: int, length: int) -> bytes:
    """One byte a page; bit 0 says that it is resident."""

def process_vm_readv(pid: int, buffer: Buffer, address: int) -> int:
    """Fill `buffer` from the task's memory; the count is short where a page could not be read."""

def process_vm_writev(pid: int, buffer: Buffer, address: int) -> int: ...
def pidfd_getfd(pidfd: int, fd: int) -> int: ...
def stat_cached(fd: int, path: bytes) -> tuple[int, int, int, int, int]:
    """What is known of a file without asking who serves it (statx, AT_STATX_DONT_SYNC).

    Device, inode, mode, bytes, blocks of 512 bytes. An empty path means the descriptor; -1 and a
    path the file that it leads to.
    """

def fallocate(fd: int, mode: int, offset: int, length: int) -> None: ...
def name_memory(address: int, length: int, name: bytes) -> None:
    """Name private anonymous memory in /proc/PID/maps (prctl PR_SET_VMA_ANON_NAME)."""

def copy_memory(target: Buffer, source: Buffer) -> None: ...
def zero_memory(memory: MappedMemory, at: int, length: int) -> None:
    """Fill a part of a mapped range with zeros: SIGSEGV where it is not writable."""

def copy_words(target: Buffer, source: Buffer) -> None:
    """Copy, reading each aligned word of 8 bytes at once; large blocks pass the caches by."""

def move_memory(source: MappedMemory, at: int, length: int, target: MappedMemory, to: int) -> None:
    """Put `length` bytes' mapping at `at` of one range in the place of what lies in another.

    One step for every other thread (mremap). What lies before it in `source` is unmapped, what
    lies behind it stays; on an error both stay as they are.
    """

def watch_stores(address: int, length: int) -> int:
    """A userfaultfd for `exchange_memory`."""

def exchange_memory(
    watch: int,
    source: MappedMemory,
    at: int,
    length: int,
    target: MappedMemory,
    to: int,
    nbytes: int,
) -> None:
    """Copy `nbytes` at `to` of `target` into `source`, then move that there.

    Stores by other threads wait meanwhile if `watch` is a userfaultfd (-1: none); without one those
    made during the copying may be lost. On an error, also that of the userfaultfd, the target is
    as it was. The caller closes `watch`.
    """

def buffer_address(buffer: Buffer) -> tuple[int, int, bool]: ...

@final
class ZoneElement:
    """An element of a zone: a writable buffer that counts its views.

    `number` tells which allocation of its zone it is, from 1; `exports` how many views it has.
    """

    @property
    def address(self) -> int: ...
    @property
    def number(self) -> int: ...
    @property
    def exports(self) -> int: ...
    @property
    def living(self) -> bool: ...
    @property
    def zone(self) -> ElementList | None: ...
    def array(
        self,
        shape: int | tuple[int, ...] | None = None,
        dtype: Any = None,
        *,
        order: str = "C",
        offset: int = 0,
    ) -> Any: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class ElementList:
    """Base of `Zone`: its fast half. What is slow or goes wrong is the subclass's `_alloc`,
    `_free` and `_changed`.
    """

    def alloc(self, timeout: float | None = 0) -> ZoneElement: ...
    def free(self, element: ZoneElement) -> None: ...
    def _begin(
        self,
        element_size: int,
        stride: int,
        most: int,
        chunks: list[Any],
        waiters: deque[Any],
        sites: dict[int, str] | None,
        make_array: Callable[..., Any],
    ) -> None:
        """Once, before anything else. `most` slots in all; `chunks` is filled by `_add_chunk`."""

    def _take(self) -> ZoneElement | None: ...
    def _add_chunk(self, base: int, slots: int, chunk: object) -> int:
        """Add zero memory, which lives as long as `chunk`; fewer slots where that is too many.

        Gives how many: none where the zone has all that it may have.
        """

    def _retire(self) -> list[int]:
        """Take all chunks without a used slot off the list; give the numbers of all retired."""

    def _first_retired(self) -> int | None:
        """The number of a retired chunk; None where there is none."""

    def _revive(self, number: int) -> bool:
        """Put a retired chunk, whose memory is zero again, back on the list; tell if it was one."""

    def _ask(self) -> None:
        """From here on every allocation goes to `_alloc`."""

    def _inherit(self) -> None:
        """In a fork child: from here on nothing changes any more."""

    def _find(self, address: int) -> tuple[int, int] | None:
        """The element whose stride an address lies in: its address, and its number.

        The number is 0 where the slot is free, -1 where it is quarantined.
        """

    def _living(self) -> list[int]:
        """The number of every living element, as the chunks lie."""

    def _span(self) -> tuple[int, int]:
        """The least and the greatest number of a living element; (0, 0) where there is none."""

    def _let_go(self, element: ZoneElement) -> None:
        """Free an element as soon as no view needs it."""

    def _counts(self) -> tuple[int, int, int, int, int, int]:
        """allocs, frees, drops, quarantined, living, most ever living."""

    def _slots(self) -> tuple[int, int, int, int]:
        """Free slots, slots of all chunks, chunks, those of them that are retired."""

class RingEnd:
    """One end of a ring in shared memory. What goes wrong is the subclass's: `_closed`, `_broke`
    and `_ended` raise. So is what a timeout means: `_deadline` makes a deadline of it. And the
    socket: `_clear` reads it empty, `_wake` has all who wait for it look again.
    """

    def _begin(
        self, window: Window, page: int, capacity: int, producer: bool, bell_fd: int
    ) -> bool:
        """Once, before anything else; False where the memory is no ring's, or says nonsense.

        The window: the producer's page, the consumer's page, and the data area twice in a row.
        `bell_fd`: a socket to which a byte goes with every waking of an end that listens; -1: none.
        """

    _spin: int  # nanoseconds that a call spins where it has to wait

    def _spin_until(self, wanted: int, deadline: float | None) -> bool:
        """Wait without sleeping; False after `_spin` ns, or at the deadline (monotonic seconds).

        True: the other is at `wanted` or has ended, or this end was closed: look. All but the first
        microsecond without the GIL, and not each time where somebody else wants the CPU. Signal
        handlers have run.
        """

    def _sleep(self, wanted: int, limit: int) -> bool:
        """Wait until the other is at `wanted` or has ended; False after `limit` ns or a signal.

        Asleep, without the GIL. Signal handlers have run.
        """

    def _want(self, wanted: int) -> None:
        """Ask to be told when the other crosses `wanted`; look again after this."""

    def _look(self) -> tuple[int, int, bool]:
        """My position, the other's, and whether it has ended: read now."""

    def _listen(self) -> None:
        """From here on ask for a waking, after `_clear`, whenever there is no entry, or no room."""

    def _set_gone(self) -> None:
        """Have the other end be known as ended."""

    def _close(self) -> None:
        """Say that this end is done; its own waiters find it closed."""

    def _inherit(self) -> None:
        """In a fork child: from here on it is the parent's, and nothing changes any more."""

    def _state(self) -> int:
        """0: never begun, 1: open, 2: closed, 3: inherited by a fork child."""

    def _counts(self) -> tuple[int, int, int, int, int]:
        """entries, bytes, wakings of the other end, waits, sleeps."""

class RingProducer(RingEnd):
    """Base of `Producer`: its fast half. `_enqueue` and `_too_large` are the subclass's."""

    def try_enqueue(self, data: Buffer) -> bool: ...
    def enqueue(self, data: Buffer, timeout: float | None = None) -> None: ...
    def _put_many(self, entries: list[Any], start: int) -> int:
        """Put entries from the number `start` on, as many as fit, published in a few steps."""

class RingConsumer(RingEnd):
    """Base of `Consumer`: its fast half. `_dequeue`, `_too_small` and `_nothing_shown`
    are the subclass's.
    """

    def try_dequeue(self) -> bytes | None: ...
    def dequeue(self, timeout: float | None = None) -> bytes: ...
    def release(self) -> None: ...
    def _take_into(self, buffer: Buffer) -> int | None:
        """Copy the next entry out: its size; None where the queue is empty."""

    def _take_many(self, most: int) -> list[bytes]:
        """Up to `most` entries that are there now, given back to the producer in one step."""

    def _view(self) -> memoryview | None:
        """The next entry in place, read-only; None where the queue is empty."""

    def _forget(self) -> None:
        """End the view that `_view` gave; its entry stays."""

@final
class Uring:
    """One io_uring; made by `open_uring`. What an entry names must stay until it is reaped.

    Let go, it cancels what is in flight and waits for it. In a fork child it does nothing but
    let go: what is in flight is the parent's.
    """

    @property
    def entries(self) -> int:
        """How many can be prepared before they are submitted."""

    @property
    def in_flight(self) -> int:
        """Entries prepared whose completions were not reaped."""

    @property
    def pending(self) -> int:
        """Entries prepared and not submitted."""

    @property
    def closed(self) -> bool: ...
    def prepare(
        self,
        write: bool,
        file: int,
        flags: int,
        address: int,
        length: int,
        offset: int,
        tag: int,
        buffer: int,
    ) -> bool:
        """Prepare a transfer between memory and a file; False where there is no room.

        `file` is a descriptor, or with URING_FIXED_FILE an index of the registered ones; `buffer`
        an index of the registered buffers, or negative.
        """

    def prepare_cancel(self, cancelled: int, tag: int) -> bool:
        """Prepare to cancel the entry with a tag; False where there is no room."""

    def reap(self) -> list[tuple[int, int]]:
        """Take what has completed: (tag, result or -errno)."""

    def close(self) -> None:
        """Let go of it; `ValueError` while anything is in flight."""

def open_uring(entries: int, completions: int, flags: int) -> Uring:
    """io_uring_setup, and the mappings. Sizes are rounded up to powers of two."""

def uring_enter(uring: Uring, wait: int, timeout: int) -> int:
    """io_uring_enter: submit, and wait for `wait` completions for `timeout` ns (negative: ever).

    Gives how many entries were submitted. A signal ends the waiting, its handler run: 0.
    """

def uring_register_files(uring: Uring, fds: Collection[int]) -> None:
    """Register up to 64 files, once."""

def uring_register_buffers(uring: Uring, count: int) -> None:
    """Register a table of so many places for buffers, all empty, once."""

def uring_update_buffer(uring: Uring, slot: int, address: int, length: int) -> None:
    """Have a place of the table mean these bytes, which pins their pages; of length 0: none."""

def uring_register_eventfd(uring: Uring, fd: int) -> None:
    """Have completions counted in an eventfd; a negative one: no longer."""

def dio_alignment(fd: int) -> tuple[int, int] | None:
    """Of memory and of offsets for O_DIRECT (STATX_DIOALIGN); None where the kernel says nothing.

    (0, 0): the file takes no O_DIRECT.
    """

def pread(fd: int, address: int, length: int, offset: int) -> int:
    """Read into memory that the caller holds; the bytes read."""

def pwrite(fd: int, address: int, length: int, offset: int) -> int:
    """Write from memory that the caller holds; the bytes written."""

def note_slots(
    noter: Callable[[LoanedSlot | SlotMemory, StreamPool | StreamSubscriber], object] | None,
) -> None:
    """Have it called with each slot that is loaned or taken; None: nobody."""

def note_fork() -> None:
    """In a fork child: the ends of streams that it inherited are the parent's from here on."""

@final
class StreamLine:
    """What the publisher knows of one subscriber: its books, and the memory shared with it."""

    @property
    def subscriber(self) -> Any: ...
    def state(self) -> tuple[int, int]:
        """1: open, 2: leaves and holds slots still, 3: gone; and the reason told, or 0."""

    def counts(self) -> tuple[int, int, int, int, int]:
        """offers, dropped, wakings, pending, held, as last looked at."""

    def sleep(self, wanted: int, spin: int, limit: int) -> bool:
        """Wait until so many offers were taken out, or the line ends; False: time, or a signal.

        Spins for up to `spin` ns before sleeping, without the GIL. Signal handlers have run.
        """

class StreamPool:
    """Base of `Stream`: its fast half. `_loan`, `_tidy`, `_closed`, `_too_many_loans`,
    `_not_loaned` and `_check_nbytes` are the subclass's.
    """

    def loan(self, timeout: float | None = None) -> LoanedSlot: ...
    def _begin(
        self,
        window: Window,
        header_size: int,
        slots: int,
        stride: int,
        slot_size: int,
        loans: int,
        make_array: Callable[[Any], Any],
        encode: Callable[[object], bytes],
    ) -> None:
        """Once, before anything else. The window: headers, page-rounded, then the slots."""

    def _take(self) -> LoanedSlot | None:
        """A slot to fill; None where a subscriber has no room for it yet."""

    def _blocked(self) -> tuple[StreamLine, int] | None:
        """Who has no room for a loan more, and how many offers must be taken out for it."""

    def _add(
        self,
        window: Window,
        depth: int,
        loans: int,
        policy: int,
        bell_fd: int,
        latest: bool,
        subscriber: object,
    ) -> StreamLine:
        """Have a subscriber more, on memory that is zero. `policy`: 0 to 3, as in offers.h."""

    def _refresh(self) -> bool:
        """Look what the subscribers took, gave back and said; tell whether a line ended."""

    def _end(self, line: StreamLine, reason: int, keep: bool) -> None:
        """Be done with a subscriber; with `keep` it has what it holds until it gives that back."""

    def _gone(self) -> list[StreamLine]:
        """Take those out that are gone."""

    def _close(self) -> None:
        """Tell all subscribers that the stream has ended."""

    def _state(self) -> int:
        """0: never begun, 1: open, 2: closed, 3: inherited by a fork child."""

    def _lines(self) -> list[StreamLine]: ...
    def _reserved(self, policy: int, depth: int, loans: int) -> int:
        """Slots that must be left for the subscribers, with one more of that kind."""

    def _counts(self) -> tuple[int, int, int, int, int, int]:
        """published, discarded, dropped, bytes, free slots, loaned ones."""

@final
class LoanedSlot:
    """A slot of a stream, to be filled in place."""

    @property
    def nbytes(self) -> int: ...
    @nbytes.setter
    def nbytes(self, value: int) -> None: ...
    @property
    def metadata(self) -> object: ...
    @metadata.setter
    def metadata(self, value: object) -> None: ...
    @property
    def array(self) -> Any: ...
    @property
    def address(self) -> int: ...
    @property
    def buffer(self) -> memoryview: ...
    @property
    def held(self) -> bool: ...
    def publish(self) -> None: ...
    def discard(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...

@final
class SlotMemory:
    """The bytes of one slot, as a subscriber sees them: what every view of them holds."""

    @property
    def exports(self) -> int: ...
    @property
    def held(self) -> bool: ...
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class TakenSlot:
    """A slot that a subscriber has: a read-only buffer."""

    @property
    def sequence(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def array(self) -> Any: ...
    @property
    def metadata(self) -> Any: ...
    @property
    def held(self) -> bool: ...
    def keep(self) -> None: ...
    def release(self) -> None: ...
    def _next_turn(self) -> None:
        """As leaving a block, unless it is kept."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class SlotIterator:
    """Slot after slot: each goes back at the next turn, the last one with this; but for those kept.
    Made by iterating over a Subscription.
    """

    def __iter__(self) -> Self: ...
    def __next__(self) -> TakenSlot: ...

class StreamSubscriber:
    """Base of `Subscription`: its fast half. `_take`, `_clear`, `_closed`, `_is_end`,
    `_ended`, `_broke` and `_too_many_loans` are the subclass's.
    """

    def __iter__(self) -> Iterator[TakenSlot]: ...
    def try_take(self) -> TakenSlot | None: ...
    def take(self, timeout: float | None = None) -> TakenSlot: ...
    def _begin(
        self,
        pool: Window,
        offers: Window,
        header_size: int,
        slots: int,
        stride: int,
        slot_size: int,
        depth: int,
        loans: int,
        make_array: Callable[[Any], Any],
        decode: Callable[[bytes], Any],
        given_back: Callable[[], Exception],
        lease: Callable[[], object] | None,
    ) -> bool:
        """Once, before anything else; False where the memory is no subscriber's.

        `lease` is called once, when this end is closed and holds nothing any more.
        """

    def _ready(self) -> bool:
        """Whether something is offered; raises where nothing will be any more."""

    def _sleep(self, spin: int, limit: int) -> bool:
        """Wait until something is offered, or the publisher ends; False after `limit` ns."""

    def _pending(self) -> int:
        """How many slots are offered now."""

    def _listen(self) -> None:
        """From here on ask for a waking, after `_clear`, whenever nothing is found."""

    def _set_gone(self) -> None:
        """Have the publisher be known as ended."""

    def _close(self) -> None:
        """Say that this end is done; slots that are held stay so."""

    def _state(self) -> int:
        """0: never begun, 1: open, 2: closed, 3: inherited by a fork child."""

    def _counts(self) -> tuple[int, int, int, int, int, int, int]:
        """taken, missed, bytes, slots held, wakings of the publisher, sleeps, last sequence."""
