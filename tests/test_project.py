"""The project's own promises: light import, small files, one version, pinned and plain."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import memdesc

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted((ROOT / "src").rglob("*.py"))

# More than 500 lines, and why.
LONG_FILES: dict[str, str] = {}

# Put together here, so that this file does not contain them.
FORBIDDEN = {
    "a path of one machine": [f"/{name}/" for name in ("work", "root", "home")],
    "a package registry": [".".join(("pypi", "org")), "".join(("python", "hosted"))],
}
MADE = {".git", ".venv", "build", "dist", "_build", "__pycache__", ".hypothesis"}


def files() -> Iterator[Path]:
    """Every text file of the repository."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in MADE and "_cache" not in name]
        for name in names:
            path = Path(folder, name)
            if path.suffix not in {".so", ".png", ".pyc"} and not path.is_symlink():
                yield path


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    ).stdout


def test_importing_does_nothing_and_brings_nothing_heavy() -> None:
    code = """
import json, os, sys, threading
fds = sorted(os.listdir("/proc/self/fd"))
import memdesc
print(json.dumps({
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
    "ours": sorted(name for name in sys.modules if name.startswith("memdesc")),
    "threads": threading.active_count(),
    "fds": sorted(os.listdir("/proc/self/fd")) == fds,
}))
"""
    seen = json.loads(run(code))
    heavy = {"numpy", "msgspec", "click", "rich", "pytest", "asyncio", "hypothesis"}
    assert not heavy & set(seen["modules"])
    assert (seen["threads"], seen["fds"]) == (1, True)
    outer = {"memdesc.testing", "memdesc.cli", "memdesc.iokit", "memdesc.files", "memdesc.interop"}
    assert not outer & set(seen["ours"])


def test_another_system_is_told_why() -> None:
    code = """
import sys
sys.platform = "darwin"
try:
    import memdesc
except ImportError as error:
    print(error)
"""
    assert "Linux" in run(code)
    assert "darwin" in run(code)


def test_everything_exported_exists() -> None:
    names = {name for name in dir(memdesc) if not name.startswith("_")}
    assert {"BufferMemoryDescriptor", "Service", "connect", "Task", "copyin"} <= names
    assert [name for name in names if not hasattr(memdesc, name)] == []


def test_one_version() -> None:
    version = PROJECT["version"]
    assert memdesc.__version__ == version
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[{re.escape(version)}\]", changes, re.M)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_files_and_functions_are_small(path: Path) -> None:
    text = path.read_text()
    length = len(text.splitlines())
    assert length <= 500 or LONG_FILES.get(str(path.relative_to(ROOT)))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1] if ast.get_docstring(node) and node.body[1:] else node.body[0]
            assert (node.end_lineno or 0) - first.lineno < 50, f"{path}:{node.lineno} {node.name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_every_wrong_argument_has_an_errno(path: Path) -> None:
    calls = [one for one in ast.walk(ast.parse(path.read_text())) if isinstance(one, ast.Call)]
    wrong = [one for one in calls if ast.unparse(one.func) == "InvalidArgument"]
    assert all("errno" in {given.arg for given in one.keywords} for one in wrong)


def test_no_reason_for_a_file_that_is_not_long() -> None:
    for name, reason in LONG_FILES.items():
        assert reason
        assert len((ROOT / name).read_text().splitlines()) > 500


def test_the_repository_speaks_of_the_project_alone() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {what}: {word}"
        for path in files()
        for what, words in FORBIDDEN.items()
        for word in words
        if word in path.read_text(errors="replace")
    ]
    assert found == []


def test_constraints_are_names_and_versions_and_fit_what_is_asked_for() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {}
    for line in lines:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line)
        assert match, f"constraints.txt: {line!r}"
        pins[canonical(match[1])] = Version(match[2])
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    extras = PROJECT["optional-dependencies"].values()
    for text in [*build, *PROJECT["dependencies"], *(line for extra in extras for line in extra)]:
        wanted = Requirement(text)
        assert pins[canonical(wanted.name)] in wanted.specifier, text


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_make_alone_lists_commands_that_exist() -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    menu = subprocess.run([make, "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = set(re.findall(r"^make ([\w-]+)", menu, re.M))
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= listed
    assert listed <= set(re.findall(r"^([\w-]+):", makefile, re.M))


def test_what_runs_for_every_change_is_the_documented_command() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text().splitlines()
