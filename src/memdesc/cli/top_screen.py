"""`memdesc top` on the screen: live on a terminal, where keys end it; else one table."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from typing import Any

from rich.live import Live
from rich.text import Text

from memdesc.cli.ls_screen import STATES
from memdesc.cli.printer import Printer
from memdesc.cli.top import Looks
from memdesc.cli.words import count, named, rate, short

_ENDS = frozenset(b"qQ\x04")

_COLUMNS: tuple[tuple[str, int, Callable[[dict[str, Any]], str]], ...] = (
    ("pid", 7, lambda one: str(one["pid"] or "-")),
    ("cpu%", 5, lambda one: rate(one["cpu"])),
    ("cli", 4, lambda one: str(one["clients"])),
    ("calls/s", 7, lambda one: rate(one["calls_per_second"])),
    ("entr/s", 6, lambda one: rate(one["entries_per_second"])),
    ("slots/s", 7, lambda one: rate(one["slots_per_second"])),
    ("B/s", 6, lambda one: short(one["bytes_per_second"])),
    ("shared", 6, lambda one: short(one["shared"])),
    ("wired", 6, lambda one: short(one["wired"])),
    ("huge", 6, lambda one: short(one["huge"])),
)


class TopScreen(Printer):
    """Shows one look after the other, or one."""

    @property
    def live(self) -> bool:
        """Whether there is a terminal to show it on as it changes."""
        return self._console.is_terminal and not self._console.is_dumb_terminal

    def tell(self, report: dict[str, Any]) -> None:
        """Print one table."""
        for text, style in self._rows(report, self._width):
            self._row_of(text, style)

    def run(self, looks: Looks, interval: float) -> None:
        """Show looks until a key, or an interrupt, ends it."""
        with _keys() as ended, Live(console=self._console, screen=True, auto_refresh=False) as live:
            pause = min(interval, 0.3)  # so that the first rates come soon
            while True:
                report = looks.look()
                live.update(self._picture(report, interval), refresh=True)
                if ended(pause):
                    return
                pause = interval

    def _picture(self, report: dict[str, Any], interval: float) -> Text:
        width, height = self._console.size
        clock = time.strftime("%H:%M:%S", time.localtime(report["time"]))
        clients = sum(one["clients"] or 0 for one in report["services"])
        whole = Text(
            f"memdesc top {clock}, {count(len(report['services']), 'service')}, "
            f"{count(clients, 'client')}, every {interval:g} s; q ends"[:width]
        )
        for text, style in [*self._rows(report, width)][: max(height - 1, 1)]:
            whole.append("\n")
            whole.append(text[:width], style)
        return whole

    def _rows(self, report: dict[str, Any], width: int) -> Iterator[tuple[str, str]]:
        """Give the lines of the table, each with its style."""
        if not report["services"]:
            yield "No services.", ""
            return
        room = max(width - sum(column + 1 for _, column, _ in _COLUMNS), 10)
        head = "".join(f" {name:>{column}}" for name, column, _ in _COLUMNS)
        yield f"{'service':<{room}}{head}", "bold"
        for one in report["services"]:
            name = f"{named(one['name'], room):<{room}}"
            if one["state"] != "serving":
                pid = "-" if one["pid"] is None else one["pid"]
                yield f"{name} {pid:>7}  {STATES[one['state']]}"[:width], "yellow"
                continue
            yield name + "".join(f" {tell(one):>{column}}" for _, column, tell in _COLUMNS), ""


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Give what waits for a key that ends it: (seconds) -> whether one came."""
    fd = sys.stdin.fileno() if sys.stdin is not None and not sys.stdin.closed else -1
    if fd < 0 or not os.isatty(fd):
        yield _sleep
        return
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield lambda seconds: _wait_for_key(fd, seconds)
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def _wait_for_key(fd: int, seconds: float) -> bool:
    """Wait that long, or for a key that ends it, or for the end of the terminal."""
    until = time.monotonic() + seconds
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    while (left := until - time.monotonic()) > 0:
        if poller.poll(left * 1000):
            key = os.read(fd, 64)
            if not key or _ENDS.intersection(key):
                return True
    return False
