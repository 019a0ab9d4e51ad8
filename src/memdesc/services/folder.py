"""Where services live: one socket each, in a folder that only their user can enter.

A name with a slash is a path. Any other is looked for in ``$MEMDESC_RUNTIME_DIR``, else
``$XDG_RUNTIME_DIR/memdesc``, else ``memdesc-UID`` under the temporary directory; the folder is made
with mode 0700 and refused if it is somebody else's or others may enter.

A killed service leaves its socket file, which no one listens to. Whoever next opens the folder
sweeps such files. A lock on the folder (flock) keeps a service that is just being made from being
taken for a dead one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket as sockets
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from memdesc.errors import AccessDeniedError, InvalidArgument, NameInUseError, TimedOutError

_PATH_MAX = 107
"""Bytes of a Unix socket's path (sun_path, less its NUL)."""


def runtime_folder() -> Path:
    """Give the folder for names without a slash; not made yet."""
    own = os.environ.get("MEMDESC_RUNTIME_DIR")
    if own:
        return Path(own)
    session = os.environ.get("XDG_RUNTIME_DIR")
    if session:
        return Path(session) / "memdesc"
    return Path(tempfile.gettempdir()) / f"memdesc-{os.geteuid()}"


def socket_path(name: str) -> Path:
    """Give the path of a service's socket."""
    if not name or "\0" in name or name in (".", ".."):
        raise InvalidArgument(f"{name!r} is no name for a service")
    path = Path(name) if "/" in name else runtime_folder() / name
    if len(os.fsencode(path)) > _PATH_MAX:
        raise InvalidArgument(
            f"the socket's path {path} has {len(os.fsencode(path))} bytes, Unix sockets take "
            f"{_PATH_MAX}: choose a shorter name, or set MEMDESC_RUNTIME_DIR"
        )
    return path


def open_folder(name: str) -> None:
    """Make the folder of a name if need be, check whose it is, and sweep the sockets of the dead.

    Raises
    ------
    AccessDeniedError
        The folder is another user's, or others may enter it (EACCES).
    """
    if "/" in name:
        return
    folder = runtime_folder()
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise AccessDeniedError(
            f"{folder} is not a folder of this user's alone (owner {status.st_uid}, mode "
            f"{stat.S_IMODE(status.st_mode):o}; this is user {os.geteuid()}): remove it, or set "
            "MEMDESC_RUNTIME_DIR",
            errno=errno.EACCES,
        )
    entries = [entry for entry in folder.iterdir() if entry.is_socket()]
    if entries:
        with locked(folder):
            for entry in entries:
                if _is_dead(entry):
                    entry.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, timeout: float = 5.0) -> Iterator[None]:
    """Hold the folder's lock. It goes with this process, however it ends."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        until = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise TimedOutError(
                        f"another process has held the lock on {folder} for {timeout} s",
                        errno=errno.ETIMEDOUT,
                    ) from error
                time.sleep(0.005)
        yield
    finally:
        os.close(fd)


def listen(name: str, *, for_all: bool) -> tuple[sockets.socket, Path]:
    """Take a name: (listening socket, its path).

    Raises
    ------
    NameInUseError
        A living service has it (EADDRINUSE).
    """
    open_folder(name)
    path = socket_path(name)
    sock = sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET | sockets.SOCK_NONBLOCK)
    try:
        # The file that bind makes takes its mode from the socket: never open, not for an instant.
        os.fchmod(sock.fileno(), 0o666 if for_all else 0o600)
        with locked(path.parent):
            if path.is_socket() and _is_dead(path):
                path.unlink(missing_ok=True)
            try:
                sock.bind(os.fspath(path))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise NameInUseError(
                        f"{path} is taken by a living service (or is no socket): choose another "
                        "name, or end that service",
                        errno=errno.EADDRINUSE,
                    ) from error
                raise
            sock.listen(128)
    except BaseException:
        sock.close()
        raise
    return sock, path


def remove(path: Path, inode: int) -> None:
    """Remove the socket file of a service that ends, if it is still that service's."""
    with contextlib.suppress(FileNotFoundError), locked(path.parent):
        if path.lstat().st_ino == inode:
            path.unlink()


def _is_dead(path: Path) -> bool:
    """Whether no one listens to a socket file (ECONNREFUSED), whoever it was."""
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET | sockets.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False  # EAGAIN: its backlog is full; EACCES, EPROTOTYPE: not one of ours
        return False
