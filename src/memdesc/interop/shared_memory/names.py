"""Names of blocks: made, looked up, removed.

Looking up and letting go take no lock. What makes or removes a name does: a name is removed only
if it still is that block's.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Iterable

from memdesc import _core
from memdesc.errors import AllocationError, BlockExistsError, BlockNotFoundError, NotPrivilegedError
from memdesc.interop.shared_memory.folder import (
    Record,
    changing,
    folder,
    is_ours,
    made_folder,
    read_record,
)
from memdesc.interop.shared_memory.holders import Holding, anyone, holders, open_holder
from memdesc.memory.lease import held_by_others

_SWEPT_EVERY = 64
"""Blocks that a process makes between two sweeps of all names."""

_TRIES = 1000
"""How often a holder that has just let go may be met before a name counts as nobody's."""

_MOMENT = 1.0
"""Seconds that who ends waits for others who make or remove names."""

_PUNCH_HOLE = 3
"""FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE (linux/falloc.h)."""

_claims = itertools.count()


def check_free(name: str) -> None:
    """Raise `BlockExistsError` if a living block has a name, before memory is taken for another."""
    own = folder()
    record = read_record(own, name) if is_ours(own) else None
    if record is not None and anyone(own, record.token):
        raise _exists(name)


def claim(name: str, token: str, size: int, fd: int) -> Holding:
    """Give a block its name. Takes the descriptor over.

    Raises
    ------
    BlockExistsError
        A living block has it (EEXIST).
    """
    holding = Holding(folder(), name, token, fd)
    try:
        own = made_folder()
        if next(_claims) % _SWEPT_EVERY == 0:
            sweep_all()
        with changing(own):
            record = read_record(own, name)
            if record is not None:
                _remove_dead(own, name, record)
            os.mkdir(f"{own}/blocks/{token}", 0o700)
            holding.tell()
            os.symlink(f"{Record(token, size)}", f"{own}/names/{name}")
    except FileExistsError as error:
        holding.let_go()
        raise _exists(name) from error
    except BaseException:
        holding.let_go()
        raise
    return holding


def _exists(name: str) -> BlockExistsError:
    return BlockExistsError(
        f"a block of shared memory has the name {name!r} already: attach to it, or choose "
        "another name",
        errno=errno.EEXIST,
    )


def find(name: str, *, writable: bool) -> tuple[Holding, int]:
    """Open a block by its name: (a holding of our own, its size in bytes).

    Raises
    ------
    BlockNotFoundError
        No process holds a block of that name (ENOENT).
    NotPrivilegedError
        Those who hold it do not let this process look (EACCES).
    """
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
    own = folder()
    for _ in range(_TRIES):
        record = read_record(own, name) if is_ours(own) else None
        if record is None:
            break
        refusals: list[int] = []
        for holder in holders(own, record.token):
            fd = open_holder(holder, record.token, flags, refusals)
            if fd < 0:
                continue
            holding = Holding(own, name, record.token, fd)
            try:
                # One who opened it after the name was removed could find its pages freed.
                if holding.tell() and holding.named:
                    return holding, record.size
            except BaseException:
                holding.let_go()
                raise
            holding.let_go()
        if refusals:
            raise _refused(name, refusals)
        with changing(own):
            _remove_dead(own, name, record)
    raise _not_found(name)


def _not_found(name: str) -> BlockNotFoundError:
    return BlockNotFoundError(
        f"there is no shared memory of the name {name!r}: it was unlinked, or no process of user "
        f"{os.geteuid()} holds it any more (a block lives while one does)",
        errno=errno.ENOENT,
    )


def _refused(name: str, pids: list[int]) -> NotPrivilegedError:
    return NotPrivilegedError(
        f"shared memory {name!r} is held by task {pids[0]}, which does not let this one open what "
        "it has (another user or capabilities, or not dumpable since it changed its user): have "
        "it call prctl(PR_SET_DUMPABLE, 1), or share the memory by a Service",
        errno=errno.EACCES,
    )


def remove(holding: Holding) -> None:
    """Remove a block's name, if it still is that block's.

    Raises
    ------
    BlockNotFoundError
        It is not: it was removed before (ENOENT).
    """
    own, name = holding.own, holding.name
    if not os.path.isdir(own):
        raise _not_found(name)
    with changing(own):
        if not _remove_name(holding):
            raise _not_found(name)


def remove_last(holdings: Iterable[Holding]) -> None:
    """At the end of a process, remove the names that lead nowhere now.

    The lock is taken once for all of them: where many processes end together, each with many names,
    some would wait for seconds. Nobody waits longer than a moment, and what can not be removed
    stays for him who next looks at the name, or makes his first block, as if this one was killed.
    """
    for own, its in itertools.groupby(sorted(holdings, key=_folder_of), key=_folder_of):
        with contextlib.suppress(OSError, AllocationError), changing(own, timeout=_MOMENT):
            for holding in its:
                _remove_name(holding)


def _folder_of(holding: Holding) -> str:
    return holding.own


def _remove_name(holding: Holding) -> bool:
    """Remove a block's name, and what the dead left, if it still is that block's. With the lock."""
    if not holding.named:
        return False
    os.unlink(f"{holding.own}/names/{holding.name}")
    if not anyone(holding.own, holding.token):  # nobody looks there again
        _remove_block(holding.own, holding.token)
    return True


def free_unused(holding: Holding) -> None:
    """Free the pages of a block that has no name any more, and nobody but who made it.

    He holds it by a handle, learns that the name is gone at his next look, and frees all of it
    then. That there is nobody else, told or not, the kernel says: by a lease. Nobody can come.
    """
    if not holders(holding.own, holding.token):
        return
    with changing(holding.own):  # two who leave would see each other
        if holding.named:
            return
        for holder in holders(holding.own, holding.token):
            fd = open_holder(holder, holding.token, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK, [])
            if fd < 0:
                continue
            try:
                if not held_by_others(fd):
                    _core.fallocate(fd, _PUNCH_HOLE, 0, os.fstat(fd).st_size)
            finally:
                os.close(fd)
            return


def set_size(holding: Holding, size: int) -> None:
    """Have a block's name say that it is of that many bytes, unless it says more."""
    own, name = holding.own, holding.name
    with changing(own):
        if not 0 < size_of(holding) < size:
            return
        following = f"{own}/next.{holding.token}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(following)  # of one who was killed here
        os.symlink(f"{Record(holding.token, size)}", following)
        os.rename(following, f"{own}/names/{name}")


def size_of(holding: Holding) -> int:
    """How many bytes a block's name says that it has; 0 where it is that block's no more."""
    record = read_record(holding.own, holding.name)
    return record.size if record is not None and record.token == holding.token else 0


def sweep_all() -> None:
    """Remove what dead processes left: names and folders of blocks that nobody has."""
    own = folder()
    if not is_ours(own):
        return
    named = {name: read_record(own, name) for name in os.listdir(f"{own}/names")}
    for name, record in named.items():
        if record is not None and not anyone(own, record.token):
            with changing(own):
                _remove_dead(own, name, record)
    tokens = {record.token for record in named.values() if record is not None}
    for token in set(os.listdir(f"{own}/blocks")) - tokens:
        with changing(own):  # who makes one has the lock until he has told of himself
            if not anyone(own, token):
                _remove_block(own, token)


def _remove_dead(own: str, name: str, record: Record) -> None:
    """Remove a name that leads to nobody. With the lock."""
    if read_record(own, name) == record and not anyone(own, record.token):
        os.unlink(f"{own}/names/{name}")
        _remove_block(own, record.token)


def _remove_block(own: str, token: str) -> None:
    with contextlib.suppress(OSError):  # ENOENT: it is gone; ENOTEMPTY: someone came
        os.rmdir(f"{own}/blocks/{token}")
