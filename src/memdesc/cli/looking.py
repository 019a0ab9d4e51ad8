"""Looking at services: where their sockets are, and what they say when they are asked.

All are asked at once, and waited for together: one that never answers takes nobody's time but its
own. Nothing is swept, opened or granted.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memdesc.cli.words import harmless, program_of
from memdesc.errors import (
    AccessDeniedError,
    MemdescError,
    ServiceNotFoundError,
    TimedOutError,
)
from memdesc.services import folder, protocol
from memdesc.services.describing import Inquiry, silent
from memdesc.services.offers import near_names
from memdesc.services.protocol.describing import Item
from memdesc.vm.task import Task

PATIENCE = 1.0
"""Seconds that services have to answer, all of them together."""
GONE = ("dead", "missing")
"""States of a service that is not there."""
_MOST_SOCKETS = 1024
_TOLD = 5


@dataclass(slots=True)
class Seen:
    """One service, as it was found.

    Attributes
    ----------
    name : str
        As `connect` takes it.
    path : Path
    state : str
        `serving`; `silent`: it does not answer; `denied`: it is not for this user, or tells him
        nothing; `unknown`: it speaks otherwise (an older version, another program); `dead`: no
        one listens; `missing`: there is no such socket.
    why : str
        Where it is not `serving`.
    task : Task, optional
        Who listens, by the kernel's word; the watch's own, which closes it.
    told : Described, optional
        The service's own word, as is `items`.
    """

    name: str
    path: Path
    state: str = "serving"
    why: str = ""
    task: Task | None = None
    told: protocol.Described | None = None
    items: list[Item] = field(default_factory=list)
    at: float = 0.0
    """When it was asked (`time.monotonic`)."""

    @property
    def pid(self) -> int | None:
        """Of who listens."""
        return None if self.task is None else self.task.pid

    @property
    def uid(self) -> int | None:
        """Whose that process is."""
        return None if self.task is None else self.task.credentials.uid

    def described(self) -> dict[str, Any]:
        """Tell what it is and whose, as JSON can carry it."""
        return {
            "name": self.name,
            "path": str(self.path),
            "state": self.state,
            "why": self.why,
            "pid": self.pid,
            "user": self.uid,
            "program": "" if self.pid is None else program_of(self.pid),
        }


class Watch:
    """Asks services, those that it knows already over the connection that it has."""

    def __init__(self) -> None:
        self._inquiries: dict[Path, Inquiry] = {}

    def look(self, sockets: Iterable[tuple[str, Path]], *, items: bool) -> list[Seen]:
        """Ask all of them, with all that they have or their figures alone."""
        found = [Seen(name, path) for name, path in sockets]
        for gone in self._inquiries.keys() - {seen.path for seen in found}:
            self._forget(gone)
        asked = [seen for seen in found if self._ask(seen, items=items)]
        self._read(asked, time.monotonic() + PATIENCE, items=items)
        return found

    def _ask(self, seen: Seen, *, items: bool) -> bool:
        for _ in range(2):  # the service that we knew may have ended, and another have its place
            again = seen.path in self._inquiries
            try:
                inquiry = self._inquiries.get(seen.path) or _reach(seen.path)
                self._inquiries[seen.path] = inquiry
                inquiry.ask(0 if items else None)
            except MemdescError as error:
                self._failed(seen, error)
                if again:
                    continue
                return False
            seen.task = inquiry.task
            seen.at, seen.state, seen.why = time.monotonic(), "serving", ""
            return True
        return False

    def _read(self, asked: Iterable[Seen], until: float, *, items: bool) -> None:
        """Take answers as they come."""
        waiting = {self._inquiries[seen.path].fileno(): seen for seen in asked}
        poller = select.poll()
        for fd in waiting:
            poller.register(fd, select.POLLIN)
        late = False
        while waiting and not late:  # once more at the end: all may have had to wait for us
            left = until - time.monotonic()
            late = left <= 0
            for fd, _ in poller.poll(max(left, 0) * 1000):
                if self._take(waiting[fd], items=items):
                    poller.unregister(fd)
                    del waiting[fd]
        for seen in waiting.values():
            seen.told, seen.items = None, []
            self._failed(seen, silent(seen.path))

    def _take(self, seen: Seen, *, items: bool) -> bool:
        """Take the answer that has come; whether it was the last."""
        inquiry = self._inquiries[seen.path]
        try:
            answer = inquiry.answer(0)
            seen.told = seen.told or answer
            if items and inquiry.ask_on(answer, seen.items):
                return False
            if answer.superseded:  # the next look is at who has the name now
                self._forget(seen.path)
        except TimedOutError:
            return False  # an answer to what was asked earlier
        except MemdescError as error:
            seen.told, seen.items = None, []
            self._failed(seen, error)
        return True

    def _failed(self, seen: Seen, error: MemdescError) -> None:
        seen.why = str(error)
        if isinstance(error, TimedOutError):
            seen.state = "silent"
            return  # what it answers later is passed over
        self._forget(seen.path)
        if isinstance(error, ServiceNotFoundError):
            seen.state = "dead" if os.path.lexists(seen.path) else "missing"
        elif isinstance(error, AccessDeniedError):
            seen.state = "denied"
        else:
            seen.state = "unknown"

    def _forget(self, path: Path) -> None:
        inquiry = self._inquiries.pop(path, None)
        if inquiry is not None:
            inquiry.close()

    def close(self) -> None:
        """Hang up."""
        for path in list(self._inquiries):
            self._forget(path)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _reach(path: Path) -> Inquiry:
    try:
        return Inquiry(path)
    except ServiceNotFoundError:
        time.sleep(0.01)  # between its making and its listening a service is not dead
        return Inquiry(path)


def sockets(name: str | None = None) -> list[tuple[str, Path]]:
    """Find the sockets of services, or of that one: (name for `connect`, path).

    In the folder of this user's services; and, where MEMDESC_RUNTIME_DIR does not say which that
    is, in those of all users that this one may read.
    """
    if name is not None:
        return [(name, Path(folder.socket_path(name)))]
    own = Path(folder.runtime_folder())
    found = [(path.name, path) for path in _sockets_in(own, None)]
    if "MEMDESC_RUNTIME_DIR" not in os.environ:
        for other, uid in _other_folders():
            if other != own:
                found += [(str(path), path) for path in _sockets_in(other, uid)]
    return found


def others(name: str) -> list[str]:
    """Give the names of services that there are, those first that are nearly that one."""
    known = [one for one, path in sockets() if one != name and not folder.is_dead(str(path))]
    near = near_names(name, known)
    return [*near, *(one for one in known if one not in near)]


def tell_others(names: Sequence[str]) -> str:
    """Say which services there are, in place of one that is not."""
    if not names:
        return "there is no other"
    more = ", ..." if len(names) > _TOLD else ""
    return f"there is {', '.join(harmless(one, 60) for one in names[:_TOLD])}{more}"


def check_there(name: str) -> None:
    """Raise `ServiceNotFoundError`, which tells of others, unless that service is there."""
    with Watch() as watch:
        (seen,) = watch.look(sockets(name), items=False)
    if seen.state in GONE:
        raise ServiceNotFoundError(
            f"there is no service {name!r}; {tell_others(others(name))}", errno=errno.ENOENT
        )


def pid_of(name: str) -> int:
    """Find the process of a service.

    Raises
    ------
    ServiceNotFoundError, MemdescError
        It is not there, or there is no telling whose it is.
    """
    with Watch() as watch:
        (seen,) = watch.look(sockets(name), items=False)
        pid = seen.pid
    if pid is not None:
        return pid
    if seen.state not in GONE:
        raise MemdescError(f"of service {name!r} no process is known ({seen.why}): give its pid")
    raise ServiceNotFoundError(
        f"{name!r} is no pid, and no service either; {tell_others(others(name))}",
        errno=errno.ENOENT,
    )


def _other_folders() -> list[tuple[Path, int]]:
    """The folders of other users, each with whose it must be."""
    found = []
    for pattern, part in (("/run/user/*/memdesc", -2), (f"{tempfile.gettempdir()}/memdesc-*", -1)):
        for path in sorted(Path("/").glob(pattern[1:])):
            number = path.parts[part].rpartition("-")[2]
            if number.isdecimal():
                found.append((path, int(number)))
    return found


def _sockets_in(place: Path, uid: int | None) -> list[Path]:
    """Give the sockets in a folder; of another user's, none that he has not made himself."""
    found: list[Path] = []
    with suppress(OSError):  # there is none, or it is not ours to read
        if uid is not None and not _is_of(place, uid, stat.S_ISDIR):
            return []
        with os.scandir(place) as entries:
            for entry in entries:
                path = place / entry.name
                if _is_of(path, uid, stat.S_ISSOCK) and len(found) < _MOST_SOCKETS:
                    found.append(path)
    return sorted(found)


def _is_of(path: Path, uid: int | None, kind: object) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    is_kind = kind(status.st_mode) if callable(kind) else False
    return is_kind and uid in (None, status.st_uid)
