"""Where services live: whose folder, which names, and who sweeps the sockets of the dead."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from pathlib import Path

import pytest
from puppets import count_fds

import memdesc as md
from memdesc.errors import TimedOutError
from memdesc.loop import loop
from memdesc.services import folder


def test_the_folder_is_chosen_by_the_environment(monkeypatch, runtime_dir):
    assert folder.socket_path("camera") == str(runtime_dir / "camera")
    monkeypatch.delenv("MEMDESC_RUNTIME_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/of/session")
    assert folder.socket_path("camera") == "/run/of/session/memdesc/camera"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert os.path.basename(folder.runtime_folder()) == f"memdesc-{os.geteuid()}"
    assert folder.socket_path("./camera") == "./camera"
    assert folder.socket_path("run/camera/") == "run/camera"


def test_the_folder_is_made_for_its_user_alone(monkeypatch, runtime_dir):
    monkeypatch.setenv("MEMDESC_RUNTIME_DIR", str(runtime_dir / "deep" / "run"))
    with md.Service("camera") as service:
        assert stat.S_IMODE(service.path.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(service.path.stat().st_mode) == 0o600
    assert list(service.path.parent.iterdir()) == []


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701, 0o770, 0o1777])
def test_a_folder_that_others_may_enter_is_refused(monkeypatch, tmp_path, mode):
    shared = tmp_path / "run"
    shared.mkdir()
    shared.chmod(mode)
    monkeypatch.setenv("MEMDESC_RUNTIME_DIR", str(shared))
    for make in (md.Service, md.connect):
        with pytest.raises(md.AccessDeniedError) as caught:
            make("camera")
        assert caught.value.errno == errno.EACCES


def test_a_folder_of_another_user_is_refused(monkeypatch, tmp_path):
    other = tmp_path / "run"
    other.mkdir(mode=0o700)
    try:
        os.chown(other, 65533, 65533)
    except PermissionError as error:
        pytest.skip(f"a folder can not be given to another user: {error}")
    monkeypatch.setenv("MEMDESC_RUNTIME_DIR", str(other))
    with pytest.raises(md.AccessDeniedError) as caught:
        md.Service("camera")
    assert caught.value.errno == errno.EACCES


def test_a_link_to_a_folder_and_a_file_are_refused(monkeypatch, tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch(0o600)
    for name in ("link", "file"):
        monkeypatch.setenv("MEMDESC_RUNTIME_DIR", str(tmp_path / name))
        with pytest.raises(md.AccessDeniedError):
            md.Service("camera")


@pytest.mark.parametrize("name", ["", ".", "..", "a\0b", "x" * 108, "/" + "y" * 107])
def test_what_is_no_name(name):
    loop()
    for make in (md.Service, md.connect):
        before = count_fds()
        with pytest.raises(md.InvalidArgument):
            make(name)
        assert count_fds() <= before


def test_the_longest_path_works(runtime_dir):
    room = 107 - len(os.fsencode(runtime_dir)) - 1
    path = f"{runtime_dir}/{'n' * room}"
    with md.Service(path) as service, md.connect(path) as connection:
        assert len(os.fsencode(service.path)) == 107
        assert connection.shares() == []
    with pytest.raises(md.InvalidArgument, match="108 bytes"):
        md.Service(path + "n")


def test_a_path_into_nowhere():
    loop()
    for path in ("/nonexistent/folder/camera", f"{__file__}/camera"):
        before = count_fds()
        with pytest.raises(md.InvalidArgument) as caught:
            md.Service(path)
        assert caught.value.errno in (errno.ENOENT, errno.ENOTDIR)
        assert count_fds() <= before


def test_a_path_where_nothing_can_be_made():
    loop()
    before = count_fds()
    with pytest.raises((md.AccessDeniedError, md.InvalidArgument)) as caught:
        md.Service("/proc/camera")
    assert caught.value.errno in (errno.EACCES, errno.EPERM, errno.ENOENT, errno.EROFS)
    assert count_fds() <= before


def test_a_name_is_one_living_services(runtime_dir):
    with md.Service("camera"):
        with pytest.raises(md.NameInUseError) as caught:
            md.Service("camera")
        assert caught.value.errno == errno.EADDRINUSE
        with md.Service("other"):
            pass
    with md.Service("camera"):  # free again
        assert [path.name for path in runtime_dir.iterdir()] == ["camera"]


def test_a_file_that_is_no_socket_is_never_touched(runtime_dir):
    (runtime_dir / "camera").write_text("mine")
    with pytest.raises(md.NameInUseError):
        md.Service("camera")
    assert (runtime_dir / "camera").read_text() == "mine"
    with pytest.raises(md.ServiceNotFoundError):
        md.connect("camera", timeout=0.01)


def test_sockets_of_others_that_live_are_not_swept(runtime_dir):
    kinds = (socket.SOCK_DGRAM, socket.SOCK_STREAM, socket.SOCK_SEQPACKET)
    theirs = [socket.socket(socket.AF_UNIX, kind) for kind in kinds]
    for index, one in enumerate(theirs):
        one.bind(f"{runtime_dir}/{index}")
    folder.open_folder("x")
    assert len(list(runtime_dir.iterdir())) == 3
    for one in theirs:
        one.close()
    folder.open_folder("x")
    assert list(runtime_dir.iterdir()) == []


def test_looking_for_the_dead_does_not_bother_the_living():
    with md.Service("camera") as service:
        accepted = []
        original, service._accept = service._accept, lambda: accepted.append(1)
        for _ in range(300):  # more than a backlog
            folder.open_folder("x")
        service._accept = original
        with md.connect("camera"):
            assert accepted == []


def test_the_locks_holder_is_waited_for_but_not_for_ever(runtime_dir):
    fd = os.open(runtime_dir, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(TimedOutError) as caught, folder.locked(runtime_dir, timeout=0.02):
            pass
        assert caught.value.errno == errno.ETIMEDOUT
    finally:
        os.close(fd)
    with folder.locked(runtime_dir):
        pass


def test_closing_needs_no_lock(runtime_dir):
    service = md.Service("camera")
    with folder.locked(runtime_dir):
        service.close()
        assert list(runtime_dir.iterdir()) == []


def test_a_socket_file_that_is_no_longer_ours_stays(runtime_dir):
    service = md.Service("camera")
    service.path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.bind(str(service.path))
        service.close()
        assert service.path.is_socket()
        service.path.unlink()


@pytest.mark.slow
def test_the_socket_of_a_killed_service_is_swept_at_the_next_opening(puppet, runtime_dir):
    killed = puppet("service = md.Service('killed')")
    living = puppet("service = md.Service('living')")
    stopped = puppet("service = md.Service('stopped')")
    killed.kill()
    stopped.stop()
    names = {path.name for path in runtime_dir.iterdir()}
    assert names == {"killed", "living", "stopped"}
    with pytest.raises(md.ServiceNotFoundError):
        md.connect("killed", timeout=0.01)
    assert {path.name for path in runtime_dir.iterdir()} == {"living", "stopped"}
    for name in ("living", "stopped"):
        with pytest.raises(md.NameInUseError):
            md.Service(name)
    with md.Service("killed"), md.connect("killed"), md.connect("living"):
        pass
    for one in (stopped, living):
        one.kill()
    folder.open_folder("x")
    assert list(runtime_dir.iterdir()) == []


@pytest.mark.slow
def test_the_path_of_a_killed_service_is_taken_over(puppet, runtime_dir):
    path = f"{runtime_dir}/./camera"
    killed = puppet(f"service = md.Service({path!r})")
    killed.kill()
    assert Path(path).is_socket()
    with md.Service(path), md.connect(path):
        pass
    assert not Path(path).exists()


@pytest.mark.slow
def test_a_service_that_ends_without_closing_removes_its_socket(puppet, runtime_dir):
    one = puppet("service = md.Service('camera')")
    assert one.finish() == 0
    assert list(runtime_dir.iterdir()) == []
