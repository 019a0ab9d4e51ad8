"""The folder of names and blocks: what lies there, and who may.

A memfd has no name, and none could keep it alive but a process that has it open. So a name is a
link to the block's folder, and in that folder lies one more for each holder, all of them symbolic:

    names/NAME -> TOKEN.SIZE                    the name
    blocks/TOKEN/PID.STARTED.FD.SERIAL -> held  one who holds it, under that number

Both lie beneath the services' folder of this user (`memdesc.services.folder`), which only he can
enter, in one folder for each pid namespace, as a pid means something only in its own. Who attaches
opens `/proc/PID/fd/FD` of any holder: no process has to answer, so none needs a thread, and a
stopped one is no obstacle. What that number means now is checked by the token, which is part of
the memfd's own name: a pid or a number that was given anew is not mistaken for the holder.

What a killed process leaves are its links here. Who next looks at the name, and every
process that makes its first block, sweeps what belongs to nobody.

Attaching and letting go take no lock. What makes or removes a name does: a name is removed only
if it still is that block's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from memdesc.errors import InvalidArgument, UnsupportedError
from memdesc.services.folder import locked, open_folder, runtime_folder
from memdesc.vm.forks import lock_for

_RECORD = re.compile(r"([0-9a-f]{16})\.([1-9][0-9]{0,18})", re.ASCII)


class _Threads:
    """The lock among threads: with that on the folder alone they would poll for each other."""

    def __init__(self) -> None:
        self._lock = lock_for(self)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:
            yield


_threads: Final = _Threads()


@dataclass(frozen=True, slots=True)
class Record:
    """What a name says: which block, and how many bytes of it there are."""

    token: str
    size: int

    def __str__(self) -> str:
        return f"{self.token}.{self.size}"


def new_token() -> str:
    """Make what tells a block from every other."""
    return secrets.token_hex(8)


def new_name() -> str:
    """Make a name that nobody uses: as those of `multiprocessing` look."""
    return f"psm_{secrets.token_hex(4)}"


def memory_name(name: str, token: str) -> str:
    """Give the memfd's own name: what maps files show, and what proves that it is that block."""
    shown = os.fsencode(check_name(name))[:200].decode(errors="replace")
    while len(os.fsencode(shown)) > 200:  # what could not be decoded takes more bytes than it was
        shown = shown[:-1]
    return f"{shown}.{token}"


def check_name(name: str) -> str:
    """Give a name as it stands in the folder: without slashes before it.

    Raises
    ------
    InvalidArgument
        It is no str, empty, has a slash or NUL in it, or more than 255 bytes (EINVAL).
    """
    if not isinstance(name, str):
        raise InvalidArgument(
            f"name is of type {type(name).__name__}: give a str", errno=errno.EINVAL
        )
    bare = name.lstrip("/")
    try:
        nbytes = len(os.fsencode(bare))
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte
        nbytes = 0
    if bare in (".", "..") or "/" in bare or "\0" in bare or not 0 < nbytes <= 255:
        raise InvalidArgument(
            f"{name[:300]!r} is no name for shared memory: give up to 255 bytes without a slash "
            "in them (one before them is left out) and without NUL",
            errno=errno.EINVAL,
        )
    return bare


def folder() -> str:
    """Give the folder of the names of this user in this pid namespace; not made yet."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except FileNotFoundError as error:
        raise UnsupportedError(
            "shared memory is found by name through /proc: mount it here", errno=errno.ENOENT
        ) from error
    return f"{runtime_folder()}/shared-memory-{namespace}"


def made_folder() -> str:
    """Give that folder, made, after a look at whose it is."""
    own = folder()
    if not is_ours(own):
        open_folder("shared-memory")
        os.makedirs(f"{own}/names", mode=0o700, exist_ok=True)
        os.makedirs(f"{own}/blocks", mode=0o700, exist_ok=True)
    return own


def is_ours(own: str) -> bool:
    """Whether it is made.

    Raises
    ------
    AccessDeniedError
        It lies in a folder that others than this user can enter (EACCES).
    """
    try:
        status = os.lstat(os.path.dirname(own))
        made = stat.S_ISDIR(os.lstat(f"{own}/blocks").st_mode)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False
    mode = status.st_mode
    if not stat.S_ISDIR(mode) or status.st_uid != os.geteuid() or mode & 0o077:
        open_folder("shared-memory")  # raises, and says whose it is
    return made


@contextlib.contextmanager
def changing(own: str, timeout: float = 5.0) -> Iterator[None]:
    """Be the only one who makes or removes names. For microseconds."""
    with _threads.held(), locked(own, timeout):
        yield


def read_record(own: str, name: str) -> Record | None:
    """What a name says now; None where it is none."""
    try:
        target = os.readlink(f"{own}/names/{name}")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL, errno.ENOTDIR):
            return None
        raise
    said = _RECORD.fullmatch(target)
    return Record(said[1], int(said[2])) if said else None
