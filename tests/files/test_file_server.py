"""File servers: one version for each reader, whole, for as long as it wants; swapped meanwhile."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from array_files import old
from children import finish, start

import memdesc as md
from memdesc import files
from memdesc.descriptors.homes import lies_immutable
from memdesc.services.arrays import ALL
from memdesc.testing import failing

MIB = 1 << 20
NAMES = ("a", "b", "c")


def fill(folder: Path, value: int, count: int = 5000) -> list[Path]:
    """Three files of one value, each of a length of its own."""
    paths = []
    for number, name in enumerate(NAMES):
        path = folder / f"{name}.npy"
        np.save(folder / "new.npy", np.full(count + 1000 * number, value, "<i8"))
        old(folder / "new.npy")  # and no two versions are told from each other by their time
        (folder / "new.npy").replace(path)
        paths.append(path)
    return paths


def wait_until(true: object, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.005)


def memories() -> set[str]:
    """The memory of versions that this process still has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "memdesc-files" in line}


def test_the_arrays_are_served_read_only(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", np.asfortranarray(np.arange(6.0).reshape(2, 3)))
    np.save(tmp_path / "empty.npy", np.empty((0, 3), "f4"))
    np.save(tmp_path / "number.npy", np.float32(1.5))
    paths = [*fill(tmp_path, 7), *(tmp_path / f"{one}.npy" for one in ("f", "empty", "number"))]
    with files.FileServer("model", paths) as server, md.connect("model") as connection:
        arrays = connection.arrays()
        assert list(arrays) == ["a", "b", "c", "f", "empty", "number"]
        assert (arrays.version, server.version) == (1, 1)
        for name in arrays:
            for array in (arrays[name], connection[name], server.loaded.arrays()[name]):
                assert array.tobytes() == np.load(tmp_path / f"{name}.npy").tobytes()
                assert array.shape == arrays[name].shape
                assert not array.flags.writeable or not array.nbytes
            if arrays[name].nbytes:
                for array in (arrays[name], connection[name], server.loaded.arrays()[name]):
                    with pytest.raises(ValueError, match="WRITEABLE"):
                        array.flags.writeable = True
        assert connection["f"].flags.f_contiguous
        assert not connection["f"].flags.c_contiguous
        shares = {share.name: share for share in connection.shares()}
        assert set(shares) == {*arrays, ALL}
        assert not any(share.writable for share in shares.values())
        with pytest.raises(KeyError):
            arrays["missing"]
        assert "missing" not in arrays
        assert arrays.get("missing") is None
        before = server.service.opens, server.service.opened_bytes
        connection["a"]
        assert (server.service.opens, server.service.opened_bytes) == (
            before[0] + 1,
            before[1] + arrays["a"].nbytes,
        )
    assert (arrays["a"] == 7).all()  # after connection and server have ended
    with pytest.raises(md.ClosedError):
        server.reload()
    del arrays, array, server


def test_nobody_can_change_what_is_served(tmp_path: Path) -> None:
    """Not the server's own process either: what a reader checked holds."""
    with files.FileServer("model", fill(tmp_path, 7)) as server, md.connect("model") as connection:
        for version in (1, 2):
            memory = server.loaded.descriptor
            assert (memory.copied_bytes, memory.reason) == (0, None)
            with pytest.raises(md.SealedError):
                memory.write_bytes(0, b"x")
            for seen in (connection["a"], connection.arrays()["b"], server.loaded.arrays()["c"]):
                assert lies_immutable(seen)
            fd = memory._parts[0].object.open(md.Access.READ_ONLY)
            try:
                with pytest.raises(PermissionError):  # root too
                    os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_TRUNC))
                assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
            finally:
                os.close(fd)
            assert server.reload().version == version + 1
        del memory, seen


def test_a_swap_leaves_readers_what_they_have(tmp_path: Path) -> None:
    paths = fill(tmp_path, 1)
    with files.FileServer("model", paths) as server, md.connect("model") as connection:
        first = connection.arrays()
        kept = connection["a"]
        with connection.events("version") as events:
            fill(tmp_path, 2, count=100)
            assert server.changed_files() == [files.FileSource(path) for path in paths]
            assert server.reload().version == 2
            assert server.changed_files() == []
            event = events.get(timeout=20)
            assert (event.name, event.value) == ("version", 2)
        second = connection.arrays()
        assert (second.version, len(second["a"])) == (2, 100)
        assert all((second[name] == 2).all() for name in NAMES)
        assert all((first[name] == 1).all() for name in NAMES)
        assert (kept == 1).all()
        (only,) = server.reload(paths[0]).entries  # other files: the others are there no more
        assert only.name == "a"
        with pytest.raises(md.ShareNotFoundError):
            connection.map("b", timeout=0)
        assert set(connection.arrays()) == {"a"}
        gc.collect()
        assert len(memories()) == 3  # of both that are read, and of the third
        del first
        assert len(memories()) == 3
        del kept, second
        assert len(memories()) == 1
    del server
    assert memories() == set()


def test_a_reload_that_fails_changes_nothing(tmp_path: Path) -> None:
    paths = fill(tmp_path, 1)
    with files.FileServer("model", paths) as server, md.connect("model") as connection:
        paths[1].write_bytes(b"rubbish")
        with pytest.raises(md.InvalidArgument):
            server.reload()
        paths[1].unlink()
        with pytest.raises(FileNotFoundError):
            server.reload()
        fill(tmp_path, 2)
        with failing("fallocate", errno.ENOSPC), pytest.raises(md.AllocationError):
            server.reload()
        assert connection.arrays().version == server.version == 1
        assert (connection["b"] == 1).all()
        assert server.reload().version == 2
        assert (connection["b"] == 2).all()
    gc.collect()


def test_what_was_shared_in_a_block_that_fails_is_not(tmp_path: Path) -> None:
    with md.Service("camera") as service, md.BufferMemoryDescriptor(100) as buffer:
        service.share("before", buffer)
        with pytest.raises(ZeroDivisionError), service.together():
            service.unshare("before")
            service.share("after", buffer)
            raise ZeroDivisionError
        assert [share.name for share in service.shares()] == ["before"]


def test_nothing_is_served_of_files_that_can_not_be(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.FileServer("model", tmp_path / "missing.npy")
    with pytest.raises(md.ServiceNotFoundError):
        md.connect("model", timeout=0)
    with md.Service("taken"), pytest.raises(md.NameInUseError):
        files.FileServer("taken", tmp_path / "missing.npy")  # before the files are looked at


def test_who_comes_while_it_loads_waits(tmp_path: Path) -> None:
    paths = fill(tmp_path, 3)
    found: list[np.ndarray] = []

    def read() -> None:
        with md.connect("model", timeout=30) as connection:
            connected.set()
            found.append(connection.map("a", timeout=30).array())

    connected = threading.Event()
    reader = threading.Thread(target=read)
    reader.start()

    def progress(*_: int) -> None:
        assert connected.wait(30)

    with files.FileServer("model", paths, progress=progress):
        reader.join(30)
        assert (found.pop() == 3).all()


def test_clients_are_told_of_as_they_come_and_go(caplog: pytest.LogCaptureFixture) -> None:
    told: list[tuple[int, bool]] = []
    with md.Service("camera") as service:
        service.watch_clients(lambda client, joined: told.append((client.task.pid, joined)))
        md.connect("camera").close()
        wait_until(lambda: len(told) == 2)

        def fail(*_: object) -> None:
            raise ZeroDivisionError

        service.watch_clients(fail)  # is logged; the client is served all the same
        with md.connect("camera") as connection:
            assert connection.shares() == []
        service.watch_clients(None)
    assert {record.msg for record in caplog.records} == {"service.watcher_failed"}
    caplog.clear()  # it holds what was being done
    assert told == [(os.getpid(), True), (os.getpid(), False)]


# -- readers in other processes --------------------------------------------------------------------


def never_a_mixture(last: int) -> None:
    """Read over and over, until the last version comes; exits with 0 where each was whole."""
    seen = set()
    with md.connect("model", timeout=60) as connection:
        while last not in seen:
            arrays = connection.arrays()
            values = {int(value) for name in NAMES for value in (arrays[name][0], arrays[name][-1])}
            assert values == {arrays.version}, (values, arrays.version)
            assert len({len(arrays[name]) - 1000 * at for at, name in enumerate(NAMES)}) == 1
            assert all((arrays[name] == arrays.version).all() for name in NAMES)
            one = connection["b"]
            assert (one == one[0]).all()
            assert one[0] >= arrays.version >= max(seen, default=0)
            seen.add(arrays.version)


@pytest.mark.slow
def test_no_reader_ever_sees_a_mixture(tmp_path: Path) -> None:
    last = 25
    readers = [start(never_a_mixture, last) for _ in range(2)]
    with files.FileServer("model", fill(tmp_path, 1)) as server:
        try:
            for value in range(2, last + 1):
                before = server.service.opens
                fill(tmp_path, value, count=3000 + 500 * (value % 5))
                server.reload()
                wait_until(lambda before=before: server.service.opens > before)
        finally:
            assert [finish(reader) for reader in readers] == [0, 0]


def read_all(ready: int, go: int) -> None:
    with md.connect("model", timeout=60) as connection:
        array = connection["large"]
    assert int(array.sum()) == 0
    os.write(ready, b"1")
    os.read(go, 1)


def shares_of(pids: list[int]) -> list[int]:
    """What each task's share of the versions' memory is (Pss), as the kernel reckons it."""
    return [
        sum(
            int(line.split()[1]) << 10 for line in pss_lines(Path(f"/proc/{pid}/smaps").read_text())
        )
        for pid in pids
    ]


def pss_lines(text: str) -> Iterator[str]:
    ours = False
    for line in text.splitlines():
        if "-" in line.split()[0] and not line.split()[0].endswith(":"):
            ours = "memdesc-files" in line
        elif ours and line.startswith("Pss:"):
            yield line


@pytest.mark.slow
def test_five_processes_have_the_memory_once(tmp_path: Path) -> None:
    nbytes = 64 * MIB
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(nbytes)
    ready, say = os.pipe()
    wait, go = os.pipe()
    readers = [start(read_all, say, wait) for _ in range(4)]
    try:
        path = old(tmp_path / "large.bin")
        with files.FileServer("model", path, pages=md.PageKind.BASE):
            told = b""
            while len(told) < 4:
                told += os.read(ready, 4)
            own, *shares = shares_of([os.getpid(), *readers])
            assert own <= nbytes / 5  # it need not have in its page table what it loaded
            assert all(nbytes / 5 * 0.9 <= share <= nbytes / 4 * 1.1 for share in shares)
            assert own + sum(shares) <= 1.1 * nbytes
    finally:
        os.write(go, b"1111")
        codes = [finish(reader) for reader in readers]
        for fd in (ready, say, wait, go):
            os.close(fd)
    assert codes == [0] * 4
