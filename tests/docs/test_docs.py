"""The documentation tells the truth about what is here."""

import re
from pathlib import Path

import pytest

from memdesc.errors import MappingReason

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def test_each_reason_has_a_section():
    headings = re.findall(r"^## ([A-Z_]+)$", (DOCS / "why-your-map-failed.md").read_text(), re.M)
    assert sorted(headings) == sorted(MappingReason.__members__)


def test_each_row_of_the_seeds_is_there_and_its_test_exists():
    rows = re.findall(r"^\| (\d+) \|.*\| (\S+) \|$", (DOCS / "seeds.md").read_text(), re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 23))
    for number, shown_by in rows:
        if shown_by != "—":
            assert (ROOT / shown_by.strip("`")).is_file(), f"row {number} names {shown_by}"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", page.read_text()):
        assert (DOCS / target).is_file(), target


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_tests_that_a_page_names_exist(page):
    for name in re.findall(r"tests/[\w/]+\.py", page.read_text()):
        assert (ROOT / name).is_file(), name
