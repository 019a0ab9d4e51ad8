"""A queue of entries of any size in shared memory, from one producer to one consumer.

I/O Kit: IODataQueue, IOSharedDataQueue. What lies where: `memdesc.queues.layout`.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import TYPE_CHECKING, NoReturn, final

from memdesc import _core
from memdesc.descriptors.base import MemoryDescriptor
from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.errors import InvalidArgument, PeerGoneError, RangeError
from memdesc.queues.layout import ENTRY_HEADER, MAX_CAPACITY, entry_extent, memory_for
from memdesc.queues.waiting import End
from memdesc.vm.awaiting import until
from memdesc.vm.pages import Access, check_length
from memdesc.vm.task import Task
from memdesc.vm.timeouts import SPIN, deadline_of

if TYPE_CHECKING:
    import socket as sockets

    from typing_extensions import Buffer  # collections.abc has it from 3.12 on


def create_data_queue(
    capacity: int, *, wired: bool = False, name: str = "queue"
) -> BufferMemoryDescriptor:
    """Make the memory of a queue, empty. Either side may make it and hand it to the other.

    Parameters
    ----------
    capacity : int
        Bytes of the data area, rounded up to pages. An entry takes 8 bytes more than it has, and
        a multiple of 8; one of `capacity - 8` bytes always goes into an empty queue.
    wired : bool
        Keep it resident.
    name : str
        Shows in every task's maps file.

    Returns
    -------
    BufferMemoryDescriptor
        With `max_access=READ_WRITE`, since both sides write. Make a `Producer` or a `Consumer` of
        it; in another process, of what arrived there.

    Raises
    ------
    InvalidArgument, AllocationError, WiringError

    Examples
    --------
    >>> from memdesc import Consumer, Producer, create_data_queue
    >>> memory = create_data_queue(1 << 16)
    >>> producer, consumer = Producer(memory), Consumer(memory)
    >>> producer.enqueue(b"hello")
    >>> consumer.dequeue()
    b'hello'
    """
    if check_length(capacity, "capacity") > MAX_CAPACITY:
        raise InvalidArgument(
            f"capacity is {capacity:,}: a queue has at most {MAX_CAPACITY:,} bytes",
            errno=errno.EINVAL,
        )
    memory = BufferMemoryDescriptor(
        memory_for(capacity),
        max_access=Access.READ_WRITE,
        wired=wired,
        recycle=False,
        name=name,
    )
    magic = _core.RING_MAGIC.to_bytes(8, sys.byteorder)
    memory.write_bytes(_core.RING_OFFSETS["magic"], magic)
    return memory


@final
class Producer(_core.RingProducer, End):
    """The end of a queue that puts entries in. There may be one at a time.

    Parameters
    ----------
    descriptor : MemoryDescriptor
        What `create_data_queue` made, here or in another process. Kept alive. Entries that an
        earlier producer left are kept: this one goes on where it stopped, even killed.
    peer : Task, optional
        The consumer's: a wait then notices within 0.25 s that it has ended. Without it only the
        time given ends a wait for a consumer that was killed.
    notify : socket, optional
        The producer's of `notification_pair`; duplicated. By it event loops wait, at both ends.
    spin : float
        Seconds to spin before sleeping, where a call waits; 0 for never. Others may run every
        microsecond; the next waits do not spin where another program then kept the CPU for long.

    Attributes
    ----------
    name : str
    capacity : int
        Bytes of the data area.
    largest : int
        Bytes of the largest entry.

    Raises
    ------
    InvalidArgument
        The descriptor is not of a queue's size (EINVAL).
    ProtocolError
        Its memory is not a queue's (EPROTO).
    MappingError
        It can not be mapped for writing, or its size is not sealed.

    Notes
    -----
    Nothing that the other side writes to the memory makes this side read or write outside of it.
    Threads: safe. Fork: the child's copy is closed. Linux: futex, no privilege.
    """

    _OTHER = "consumer"

    def __init__(
        self,
        descriptor: MemoryDescriptor,
        *,
        peer: Task | None = None,
        notify: sockets.socket | None = None,
        spin: float = SPIN,
    ) -> None:
        self._open(descriptor, peer, notify, spin, produces=True)
        self.largest = self.capacity - ENTRY_HEADER

    @property
    def free(self) -> int:
        """Bytes of the largest entry that goes in now; -1 where not even an empty one does."""
        position, taken, _ = self._look()
        return max(self.capacity - (position - taken) - ENTRY_HEADER, -1)

    def enqueue_nowait(self, data: Buffer) -> None:
        """Put one entry in, or raise `TimedOutError` (EAGAIN) where there is no room now."""
        self.enqueue(data, 0)

    def enqueue_many(self, entries: Iterable[Buffer], timeout: float | None = None) -> int:
        """Put entries in, in order, with one look at the other side an eighth of the capacity.

        Returns
        -------
        int
            How many went in: all of them, unless the time ran out.

        Raises
        ------
        RangeError, PeerGoneError, ProtocolError, ClosedError
            As `enqueue`. Those before the one that failed are in.
        """
        deadline = deadline_of(timeout)
        pending = list(entries)
        done = self._put_many(pending, 0)
        while done < len(pending):
            if not self._wait(memoryview(pending[done]).nbytes, deadline):
                break
            done += self._put_many(pending, done)
        return done

    def wait(self, nbytes: int = 0, timeout: float | None = None) -> bool:
        """Wait until an entry of so many bytes fits; False where the time ran out.

        Raises
        ------
        RangeError, PeerGoneError, ProtocolError, ClosedError
        """
        if not 0 <= nbytes <= self.largest:
            self._too_large(nbytes)
        deadline = deadline_of(timeout)
        while not self._has_room(nbytes):
            if not self._wait(nbytes, deadline):
                return False
        return True

    async def wait_async(self, nbytes: int = 0, timeout: float | None = None) -> bool:
        """As `wait`, for asyncio. The producer must have been made with `notify`."""
        if not 0 <= nbytes <= self.largest:
            self._too_large(nbytes)
        return await self._wait_async(
            lambda: self._has_room(nbytes), lambda: self._wanted(nbytes), timeout
        )

    def _has_room(self, nbytes: int) -> bool:
        if self._look()[2]:
            self._ended()
        return self.free >= nbytes

    async def enqueue_async(self, data: Buffer, timeout: float | None = None) -> None:
        """As `enqueue`, for asyncio. Cancelled, it has put nothing in.

        Raises
        ------
        InvalidArgument
            There is no room now, and the producer was made without `notify` (EINVAL).
        TimedOutError, RangeError, PeerGoneError, ProtocolError, ClosedError
            As `enqueue`.
        """
        nbytes = memoryview(data).nbytes
        await until(
            lambda: self.try_enqueue(data) or None,
            self._awaited,
            timeout,
            lambda: self._timed_out(timeout, f"no room for {nbytes:,} bytes"),
        )

    def fileno(self) -> int:
        """Give the socket that an event loop waits on; for `select` and `loop.add_reader`.

        It becomes readable when there is room for the entry that last found none, and stays so
        until a call finds no room again. So try (`try_enqueue`) once more before the first wait. It
        is readable too when the consumer closes its end or is killed.

        Raises
        ------
        InvalidArgument
            The producer was made without `notify`.
        ClosedError
        """
        return self._socket_fileno()

    def _wait(self, nbytes: int, deadline: float | None) -> bool:
        """Wait until the consumer is so far that there is room, or has ended."""
        wanted = self._wanted(nbytes)
        return wanted <= 0 or self._wait_until(wanted, deadline)

    def _wanted(self, nbytes: int) -> int:
        return self._look()[0] + entry_extent(nbytes) - self.capacity

    def _enqueue(self, data: Buffer, timeout: float | None, deadline: float | None) -> None:
        """Go on where `enqueue` has spun in vain."""
        nbytes = memoryview(data).nbytes
        while self._sleep_until(max(self._wanted(nbytes), 0), deadline):
            if self.try_enqueue(data):
                return
        raise self._timed_out(timeout, f"no room for {nbytes:,} bytes")

    def _too_large(self, nbytes: int) -> NoReturn:
        raise RangeError(
            f"an entry of {nbytes:,} bytes does not go into queue {self.name!r}, whose largest "
            f"has {self.largest:,}: make a larger queue, or send a descriptor",
            errno=errno.EMSGSIZE,
        )


@final
class Consumer(_core.RingConsumer, End):
    """The end of a queue that takes entries out. There may be one at a time.

    Parameters
    ----------
    descriptor : MemoryDescriptor
        What `create_data_queue` made, here or in another process. Kept alive.
    peer : Task, optional
        The producer's: a wait then notices within 0.25 s that it has ended.
    listen : socket, optional
        The consumer's of `notification_pair`; duplicated. See `fileno`.
    spin : float
        Seconds to spin before sleeping, where a call waits; 0 for never. Others may run every
        microsecond; the next waits do not spin where another program then kept the CPU for long.

    Attributes
    ----------
    name : str
    capacity : int
        Bytes of the data area.

    Raises
    ------
    InvalidArgument, ProtocolError, MappingError
        As `Producer`.

    Notes
    -----
    As a `Producer`. Iterating gives entry after entry, until the producer closes its end.
    """

    _OTHER = "producer"

    def __init__(
        self,
        descriptor: MemoryDescriptor,
        *,
        peer: Task | None = None,
        listen: sockets.socket | None = None,
        spin: float = SPIN,
    ) -> None:
        self._open(descriptor, peer, listen, spin, produces=False)
        if self._socket is not None:
            self.fileno()

    @property
    def used(self) -> int:
        """Bytes of the data area that entries take now."""
        position, put, _ = self._look()
        return put - position

    def dequeue_nowait(self) -> bytes:
        """Take the next entry out, or raise `TimedOutError` (EAGAIN) where there is none."""
        return self.dequeue(0)

    def dequeue_into(self, buffer: Buffer, timeout: float | None = None) -> int:
        """Take the next entry out into a writable buffer: how many bytes it has.

        Raises
        ------
        RangeError
            The buffer is too small (ENOBUFS); the entry stays.
        TimedOutError, PeerGoneError, ProtocolError, ClosedError, BufferError
            As `dequeue`.
        """
        deadline = deadline_of(timeout)
        while (nbytes := self._take_into(buffer)) is None:
            self._wait_or_raise(timeout, deadline)
        return nbytes

    def dequeue_many(self, most: int = 1 << 16, timeout: float | None = None) -> list[bytes]:
        """Take out all entries that are there, at most so many; wait only for the first.

        Their room goes back to the producer in one step.
        """
        if most < 1:
            raise InvalidArgument(f"most is {most}: give at least 1", errno=errno.EINVAL)
        deadline = deadline_of(timeout)
        while not (entries := self._take_many(most)):
            self._wait_or_raise(timeout, deadline)
        return entries

    def peek(self, timeout: float | None = None) -> memoryview:
        """Show the next entry in place, read-only, without a copy.

        Valid until `release`, or until the entry is taken out: both refuse with `BufferError` while
        slices or arrays of it are alive, and release the view itself. A producer that does not keep
        to the rules can change what it shows: check a copy of what must not change.
        """
        deadline = deadline_of(timeout)
        while (view := self._view()) is None:
            self._wait_or_raise(timeout, deadline)
        return view

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until there is an entry; False where the time ran out.

        Raises
        ------
        PeerGoneError, ProtocolError, ClosedError
        """
        deadline = deadline_of(timeout)
        while not self._has_entry():
            if not self._wait(deadline):
                return False
        return True

    def _has_entry(self) -> bool:
        if not self.used and self._look()[2] and not self.used:
            self._ended()
        return self.used > 0

    def fileno(self) -> int:
        """Give the socket that an event loop waits on; for `select` and `loop.add_reader`.

        It becomes readable when the queue stops being empty, and stays so until a call finds the
        queue empty. So look (`try_dequeue`) once before the first wait. It is readable too when the
        producer closes its end or is killed.

        Raises
        ------
        InvalidArgument
            The consumer was made without `listen`.
        ClosedError
        """
        return self._socket_fileno()

    async def dequeue_async(self, timeout: float | None = None) -> bytes:
        """As `dequeue`, for asyncio. Cancelled, it has taken nothing out.

        Raises
        ------
        InvalidArgument
            There is no entry now, and the consumer was made without `listen` (EINVAL).
        TimedOutError, PeerGoneError, ProtocolError, ClosedError, BufferError
            As `dequeue`.
        """
        return await until(
            self.try_dequeue, self._awaited, timeout, lambda: self._timed_out(timeout, "no entry")
        )

    async def wait_async(self, timeout: float | None = None) -> bool:
        """As `wait`, for asyncio. The consumer must have been made with `listen`.

        The calls that have no twin (`dequeue_many`, `dequeue_into`, `peek`) follow it, with
        ``timeout=0``.
        """
        return await self._wait_async(self._has_entry, lambda: self._look()[0] + 1, timeout)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            try:
                entry = await self.dequeue_async()
            except PeerGoneError as error:
                if error.errno == errno.EPIPE:
                    return
                raise
            yield entry

    def __iter__(self) -> Iterator[bytes]:
        while True:
            try:
                entry = self.dequeue()
            except PeerGoneError as error:
                if error.errno == errno.EPIPE:
                    return
                raise
            yield entry

    def _wait(self, deadline: float | None) -> bool:
        return self._wait_until(self._look()[0] + 1, deadline)

    def _wait_or_raise(self, timeout: float | None, deadline: float | None) -> None:
        if not self._wait(deadline):
            raise self._timed_out(timeout, "no entry")

    def _dequeue(self, timeout: float | None, deadline: float | None) -> bytes:
        """Go on where `dequeue` has spun in vain."""
        while self._sleep_until(self._look()[0] + 1, deadline):
            entry = self.try_dequeue()
            if entry is not None:
                return entry
        raise self._timed_out(timeout, "no entry")

    def _too_small(self, nbytes: int, room: int) -> NoReturn:
        raise RangeError(
            f"the next entry of queue {self.name!r} has {nbytes:,} bytes, the buffer {room:,}: "
            "give a larger one; the entry stays",
            errno=errno.ENOBUFS,
        )

    def _nothing_shown(self) -> NoReturn:
        raise InvalidArgument(
            f"peek() shows no entry of queue {self.name!r}: release() follows it",
            errno=errno.EINVAL,
        )
