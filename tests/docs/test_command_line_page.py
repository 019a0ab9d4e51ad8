"""docs/command-line.md: its programs run, its tables have every key, its lists are as they come."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from puppets import wait_until

from memdesc.cli import looking, ls, map as maps
from memdesc.cli.ls_screen import LsScreen
from memdesc.cli.top import Looks

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = (DOCS / "command-line.md").read_text()
PROGRAMS = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", TEXT, re.S))


@contextmanager
def programs(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The page's camera and two of its viewers."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(one for one in sys.path if one))
    started = []
    try:
        for name in ("camera", "viewer", "viewer"):
            (folder / f"{name}.py").write_text(PROGRAMS[name])
            command = [sys.executable, folder / f"{name}.py"]
            started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE))
        yield started[0]
    finally:
        for one in started:
            one.kill()
            one.communicate(timeout=30)


def kinds(buffers: list[dict[str, Any]]) -> list[str]:
    return sorted(one["kind"] for one in buffers)


@pytest.mark.slow
@pytest.mark.leaves("socket", reason="the camera is killed")
def test_what_the_page_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "PATIENCE", 30.0)  # of a busy machine
    assert set(PROGRAMS) == {"camera", "viewer"}
    with programs(tmp_path) as camera, Looks() as looks:
        wait_until(lambda: kinds(_camera()["buffers"]).count("subscriber") == 2, 60)
        wait_until(lambda: _camera()["calls"] > 2, 60)
        report = ls.gather("camera")
        address_space = maps.gather(camera.pid)
        look = looks.look()
        LsScreen(to_stderr=False).tell(report, long=True)
    shown = capsys.readouterr().out
    (printed,) = re.findall(r"```console\n\$ memdesc ls camera\n(.*?)```", TEXT, re.S)
    assert heads(shown) == heads(printed)
    for one in (report, address_space, look):
        for key in keys(json.loads(json.dumps(one))):
            assert f"`{key}`" in TEXT, key


def _camera() -> dict[str, Any]:
    found: dict[str, Any] = ls.gather("camera")["services"][0]
    return found | {"calls": found["calls"] or 0}


def heads(text: str) -> list[str]:
    """The name that each line begins with, and how often; pids and figures are another run's."""
    return sorted(re.findall(r"^  ([a-z]\w* [a-z]+) ", text, re.M))


def keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        for one in value.values():
            yield from keys(one)
    if isinstance(value, list):
        for one in value:
            yield from keys(one)


def test_the_picture_is_one() -> None:
    path = DOCS / "pictures" / "map.svg"
    assert "(pictures/map.svg)" in TEXT
    assert path.stat().st_size < 60_000
    assert ET.fromstring(path.read_text()).tag.endswith("svg")


def test_what_is_on_a_terminal_fits_it() -> None:
    for block in re.findall(r"```console\n(.*?)```", TEXT, re.S):
        assert max(map(len, block.splitlines())) <= 80
