"""`memdesc map` on the screen: the address space as bands, the higher the larger."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from rich.text import Text

from memdesc.cli.ls_screen import held_up, hidden
from memdesc.cli.map import FOLDED, KINDS, Band, bands, gap_before
from memdesc.cli.printer import Printer
from memdesc.cli.words import amount, count, harmless, user

# The letter says it where there are no colours.
_LOOK = {
    "buffer": ("#", "black on green"),
    "memfd": ("%", "black on bright_green"),
    "shared": ("=", "black on cyan"),
    "file": ("f", "white on blue"),
    "private": ("p", "black on white"),
    "heap": ("h", "white on magenta"),
    "stack": ("s", "black on yellow"),
    "kernel": ("k", "white on red"),
}
_ASCII = {"first": "+------+", "wall": "|", "gap": ":      :"}
_ASCII |= {"border": _ASCII["first"], "last": _ASCII["first"]}
_LINES = {"first": "┌──────┐", "border": "├──────┤", "last": "└──────┘", "wall": "│"}
_LINES |= {"gap": "┊      ┊"}
_FILL = 6
_MOST_HOLDERS = 6


class MapScreen(Printer):
    """Draws one address space."""

    def tell(self, report: dict[str, Any], *, fold: bool) -> None:
        """Draw it, or tell what may be seen instead."""
        self._summary(report)
        if report["hidden"] is not None:
            self._line()
            self._line(report["hidden"], style="yellow")
            return
        self._line()
        frame = _LINES if self._console.is_terminal and not self._ascii else _ASCII
        kinds: set[str] = set()
        for band in bands(report, fold=fold):
            self._border(frame["border" if kinds else "first"])
            self._band(band, frame)
            kinds.add(band.kind)
        self._border(frame["last"])
        self._line()
        self._line("   ".join(f"{_LOOK[kind][0]} {kind}" for kind in KINDS if kind in kinds))
        if report["hidden_tasks"]:
            self._line(hidden(report["hidden_tasks"]), style="yellow")
        if report["held_up_pids"]:
            self._line(held_up(report["held_up_pids"]), style="yellow")

    @property
    def _ascii(self) -> bool:
        return "utf" not in self._console.encoding.lower()

    def _summary(self, report: dict[str, Any]) -> None:
        memory = report["memory"]
        self._line(
            f"Task {report['pid']}, {harmless(report['program'], 60) or '-'}, user "
            f"{user(report['user'])}",
            style="bold",
        )
        parts = [
            f"{amount(memory[name])} {what}"
            for name, what in (("anonymous", "private"), ("file", "of files"), ("shared", "shared"))
        ]
        extra = [
            f"{amount(memory[name])} {what}"
            for name, what in (
                ("hugetlb", "of huge pages besides"),
                ("swapped", "swapped out"),
                ("locked", "wired"),
                ("pinned", "pinned"),
            )
            if memory[name]
        ]
        self._line(f"{amount(memory['resident'])} resident: {', '.join(parts + extra)}.")

    # -- bands -----------------------------------------------------------------------------------

    def _band(self, band: Band, frame: dict[str, str]) -> None:
        if gap := gap_before(band):
            self._row_of(f"{'':14} {frame['gap']} {gap}")
            self._border(frame["border"])
        room = self._width - 14 - 2 - _FILL - 3
        lines = [
            line
            for text in (_title(band), *_more(band))
            for line in textwrap.wrap(text, room, subsequent_indent=" " * 12)
        ]
        for number in range(max(_height(band.total("length")), len(lines))):
            address = f"{band.start:>14x}" if not number else f"{'':14}"
            text = lines[number] if number < len(lines) else ""
            self._cells(band.kind, frame, f"{address} ", f" {text}".rstrip())

    def _cells(self, kind: str, frame: dict[str, str], before: str, after: str) -> None:
        letter, style = _LOOK[kind]
        line = Text(before)
        line.append(frame["wall"]).append(letter * _FILL, style).append(frame["wall"] + after)
        self._console.print(line, soft_wrap=True)

    def _border(self, line: str) -> None:
        self._row_of(f"{'':14} {line}")


def _height(nbytes: int) -> int:
    """Give the rows of a band: one more with each factor of 64, from 1 MiB on."""
    return 1 + max((nbytes.bit_length() - 15) // 6, 0)


def _title(band: Band) -> str:
    """Say in a line what a band is."""
    first = band.regions[0]
    size = amount(band.total("length"))
    if len(band.regions) > 1 and band.kind in FOLDED:
        return f"{size:>8}  {count(len(band.regions), 'region')}: {_some(band.names)}"
    names = band.names
    name = (
        harmless(os.path.basename(names[0]) if band.kind == "file" else names[0], 40)
        if names
        else ""
    )
    what = band.kind if name in (f"[{band.kind}]", "") else f"{band.kind} {name}"
    return f"{size:>8}  {first['permissions']}  {what}"


def _some(names: Sequence[str]) -> str:
    """Name the largest, and say how many others there are."""
    if not names:
        return "private memory"
    shown = ", ".join(harmless(os.path.basename(name) or name, 24) for name in names[:2])
    return shown + (f" and {len(names) - 2:,} more" if names[2:] else "")


def _more(band: Band) -> Iterator[str]:
    """Say what of it is in memory, and who else has it."""
    facts = [f"{amount(band.total('resident'))} resident"]
    facts += [
        f"{amount(band.total(what))} {what}"
        for what in ("huge", "wired", "swapped")
        if band.total(what)
    ]
    if band.kind != "kernel":
        yield f"{'':8}  {', '.join(facts)}"
    others = band.others
    for one in others[:_MOST_HOLDERS]:
        yield (
            f"{'':8}  also {one['pid']} {harmless(one['program'], 24)}: "
            f"{one['access'] or 'open, not mapped'}"
        )
    if len(others) > _MOST_HOLDERS:
        yield f"{'':8}  and {len(others) - _MOST_HOLDERS:,} more tasks"
