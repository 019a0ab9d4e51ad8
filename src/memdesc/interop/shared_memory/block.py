"""SharedMemory: a block of memory that any process of this user finds by its name."""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
from functools import partial
from typing import Any

from memdesc import _core
from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.descriptors.received import ReceivedMemoryDescriptor
from memdesc.errors import (
    AllocationError,
    BlockExistsError,
    ClosedError,
    InvalidArgument,
    RangeError,
    SealedError,
    describe_errno,
)
from memdesc.handover import too_many_files
from memdesc.interop.shared_memory import keeping, names
from memdesc.interop.shared_memory.folder import check_name, memory_name, new_name, new_token
from memdesc.interop.shared_memory.holders import Holding
from memdesc.mapping import Extent, map_extents
from memdesc.memory.foreign import ForeignObject
from memdesc.memory.limits import check_available
from memdesc.vm.pages import Access, Direction, check_integer, round_page


def _nothing(_: object) -> None:
    """What is called when the last who could know an address is gone: the argument goes with it."""


class SharedMemory:
    """A block of shared memory with a name, as `multiprocessing.shared_memory.SharedMemory`.

    A sealed memfd: its bytes are there from the start, it has exactly the size asked for, and
    nobody can take a byte of it away. It lives as long as a process holds it: the one that made
    it, until the name is removed; the others, as long as they have it open. Killed processes hold
    nothing.

    Parameters
    ----------
    name : str, optional
        Up to 255 bytes; a slash before it makes no difference. By default a new one is chosen.
    create : bool
        Make a block of that name, else attach to it.
    size : int
        Bytes, at least 1; when attaching it is ignored.
    track : bool
        Without effect: there is no tracker, and nothing that it would be needed for.
    readonly : bool
        Attach without writing: stores raise. The kernel holds it for this mapping; as any process
        of the user may open the block for writing, it is no protection from programs. (For that
        share a `BufferMemoryDescriptor` by a `Service`.)
    lazy : bool
        Take pages at the first touch: for who asks for much more than he uses. Then a full
        machine is the out-of-memory killer, not an `AllocationError` here.
    reserve : int, optional
        Bytes that `grow` can reach; the size by default. They cost no memory.

    Raises
    ------
    InvalidArgument
        A size below 1; no name to attach to; a name with a slash inside or NUL (also a
        ValueError).
    BlockExistsError, BlockNotFoundError
        As FileExistsError (EEXIST) and FileNotFoundError (ENOENT) in the standard library.
    AllocationError
        The memory is not to be had (ENOMEM, ENOSPC; also a MemoryError). Nothing was made.
    NotPrivilegedError
        Its holders do not let this process look into them (EACCES).

    Notes
    -----
    Linux: memfd_create, fallocate; names as links in the services' folder, and
    /proc/PID/fd of a holder, which asks for the same user (PTRACE_MODE_READ; yama does not
    matter). Threads: safe. Fork: the child holds what the parent has open, and answers for its
    name. Pickle: by the name. See `docs/shared-memory.md`.

    Examples
    --------
    >>> from memdesc.interop.shared_memory import SharedMemory
    >>> ours = SharedMemory(create=True, size=10)
    >>> theirs = SharedMemory(ours.name)
    >>> theirs.buf[:5] = b"howdy"
    >>> bytes(ours.buf[:5]), ours.size
    (b'howdy', 10)
    >>> theirs.close()
    >>> ours.close()
    >>> ours.unlink()
    """

    _buf: memoryview | None = None

    def __init__(
        self,
        name: str | None = None,
        create: bool = False,
        size: int = 0,
        *,
        track: bool = True,
        readonly: bool = False,
        lazy: bool = False,
        reserve: int | None = None,
    ) -> None:
        size = check_integer(size, "size")
        if size < 0 or (create and size == 0):
            raise InvalidArgument(
                f"size is {size}: a block has at least one byte", errno=errno.EINVAL
            )
        if name is None and not create:
            raise InvalidArgument(
                "there is no name to attach to: give one, or say create=True", errno=errno.EINVAL
            )
        if create and readonly:
            raise InvalidArgument(
                "a block that is made read-only could never be filled", errno=errno.EINVAL
            )
        keeping.look_after()
        self._access = Access.READ_ONLY if readonly else Access.READ_WRITE
        if create:
            given, self._holding, window = _create(name, size, lazy=lazy, reserve=reserve)
            self._holding.made_here = True
        else:
            assert name is not None
            given = name
            self._holding, window = _attach(name, self._access)
        self._name = f"/{given}"
        try:
            self._show(window)
        except BaseException:
            if create:
                names.remove(self._holding)
            self._holding.let_go()
            raise

    def _show(self, window: _core.Window) -> None:
        # Before what is shown so far goes: with the last range of it the block would be let go.
        keeping.keep(self._holding, window, self._describe(window.nbytes))
        self._window: _core.Window | None = window
        self._size = window.nbytes
        self._buf = memoryview(window)

    @property
    def buf(self) -> memoryview:
        """The bytes, `size` of them. Views of it keep the memory alive, whatever becomes of this.

        Raises
        ------
        ClosedError
            After `close`. (None in the standard library: NumPy takes that for no buffer, and
            makes an array of its own.)
        """
        if self._buf is None:
            raise self._closed()
        return self._buf

    @property
    def name(self) -> str:
        """What to attach by."""
        return self._name[1:]

    @property
    def size(self) -> int:
        """Bytes: exactly as many as were asked for."""
        return self._size

    @property
    def readonly(self) -> bool:
        """Whether it was attached without writing."""
        return not self._access.writable

    @property
    def reserve(self) -> int:
        """What `grow` can reach, in bytes: whole pages."""
        return os.fstat(self.fileno()).st_size

    def fileno(self) -> int:
        """Give the memfd's descriptor, which stays ours: duplicate it to keep or to send it.

        Raises
        ------
        ClosedError
        """
        if self._buf is None:
            raise self._closed()
        return self._holding.fd

    def as_descriptor(self) -> ReceivedMemoryDescriptor:
        """Describe the memory: to map, wire, hand over, read from disk, as any other.

        Returns
        -------
        ReceivedMemoryDescriptor
            Owned by the caller; it holds the memory, but does not answer for the name.
        """
        self.fileno()  # while it is open only, though the block may be held for longer
        return self._describe(self._size)

    def _describe(self, size: int) -> ReceivedMemoryDescriptor:
        extent = Extent(self._object(), 0, size)
        return ReceivedMemoryDescriptor([extent], direction=Direction.OUT_IN, name=self.name)

    def _object(self) -> ForeignObject:
        fd = self._holding.fd
        if fd < 0:
            raise self._closed()
        return _object_of(fd, self._access)

    def _closed(self) -> ClosedError:
        return ClosedError(f"shared memory {self.name!r} was closed here: attach to it again")

    def grow(self, size: int, *, lazy: bool = False) -> None:
        """Have more bytes, in place: what was taken of `buf` before stays valid and shared.

        Each holder has its own `size` and calls this for itself: the first takes the memory, for
        the others it is there already. Who attaches later gets the new size.

        Parameters
        ----------
        size : int
            Bytes, from the present size up to `reserve`.
        lazy : bool
            As for a new block.

        Raises
        ------
        RangeError
            Past the reserve, or less than there is (EINVAL).
        SealedError
            It is attached read-only, and nobody has grown it so far yet (EACCES).
        AllocationError
            The size is what it was.
        ClosedError
        """
        size = check_integer(size, "size")
        if not self._size <= size <= self.reserve:
            raise RangeError(
                f"shared memory {self.name!r} of {self._size:,} bytes can grow up to its reserve "
                f"of {self.reserve:,}, not to {size:,}: make it with reserve={size}",
                errno=errno.EINVAL,
            )
        if size == self._size:
            return
        held = self._holding
        if self._access.writable:
            if not lazy:
                _take_pages(held.fd, self._size, size, self.name)
            names.set_size(held, size)
        elif names.size_of(held) < size:
            raise SealedError(
                f"shared memory {self.name!r} is attached read-only here: have one who writes it "
                f"grow it to {size:,} bytes first",
                errno=errno.EACCES,
            )
        object_ = self._object()
        try:
            self._show(map_extents([Extent(object_, 0, size)], self._access))
        finally:
            object_.close()

    def close(self) -> None:
        """Show the memory here no longer. Again is a no-op; it never raises.

        `buf` itself is released. Arrays and other views of it stay valid, and keep the memory.
        """
        buf, self._buf = self._buf, None
        window, self._window = self._window, None
        if buf is not None:
            # Some (torch.frombuffer) take the address and keep only the object `buf`, which they
            # could not use after its release: so the memory goes with that object, not before.
            weakref.finalize(buf, _nothing, window).atexit = False
            with contextlib.suppress(BufferError):  # views of it go on
                buf.release()
        del buf, window
        keeping.look_after()

    def unlink(self) -> None:
        """Remove the name. Once for a block, by any of its holders, before or after `close`.

        Who has the memory open keeps it; it goes with the last of them.

        Raises
        ------
        BlockNotFoundError
            It was removed before, also where another block has that name by now (ENOENT).
        """
        names.remove(self._holding)
        keeping.name_gone(self._holding)
        keeping.look_after()

    def __reduce__(self) -> Any:
        kind = partial(type(self), readonly=True) if self.readonly else type(self)
        return kind, (self.name, False, self.size)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, size={self.size})"


def _create(
    name: str | None, size: int, *, lazy: bool, reserve: int | None
) -> tuple[str, Holding, _core.Window]:
    """Make a block and give it its name, whole or not at all."""
    while True:
        given = new_name() if name is None else name
        bare = check_name(given)
        names.check_free(bare)
        token = new_token()
        with BufferMemoryDescriptor(
            size,
            max_access=Access.READ_WRITE,
            lazy=lazy,
            recycle=False,
            reserve=None if reserve is None else round_page(check_integer(reserve, "reserve")),
            name=memory_name(bare, token),
        ) as buffer:
            window = memoryview(buffer).obj
            assert isinstance(window, _core.Window)
            fd = buffer.memory.grant(Access.READ_WRITE, user=os.geteuid())
        try:
            return given, names.claim(bare, token, size, fd), window
        except BlockExistsError:
            if name is not None:
                raise


def _attach(name: str, access: Access) -> tuple[Holding, _core.Window]:
    holding, size = names.find(check_name(name), writable=access.writable)
    try:
        object_ = _object_of(holding.fd, access)
        try:
            if size > object_.size:
                raise RangeError(
                    f"shared memory {name!r} is said to be of {size:,} bytes and has "
                    f"{object_.size:,}",
                    errno=errno.EINVAL,
                )
            return holding, map_extents([Extent(object_, 0, size)], access)
        finally:
            object_.close()
    except BaseException:
        holding.let_go()
        raise


def _object_of(fd: int, access: Access) -> ForeignObject:
    """Make an object of a duplicate of a descriptor, its seals checked."""
    try:
        own = os.dup(fd)
    except OSError as error:
        raise too_many_files(error) from error
    return ForeignObject(own, access)


def _take_pages(fd: int, old: int, new: int, name: str) -> None:
    start, end = round_page(old), round_page(new)
    if start == end:
        return
    doing = f"growing shared memory {name!r} by {end - start:,} bytes"
    check_available(end - start, doing)
    try:
        _core.fallocate(fd, 0, start, end - start)
    except OSError as error:
        raise AllocationError(
            f"{doing}: {describe_errno(error)}", errno=error.errno, requested=end - start
        ) from error
