"""`memdesc serve`, run as its users run it: as a program."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

import memdesc as md
from memdesc.cli import serve
from memdesc.cli.serve import parse_file
from memdesc.files import FileSource

pytestmark = pytest.mark.slow

MEMDESC = [sys.executable, "-c", "from memdesc.cli import main; main()"]
PATIENCE = 60


class Served:
    """A running `memdesc serve --json`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._text = b""

    def next(self, event: str) -> dict[str, Any]:
        """The next record of that kind; others are passed over."""
        assert self.process.stdout is not None
        until = time.monotonic() + PATIENCE
        while True:
            line, newline, rest = self._text.partition(b"\n")
            if newline:
                self._text = rest
                record: dict[str, Any] = json.loads(line)
                if record["event"] == event:
                    return record
                continue
            left = max(until - time.monotonic(), 0)
            assert select.select([self.process.stdout], [], [], left)[0], f"no {event}"
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            assert more, f"it ended before {event}"
            self._text += more

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit status, and what it said on stderr."""
        self.process.send_signal(number)
        _, told = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, told.decode()


@contextmanager
def serving(*arguments: str | Path) -> Iterator[Served]:
    command = [*MEMDESC, "serve", "--json", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield Served(process)
        finally:
            process.kill()


def put(path: Path, array: np.ndarray) -> Path:
    np.save(path.with_suffix(".new.npy"), array)
    path.with_suffix(".new.npy").replace(path)
    return path


def test_serves_swaps_and_ends(tmp_path: Path) -> None:
    path = put(tmp_path / "weights.npy", np.arange(1000.0).reshape(10, 100))
    (tmp_path / "b.bin").write_bytes(bytes(range(24)))
    with serving(path, f"frames={tmp_path}/b.bin:<u2:3x4") as served:
        loaded = served.next("loaded")
        assert [(one["name"], one["shape"], one["dtype"]) for one in loaded["arrays"]] == [
            ("weights", [10, 100], "<f8"),
            ("frames", [3, 4], "<u2"),
        ]
        assert loaded["array_bytes"] == 8024
        assert loaded["read_bytes"] == 8128 + 24
        assert (loaded["name"], loaded["pid"]) == ("weights", served.process.pid)
        assert served.next("serving")["version"] == 1
        with md.connect("weights") as connection:
            joined = served.next("joined")
            assert (joined["client"], joined["user"]) == (os.getpid(), os.geteuid())
            assert joined["clients"] == 1
            arrays = connection.arrays()
            assert arrays["weights"][3, 4] == 304
            assert connection["frames"].shape == (3, 4)

            put(path, np.zeros(3))
            served.process.send_signal(signal.SIGHUP)
            assert served.next("swapped")["version"] == 2
            assert connection["weights"].shape == (3,)
            assert arrays["weights"][3, 4] == 304

            path.write_bytes(b"rubbish")
            served.process.send_signal(signal.SIGHUP)
            failed = served.next("failed")
            assert (failed["error"], failed["errno"]) == ("InvalidArgument", errno.EBADMSG)
            assert failed["version"] == 2
            assert connection["weights"].shape == (3,)
            del arrays
        left = served.next("left")
        assert (left["clients"], left["opens"]) == (0, 4)
        served.process.terminate()
        assert served.next("stopped")["opens"] == 4
        code, told = served.end()
        assert code == 0
    lines = told.splitlines()  # the same, in words
    assert "Version 1: 2 arrays, 7.84 KiB; 0 B in huge pages" in lines
    assert "Version 2 is served from now on." in lines
    assert any(line.startswith("RELOADING FAILED, version 2 is served on") for line in lines)
    assert "\x1b" not in told
    assert told.isascii()


def test_quiet_says_nothing_but_errors(tmp_path: Path) -> None:
    path = put(tmp_path / "weights.npy", np.full(3, 1))
    command = [*MEMDESC, "serve", "--quiet", "--watch", "--name", "model", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        with md.connect("model", timeout=PATIENCE) as connection:
            kept = connection["weights"]
        path.write_bytes(b"rubbish")
        process.send_signal(signal.SIGHUP)
        line = process.stderr.readline()
        assert line.startswith(b"memdesc serve: ")
        assert str(path) in line.decode()
        process.send_signal(signal.SIGINT)
        out, told = process.communicate(timeout=PATIENCE)
    # A machine that was slow with the signal has seen of itself before that the file was changed.
    assert (process.returncode, out, told.replace(line, b"")) == (130, b"", b"")
    assert kept.tolist() == [1, 1, 1]
    with pytest.raises(md.ServiceNotFoundError):
        md.connect("model", timeout=0)


class Enough(Exception):
    """Ends a run from within."""


def test_what_changed_is_loaded_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "TURN", 0.02)
    path = put(tmp_path / "weights.npy", np.full(3, 1))
    records: SimpleQueue[dict[str, Any]] = SimpleQueue()
    turns: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def tell(record: dict[str, Any]) -> None:
        records.put(record)
        if record["version"] == 4 and record["event"] == "swapped":
            raise Enough

    wishes = serve.Wishes("model", [FileSource(path)], watch=True)
    serving = serve.Serving(wishes, tell, lambda *_: None, turns.put)

    def run_it() -> None:
        with contextlib.suppress(Enough):
            serving.run()

    thread = threading.Thread(target=run_it, daemon=True)
    thread.start()

    def expect(event: str, version: int, **more: object) -> None:
        while (record := records.get(timeout=PATIENCE))["event"] != event:
            assert record["event"] in ("joined", "left", "loaded", "serving")
        assert record["version"] == version
        assert record | more == record

    expect("serving", 1)
    put(path, np.full(3, 2))
    expect("swapped", 2, why="changed")
    (tmp_path / "rubbish").write_bytes(b"rubbish")
    (tmp_path / "rubbish").replace(path)
    expect("failed", 2, why="changed", errno=errno.EBADMSG)
    (tmp_path / "rubbish").write_bytes(b"more rubbish")
    (tmp_path / "rubbish").replace(path)
    serving.ask_to_reload()
    while records.get(timeout=PATIENCE)["why"] != "asked to":  # it may have seen it of itself
        pass
    while not turns.empty():
        turns.get()
    for _ in range(5):  # what a signal had it try it does not try, and tell of, again
        turns.get(timeout=PATIENCE)
    assert records.empty()
    path.unlink()
    for _ in range(5):  # gone: it waits for another, and does not try again and again
        turns.get(timeout=PATIENCE)
    with md.connect("model") as connection:
        assert connection["weights"].tolist() == [2, 2, 2]
    put(path, np.full(3, 3))
    expect("swapped", 3)
    serving.ask_to_reload()
    expect("swapped", 4, why="asked to")
    thread.join(PATIENCE)
    expect("stopped", 4)


# Runs the commands that it reads, one after the other: starting Python takes longer than these.
MANY = """
import json, sys
from memdesc.cli.commands import memdesc
for arguments in json.loads(sys.argv[1]):
    try:
        memdesc(arguments)
    except SystemExit as end:
        print("exit", end.code, file=sys.stderr, flush=True)
"""


def test_files_that_can_not_be_served(tmp_path: Path) -> None:
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY rubbish")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    names = ["missing.npy", "", "empty", "pipe", "bad.npy"]
    if os.geteuid():
        put(tmp_path / "secret.npy", np.zeros(3)).chmod(0)
        names.append("secret.npy")
    commands = [["serve", str(tmp_path / name)] for name in names]
    commands += [
        ["serve", "--json", "--quiet", str(tmp_path / "bad.npy")],
        ["serve"],
        ["serve", "--pages", "large", str(tmp_path / "bad.npy")],
        ["serve", "--name", "", str(put(tmp_path / "good.npy", np.zeros(3)))],
        ["serve", "--name", "taken", str(tmp_path / "good.npy")],  # this is no fault of the file
    ]
    with md.Service("taken"):
        done = subprocess.run(
            [sys.executable, "-c", MANY, json.dumps(commands)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    assert "Traceback" not in done.stderr, done.stderr
    assert json.loads(done.stdout)["errno"] == errno.EBADMSG  # of --json, and nothing else
    codes = [int(code) for code in re.findall(r"^exit (\d+)$", done.stderr, re.M)]
    assert codes == [2] * (len(commands) - 1) + [1], done.stderr
    told = re.split(r"^exit \d+\n", done.stderr, flags=re.M)
    for name, text in zip(names, told, strict=False):
        assert text.startswith("memdesc serve: ")
        assert str(tmp_path / name) in text
        assert len(text.splitlines()) == 1


def test_on_a_terminal_a_table_lives(tmp_path: Path) -> None:
    path = put(tmp_path / "weights.npy", np.zeros((4, 5), "f4"))
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24", "NO_COLOR": "1"}
    command = [*MEMDESC, "serve", str(path)]
    with subprocess.Popen(
        command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        with md.connect("weights", timeout=PATIENCE) as connection:
            assert connection["weights"].shape == (4, 5)
            shown = read_until(ours, b"1 client connected; shares were opened 1 time")
        path.write_bytes(b"rubbish")
        process.send_signal(signal.SIGHUP)
        shown += read_until(ours, b"RELOADING FAILED")
        process.send_signal(signal.SIGINT)
        shown += read_until(ours, None)
        assert process.wait(PATIENCE) == 130
    os.close(ours)
    text = shown.decode()
    assert "weights" in text
    assert "4 x 5" in text
    assert "\x1b[" in text  # it moves
    assert not re.search(r"\x1b\[[\d;]*[34]\d[;m]", text)  # and has no colour
    plain = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "\n", text).replace("\r", "")
    assert max(len(line) for line in plain.splitlines() if str(path) not in line) <= 80


def read_until(fd: int, wanted: bytes | None) -> bytes:
    shown = b""
    while wanted is None or wanted not in re.sub(rb"\s+", b" ", shown):
        assert select.select([fd], [], [], PATIENCE)[0], shown
        try:
            shown += os.read(fd, 1 << 16)
        except OSError:  # EIO: the last holder of the other end has ended
            assert wanted is None, shown
            break
    return shown


def test_a_terminal_that_is_hung_up_ends_it(tmp_path: Path) -> None:
    path = put(tmp_path / "weights.npy", np.zeros(3))
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*MEMDESC, "serve", str(path)],
        env=os.environ | {"TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        read_until(ours, b"client")
        os.close(ours)
        process.send_signal(signal.SIGHUP)  # as the kernel does to a session's leader
        assert process.wait(PATIENCE) in (0, 1)


def test_whoever_reads_may_go(tmp_path: Path) -> None:
    path = put(tmp_path / "weights.npy", np.zeros(3))
    with contextlib.ExitStack() as stack, serving("--quiet", path) as served:
        served.next("serving")
        assert served.process.stdout is not None
        served.process.stdout.close()
        with contextlib.suppress(md.PeerGoneError):  # it may end before it answers
            stack.enter_context(md.connect("weights"))  # and stays: who left at once is not told of
        assert served.process.wait(PATIENCE) == 128 + signal.SIGPIPE
        assert served.process.stderr is not None
        assert served.process.stderr.read() == b""


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("a.npy", FileSource(Path("a.npy"))),
        ("x=a.npy", FileSource(Path("a.npy"), "x")),
        ("raw:f4", FileSource(Path("raw"), None, "f4")),
        ("raw:<u2:3x4", FileSource(Path("raw"), None, "<u2", (3, 4))),
        ("x=raw:float32:7", FileSource(Path("raw"), "x", "float32", (7,))),
        ("y=odd:u1", FileSource(Path("y=odd:u1"))),  # such a file is there
        ("./y=odd", FileSource(Path("./y=odd"))),
        ("missing:u1", FileSource(Path("missing:u1"))),
    ],
)
def test_how_files_are_named(
    text: str, source: FileSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.npy", "raw", "y=odd:u1"):
        (tmp_path / name).touch()
    assert parse_file(text) == source


@pytest.mark.parametrize("text", ["raw:u1:axb", "raw:u1:", "raw:u1:3x", "x=raw:u1:3.5"])
def test_a_shape_that_is_none(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw").touch()
    with pytest.raises(md.InvalidArgument) as caught:
        parse_file(text)
    assert caught.value.errno == errno.EINVAL
