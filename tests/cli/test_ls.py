"""`memdesc ls`: services, their buffers, and who has these; hostile ones told apart."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from children import NOBODY, become, in_child, kill, start
from cli_runs import as_json, check_plain, memdesc, program
from puppets import Puppet, end_holder, wait_until

import memdesc as md
from memdesc.cli import in_transit, looking, ls
from memdesc.services import protocol
from memdesc.services.describing import Inquiry

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may keep a service from answering for a while; forked commands inherit it."""
    monkeypatch.setattr(looking, "PATIENCE", 30.0)


@pytest.fixture
def less_patience(patience: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody never answers."""
    monkeypatch.setattr(looking, "PATIENCE", 2.0)


@contextmanager
def camera_with_client(name: str = "camera") -> Iterator[tuple[md.Service, dict[str, Any], int]]:
    """A service of this process with a client that uses all of it; its buffers by name."""
    with md.Service(name) as service, Puppet() as client:
        frames = md.BufferMemoryDescriptor(3 * md.page_size, name="fr\x1b[31mames")
        settings = md.BufferMemoryDescriptor(100, max_access=md.Access.READ_WRITE)
        frames.prepare()
        service.share("frames", frames, shape=(3, md.page_size), dtype="u1")
        service.share("set\x1b[2Jtings\n", settings)
        service.stream("video", nbytes=100)
        service.queue("samples", capacity=4096)
        service.method(os.getpid)
        client.do(
            f"c = md.connect({name!r}); a = c.map('frames'); s = c.map('set\\x1b[2Jtings\\n')"
        )
        client.do("v = c.subscribe('video'); q = c.queue('samples'); c.call('getpid')")
        client.do("bytes(a), bytes(s), None")
        yield service, {"frames": frames, "settings": settings}, client.pid
        frames.complete()


def test_all_that_is_there() -> None:
    with camera_with_client() as (service, buffers, client):
        report = as_json("ls")
        text = memdesc("ls", "--long")
        short = program("ls")
    (one,) = report["services"]
    assert (one["name"], one["path"], one["state"]) == ("camera", str(service.path), "serving")
    assert (one["pid"], one["user"]) == (os.getpid(), os.geteuid())
    assert [one[key] for key in ("clients", "shares", "queues", "streams", "methods", "calls")] == [
        1, 2, 1, 1, 1, 1,
    ]  # fmt: skip
    assert [(it["pid"], it["user"]) for it in one["connected"]] == [(client, os.geteuid())]
    kinds = [it["kind"] for it in one["buffers"]]
    assert kinds == ["share", "share", "stream", "subscriber", "queue", "queue end"]
    frames, settings, stream = one["buffers"][:3]
    assert (frames["name"], frames["nbytes"], frames["access"]) == (
        "frames", 3 * md.page_size, "read-only",
    )  # fmt: skip
    (object_,) = frames["objects"]
    assert (object_["device"], object_["inode"]) == buffers["frames"].memory.identity
    assert object_["nbytes"] == object_["allocated"] == 3 * md.page_size
    assert {it["pid"]: it["access"] for it in object_["holders"]} == {
        os.getpid(): "read-write",
        client: "read-only",
    }
    assert {it["pid"]: it["wired"] for it in object_["holders"]} == {
        os.getpid(): 3 * md.page_size,
        client: 0,
    }
    assert object_["wired"] == object_["holders"][0]["mapped"] == 3 * md.page_size
    assert {it["access"] for it in settings["objects"][0]["holders"]} == {"read-write"}
    assert {it["access"] for it in stream["objects"][0]["holders"]} == {"read-write", "read-only"}
    for done in (text, short):
        assert (done.returncode, done.stderr) == (0, "")
        check_plain(done.stdout)
    assert "set\\x1b[2Jtings\\n" in text.stdout
    assert f"client {client}" in text.stdout
    assert "frames" not in short.stdout


def test_buffers_of_no_service() -> None:
    with md.BufferMemoryDescriptor(md.page_size, name="lo\x1b[31mne") as buffer, Puppet() as one:
        one.do("b = md.BufferMemoryDescriptor(100, name='theirs')")
        one.do("m = os.memfd_create('foreign'); os.ftruncate(m, 4096)")
        report = as_json("ls")
        text = memdesc("ls", "-l").stdout
        identity = buffer.memory.identity
    found = {
        (it["objects"][0]["device"], it["objects"][0]["inode"]): it for it in report["buffers"]
    }
    assert found[identity]["name"] == "lo\x1b[31mne"
    assert found[identity]["ours"] is True
    assert [it["pid"] for it in found[identity]["objects"][0]["holders"]] == [os.getpid()]
    names = [it["name"] for it in report["buffers"]]
    assert "theirs" in names
    assert "foreign" not in names  # another program's: its mode is not as we make them
    check_plain(text)
    assert "lo\\x1b[31mne" in text


def test_one_that_is_named() -> None:
    with camera_with_client() as (_, _, client), md.Service("other"):
        report = as_json("ls", "camera")
        text = memdesc("ls", "camera").stdout
        assert [one["name"] for one in report["services"]] == ["camera"]
        assert report["buffers"] == []
        assert str(client) in text
        assert "other" not in text


def test_what_is_not_there() -> None:
    done = memdesc("ls", "nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "nowhere: there is no such service\n"
    report = as_json("ls", "nowhere", status=1)
    assert (report["services"][0]["state"], report["others"]) == ("missing", [])
    done = memdesc("ls")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("No services.\n")
    done = memdesc("ls", "x" * 200)  # no socket can have that name
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


def test_who_mistypes_a_name_is_told_those_that_there_are() -> None:
    with md.Service("archive"), md.Service("camera"), md.Service("ca\x1b[2Jm"):
        assert as_json("ls", "camrea", status=1)["others"] == ["camera", "archive", "ca\x1b[2Jm"]
        assert as_json("ls", "camera")["others"] == []
        done = memdesc("ls", "camrea")
    assert (done.returncode, done.stdout) == (1, "")
    assert "camera" in done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.leaves("socket", reason="a dead service's is made, to see that it stays")
def test_the_dead_are_told_apart_and_stay(runtime_dir: Path) -> None:
    dead = runtime_dir / "de\nad"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(dead))
    (runtime_dir / "no socket").touch()
    report = as_json("ls")
    assert [(one["name"], one["state"]) for one in report["services"]] == [("de\nad", "dead")]
    assert as_json("ls", "dead", status=1)["others"] == []  # which is no help to anybody
    assert dead.is_socket()
    done = memdesc("ls")
    check_plain(done.stdout)
    assert "de\\nad: dead" in done.stdout
    assert memdesc("ls", "de\nad").returncode == 1
    dead.unlink()


@pytest.mark.usefixtures("less_patience")
def test_hostile_services_cost_nobody_else_anything(runtime_dir: Path) -> None:
    with (
        strange(runtime_dir / "silent", None),
        strange(runtime_dir / "rub\x1b[2Jbish", b"\xc1"),
        strange(runtime_dir / "endless", _endless),
        strange(runtime_dir / "older", b""),
        md.Service("real") as service,
    ):
        service.share("frames", md.BufferMemoryDescriptor(100))
        report = as_json("ls")
        text = memdesc("ls", "-l").stdout
    states = {one["name"]: one["state"] for one in report["services"]}
    assert states.pop("endless") in ("unknown", "silent")  # too much, or not in time
    assert states == {
        "silent": "silent",
        "rub\x1b[2Jbish": "unknown",
        "older": "unknown",
        "real": "serving",
    }
    assert {one["pid"] for one in report["services"]} == {os.getpid()}  # the kernel's word
    check_plain(text)
    assert "share frames" in text


def test_one_that_never_answers_takes_nobody_elses_time(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of those that need several answers to tell all. It hangs up when they are asked on."""
    silent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    silent.bind(str(runtime_dir / "a"))
    silent.listen()
    ask = Inquiry.ask

    def asking(inquiry: Inquiry, start: int | None = None) -> None:
        ask(inquiry, start)
        if start:
            silent.close()

    monkeypatch.setattr(Inquiry, "ask", asking)
    with silent, md.Service("b") as service, looking.Watch() as watch:
        memory = md.BufferMemoryDescriptor(100)
        for number in range(300):
            service.share(f"{number}", memory)
        found = watch.look([("a", runtime_dir / "a"), ("b", service.path)], items=True)
    assert [(seen.state, len(seen.items)) for seen in found] == [("unknown", 0), ("serving", 300)]
    (runtime_dir / "a").unlink()


def _endless(number: int) -> bytes:
    """An answer that says that more will come, and whose names are bad."""
    item = protocol.ShareItem("\x1b]0;x\x07" * 60, 1, False, True, False)
    zeros = dict.fromkeys(protocol.Described.__struct_fields__, 0)
    usual = {"id": number, "service": "x", "superseded": False, "items": (item,) * 200}
    return protocol.encode(protocol.Described(**{**zeros, **usual, "more": True}))


@contextmanager
def strange(path: Path, answer: Any) -> Iterator[None]:
    """A socket whose owner answers so: None never, b"" hangs up."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        while True:
            try:
                one, _ = listener.accept()
            except OSError:
                return
            with one:
                with suppress(OSError):  # it has heard enough, perhaps of what is not sent yet
                    while data := one.recv(4096):
                        said = answer(protocol.decode(data).id) if callable(answer) else answer
                        if not said:
                            break
                        one.send(said)

    thread = threading.Thread(target=serve)
    if answer is not None:
        thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        if answer is not None:
            thread.join(30)
            assert not thread.is_alive()
        listener.close()
        path.unlink()


def test_a_thousand_shares() -> None:
    with md.Service("camera") as service:
        buffer = md.BufferMemoryDescriptor(100)
        for number in range(1000):
            service.share(f"{number:04}", buffer)
        report = as_json("ls", "camera")
    assert [it["name"] for it in report["services"][0]["buffers"]] == [
        f"{n:04}" for n in range(1000)
    ]


@pytest.mark.usefixtures("less_patience")
def test_a_stopped_service_is_told_with_its_pid() -> None:
    with Puppet() as one:
        one.do("s = md.Service('stopped')")
        one.stop()
        (seen,) = as_json("ls")["services"]
        assert (seen["state"], seen["pid"]) == ("silent", one.pid)
        assert f"stopped (task {one.pid}, " in memdesc("ls").stdout
        one.go_on()
        one.do("s.close()")


def test_an_ordinary_user_looks_at_others() -> None:
    in_child(become, NOBODY)  # or skip
    with (
        readable_folder() as folder,
        md.Service(f"{folder}/camera", allow=lambda _: True) as service,
    ):
        buffer = md.BufferMemoryDescriptor(100)
        service.share("frames", buffer)

        def look() -> Any:
            become(NOBODY)
            return ls.gather(f"{folder}/camera"), ls.gather()

        named, whole = in_child(look)
        identity = buffer.memory.identity
    (one,) = named["services"]
    assert (one["state"], one["pid"], one["user"]) == ("denied", os.getpid(), os.geteuid())
    assert one["buffers"] == []
    assert whole["services"] == []
    assert whole["hidden_tasks"] > 0
    assert identity not in [
        (it["objects"][0]["device"], it["objects"][0]["inode"]) for it in whole["buffers"]
    ]


def test_root_looks_at_an_ordinary_user() -> None:
    in_child(become, NOBODY)  # or skip
    with readable_folder() as folder:
        os.chmod(folder, 0o777)
        pid = start(serve_as_nobody, f"{folder}/camera")
        try:
            wait_until(lambda: Path(f"{folder}/ready").exists())
            (one,) = ls.gather(f"{folder}/camera")["services"]
        finally:
            kill(pid)
    assert (one["state"], one["pid"], one["user"]) == ("serving", pid, NOBODY)
    (share,) = one["buffers"]
    assert share["name"] == "frames"
    holders = share["objects"][0]["holders"]
    assert [(it["pid"], it["user"], it["access"]) for it in holders] in (
        [(pid, NOBODY, "read-write")],
        [],  # root that may not trace other users' tasks: a container's
    )


def serve_as_nobody(path: str) -> None:
    become(NOBODY)
    service = md.Service(path)
    service.share("frames", md.BufferMemoryDescriptor(100))
    Path(path).with_name("ready").touch()
    threading.Event().wait()


@contextmanager
def readable_folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="md-") as folder:
        os.chmod(folder, 0o755)
        yield folder


def test_folders_of_other_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what its user made himself is spoken to: not where a link in /tmp leads."""
    monkeypatch.delenv("MEMDESC_RUNTIME_DIR")
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    uid = os.geteuid()
    own, link = tmp_path / f"memdesc-{uid}", tmp_path / f"memdesc-{uid + 1}"
    foreign = tmp_path / f"memdesc-{uid + 2}"  # it is ours, and not of whom it says
    for folder in (own, foreign):
        folder.mkdir(mode=0o700)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.bind(str(folder / "one"))
    link.symlink_to(own)
    found = [path for _, path in looking.sockets() if tmp_path in path.parents]
    assert found == [own / "one"]


def test_json_is_one_object(runtime_dir: Path) -> None:
    done = memdesc("ls", "--json")
    assert set(json.loads(done.stdout)) == {
        "services",
        "others",
        "buffers",
        "in_transit",
        "hidden_tasks",
        "hidden_pids",
        "held_up_pids",
    }


def test_handles_on_their_way_are_told_of_who_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def send(ready: int) -> None:
        md.interop.multiprocessing.limit_in_transit(1 << 20)
        ours, _theirs = multiprocessing.Pipe()
        several = md.MultiMemoryDescriptor([md.BufferMemoryDescriptor(100) for _ in range(2)])
        ours.send([md.BufferMemoryDescriptor(5000), several])
        os.write(ready, b"r")
        signal.pause()

    end_holder()  # of the family; then the child is one itself
    told, ready = os.pipe()
    pid = start(send, ready)
    os.close(ready)
    assert os.read(told, 1) == b"r"
    os.close(told)
    (one,) = (one for one in ls.gather()["in_transit"] if one["pid"] == pid)
    nbytes = 4 * md.page_size
    assert (one["handles"], one["objects"], one["nbytes"]) == (2, 3, nbytes)
    assert one["limit"] == 1 << 20
    shown = memdesc("ls").stdout.split("On their way with ")
    (line,) = (line for line in shown if line.startswith(f"task {pid} "))
    assert " ".join(line.split("):")[1].split()).startswith("2 handles, 3 objects, 16")
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(in_transit, "_PATIENCE", 0.05)
    assert pid not in [one["pid"] for one in ls.gather()["in_transit"]]
    kill(pid)
    assert pid not in [one["pid"] for one in ls.gather()["in_transit"]]
