"""Arrays and tables in descriptors travel through `multiprocessing` as handles, not as bytes.

After `install`, what is sent of such an array through a Process's arguments, a Queue, a Pipe, a
Pool or `concurrent.futures` is a few hundred bytes; the receiver maps the same pages. All other
arrays travel as before. So do PyArrow's tables (`tables`). Descriptors themselves travel so without
`install` (`memdesc.handover.reducers`), and what is told of what is on its way here is told of all.
"""

from __future__ import annotations

import copyreg
import errno
import pickle
import sys
import typing
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import current_process, reduction
from typing import TYPE_CHECKING, Any

from memdesc.descriptors.homes import Home, home_of, span_of
from memdesc.descriptors.sub import SubMemoryDescriptor
from memdesc.errors import (
    ClosedError,
    InvalidArgument,
    MappingError,
    MappingReason,
    SealedError,
)
from memdesc.handover import reducers, transit
from memdesc.handover.reducers import Handle, HandleLostError as HandleLostError
from memdesc.interop.arrays import Keeper, keeper_of, placed
from memdesc.tables.reading import when_imported
from memdesc.vm.pages import Access, check_length

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = [
    "HandleLostError",
    "Transit",
    "forget_in_transit",
    "in_transit",
    "install",
    "installed",
    "limit_in_transit",
    "uninstall",
    "writable",
]


@dataclass(frozen=True, slots=True)
class Transit:
    """What this process keeps for receivers that did not come yet.

    Attributes
    ----------
    handles : int
        Arrays and descriptors that were sent and not received.
    objects : int
        Files that they lie in; each takes one file descriptor.
    nbytes : int
        Memory of these, as much as they had when they were sent.
    """

    handles: int
    objects: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Settings:
    access: Access
    plain: str
    before: dict[type, Any]
    """What `multiprocessing` reduced each type with, None where with nothing of its own."""


_settings: _Settings | None = None
_writable: dict[int, weakref.ref[Array]] = {}


def install(*, access: Access = Access.READ_ONLY, plain: str = "copy") -> None:
    """Have arrays that live in descriptors sent as handles by this process, from now on.

    PyArrow's tables, batches, arrays and buffers too, always read-only: from now on where PyArrow
    is imported, else once `memdesc.interop.arrow` was used.

    What is received needs no `install`. A fork child has its parent's; a process that is spawned
    has none, and what it sends goes by value until it calls this too
    (``Pool(initializer=install)``). The first process of a family should: it keeps for all what is
    on its way (`docs/multiprocessing.md`).

    Parameters
    ----------
    access : Access
        The most that receivers get of arrays. READ_WRITE where the array and `max_access` of its
        descriptor allow it too, else read-only. What `max_access` forbids the kernel forbids;
        below that it is a courtesy among the processes of one program.
    plain : {"copy", "refuse"}
        What plain `pickle.dumps` does with such an array: copy its bytes, as NumPy does, or raise
        TypeError, so that no large copy goes unnoticed. With protocol 5 the bytes are left to the
        caller's `buffer_callback` in any case.

    Notes
    -----
    Again changes the settings. The receiver sees what is stored in the memory after sending, too:
    send a `snapshot` of what you go on writing. Threads: one setting for all of the process.

    Linux: an abstract Unix socket and SCM_RIGHTS, served by the I/O thread; no privilege. A
    message reaches processes of the same user in the same network namespace.
    """
    global _settings
    if plain not in ("copy", "refuse"):
        raise InvalidArgument(f"plain is {plain!r}: give 'copy' or 'refuse'", errno=errno.EINVAL)
    access = Access(access)
    before = {} if _settings is None else _settings.before
    # A child or a fork server that imports the main module does no more until it sends.
    if not getattr(current_process(), "_inheriting", False):
        transit.ways.to_send()
    _settings = _Settings(access, plain, before)
    see_types()
    if see_types not in when_imported:
        when_imported.append(see_types)
    _refuse_plain(plain == "refuse")


def see_types() -> None:
    """Reduce, if installed, what can be sent as handles: of PyArrow once something imported it."""
    import numpy as np

    settings = _settings
    if settings is None:
        return
    reduces: dict[type, Callable[[Any], Any]] = {np.ndarray: _reduce}
    buffer = getattr(sys.modules.get("pyarrow"), "Buffer", None)
    if buffer is not None:
        from memdesc.interop.multiprocessing.tables import reduce_buffer

        reduces[buffer] = reduce_buffer
    table = _reducers()
    for kind, reduce in reduces.items():
        settings.before.setdefault(kind, table.get(kind))
        table[kind] = reduce


def uninstall() -> None:
    """Send arrays by value again, as before `install`. Without one before it is a no-op.

    What is on its way can still be received; the socket is closed once nothing is.
    """
    global _settings
    if _settings is None:
        return
    table = _reducers()
    for kind, before in _settings.before.items():
        if before is None:
            table.pop(kind, None)
        else:
            table[kind] = before
    _refuse_plain(False)
    _settings = None
    transit.ways.close()


@contextmanager
def installed(*, access: Access = Access.READ_ONLY, plain: str = "copy") -> Iterator[None]:
    """Install for the length of a ``with`` block; then what held before it holds again."""
    before = _settings
    install(access=access, plain=plain)
    try:
        yield
    finally:
        if before is None:
            uninstall()
        else:
            install(access=before.access, plain=before.plain)


def writable(array: Array) -> Array:
    """Let whoever receives this array write it; gives the array back.

    This array object, not views of it that are made later.

    Raises
    ------
    InvalidArgument
        It lies in no descriptor, so what is received is a copy; or it is no array (EINVAL).
    SealedError
        It is read-only, or its descriptor gives others no more: make that with
        ``max_access=READ_WRITE`` (EACCES).
    """
    import errno

    if not hasattr(array, "flags"):
        raise InvalidArgument(
            f"{type(array).__name__} is no NumPy array; a descriptor gives its receivers what its "
            "max_access allows, and needs no writable()",
            errno=errno.EINVAL,
        )
    home = home_of(array)
    if home is None:
        raise InvalidArgument(
            "the array lies in no descriptor that is open, so receivers get a copy, which they can "
            "write anyhow: make it with memdesc.empty",
            errno=errno.EINVAL,
        )
    if not array.flags.writeable or not home.descriptor.max_access.writable:
        raise SealedError(
            f"the array can not be sent for writing: {home.descriptor.name!r} gives others "
            f"{home.descriptor.max_access.value} at most, and the array is "
            f"{'writable' if array.flags.writeable else 'read-only'} here; make it with "
            "max_access=READ_WRITE",
            errno=errno.EACCES,
        )
    number = id(array)
    _writable[number] = weakref.ref(array, lambda _: _writable.pop(number, None))
    return array


def in_transit() -> Transit:
    """Tell what this process keeps for receivers: what is on its way, and what none will take.

    A handle that is never unpickled (a killed worker's, a dropped queue's) keeps its memory, and
    one file descriptor, until `forget_in_transit` or the end of this process. What is left then is
    told by a ResourceWarning, with its bytes and names.

    In the first process of a program, which installed or sent something, it is what all of them
    sent; `memdesc ls` shows it, too.
    """
    holder = transit.ways.holder
    return Transit(0, 0, 0) if holder is None else Transit(*holder.counts())


def forget_in_transit() -> Transit:
    """Close all that this process keeps for receivers; give what that was.

    For a program that knows that nobody will come for it: its workers were killed, and their queues
    made anew. Whoever comes all the same gets `HandleLostError` (ENOENT).
    """
    holder = transit.ways.holder
    return Transit(0, 0, 0) if holder is None else Transit(*holder.forget_all())


def limit_in_transit(nbytes: int | None) -> None:
    """Let no more bytes be on their way with this process than that; None, as at first: any number.

    Who sends what would be more gets `LimitError` (EDQUOT), in whatever process: of a `Pool` or an
    executor that is the error of the task; the thread of a `Queue` prints it, and drops the item.
    What is on its way already stays so. Nobody waits: the receiver may be the one who would.

    Parameters
    ----------
    nbytes : int, optional
        Memory of the files that are kept, each counted once, as `in_transit` tells it.

    Notes
    -----
    Say it in the first process, which keeps what all of them sent. The number of files has a limit
    in any case: three quarters of the descriptors that the process may have (RLIMIT_NOFILE).
    """
    transit.ways.limit(None if nbytes is None else check_length(nbytes, "nbytes"))


# -- sending ---------------------------------------------------------------------------------------


def _reducers() -> dict[type, Callable[[Any], Any]]:
    """The table behind `ForkingPickler.register`, which has no way to undo it."""
    return reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined,no-any-return]


def _reduce(array: Array) -> Any:
    """What `multiprocessing` sends of an array: a handle, or what it did before."""
    home = home_of(array)
    settings = _settings
    if home is None or settings is None:
        return by_value(array)
    access = _access(array, home, settings)
    try:
        part = SubMemoryDescriptor(home.descriptor, home.offset, home.length)
        # Below what its seals allow, read-only is a courtesy: a family is one program.
        handle = reducers.leave(part, access, enforced=False)
    except ClosedError:
        return by_value(array)  # another thread did it just now
    except MappingError as error:
        if error.reason in (MappingReason.TOO_MANY_FILES, MappingReason.NOT_ANSWERING):
            raise
        return by_value(array)  # private memory, and what else nobody can be given
    first = array.__array_interface__["data"][0] - span_of(array)[0]
    form = array.dtype, array.shape, array.strides, first
    return _rebuild, (tuple(handle), form)


def _access(array: Array, home: Home, settings: _Settings) -> Access:
    marked = _writable.get(id(array))
    wanted = settings.access.writable or (marked is not None and marked() is array)
    allowed = array.flags.writeable and home.descriptor.max_access.writable
    return Access.READ_WRITE if wanted and allowed else Access.READ_ONLY


def by_value(value: Any) -> Any:
    """Reduce as before `install`."""
    before = None if _settings is None else _settings.before.get(type(value))
    return value.__reduce_ex__(pickle.DEFAULT_PROTOCOL) if before is None else before(value)


# -- receiving -------------------------------------------------------------------------------------


def receive(handle: Handle, what: str) -> tuple[Keeper, int]:
    """Take and map what was left: (what keeps it, where in that it begins). `HandleLostError`."""
    received = reducers.take(handle, what)
    try:
        return keeper_of(received)
    except OSError as error:
        received.close()
        raise reducers.lost(what, error) from error


def _rebuild(handle: tuple[bytes, bytes, bytes], form: Any) -> Array:
    dtype, shape, strides, first = form
    keeper, start = receive(Handle(*handle), f"an array of shape {shape} and dtype {dtype}")
    return placed(keeper, shape, dtype, offset=start + first, strides=strides)


# -- plain pickle ----------------------------------------------------------------------------------


class _Plain:
    """Stands for an array until the pickler tells its protocol."""

    def __init__(self, array: Array) -> None:
        self._array = array

    def __reduce_ex__(self, protocol: Any) -> Any:
        if protocol < 5 and home_of(self._array) is not None:
            raise TypeError(
                f"an array of {self._array.nbytes:,} bytes that lives in a descriptor is not "
                "pickled, as this process said (plain='refuse'): send it through multiprocessing, "
                "pickle it with protocol 5 and a buffer_callback, or pickle array.copy()"
            )
        return self._array.__reduce_ex__(protocol)


def _plainly(array: Array) -> Any:
    # `cast` gives its second argument back: a pickle of another array needs nothing of ours.
    return typing.cast, (None, _Plain(array))


def _refuse_plain(refuse: bool) -> None:
    import numpy as np

    if refuse:
        copyreg.pickle(np.ndarray, _plainly)
    elif copyreg.dispatch_table.get(np.ndarray) is _plainly:
        del copyreg.dispatch_table[np.ndarray]
