"""The page on tables prints what it says."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_examples_of_the_page_run() -> None:
    page = str(ROOT / "docs/arrow.md")
    done = doctest.testfile(page, module_relative=False, optionflags=doctest.ELLIPSIS)
    assert done.failed == 0
    assert done.attempted >= 29
