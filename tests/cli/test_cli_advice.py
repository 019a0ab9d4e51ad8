"""What the commands tell who made a mistake, or sees less than all."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from cli_runs import as_json, memdesc

from memdesc.cli import ls, ls_screen
from memdesc.vm.holders import Survey


def test_files_that_are_not_what_they_are_called(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(b"1234567")
    (tmp_path / "x.txt").write_bytes(b"12345")
    for argument, wanted in (
        (tmp_path / "x.npy", "no .npy"),
        (f"{tmp_path}/x.txt:f4", "multiple of 4"),
        (f"{tmp_path}/x.txt:u1:axb", "'axb'"),
        (f"{tmp_path}/x.txt:u1:", "shape ''"),
        (tmp_path, "directory"),
        (".", "directory"),
    ):
        done = memdesc("serve", argument, "--quiet")
        assert done.returncode == 2, done.stderr
        assert wanted in done.stderr.replace("\n", " ")
        assert "Traceback" not in done.stderr


def test_two_files_of_one_name_lead_to_the_way_out(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.bin").write_bytes(b"123")
    done = memdesc("serve", tmp_path / "a/x.bin", tmp_path / "b/x.bin", "--quiet")
    assert done.returncode == 2
    assert "NAME=FILE" in done.stderr
    assert "FileSource(" not in done.stderr


def test_a_dead_service_is_told_in_one_line_of_top(runtime_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(runtime_dir / "gone"))
    done = memdesc("top", "--once")
    (runtime_dir / "gone").unlink()
    assert ls_screen.STATES["dead"] in done.stdout
    room = 80 - len(f"{'name':<10} {'pid':>7}  ")
    assert max(map(len, ls_screen.STATES.values())) <= room


def test_tasks_that_can_not_be_looked_at_are_told_where_one_asks_for_all(
    monkeypatch: pytest.MonkeyPatch, runtime_dir: Path
) -> None:
    seen = Survey(hidden_pids=[1, os.getpid()])
    monkeypatch.setattr(ls, "survey", lambda _: seen)
    told = ls.gather()
    assert (told["hidden_tasks"], told["hidden_pids"]) == (2, [1, os.getpid()])
    done = memdesc("ls")
    assert "looked at" not in done.stdout
    done = memdesc("ls", "--long")
    assert f"1, {os.getpid()}" in done.stdout
    assert as_json("ls")["hidden_pids"] == [1, os.getpid()]
