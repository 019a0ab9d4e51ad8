"""Files are loaded whole, past the page cache, or not at all."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from array_files import loaded, old, safetensors
from children import NOBODY, become, in_child, limit_locking
from huge_pool import huge_pages

import memdesc as md
from memdesc import files
from memdesc.descriptors.homes import lies_immutable
from memdesc.dma import DirectFile, Way
from memdesc.files import loading
from memdesc.testing import failing

sys.path.append(str(Path(__file__).parents[1] / "dma"))
from disk_tools import best_way, has_uring
from fuse_disk import NoDisk, failing_disk, pattern

MIB = 1 << 20


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users may read."""
    with tempfile.TemporaryDirectory(prefix="md-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return old(path)


def counting(nbytes: int, seed: int = 1) -> np.ndarray:
    return np.arange(seed, seed + nbytes // 8, dtype="<i8")


def test_nothing_is_bounced_where_files_are_aligned(tmp_path: Path) -> None:
    tensors = {f"layer.{at}": ("F32", np.full((at + 1, 1000), at, "f4")) for at in range(20)}
    model = tmp_path / "model.safetensors"
    model.write_bytes(safetensors(tensors))
    paths = [
        saved(tmp_path / "a.npy", counting(MIB)),
        saved(tmp_path / "odd.npy", counting(800)),
        old(model),
    ]
    with DirectFile(paths[0]) as disk:
        way = best_way(disk)
    found = files.load(paths)
    assert found.way is way
    if way in (Way.URING_DIRECT, Way.PREAD_DIRECT):
        assert found.bounced_bytes == 0
    if way is Way.URING_DIRECT:
        assert found.reasons == ()
    assert found.nbytes == sum(path.stat().st_size for path in paths)
    arrays = found.arrays()
    assert (arrays["a"] == counting(MIB)).all()
    assert (arrays["odd"] == counting(800)).all()
    for name, (_, tensor) in tensors.items():
        assert (arrays[name] == tensor).all()
    assert [one.file for one in found.entries] == [str(paths[0]), str(paths[1])] + 20 * [str(model)]


def test_what_lies_askew_in_a_file_is_aligned_in_memory(tmp_path: Path) -> None:
    tensors = {
        "a": ("U8", np.arange(3, dtype="u1")),
        "b": ("F64", np.arange(9000.0)),
        "c": ("U8", np.arange(5, dtype="u1")),
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(tensors))
    found = files.load(old(path))
    for name, (_, tensor) in tensors.items():
        assert (found.arrays()[name] == tensor).all()
        assert found.arrays()[name].flags.aligned
    assert found.bounced_bytes >= 72000


def test_progress_comes_to_all(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npy", counting(8 * MIB))
    np.savez_compressed(tmp_path / "b.npz", x=np.zeros(MIB, "u1"))
    told: list[tuple[int, int]] = []
    files.load([path, old(tmp_path / "b.npz")], progress=lambda *one: told.append(one))
    assert told == sorted(told)
    assert told[-1] == (path.stat().st_size + MIB,) * 2


def test_what_progress_raises_ends_it(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npy", counting(8 * MIB))

    def enough(*_: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        files.load(path, progress=enough)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.safetensors", "a.bin"])
def test_of_every_kind_a_change_is_noticed(tmp_path: Path, name: str) -> None:
    """Shortened, written in place, replaced, removed while it is read: nothing is loaded."""
    path, array = tmp_path / name, counting(2 * MIB)
    contents = {
        ".npy": lambda: np.save(path, array),
        ".npz": lambda: np.savez(path, a=array),
        ".safetensors": lambda: path.write_bytes(safetensors({"a": ("I64", array)})),
        ".bin": lambda: path.write_bytes(array.tobytes()),
    }

    def store() -> None:
        with path.open("r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write(b"changed!")

    def replace() -> None:
        path.with_suffix(".new").write_bytes(path.read_bytes())
        path.with_suffix(".new").replace(path)

    changes: list[Callable[[], object]] = [
        lambda: os.truncate(path, MIB),
        lambda: os.truncate(path, 3 * MIB),
        store,
        replace,
        path.unlink,
    ]
    for change in changes:
        contents[path.suffix]()
        old(path)
        done = []

        def once(*_: int, change: Callable[[], object] = change, done: list[int] = done) -> None:
            if not done:
                done.append(1)
                change()

        with pytest.raises((md.TransferError, md.InvalidArgument)) as caught:
            files.load(path, progress=once)
        damaged = path.suffix == ".npz" and caught.value.errno == errno.EBADMSG  # its checksum
        assert caught.value.errno == errno.ESTALE or damaged, caught.value
        assert str(path) in str(caught.value)


def test_a_file_that_was_shortened_before_the_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "a.npy", counting(MIB))
    find = loading.find_arrays

    def shorten(file: object) -> object:
        found = find(file)  # type: ignore[arg-type]
        os.truncate(path, 0)
        return found

    monkeypatch.setattr(loading, "find_arrays", shorten)
    with pytest.raises(md.TransferError) as caught:
        files.load(path)
    assert caught.value.errno == errno.ESTALE


def test_a_store_of_this_very_moment_is_waited_for(tmp_path: Path) -> None:
    """Two stores within a tick of the kernel's clock show one time: so the tick must be over."""
    path = tmp_path / "a.bin"
    for number in range(5):
        path.write_bytes(bytes([number]) * 4096)
        seen = []

        def store(*_: int, seen: list[int] = seen) -> None:
            if not seen:
                seen.append(1)
                path.write_bytes(b"other" * 819 + b"!")  # of the same size

        with pytest.raises(md.TransferError):
            files.load(path, progress=store)


def test_a_disk_that_fails(tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    try:
        with failing_disk(tmp_path / "mount", MIB, bad=MIB // 2) as (path, _):
            with pytest.raises(md.TransferError) as caught:
                files.load(path)
            assert caught.value.errno == errno.EIO
            assert str(path) in str(caught.value)
            assert "/proc/" not in str(caught.value)
            assert caught.value.file_offset is not None
        with failing_disk(tmp_path / "mount", MIB) as (path, _):
            assert loaded(path)["disk"].tobytes() == pattern(0, MIB)
    except NoDisk as error:
        pytest.skip(f"no FUSE here: {error}")


def test_what_is_no_file_to_load(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    for name, number in [("", errno.EISDIR), ("pipe", errno.EINVAL), ("empty", errno.ENODATA)]:
        with pytest.raises(md.InvalidArgument) as caught:
            files.load(tmp_path / name)
        assert caught.value.errno == number
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(FileNotFoundError):
        files.load(tmp_path / "missing")
    with pytest.raises(md.InvalidArgument):
        files.load([])
    with pytest.raises(md.InvalidArgument):
        files.load(files.FileSource(saved(tmp_path / "a.npy", counting(8)), dtype="u1"))


def test_a_file_that_this_user_may_not_read(open_folder: Path) -> None:
    path = saved(open_folder / "a.npy", counting(8))

    def load() -> int | None:
        try:
            files.load(path)
        except PermissionError as error:
            return error.errno
        return 0

    before = None if os.geteuid() else lambda: become(NOBODY)
    assert in_child(load, before=before) == 0
    path.chmod(0)
    assert in_child(load, before=before) == errno.EACCES


def test_names(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    one, two = tmp_path / "a.npy", tmp_path / "other" / "a.npy"
    for path in (one, two):
        saved(path, counting(80))
    with pytest.raises(md.InvalidArgument) as caught:
        files.load([one, two])
    assert caught.value.errno == errno.EEXIST
    np.savez(tmp_path / "z.npz", a=counting(8), b=counting(16))
    found = loaded(
        [
            one,
            files.FileSource(two, "b"),
            files.FileSource(old(tmp_path / "z.npz"), "z"),
        ]
    )
    assert set(found) == {"a", "b", "z.a", "z.b"}
    with pytest.raises(md.InvalidArgument) as caught:
        files.load(files.FileSource(one, "*"))
    assert caught.value.errno == errno.EEXIST
    odd = tmp_path / os.fsdecode(b"\xff.npy")
    saved(odd, counting(8))
    with pytest.raises(md.InvalidArgument):  # no text: can not travel
        files.load(odd)
    assert loaded(files.FileSource(odd, "odd"))["odd"].tolist() == [1]


# -- memory ----------------------------------------------------------------------------------------


def test_more_than_there_is_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    path.touch()
    try:
        os.truncate(path, 1 << 43)
    except OSError as error:
        pytest.skip(f"no file of 8 TiB here: {error}")
    with pytest.raises(md.AllocationError) as caught:
        files.load(old(path))
    assert caught.value.errno in (errno.ENOMEM, errno.ENOSPC, errno.EFBIG)


def test_wired(open_folder: Path) -> None:
    path = saved(open_folder / "a.npy", counting(128 << 10))

    def load() -> tuple[str, int | None]:
        try:
            files.load(path, wired=True)
        except md.WiringError as error:
            return error.reason.name, error.errno
        return "", 0

    assert in_child(load, before=lambda: limit_locking(64 << 10)) == ("LIMIT", errno.ENOMEM)
    before = md.wiring.wired_bytes()
    with failing("mlock", errno.EAGAIN, after=1) as fault, pytest.raises(md.WiringError):
        files.load(path, wired=True)  # it can not be wired again once it is immutable
    assert fault.failures == 1
    assert md.wiring.wired_bytes() == before
    found = files.load(path, wired=True)
    assert (found.descriptor.prepare_count, found.descriptor.copied_bytes) == (1, 0)
    assert (found.arrays()["a"] == counting(128 << 10)).all()


def test_what_can_not_be_made_immutable_in_place_is_copied_and_said(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npy", counting(MIB))
    with failing("move_memory", errno.ENOMEM) as fault:
        found = files.load(path)
    assert fault.failures == 1
    assert found.descriptor.reason is md.SnapshotReason.NO_MEMORY
    assert found.reasons[-1].endswith(md.SnapshotReason.NO_MEMORY.value)
    assert lies_immutable(found.arrays()["a"])
    assert (found.arrays()["a"] == counting(MIB)).all()


@pytest.mark.alone
def test_huge_pages(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npy", counting(3 * MIB))
    with huge_pages(2), files.FileServer("model", path, pages=md.PageKind.HUGE) as server:
        assert server.loaded.page_kind is md.PageKind.HUGE
        with md.connect("model") as connection:
            arrays = connection.arrays()
            assert (arrays["a"] == counting(3 * MIB)).all()
            assert (connection["a"] == arrays["a"]).all()
        del arrays, connection


def test_without_a_ring_the_bytes_are_the_same(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npy", counting(MIB))
    with failing("open_uring", errno.EPERM, times=None) as fault:
        found = files.load(path)
    assert fault.calls or not has_uring()
    assert found.way in (Way.PREAD_DIRECT, Way.PREAD_BUFFERED)
    assert found.reasons
    assert (found.arrays()["a"] == counting(MIB)).all()
