"""`memdesc top`: rates and memory; live on a terminal of 80 by 24, and one table where piped."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import termios
from pathlib import Path

import pytest
from cli_runs import MEMDESC, Terminal, as_json, check_plain, environment, memdesc
from puppets import Puppet, wait_until

import memdesc as md
from memdesc.cli import looking
from memdesc.cli.top import Looks

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may keep a service from answering for a while; forked commands inherit it."""
    monkeypatch.setattr(looking, "PATIENCE", 30.0)


def test_what_moves() -> None:
    with md.Service("busy") as service, md.Service("idle"), Puppet() as client:
        frames = md.BufferMemoryDescriptor(64 * md.page_size, pages=md.PageKind.BASE)
        service.share("frames", frames)
        service.method(os.getpid)
        client.do("c = md.connect('busy')")
        client.begin("while True: c.call('getpid')")
        report = as_json("top", "--once", "--interval", "0.5")
        done = memdesc("top", "--interval", "0.2")
        two = subprocess.Popen(
            [*MEMDESC, "top", "--json", "--interval", "0.1"],
            env=environment(),
            stdout=subprocess.PIPE,
        )
        assert two.stdout is not None
        lines = [json.loads(two.stdout.readline()) for _ in range(2)]
        two.send_signal(signal.SIGINT)
        assert two.wait(30) == 0
        two.stdout.close()
    busy, idle = report["services"]
    assert (busy["name"], idle["name"]) == ("busy", "idle")  # what moves comes first
    assert busy["pid"] == idle["pid"] == os.getpid()
    assert (busy["clients"], idle["clients"]) == (1, 0)
    assert busy["calls_per_second"] > 0
    assert idle["calls_per_second"] == idle["bytes_per_second"] == 0
    assert busy["cpu"] >= 0
    assert busy["shared"] >= frames.capacity
    assert report["seconds"] >= 0.5
    assert lines[0]["time"] < lines[1]["time"]
    assert done.returncode == 0
    check_plain(done.stdout)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["service", "busy", "idle"]


def test_one_service_of_several() -> None:
    with md.Service("busy"), md.Service("idle"):
        done = memdesc("top", "idle", "--interval", "0.1")
        assert (done.returncode, done.stderr) == (0, "")
        assert [line.split()[0] for line in done.stdout.splitlines()] == ["service", "idle"]
        done = memdesc("top", "idel")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "memdesc top: there is no service 'idel'; there is idle, busy\n"


def test_what_goes_through_queues_and_streams() -> None:
    with md.Service("camera") as service, Looks() as looks:
        stream, samples = service.stream("video", nbytes=100), service.queue("samples")
        with md.connect("camera") as client, client.queue("samples") as queue:
            (first,) = looks.look()["services"]
            for _ in range(10):
                samples.put(b"entry")
                stream.publish(b"slot")
                queue.dequeue(timeout=20)
            (one,) = looks.look()["services"]
        wait_until(lambda: not service.clients())
        (after,) = looks.look()["services"]
    assert first["entries_per_second"] is None  # of one look there is none yet
    assert one["entries_per_second"] == one["slots_per_second"] > 0
    assert one["bytes_per_second"] == pytest.approx(9 * one["slots_per_second"])
    assert one["calls_per_second"] == 0
    assert after["entries_per_second"] == 0  # what ended took its counts along


def test_a_service_that_was_superseded_is_asked_no_more() -> None:
    with md.Service("camera") as first, Looks() as looks:
        looks.look()
        with Puppet() as one:
            one.do("s = md.Service('camera', take_over=True)")
            assert first.superseded
            seen = []
            wait_until(lambda: seen.append(looks.look()["services"][0]["pid"]) or one.pid in seen)
            one.do("s.close()")


def test_a_service_that_ends_and_one_that_stops() -> None:
    with Terminal("top", "--interval", "0.1") as terminal, Puppet() as one:
        terminal.read_until(lambda shown: "No services." in shown)
        one.do("s = md.Service('first')")
        terminal.read_until(lambda shown: "first" in shown)
        one.stop()
        terminal.read_until(lambda shown: "does not answer" in shown)
        one.go_on()
        # Looks of before that are still to be read tell of it as stopped.
        terminal.read_until(lambda shown: "first" in shown.rpartition("does not answer")[2])
        one.do("s.close()")
        terminal.shown = ""
        terminal.read_until(lambda shown: "No services." in shown)
        terminal.press(b"q")
        assert terminal.end() == 0


@pytest.mark.parametrize("ends", [b"q", b"\x03", signal.SIGTERM], ids=["q", "Ctrl-C", "SIGTERM"])
def test_live(ends: bytes | signal.Signals) -> None:
    with md.Service("camera" * 10), Terminal("top", "--interval", "0.1") as terminal:
        terminal.read_until(lambda shown: shown.count("cameraca") > 2)
        if isinstance(ends, bytes):
            terminal.press(b"x")  # does nothing
            terminal.press(ends)
        else:
            terminal.process.send_signal(ends)
        assert terminal.end() == (0 if isinstance(ends, bytes) else 128 + ends)
        assert max(map(len, terminal.lines())) <= 80
        assert "\x1b[?1049l" in terminal.shown  # the screen that was there is back
        assert "\x1b[?25h" in terminal.shown  # and the cursor
        now = termios.tcgetattr(terminal.theirs)
        assert now[3] == terminal.before[3]
        assert "Traceback" not in terminal.shown


def test_in_tmux(tmp_path: Path) -> None:
    tmux = shutil.which("tmux")
    if tmux is None:
        pytest.skip("tmux is not installed")
    base = [tmux, "-S", str(tmp_path / "tmux"), "-f", "/dev/null"]

    def ask(*words: str) -> str:
        done = subprocess.run(
            [*base, *words], capture_output=True, text=True, timeout=30, check=False
        )
        return done.stdout

    with md.Service("camera") as service:
        service.share("frames", md.BufferMemoryDescriptor(100, name="frames"))
        script = tmp_path / "script"
        # The service may be kept from answering for a while here too.
        code = MEMDESC[2].replace("main()", "looking.PATIENCE = 30.0; main()")
        code = f"from memdesc.cli import looking; {code}"
        words = shlex.join([*MEMDESC[:2], code])
        script.write_text(
            f"{words} ls -l; {words} map {os.getpid()} | tail -n 5; {words} top --interval 0.2\n"
            f"echo ended with $?\nread line\n"
        )
        started = subprocess.run(
            [*base, "new-session", "-d", "-x", "80", "-y", "24", f"sh {script}"],
            env={name: value for name, value in environment().items() if name != "COLUMNS"},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        if started.returncode:
            pytest.skip(f"tmux can not be started here: {started.stderr}")
        try:
            wait_until(lambda: "q ends" in ask("capture-pane", "-p"), 60)
            shown = ask("capture-pane", "-p").splitlines()
            assert shown[1].split()[:3] == ["service", "pid", "cpu%"]
            assert shown[2].split()[:2] == ["camera", str(os.getpid())]
            ask("send-keys", "q")
            wait_until(lambda: "ended with 0" in ask("capture-pane", "-p"), 60)
            text = ask("capture-pane", "-p", "-S", "-1000")
            assert "share frames, 100 B, read-only, sealed, base pages" in text
            assert "stack" in text
        finally:
            ask("kill-server")
