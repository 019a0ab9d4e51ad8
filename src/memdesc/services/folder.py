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
import time
from collections.abc import Iterator

from memdesc.errors import (
    AccessDeniedError,
    AllocationError,
    InvalidArgument,
    MemdescError,
    NameInUseError,
    TimedOutError,
    describe_errno,
)
from memdesc.loop import Loop
from memdesc.memory.closing import close_socket, no_descriptor
from memdesc.vm.telling import explains

BACKLOG = 128
"""Connections that may wait for a service to take them; one more, and who connects waits."""

_PATH_MAX = 107
"""Bytes of a Unix socket's path (sun_path, less its NUL)."""


def runtime_folder() -> str:
    """Give the folder for names without a slash; not made yet."""
    own = os.environ.get("MEMDESC_RUNTIME_DIR")
    if own:
        return own.rstrip("/") or "/"
    session = os.environ.get("XDG_RUNTIME_DIR")
    if session:
        return os.path.join(session, "memdesc")
    import tempfile

    return os.path.join(tempfile.gettempdir(), f"memdesc-{os.geteuid()}")


def socket_path(name: str) -> str:
    """Give the path of a service's socket."""
    _check_name(name)
    path = name.rstrip("/") if "/" in name else os.path.join(runtime_folder(), name)
    if len(os.fsencode(path)) > _PATH_MAX:
        raise InvalidArgument(
            f"the socket's path {path} has {len(os.fsencode(path))} bytes, Unix sockets take "
            f"{_PATH_MAX}: choose a shorter name, or set MEMDESC_RUNTIME_DIR",
            errno=errno.EINVAL,
        )
    return path


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name or "\0" in name or name in (".", ".."):
        raise InvalidArgument(
            f"{name!r} is no name for a service: give text, like 'camera', or with a slash the "
            "path of its socket, in a folder that exists",
            errno=errno.EINVAL,
        )


def open_folder(name: str) -> None:
    """Make the folder of a name if need be, check whose it is, and sweep the sockets of the dead.

    Raises
    ------
    AccessDeniedError
        The folder is another user's, or others may enter it (EACCES).
    """
    _check_name(name)
    if "/" in name:
        return
    folder = runtime_folder()
    with _explained(folder), contextlib.suppress(FileExistsError):
        os.makedirs(os.path.dirname(folder) or ".", exist_ok=True)
        os.mkdir(folder, 0o700)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise AccessDeniedError(
            f"{folder} is not a folder of this user's alone (owner {status.st_uid}, mode "
            f"{stat.S_IMODE(status.st_mode):o}; this is user {os.geteuid()}): remove it, or set "
            f"MEMDESC_RUNTIME_DIR to one that memdesc can make, inside it for instance "
            f"({folder}/memdesc; of a volume the root belongs to who made the volume)",
            errno=errno.EACCES,
        )
    with _explained(folder):
        entries = [f"{folder}/{name}" for name in os.listdir(folder)]
        entries = [path for path in entries if _is_socket(path)]
    if entries:
        with locked(folder):
            for entry in entries:
                if is_dead(entry):
                    _unlink(entry)


@contextlib.contextmanager
def locked(folder: str, timeout: float = 5.0) -> Iterator[None]:
    """Hold the folder's lock. It goes with this process, however it ends."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise no_descriptor(f"lock {folder}", error) from error
        raise
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
        fcntl.flock(fd, fcntl.LOCK_UN)  # closing alone would leave it to a child forked meanwhile
        os.close(fd)


class Listener:
    """A listening socket under a name, and what it takes to give both up.

    `inherited` is the socket of a service whose name this one takes over; it is ours from here on.

    Raises
    ------
    NameInUseError
        A living service has the name (EADDRINUSE).
    InvalidArgument
        The folder of the path does not exist (ENOENT, ENOTDIR).
    AccessDeniedError
        It is not ours to make a socket in (EACCES, EROFS).
    """

    def __init__(
        self, name: str, *, for_all: bool, inherited: sockets.socket | None = None
    ) -> None:
        self.inherited = inherited is not None
        open_folder(name)
        self.path = socket_path(name)
        self.sock = new_socket() if inherited is None else inherited
        self._ours = True
        self._spare: int | None = None
        try:
            self._keep_spare()
            with _explained(self.path):
                if inherited is None:
                    self._bind(for_all)
                else:
                    os.chmod(self.path, 0o666 if for_all else 0o600)
            self._inode = os.lstat(self.path).st_ino
        except BaseException:
            self.close()
            raise

    def _bind(self, for_all: bool) -> None:
        # The file that bind makes takes its mode from the socket: never open, not for an instant.
        os.fchmod(self.sock.fileno(), 0o600)
        with locked(os.path.dirname(self.path) or "."):
            if _is_socket(self.path) and is_dead(self.path):
                _unlink(self.path)
            try:
                self.sock.bind(self.path)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise NameInUseError(
                        f"{self.path} is taken by a living service (or is no socket): choose "
                        "another name, or end that service",
                        errno=errno.EADDRINUSE,
                    ) from error
                raise
            if for_all:
                os.chmod(self.path, 0o666)  # here, since the umask would take from what bind makes
            self.sock.listen(BACKLOG)

    def turn_away(self) -> None:
        """Take one client in and close it with the descriptor kept for this (EMFILE).

        Else it would wait for ever, and epoll with it.
        """
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        else:
            time.sleep(0.01)  # another thread was faster; epoll asks again at once
        with contextlib.suppress(OSError):
            close_socket(self.sock.accept()[0])
        with contextlib.suppress(AllocationError):
            self._keep_spare()

    def _keep_spare(self) -> None:
        try:
            self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise no_descriptor("keep a spare descriptor", error) from error

    def give_away(self) -> None:
        """Leave the name, and the socket, to the task that has a descriptor of it too."""
        self._ours = False
        self.close()

    def remove_name(self) -> None:
        """Remove the socket file if it is still ours.

        While we listen nobody sweeps it, so this needs no lock, and waits for nobody.
        """
        with contextlib.suppress(FileNotFoundError):
            if self._ours and os.lstat(self.path).st_ino == self._inode:
                os.unlink(self.path)

    def end(self, io: Loop) -> None:
        """Listen no longer. On the I/O thread."""
        io.forget(self.sock.fileno())
        # Those who wait are to see the end also where a fork child holds the socket still.
        with contextlib.suppress(OSError):
            self.sock.shutdown(sockets.SHUT_RDWR)
            while True:  # what they sent must not be closed with this socket, in this thread
                close_socket(self.sock.accept()[0])
        self.close()

    def close(self) -> None:
        """Let go of the descriptors alone."""
        self.sock.close()
        spare, self._spare = self._spare, None
        if spare is not None:
            os.close(spare)


def new_socket(kind: sockets.SocketKind = sockets.SOCK_SEQPACKET) -> sockets.socket:
    """Make a Unix socket that never waits."""
    try:
        return sockets.socket(sockets.AF_UNIX, kind | sockets.SOCK_NONBLOCK)
    except OSError as error:
        raise no_descriptor("make a socket", error) from error


def is_served(name: str) -> bool:
    """Whether a living service has a name, as far as can be told without the lock."""
    open_folder(name)
    path = socket_path(name)
    return _is_socket(path) and not is_dead(path)


def living_names() -> list[str]:
    """List the services of this user's folder that live, for people: at most 64, by name."""
    folder = runtime_folder()
    with contextlib.suppress(OSError):
        paths = ((name, f"{folder}/{name}") for name in sorted(os.listdir(folder))[:64])
        return [name for name, path in paths if _is_socket(path) and not is_dead(path)]
    return []


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@explains
def _explained(error: Exception, path: str) -> None:
    """Say in the family's terms why a socket or its folder can not be had there."""
    if isinstance(error, MemdescError):
        return
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise InvalidArgument(
            f"the folder {os.path.dirname(path) or '.'} does not exist: make it first (a service's "
            "name with a / is a path)",
            errno=error.errno,
        ) from error
    if isinstance(error, OSError):
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise no_descriptor(f"use {path}", error) from error
        raise AccessDeniedError(
            f"user {os.geteuid()} can not use {path}: {describe_errno(error)}", errno=error.errno
        ) from error


def is_dead(path: str) -> bool:
    """Whether no living process has the socket of a file (ECONNREFUSED), whoever it was.

    A datagram socket can not be connected to a service's: the kernel says EPROTOTYPE where there
    is one, and the service, which may be stopped or busy, does not even notice.
    """
    with new_socket(sockets.SOCK_DGRAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False  # EPROTOTYPE: it lives; EACCES: not ours to tell
        return False
