"""`memdesc map --svg`: the address space as a picture that browsers and documents show."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from memdesc.cli.map import FOLDED, KINDS, Band, bands, gap_before
from memdesc.cli.words import amount, count, harmless, user

_WIDTH = 860
_LEFT, _BAND = 132, 150
_LINE = 17
_MOST_LETTERS = 76
"""Of a line beside a band."""
_MOST_BANDS = 2000
_MOST_HOLDERS = 8

_STYLE = """
text { font: 12px ui-monospace, Menlo, Consolas, monospace; fill: #1f2328 }
.title { font-weight: bold; font-size: 14px }
.soft { fill: #57606a }
.paper { fill: #ffffff }
rect.band { stroke: #1f2328; stroke-width: 1 }
.nothing { stroke: #57606a; stroke-dasharray: 3 4 }
.buffer { fill: #2da44e } .memfd { fill: #7ee787 } .shared { fill: #39c5cf }
.file { fill: #79a8ff } .private { fill: #c9d1d9 } .heap { fill: #d2a8ff }
.stack { fill: #f2cc60 } .kernel { fill: #ff9b8e }
.wired { fill: url(#wired) }
rect.huge { stroke-width: 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .soft { fill: #9da7b3 } .paper { fill: #0d1117 }
  rect.band { stroke: #e6edf3 } .nothing { stroke: #9da7b3 }
}
"""
_HATCH = (
    '<defs><pattern id="wired" width="6" height="6" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><line x1="0" y1="0" x2="0" y2="6" stroke="#1f2328" '
    'stroke-width="1.5"/></pattern></defs>'
)


def draw(report: dict[str, Any], *, fold: bool) -> str:
    """Give the picture as an SVG document: no scripts, no references to anything outside."""
    shown = [band for _, band in zip(range(_MOST_BANDS), bands(report, fold=fold), strict=False)]
    body, y = list(_head(report)), 72
    for band in shown:
        part, y = _band(band, y)
        body += part
    drawn, y = _legend(shown, y + 8)
    body += drawn
    if sum(len(band.regions) for band in shown) < len(report["regions"]):
        body.append(_text(_LEFT, y + 12, f"the first {_MOST_BANDS:,} bands alone", "soft"))
        y += _LINE
    height = y + 16
    label = f"Address space of task {report['pid']}, {harmless(report['program'], 60)}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            f'width="{_WIDTH}" height="{height}" role="img" aria-labelledby="title desc">',
            f'<title id="title">{escape(label)}</title>',
            f'<desc id="desc">{escape(_description(report, shown))}</desc>',
            f"<style>{_STYLE}</style>",
            _HATCH,
            f'<rect class="paper" width="{_WIDTH}" height="{height}"/>',
            *body,
            "</svg>",
            "",
        ]
    )


def _head(report: dict[str, Any]) -> Iterator[str]:
    memory = report["memory"]
    who = f"Task {report['pid']}, {harmless(report['program'], 50)}, user {user(report['user'])}"
    yield _text(16, 28, who, "title")
    sums = f"{count(len(report['regions']), 'region')}, {amount(memory['resident'])} resident"
    wired = f", {amount(memory['locked'])} wired" if memory["locked"] else ""
    yield _text(16, 48, sums + wired, "soft")


def _description(report: dict[str, Any], shown: list[Band]) -> str:
    """Say in words what the picture shows, for who can not see it."""
    told = [f"{count(len(report['regions']), 'region')} in {count(len(shown), 'band')}."]
    for band in shown:
        if band.kind in ("buffer", "memfd", "shared"):
            others = band.others
            told.append(
                f"{band.kind} {_name(band)}, {amount(band.total('length'))}, "
                f"{len(others)} other {'task has' if len(others) == 1 else 'tasks have'} it."
            )
    return " ".join(told[:200])


def _band(band: Band, y: int) -> tuple[list[str], int]:
    """Draw a band with what lies before it: (elements, where the next one begins)."""
    found = []
    if gap := gap_before(band):
        for x in (_LEFT, _LEFT + _BAND):
            found.append(f'<line class="nothing" x1="{x}" y1="{y}" x2="{x}" y2="{y + 26}"/>')
        found.append(_text(_LEFT + _BAND + 14, y + 17, gap, "soft"))
        y += 26
    lines = list(_lines(band))
    length = band.total("length")
    height = max(round(7 * math.log2(max(length / 4096, 1)) + 10), _LINE * len(lines) + 8, 22)
    huge = " huge" if band.total("huge") else ""
    box = f'x="{_LEFT}" y="{y}" width="{_BAND}" height="{height}"'
    told = f"{band.start:#x} to {band.end:#x}, {amount(length)}"
    found.append(f"<g><title>{escape(told)}</title>")
    found.append(f'<rect class="band {band.kind}{huge}" {box}/>')
    wired = band.total("wired")
    if wired:
        part = max(round(height * min(wired / max(length, 1), 1)), 2)
        found.append(f'<rect class="wired" x="{_LEFT}" y="{y}" width="{_BAND}" height="{part}"/>')
    found.append("</g>")
    found.append(_text(_LEFT - 10, y + 15, f"{band.start:x}", "soft", end=True))
    for number, (text, style) in enumerate(lines):
        found.append(_text(_LEFT + _BAND + 14, y + 15 + number * _LINE, text, style))
    return found, y + height


def _lines(band: Band) -> Iterator[tuple[str, str]]:
    """Give what is written beside a band, each line with its class."""
    size = amount(band.total("length"))
    if len(band.regions) > 1 and band.kind in FOLDED:
        named = _name(band) or "private memory"
        yield f"{size}, {count(len(band.regions), 'region')}: {named}"[:_MOST_LETTERS], ""
    else:
        what = f"{band.kind} {_name(band)}".rstrip()
        yield f"{size}, {band.regions[0]['permissions']}, {what}"[:_MOST_LETTERS], ""
    facts = [f"{amount(band.total('resident'))} resident"]
    facts += [
        f"{amount(band.total(one))} {one}"
        for one in ("huge", "wired", "swapped")
        if band.total(one)
    ]
    yield ", ".join(facts), "soft"
    others = band.others
    for one in others[:_MOST_HOLDERS]:
        how = one["access"] or "open, not mapped"
        yield f"also {one['pid']} {harmless(one['program'], 30)}: {how}", ""
    if len(others) > _MOST_HOLDERS:
        yield f"and {len(others) - _MOST_HOLDERS:,} more tasks", "soft"


def _name(band: Band) -> str:
    names = [name.rpartition("/")[2] or name for name in band.names if name != f"[{band.kind}]"]
    shown = ", ".join(harmless(name, 20) for name in names[:2])
    return shown + (f" and {len(names) - 2:,} more" if names[2:] else "")


def _legend(shown: list[Band], y: int) -> tuple[list[str], int]:
    """Say what the colours mean; those that there are."""
    kinds = {band.kind for band in shown}
    found = []
    for kind in KINDS:
        if kind in kinds:
            found.append(f'<rect class="band {kind}" x="{_LEFT}" y="{y}" width="24" height="12"/>')
            found.append(_text(_LEFT + 34, y + 10, f"{kind}: {KINDS[kind]}", "soft"))
            y += _LINE
    notes = []
    if any(band.total("wired") for band in shown):
        notes.append("hatched: the part that is wired")
    if any(band.total("huge") for band in shown):
        notes.append("thick border: with huge pages")
    if notes:
        found.append(_text(_LEFT + 34, y + 10, "; ".join(notes), "soft"))
        y += _LINE
    return found, y


def _text(x: int, y: int, text: str, style: str, *, end: bool = False) -> str:
    anchor = ' text-anchor="end"' if end else ""
    kind = f" class={quoteattr(style)}" if style else ""
    return f'<text x="{x}" y="{y}"{kind}{anchor}>{escape(text)}</text>'
