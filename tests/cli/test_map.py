"""`memdesc map`: an address space in the terminal, as SVG and as JSON."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from children import NOBODY, become, in_child
from cli_runs import ESCAPES, Terminal, as_json, check_plain, environment, memdesc, program
from puppets import Puppet

import memdesc as md
from memdesc.cli import map as maps

pytestmark = pytest.mark.slow

SVG = "{http://www.w3.org/2000/svg}"
BAD_NAME = "a<&\"'>\x1b[31m\né"
SETUP = f"""
import mmap
b = md.BufferMemoryDescriptor(2 * md.page_size, name={BAD_NAME!r}); b.prepare()
s = md.Service("camera"); s.share("frames", b)
foreign = os.memfd_create("foreign"); os.ftruncate(foreign, 4096)
f = mmap.mmap(foreign, 4096); a = mmap.mmap(-1, 8192); a[0] = 1
"""


def find(report: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [one for one in report["regions"] if one["name"] == name]


def test_every_form(tmp_path: Path) -> None:
    with Puppet() as owner, Puppet() as client:
        owner.do(SETUP)
        client.do("c = md.connect('camera'); m = c.map('frames'); bytes(m)")
        report = as_json("map", owner.pid)
        theirs = as_json("map", client.pid)
        text = memdesc("map", owner.pid)
        whole = program("map", owner.pid, "--all")
        pictures = [tmp_path / "folded.svg", tmp_path / "whole.svg"]
        for picture, options in zip(pictures, ([], ["--all"]), strict=True):
            done = memdesc("map", owner.pid, "--svg", picture, *options)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        owner.do("s.close()")
    check_json(report, theirs, owner.pid, client.pid)
    for done in (text, whole):
        assert (done.returncode, done.stderr) == (0, "")
        check_plain(done.stdout)
        assert f"also {client.pid} " in done.stdout
        assert "# buffer" in done.stdout
    assert len(whole.stdout) > len(text.stdout)
    for picture in pictures:
        check_svg(picture, owner.pid, client.pid)


def check_json(report: Any, theirs: Any, owner: int, client: int) -> None:
    assert set(report) == {
        "pid", "user", "program", "memory", "hidden", "regions", "objects", "hidden_tasks",
        "held_up_pids",
    }  # fmt: skip
    assert (report["pid"], report["user"], report["hidden"]) == (owner, os.geteuid(), None)
    (region,) = find(report, BAD_NAME.replace("\n", "\n"))
    assert (region["kind"], region["permissions"], region["length"]) == (
        "buffer", "rw-s", 2 * md.page_size,
    )  # fmt: skip
    assert region["wired"] == region["resident"] == 2 * md.page_size
    assert int(region["end"], 16) - int(region["start"], 16) == region["length"]
    (other,) = find(theirs, BAD_NAME)
    assert (other["kind"], other["permissions"]) == ("buffer", "r--s")
    key = region["device"], region["inode"]
    assert key == (other["device"], other["inode"])
    (object_,) = [one for one in report["objects"] if (one["device"], one["inode"]) == key]
    assert {one["pid"]: one["access"] for one in object_["holders"]} == {
        owner: "read-write",
        client: "read-only",
    }
    assert object_["ours"] is True
    assert find(report, "foreign")[0]["kind"] == "memfd"
    kinds = {one["kind"] for one in report["regions"]}
    assert kinds >= {"buffer", "memfd", "shared", "file", "private", "heap", "stack", "kernel"}
    assert kinds <= set(maps.KINDS)
    starts = [int(one["start"], 16) for one in report["regions"]]
    assert starts == sorted(starts)
    assert report["memory"]["locked"] >= 2 * md.page_size


def check_svg(path: Path, owner: int, client: int) -> None:
    data = path.read_bytes()
    assert data.isascii()
    assert not any(byte < 32 and byte != 10 for byte in data)
    root = ET.fromstring(data)
    assert root.tag == f"{SVG}svg"
    title, desc = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert title is not None
    assert desc is not None
    assert f"task {owner}" in (title.text or "")
    assert "1 other task has it" in (desc.text or "")
    assert root.get("aria-labelledby") == f"{title.get('id')} {desc.get('id')}"
    texts = [one.text or "" for one in root.iter(f"{SVG}text")]
    assert any(text.startswith(f"also {client} ") for text in texts)
    assert any("a<&\"'>\\x1b[31m" in text for text in texts)
    height, width = int(root.get("height", "0")), int(root.get("width", "0"))
    for one in root.iter(f"{SVG}rect"):
        assert float(one.get("x", "0")) + float(one.get("width", "0")) <= width
        assert float(one.get("y", "0")) + float(one.get("height", "0")) <= height
    assert not [one for one in root.iter() if one.tag.endswith(("script", "image", "a"))]
    assert "href" not in path.read_text()


def test_on_a_terminal() -> None:
    with Puppet() as one:
        one.do(SETUP)
        shown = []
        for more in ({}, {"NO_COLOR": "1"}):
            with Terminal("map", one.pid, **more) as terminal:
                assert terminal.end() == 0
                assert max(map(len, terminal.lines())) <= 80
                shown.append(terminal.shown)
        one.do("s.close()")
    colours = [ESCAPES.findall(text) for text in shown]
    assert colours[0]
    assert not [
        one for one in colours[1] if one.endswith("m") and one not in ("\x1b[0m", "\x1b[1m")
    ]
    assert "│######│" in ESCAPES.sub("", shown[0])
    assert "│######│" in ESCAPES.sub("", shown[1])


def test_tasks_that_are_not_there(tmp_path: Path) -> None:
    with Puppet() as one:
        gone = one.pid
    for pid in (gone, 2**31 - 1):
        done = memdesc("map", pid)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert f"{pid}" in done.stderr
    assert memdesc("map", "0").returncode == 2
    with md.Service("camera"), md.Service("9"):
        done = memdesc("map", "camrea")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert "there is camera" in done.stderr
    done = memdesc("map", os.getpid(), "--svg", tmp_path / "no" / "\x1b[2Jsuch" / "folder")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "\x1b" not in done.stderr


def test_the_task_of_a_service(runtime_dir: Path) -> None:
    with Puppet() as one:
        one.do("s, t = md.Service('camera'), md.Service('9')")
        assert (
            as_json("map", "camera")["pid"] == as_json("map", runtime_dir / "9")["pid"] == one.pid
        )
        one.do("s.close(); t.close()")


def test_an_ordinary_user_of_another_users_task() -> None:
    pid = os.getpid()

    def look() -> Any:
        become(NOBODY)
        return maps.gather(pid)

    report = in_child(look)
    if os.geteuid() == NOBODY:
        pytest.skip("this user is no other one")
    assert report["regions"] == []
    assert "CAP_SYS_PTRACE" in report["hidden"]
    assert report["memory"]["resident"] > 0


def test_what_may_not_be_seen_is_said() -> None:
    """As the command shows it: the sums, what is hidden and what would show it; status 1."""
    code = (
        "import sys; sys.argv[0] = 'memdesc'\n"
        "import os, memdesc.cli.map as maps\n"
        "from memdesc.errors import NotPrivilegedError\n"
        "def denied(task): raise NotPrivilegedError('cannot read it; CAP_SYS_PTRACE', errno=13)\n"
        "maps.details = denied\n"
        "from memdesc.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "map", str(os.getpid())],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    check_plain(done.stdout)
    assert "resident" in done.stdout
    assert "CAP_SYS_PTRACE" in done.stdout
