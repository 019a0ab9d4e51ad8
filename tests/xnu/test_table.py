"""docs/xnu-tests.md names tests that exist, and every test that is ported."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = (ROOT / "docs" / "xnu-tests.md").read_text()
NAMED = set(re.findall(r"`((?:tests|src)/[\w/]+\.py)(?:::(\w+))?`", TABLE))


def functions(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_test_that_the_table_names_exists() -> None:
    missing = [
        f"{file}::{name}"
        for file, name in NAMED
        if not (ROOT / file).exists() or (name and name not in functions(ROOT / file))
    ]
    assert missing == []
    assert len(NAMED) > 40


def test_the_table_has_every_test_of_this_folder_that_names_its_source() -> None:
    named = {name for file, name in NAMED if file.startswith("tests/xnu/")}
    ours = {"test_errors_carry_the_number_of_the_kernel"}
    for file in ("test_iomemorydescriptor.py", "test_vm.py"):
        assert functions(Path(__file__).parent / file) - ours <= named


def test_every_row_says_what_became_of_it() -> None:
    rows = [line for line in TABLE.splitlines() if line.startswith("| ") and "---" not in line]
    for row in rows:
        here = row.strip("|").split("|")[-1].strip()
        assert (
            here == "here"
            or here.startswith(("`tests/", "`src/", "later", "none:", "none,"))
            or ("`" in here)
        ), row
