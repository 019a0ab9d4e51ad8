"""What zones tell of themselves: records, and the table of all of them as zprint prints it."""

from __future__ import annotations

from dataclasses import dataclass

from memdesc.memory.zone_map import ZoneMapStatistics


@dataclass(frozen=True, slots=True)
class ZoneStatistics:
    """What one zone has, holds and did. Sizes in bytes; counts since it was made.

    Attributes
    ----------
    name : str
    element_size : int
        What an element gives.
    stride : int
        What it takes: from one element to the next.
    current_size, peak_size, max_size : int
        In chunks: what the zone holds of the zone map now, the most it ever held, and its limit.
        (In XNU's zprint since 10.13 "max size" is the most it ever held.)
    current_elements, max_elements : int
        In the chunks that it holds; and its limit.
    in_use, peak_in_use : int
        Elements allocated and not freed: now, and the most there ever were.
    allocation_size : int
        A chunk: what it grows by.
    allocs, frees, drops : int
        Elements given out; freed; and gone back by themselves, since nobody held them any more.
        `allocs` is always `frees + drops + in_use`.
    failures : int
        Allocations that ended in `ZoneExhausted`.
    waits, waiting : int
        Allocations that had to wait: ever, and now.
    quarantined : int
        Elements never given out again, since they were written to after they were freed.
    collected : int
        Bytes that collections gave back to the kernel.
    wired, tracked, closed : bool
    """

    name: str
    element_size: int
    stride: int
    current_size: int
    peak_size: int
    max_size: int
    current_elements: int
    max_elements: int
    in_use: int
    peak_in_use: int
    allocation_size: int
    allocs: int
    frees: int
    drops: int
    failures: int
    waits: int
    waiting: int
    quarantined: int
    collected: int
    wired: bool
    tracked: bool
    closed: bool

    @property
    def flags(self) -> str:
        """As zprint: C collectable, W wired, T tracked, Q has quarantined elements, X closed."""
        held = {
            "C": not self.wired,
            "W": self.wired,
            "T": self.tracked,
            "Q": self.quarantined > 0,
            "X": self.closed,
        }
        return "".join(letter for letter, holds in held.items() if holds)


_COLUMNS = (
    ("elem", "size"),
    ("cur", "size"),
    ("max", "size"),
    ("cur", "#elts"),
    ("max", "#elts"),
    ("cur", "inuse"),
    ("alloc", "size"),
    ("total", "allocs"),
    ("", "fails"),
)


@dataclass(frozen=True, slots=True)
class ZoneTable:
    """All zones of this process at one moment; `print` shows it as a table.

    Attributes
    ----------
    zones : tuple of ZoneStatistics
        By name.
    zone_map : ZoneMapStatistics
    """

    zones: tuple[ZoneStatistics, ...]
    zone_map: ZoneMapStatistics

    def __str__(self) -> str:
        rows = [_row(zone) for zone in self.zones]
        heads = list(zip(*_COLUMNS, strict=True))
        first = max([len("zone name"), *(len(zone.name) for zone in self.zones)])
        widths = [
            max(len(text) for text in column)
            for column in zip(*heads, *(row for row, _ in rows), strict=True)
        ]
        names = ["", "zone name", *(zone.name for zone in self.zones)]
        flags = ["", "", *(flags for _, flags in rows)]
        lines = [
            f"{name:<{first}}  " + "  ".join(map(str.rjust, cells, widths)) + f"  {flag}"
            for name, cells, flag in zip(
                names, [*heads, *(row for row, _ in rows)], flags, strict=True
            )
        ]
        ruler = "-" * max(map(len, lines))
        used, size = self.zone_map.used, self.zone_map.size
        total = f"zone map: {_short(used)} of {_short(size)} in use ({used * 100 / size:.1f} %)"
        return "\n".join(line.rstrip() for line in [*lines[:2], ruler, *lines[2:], ruler, total])


def _row(zone: ZoneStatistics) -> tuple[list[str], str]:
    sizes = [str(zone.element_size), _short(zone.current_size), _short(zone.max_size)]
    counts = [str(n) for n in (zone.current_elements, zone.max_elements, zone.in_use)]
    calls = [str(zone.allocs), str(zone.failures)]
    return [*sizes, *counts, _short(zone.allocation_size), *calls], zone.flags


def _short(nbytes: int) -> str:
    """Bytes as zprint writes them: whole KiB, from 10 MiB on whole MiB."""
    return f"{nbytes >> 10}K" if nbytes < 10 << 20 else f"{nbytes >> 20}M"
