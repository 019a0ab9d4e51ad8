"""Pictures of the documentation: well formed, small, told in words too, used, and legible."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PICTURES = sorted((DOCS / "pictures").glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"
pictures = pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)


@pictures
def test_it_is_small_and_told_in_words(path: Path) -> None:
    assert path.stat().st_size < 30_000
    root = ET.fromstring(path.read_text())
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    assert root.get("viewBox")
    for kind in ("title", "desc"):
        (words,) = root.findall(f"{SVG}{kind}")
        assert words.text and words.get("id") in (root.get("aria-labelledby") or "").split()


@pictures
def test_its_text_is_text_and_nothing_is_fetched(path: Path) -> None:
    root = ET.fromstring(path.read_text())
    names = {element.tag for element in root.iter()}
    assert f"{SVG}text" in names
    assert not names & {f"{SVG}{name}" for name in ("image", "script", "foreignObject", "use")}
    assert not re.search(r"@import|url\((?!#)|href", path.read_text())


@pictures
def test_it_is_legible_on_any_page(path: Path) -> None:
    """As an image it does not see the page's theme, so it brings a paper as large as it is."""
    root = ET.fromstring(path.read_text())
    _, _, width, height = map(float, (root.get("viewBox") or "").split())
    papers = [one for one in root.iter(f"{SVG}rect") if one.get("class") == "paper"]
    assert any(
        float(one.get("width", 0)) >= width - 2 and float(one.get("height", 0)) >= height - 2
        for one in papers
    )


@pictures
def test_a_page_shows_it(path: Path) -> None:
    shown = rf"!\[[^\]]+\]\(pictures/{re.escape(path.name)}\)"
    assert any(re.search(shown, page.read_text()) for page in DOCS.glob("*.md"))
