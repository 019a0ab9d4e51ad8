"""What `memdesc serve` does: load, serve, swap on request or change, and tell of every change.

All that happens is told as a record, a dict that JSON can carry, to whoever listens: the screen,
the lines of `--json`. Clients come and go on the I/O thread, signals come anywhere: both only put
something into a queue, which one loop works off.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING, Any

from memdesc.cli.words import as_json as to_json, harmless
from memdesc.errors import InvalidArgument, MemdescError, TransferError
from memdesc.files import FileServer, FileSource, Loaded
from memdesc.files.sources import identify
from memdesc.memory.page_kinds import PageKind
from memdesc.services.user_client import UserClient

if TYPE_CHECKING:
    from memdesc.cli.serve_screen import ServeScreen

Record = dict[str, Any]
Progress = Callable[[int, int], object]

TURN = 1.0
"""Seconds after which figures are told again, and files are looked at (`watch`)."""

_NAMED = re.compile(r"(?P<name>[^=/]+)=(?P<file>.+)", re.S)
_FORM = re.compile(r"(?P<file>.+?):(?P<dtype>[<>|=]?[A-Za-z]\w*)(?::(?P<shape>[^:/]*))?", re.S)
_SHAPE = re.compile(r"\d+(?:x\d+)*")


def parse_file(text: str) -> FileSource:
    """Read [NAME=]FILE[:DTYPE[:2x3]]. What is the path of a file as it stands is that.

    Raises
    ------
    InvalidArgument
        Of a file that is there, the shape is none (EINVAL).
    """
    name = dtype = shape = None
    if not Path(text).exists():
        found = _NAMED.fullmatch(text)
        if found:
            name, text = found["name"], found["file"]
    if not Path(text).exists():
        found = _FORM.fullmatch(text)
        if found and Path(found["file"]).exists():
            text, dtype = found["file"], found["dtype"]
            if found["shape"] is not None:
                if not _SHAPE.fullmatch(found["shape"]):
                    raise InvalidArgument(
                        f"{text}: shape {found['shape']!r} is none: give extents like 8x1080x1920",
                        errno=errno.EINVAL,
                    )
                shape = tuple(int(extent) for extent in found["shape"].split("x"))
    return FileSource(Path(text), name, dtype, shape)


def is_unusable(error: BaseException) -> bool:
    """Whether it is the files that can not be served."""
    return isinstance(error, InvalidArgument | TransferError) or (
        isinstance(error, OSError) and not isinstance(error, MemdescError)
    )


@dataclass(frozen=True, slots=True)
class Wishes:
    """What was asked for: as of `FileServer`; `watch`: reload what changed."""

    name: str
    sources: Sequence[FileSource]
    pages: PageKind = PageKind.AUTO
    wired: bool = False
    watch: bool = False


class Serving:
    """One run of `memdesc serve`.

    Parameters
    ----------
    wishes : Wishes
    tell : callable
        Called with each record, in the thread that runs.
    progress : callable
        As of `load`.
    turn : callable
        Called now and then with the figures of that moment.
    """

    def __init__(
        self,
        wishes: Wishes,
        tell: Callable[[Record], object],
        progress: Progress,
        turn: Callable[[Record], object],
    ) -> None:
        self._wishes = wishes
        self._tell_record = tell
        self._progress = progress
        self._turn = turn
        self._queue: SimpleQueue[tuple[str, UserClient | None]] = SimpleQueue()
        self._known: set[UserClient] = set()
        self._seen: list[object] = []
        self._tried: list[object] | None = None

    def ask_to_reload(self) -> None:
        """Reload soon; any signal handler may call it."""
        self._queue.put(("reload", None))

    def run(self) -> None:
        """Serve until something is raised, and tell of the end."""
        wishes = self._wishes
        with FileServer(
            wishes.name,
            wishes.sources,
            pages=wishes.pages,
            wired=wishes.wired,
            progress=self._progress,
        ) as server:
            try:
                self._tell("loaded", server.version, **loaded_record(server.loaded))
                self._tell("serving", server.version, path=str(server.service.path))
                self._watch_clients(server)
                while True:
                    self._wait(server)
            finally:
                version = server.version
                server.service.watch_clients(None)
                self._tell("stopped", version, **self._figures(server))

    def _tell(self, event: str, version: int, **fields: Any) -> None:
        head = {"event": event, "time": time.time(), "name": self._wishes.name, "pid": os.getpid()}
        self._tell_record(head | {"version": version} | fields)

    def _figures(self, server: FileServer) -> Record:
        service = server.service
        return {
            "clients": len(self._known),
            "opens": service.opens,
            "opened_bytes": service.opened_bytes,
        }

    # -- what happens ----------------------------------------------------------------------------

    def _watch_clients(self, server: FileServer) -> None:
        queue = self._queue

        def watcher(client: UserClient, joined: bool) -> None:
            queue.put(("joined" if joined else "left", client))

        server.service.watch_clients(watcher)
        for client in server.service.clients():  # that came while the files were loaded
            queue.put(("joined", client))

    def _wait(self, server: FileServer) -> None:
        """Wait for what happens next, a turn at most, and see to it."""
        until = time.monotonic() + TURN
        while (left := until - time.monotonic()) > 0:
            try:
                what, client = self._queue.get(timeout=left)
            except Empty:
                break
            if client is None:
                self._reload(server, "asked to")
            else:
                self._note(server, what, client)
        if self._wishes.watch:
            self._look(server)
        self._turn({"version": server.version} | self._figures(server))

    def _note(self, server: FileServer, what: str, client: UserClient) -> None:
        """Note a client that came or left, once."""
        if (what == "joined") is (client in self._known):
            return
        (self._known.add if what == "joined" else self._known.remove)(client)
        task = client.task
        who = {"client": task.pid, "user": task.credentials.uid}
        self._tell(what, server.version, **who, **self._figures(server))

    def _look(self, server: FileServer) -> None:
        """Reload when a file has changed, and was the same for a whole turn since."""
        loaded = server.loaded
        seen, before = [identify(one.path) for one in loaded.sources], self._seen
        self._seen = list(seen)
        if seen == list(loaded.identities):
            self._tried = None
        elif seen == before and seen != self._tried and None not in seen:
            self._reload(server, "changed")

    def _reload(self, server: FileServer, why: str) -> None:
        # What is there now is tried now, also by a signal: if it is no good, that is told once.
        self._tried = [identify(one.path) for one in server.loaded.sources]
        try:
            loaded = server.reload(progress=self._progress)
        except (MemdescError, OSError) as error:
            self._tell("failed", server.version, why=why, **error_record(error))
        else:
            self._tell("loaded", loaded.version, **loaded_record(loaded))
            self._tell("swapped", loaded.version, why=why, **self._figures(server))


def run(wishes: Wishes, screen: ServeScreen | None, *, as_json: bool) -> int:
    """Serve until a signal ends it; give the exit status.

    With no screen errors alone are told, on stderr.
    """

    def tell(record: Record) -> None:
        if as_json:
            print(to_json(record, indent=None), flush=True)
        if screen is not None:
            screen.tell(record)
        elif record["event"] == "failed":
            _complain(record["message"])

    def hang_up(_: int, __: FrameType | None) -> None:
        if screen is not None and screen.is_gone():
            sys.exit(0)
        serving.ask_to_reload()

    serving = Serving(
        wishes,
        tell,
        _nothing if screen is None else screen.progress,
        _nothing if screen is None else screen.turn,
    )
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGHUP, hang_up)
    try:
        with screen or contextlib.nullcontext():
            serving.run()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        raise  # whoever read what is told has gone
    except (MemdescError, OSError) as error:
        return refuse(error, as_json=as_json)
    return 0


def refuse(error: BaseException, *, as_json: bool) -> int:
    """Tell why nothing is served; give the exit status."""
    if as_json:
        print(to_json({"event": "unusable"} | error_record(error), indent=None), flush=True)
    _complain(message_of(error))
    return 2 if is_unusable(error) else 1


def _end(number: int, _: FrameType | None) -> None:
    """End by way of every `finally`, once."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


def _nothing(*_: object) -> None:
    """Show nothing."""


def _complain(message: str) -> None:
    print(f"memdesc serve: {harmless(message)}", file=sys.stderr)


def error_record(error: BaseException) -> Record:
    """Tell of an error."""
    return {
        "error": type(error).__name__,
        "errno": getattr(error, "errno", None),
        "message": message_of(error),
    }


def message_of(error: BaseException) -> str:
    """Give what an error says; also of those that `open` raises, in our order."""
    if isinstance(error, OSError) and not isinstance(error, MemdescError) and error.filename:
        return f"{os.fsdecode(error.filename)} can not be read: {error.strerror}"
    return str(error)


def loaded_record(loaded: Loaded) -> Record:
    """Tell of a version: what is in it, and how it was read."""
    return {
        "arrays": [
            {
                "name": entry.name,
                "dtype": entry.dtype,
                "stored_as": entry.stored_as or None,
                "content": entry.content or None,
                "shape": list(entry.shape),
                "column_major": entry.column_major,
                "nbytes": entry.nbytes,
                "file": entry.file,
            }
            for entry in loaded.entries
        ],
        "array_bytes": sum(entry.nbytes for entry in loaded.entries),
        "memory_bytes": loaded.descriptor.length,
        "huge_bytes": loaded.huge_bytes,
        "read_bytes": loaded.nbytes,
        "bounced_bytes": loaded.bounced_bytes,
        "seconds": loaded.seconds,
        "way": None if loaded.way is None else loaded.way.value,
        "reasons": list(loaded.reasons),
    }
