"""The house: a room knows only the rooms below it, and no room is outside that order."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("importlinter", reason="import-linter is not installed in this environment")

ROOT = Path(__file__).parent.parent

# Lints the package of the working folder, not the one that is installed.
LINT = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
sys.path.insert(0, "src")
from importlinter.cli import lint_imports_command
lint_imports_command(["--no-cache"])
"""


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LINT],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the sources, to do wrong in."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src/memdesc", tmp_path / "src/memdesc", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def order() -> list[str]:
    """The rooms of the contract, from the top."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (contract,) = config["tool"]["importlinter"]["contracts"]
    return [
        room.strip().removeprefix("memdesc.")
        for layer in contract["layers"]
        for room in layer.split("|")
    ]


@pytest.mark.slow
def test_the_order_holds(house: Path) -> None:
    result = lint(house)
    assert result.returncode == 0, result.stdout


def test_every_room_has_its_place() -> None:
    rooms = {
        path.stem
        for path in (ROOT / "src/memdesc").iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").exists())
    }
    assert rooms - {"__init__", "__main__"} == set(order())


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "from memdesc import descriptors",
        "def later() -> None:\n    import memdesc.services",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from memdesc import testing",
    ],
)
def test_an_import_from_above_is_seen(house: Path, line: str) -> None:
    with (house / "src/memdesc/vm/pages.py").open("a") as pages:
        pages.write(f"\n{line}\n")
    result = lint(house)
    assert result.returncode == 1
    assert "memdesc.vm.pages ->" in result.stdout
