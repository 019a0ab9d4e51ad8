"""`memdesc serve` on the screen: a live table on a terminal, a line for each change where piped."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from rich.live import Live
from rich.text import Text

from memdesc.cli.printer import Printer
from memdesc.cli.words import amount, count, harmless

_MOST_ROWS = 40
_SLOWEST = 0.1  # seconds between two pictures of a bar that moves


class ServeScreen(Printer):
    """Tells the run, on stdout or (beside `--json`) on stderr. To be used in a ``with``."""

    def __init__(self, name: str, *, to_stderr: bool) -> None:
        super().__init__(to_stderr=to_stderr)
        self._name = name
        self._loaded: dict[str, Any] | None = None
        self._figures: dict[str, Any] = {"clients": 0, "opens": 0, "opened_bytes": 0}
        self._bar = ""
        self._drawn = 0.0
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
                vertical_overflow="crop",
            )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._bar = ""
            self._live.stop()

    def is_gone(self) -> bool:
        """Whether there was a terminal, and it was hung up."""
        if self._live is None or self._console.file is None:
            return False
        try:
            os.tcgetpgrp(self._console.file.fileno())
        except OSError as error:
            return error.errno != errno.ENOTTY  # that would be one that controls others
        return False

    # -- what is told ----------------------------------------------------------------------------

    def progress(self, done: int, total: int) -> None:
        """Show on a terminal how much was loaded."""
        if self._live is None:
            return
        now = time.monotonic()
        if done < total and now - self._drawn < _SLOWEST:
            return
        width = 30
        filled = width * done // max(total, 1)
        bar = "#" * filled + "." * (width - filled)
        self._bar = f"loading [{bar}] {amount(done)} of {amount(total)}" if done < total else ""
        self._draw()

    def turn(self, figures: dict[str, Any]) -> None:
        """Show the figures of this moment on a terminal."""
        self._figures |= figures
        self._draw()

    def tell(self, record: dict[str, Any]) -> None:
        """Tell what happened."""
        event = record["event"]
        self._figures |= {name: record[name] for name in self._figures if name in record}
        if event == "loaded":
            self._loaded = record
        if event == "failed":
            self._line(
                f"RELOADING FAILED, version {record['version']} is served on: "
                f"{harmless(record['message'])}",
                style="bold red",
            )
        elif self._live is None:
            for text in self._lines_of(record):
                self._row_of(text)
        self._bar = ""
        self._draw()

    def _lines_of(self, record: dict[str, Any]) -> Iterator[str]:
        event, version = record["event"], record["version"]
        if event == "loaded":
            yield from self._version(record)
            yield from self._table(record["arrays"], _MOST_ROWS)
        elif event == "serving":
            yield (
                f'Serving as "{harmless(self._name)}", task {record["pid"]}. SIGHUP reloads, '
                "Ctrl-C ends it."
            )
        elif event in ("joined", "left"):
            clients = count(record["clients"], "client")
            yield f"Task {record['client']} {event}: {clients} now."
        elif event == "swapped":
            yield f"Version {version} is served from now on."
        elif event == "stopped":
            opened = f"opened {count(record['opens'], 'time')}"
            yield f"Stopped. What was shared was {opened}, {amount(record['opened_bytes'])}."

    def _version(self, record: dict[str, Any]) -> Iterator[str]:
        """Tell of a version: what it is, how it came."""
        seconds = max(record["seconds"], 1e-6)
        read = record["read_bytes"]
        yield (
            f"Version {record['version']}: {count(len(record['arrays']), 'array')}, "
            f"{amount(record['array_bytes'])}; {amount(record['huge_bytes'])} in huge pages"
        )
        rate = f"{amount(int(read / seconds))}/s"
        yield f"  read {amount(read)} in {seconds:.2f} s ({rate}) by {record['way'] or 'unpacking'}"
        if record["bounced_bytes"]:
            yield f"  of it {amount(record['bounced_bytes'])} through the page cache"

    def _table(self, arrays: list[dict[str, Any]], most: int) -> Iterator[str]:
        """Give a line for each array, and how many more there are."""
        left = self._width - (2 + 10 + 18 + 10 + 4)
        names = max(left // 2, 8)
        files = max(left - names, 8)

        def row(name: str, dtype: str, shape: str, nbytes: str, file: str) -> str:
            text = f"  {name:<{names}} {dtype:<10} {shape:<18} {nbytes:>9} {file}"
            return text[: self._width].rstrip()

        yield row("array", "dtype", "shape", "bytes", "file")
        for one in arrays[:most]:
            yield row(
                harmless(one["name"], names),
                harmless(one["content"] or one["stored_as"] or one["dtype"], 10),
                harmless(" x ".join(map(str, one["shape"])) or "a number", 18),
                amount(one["nbytes"]),
                harmless(os.path.basename(one["file"]), files),
            )
        if len(arrays) > most:
            yield f"  and {len(arrays) - most:,} more"

    def _draw(self) -> None:
        if self._live is not None:
            self._drawn = time.monotonic()
            text = "\n".join(self._picture()).encode(errors="backslashreplace").decode()
            self._live.update(Text(text, no_wrap=True, overflow="crop"), refresh=True)

    def _picture(self) -> Iterator[str]:
        yield f"memdesc serve: {harmless(self._name, 40)}, task {os.getpid()}"
        if self._loaded is not None:
            yield from self._version(self._loaded)
            figures = self._figures
            yield (
                f"  {count(figures['clients'], 'client')} connected; shares were opened "
                f"{count(figures['opens'], 'time')}, {amount(figures['opened_bytes'])} together"
            )
        if self._bar:
            yield f"  {self._bar}"
        if self._loaded is not None:
            yield ""
            yield from self._table(
                self._loaded["arrays"], min(max(self._console.height - 9, 1), _MOST_ROWS)
            )
