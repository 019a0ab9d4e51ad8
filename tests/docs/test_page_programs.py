"""Programs on pages: those that a page starts print what it says, all other blocks run too."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
STARTED = [
    page.stem
    for page in PAGES
    if re.search(r"^\$ (?:\w+=\S+ )*python \w+\.py", page.read_text(), re.M)
]


def programs(page: str) -> dict[str, str]:
    """The blocks of a page that begin with a comment, which is the name of their file."""
    text = (DOCS / f"{page}.md").read_text()
    return dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", text, re.S | re.M))


def sessions(page: str) -> list[str]:
    """What a page types into a shell, and what comes of it."""
    text = (DOCS / f"{page}.md").read_text()
    found: list[str] = re.findall(r"^```console\n(.*?)^```", text, re.S | re.M)
    return [one for one in found if re.search(r"^\$ (?:\w+=\S+ )*python \w+\.py", one, re.M)]


@pytest.mark.slow
@pytest.mark.leaves("socket", reason="a program that is ended by a signal leaves its socket")
@pytest.mark.parametrize("page", STARTED)
def test_the_programs_print_what_the_page_says(page: str, tmp_path: Path) -> None:
    for name, text in programs(page).items():
        (tmp_path / name).write_text(text)
    for session in sessions(page):
        lines = session.splitlines()
        shown = [line for line in lines if not line.startswith("$ ")]
        typed = [line[2:] for line in lines if line.startswith("$ ")]
        assert sorted(play(typed, tmp_path)) == sorted(shown)


def play(typed: list[str], folder: Path) -> list[str]:
    """Run lines as a shell does that knows `&` and `kill %1`; the lines printed by all."""
    with ExitStack() as ends, (folder / "output").open("w+") as output:
        running: list[subprocess.Popen[str]] = []
        for line in typed:
            *background, last = re.split(r" &(?: |$)", line)
            if last == "kill %1":
                running.pop(0).send_signal(signal.SIGTERM)
                continue
            for command in [*background, *([last] if last else [])]:
                process = _start(command, folder, output.fileno())
                ends.callback(process.wait, 30)
                ends.callback(process.kill)
                running.append(process)
            if last:
                assert running.pop().wait(90) == 0, line
        assert [process.wait(90) for process in running] == [0] * len(running)
        output.seek(0)
        return output.read().splitlines()


def _start(command: str, folder: Path, output: int) -> subprocess.Popen[str]:
    """Start a command of a page; `python` and `memdesc` are those that run the test."""
    words = shlex.split(command)
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(one for one in sys.path if one))
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    program = {"python": [sys.executable], "memdesc": [sys.executable, "-m", "memdesc"]}[words[0]]
    return subprocess.Popen(
        [*program, *words[1:]], cwd=folder, env=environment, stdout=output, text=True
    )


@pytest.mark.slow
def test_the_tutorial_s_stranger(tmp_path: Path) -> None:
    """Its last line goes by what the kernel allows: a copy for sure, a mapping perhaps."""
    for name in ("stranger.py", "looking.py"):
        (tmp_path / name).write_text(programs("tutorial")[name])
    first, second = play(["python looking.py"], tmp_path)
    assert first == "b'hello'"
    assert second == first or "CAP_CHECKPOINT_RESTORE" in second
