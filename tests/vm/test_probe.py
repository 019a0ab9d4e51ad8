"""The probe, and docs/privileges.md: every cell of its tables, under every privilege."""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import mmap
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import in_child, limit_locking
from privilege import Privilege, run_as

from memdesc import _core
from memdesc.errors import InvalidArgument
from memdesc.testing import failing
from memdesc.vm import cgroups, probe as module
from memdesc.vm.cgroups import MemoryCgroup, memory_cgroups
from memdesc.vm.pages import page_size
from memdesc.vm.probe import FEATURES, Feature, probe, probe_feature
from memdesc.vm.task import Task

TABLES = Path(__file__).resolve().parents[2] / "docs" / "privileges.md"
OPERATIONS = Path(__file__).with_name("operations.py").read_text()
WIRE = "wire more than RLIMIT_MEMLOCK"

Table = dict[str, dict[str, str]]


def read_tables() -> dict[str, Table]:
    """Give the tables by their first header: row → column → cell."""
    found: dict[str, Table] = {}
    header: list[str] = []
    for line in TABLES.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = cells
            found[header[0]] = {}
        elif not set(line) <= set("|-: "):
            found[header[0]][cells[0].replace("`", "")] = dict(
                zip(header[1:], cells[1:], strict=True)
            )
    return found


@functools.cache
def what_is_true(privilege: Privilege) -> dict[str, Any]:
    """Run what the tables tell of, once for each privilege; a skip is not kept."""
    run = run_as(privilege, OPERATIONS)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def cells(kind: str) -> list[Any]:
    return [
        pytest.param(row, privilege, columns[privilege.value], id=f"{row}-{privilege.value}")
        for row, columns in read_tables()[kind].items()
        for privilege in Privilege
    ]


def test_the_table_has_a_row_for_each_feature() -> None:
    assert set(read_tables()["feature"]) == set(FEATURES)


@pytest.mark.slow
@pytest.mark.parametrize("privilege", Privilege)
def test_the_table_has_a_row_for_each_operation(privilege: Privilege) -> None:
    truth = what_is_true(privilege)
    untried = {WIRE} if truth["memlock"] == resource.RLIM_INFINITY else set()
    assert set(truth["operations"]) | untried == set(read_tables()["operation"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "privilege", "cell"), cells("feature"))
def test_each_cell_of_the_features(name: str, privilege: Privilege, cell: str) -> None:
    if cell == "machine":
        # Privilege has no part in it: this process, whatever it may do, finds the same.
        expected = probe_feature(name)
        found = what_is_true(privilege)["features"][name]
        assert (found["available"], found["limit"]) == (expected.available, expected.limit)
        return
    truth = what_is_true(privilege)
    found = truth["features"][name]
    assert found["available"] is {"yes": True, "no": False}[cell.partition(",")[0]]
    unlimited = truth["memlock"] == resource.RLIM_INFINITY
    if "up to `RLIMIT_MEMLOCK`" in cell and not unlimited:
        assert found["limit"] == truth["memlock"]
    else:
        assert found["limit"] is None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "privilege", "cell"), cells("operation"))
def test_each_cell_of_the_operations(name: str, privilege: Privilege, cell: str) -> None:
    truth = what_is_true(privilege)
    if name == WIRE and truth["memlock"] == resource.RLIM_INFINITY:
        pytest.skip("RLIMIT_MEMLOCK is unlimited here")
    assert truth["operations"][name] == cell


# --- Each trial ------------------------------------------------------------------------------


def test_the_probe_tells_every_feature_whole() -> None:
    found = probe()
    assert tuple(one.name for one in found) == FEATURES
    for one in found:
        assert one.why
        assert one.needs
        assert one.remedy


def test_no_such_feature() -> None:
    with pytest.raises(InvalidArgument) as caught:
        probe_feature("warp_drive")
    assert "memfd_seals" in str(caught.value)


def refuse(number: int) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    return call


def denied(name: str, *words: str) -> Feature:
    found = probe_feature(name)
    assert not found.available
    assert found.limit is None
    for word in words:
        assert word in found.why
    return found


@pytest.mark.parametrize(
    ("name", "call", "number"),
    [
        ("page_frames", "buffer_address", errno.EPERM),
        ("pidfd_getfd", "pidfd_getfd", errno.EPERM),
        ("pidfd_getfd", "pidfd_getfd", errno.ENOSYS),
        ("copy_other_task", "process_vm_readv", errno.EPERM),
        ("copy_other_task", "process_vm_readv", errno.ENOSYS),
        ("copy_any_task", "process_vm_readv", errno.EPERM),
        ("lock_memory", "map_memory", errno.EPERM),
        ("populate", "madvise", errno.EINVAL),
        ("io_uring", "open_uring", errno.EPERM),
    ],
)
def test_each_denial_by_the_core_is_told(name: str, call: str, number: int) -> None:
    with failing(call, number) as fault:
        denied(name, errno.errorcode[number])
    assert fault.failures == 1


@pytest.mark.parametrize("name", ["memfd_seals", "future_write_seal", "noexec_seal", "huge_pages"])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EMFILE, errno.EPERM])
def test_memfds_that_are_refused(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "memfd_create", refuse(number))
    denied(name, errno.errorcode[number])


@pytest.mark.parametrize("name", ["memfd_seals", "future_write_seal"])
def test_seals_that_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "fcntl", refuse(errno.EINVAL))
    denied(name, "EINVAL")


@pytest.mark.parametrize("name", ["memfd_seals", "future_write_seal", "noexec_seal"])
def test_seals_that_are_taken_and_not_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "fcntl", lambda *_: 0)
    denied(name, "seal")


def test_a_seal_that_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    # A kernel that says that it sealed, and did not.
    seals = _core.F_SEAL_FUTURE_WRITE
    monkeypatch.setattr(fcntl, "fcntl", lambda fd, command, *_: seals)
    denied("future_write_seal", "writable")


def test_the_pool_of_huge_pages_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "mmap", refuse(errno.ENOMEM))
    denied("huge_pages", "has none free")
    monkeypatch.setattr(mmap, "mmap", refuse(errno.EPERM))
    denied("huge_pages", "EPERM")


@pytest.mark.alone
def test_a_huge_page_is_free(huge_page: int) -> None:
    found = probe_feature("huge_pages")
    assert found.available
    assert f"{huge_page:,}" in found.why


def test_frames_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "frames", lambda *_: [None])
    denied("page_frames", "not present")


def test_map_files_that_are_denied(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse_map_files(path: str, flags: int) -> int:
        if "map_files" in path:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        return opened(path, flags)

    monkeypatch.setattr(os, "open", refuse_map_files)
    denied("map_files", "EPERM")
    monkeypatch.setattr(module, "region_at", lambda *_: None)
    denied("map_files", "does not show")


@pytest.mark.parametrize("name", ["pidfd_getfd", "copy_other_task", "copy_any_task"])
@pytest.mark.parametrize("python", ["", "/does/not/exist", "/bin/true", None])
def test_no_child_to_try_it_on(
    name: str, python: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", python)
    denied(name)


def test_a_copy_of_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "process_vm_readv", lambda pid, buffer, address: len(buffer))
    denied("copy_other_task", "other bytes")


def test_the_peers_pidfd_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SO_PEERPIDFD", 9999)
    denied("peer_pidfd", "ENOPROTOOPT")


def test_trying_to_lock_memory_locks_none() -> None:
    def locked() -> str:
        with open("/proc/self/status") as status:
            return next(line for line in status if line.startswith("VmLck:"))

    before = locked()
    probe_feature("lock_memory")
    assert locked() == before


def _limited_to(nbytes: int) -> Feature:
    limit_locking(nbytes)
    return probe_feature("lock_memory")


@pytest.mark.parametrize("nbytes", [1, page_size, 1 << 20, (1 << 20) + 1])
def test_a_limit_on_locked_memory_is_found(nbytes: int) -> None:
    found = in_child(_limited_to, nbytes)
    assert found.available
    assert found.limit == nbytes


def test_a_process_that_may_not_lock_memory() -> None:
    found = in_child(_limited_to, 0)
    assert not found.available
    assert "EPERM" in found.why


def test_the_limit_that_was_found_holds() -> None:
    def lock(extra: int) -> int | None:
        limit = _limited_to(1 << 20).limit
        assert limit == 1 << 20
        with Task.current():
            memory = _core.reserve_memory(2 << 20)
            _core.mprotect(memory.address, 2 << 20, _core.PROT_READ)
            try:
                _core.mlock(memory.address, limit + extra)
            except OSError as error:
                return error.errno
            return None

    assert in_child(lock, 0) is None
    assert in_child(lock, page_size) == errno.ENOMEM


@pytest.mark.parametrize("kib", [0, 2048])
def test_swap_is_told_by_its_size(kib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"MemTotal: 1000 kB\nSwapTotal:       {kib} kB\nSwapFree: 0 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    if kib:
        assert probe_feature("swap").limit == kib * 1024
    else:
        denied("swap", "no swap")


# --- Memory cgroups --------------------------------------------------------------------------


def test_a_real_memory_cgroup_with_a_limit() -> None:
    def look(folder: Path) -> tuple[Feature, list[MemoryCgroup]]:
        (folder / "cgroup.procs").write_text(str(os.getpid()))
        return probe_feature("memory_cgroup"), memory_cgroups()

    groups = memory_cgroups()
    if not groups:
        pytest.skip("no memory cgroup of this process is to be seen")
    folder = Path(groups[0].folder, f"memdesc-test-{os.getpid()}")
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made: {error.strerror}")
    try:
        limits = [folder / name for name, _ in cgroups._FILES.values()]
        limit_file = next(filter(Path.exists, limits), None)
        if limit_file is None:
            pytest.skip("the memory controller is not given to child cgroups here")
        limit_file.write_text(str(256 << 20))
        found, inside = in_child(look, folder)
    finally:
        folder.rmdir()
    assert (found.available, found.limit) == (True, 256 << 20)
    assert (inside[0].folder, inside[0].limit) == (str(folder), 256 << 20)
    assert 0 < inside[0].used <= 256 << 20


def test_cgroups_are_found_where_they_are_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "v2" / "a" / "b").mkdir(parents=True)
    (tmp_path / "v1" / "c").mkdir(parents=True)
    stat2, stat1 = "inactive_file 10\nactive_file 5\n", "inactive_file 1\ntotal_inactive_file 30\n"
    for folder, names in [
        ("v2/a", {"memory.max": "1000\n", "memory.current": "100\n", "memory.stat": stat2}),
        ("v2/a/b", {"memory.max": "max\n", "memory.current": "50\n", "memory.stat": stat2}),
        (
            "v1/c",
            {
                "memory.limit_in_bytes": "9223372036854771712\n",
                "memory.usage_in_bytes": "70\n",
                "memory.stat": stat1,
            },
        ),
    ]:
        for name, text in names.items():
            (tmp_path / folder / name).write_text(text)
    mountinfo = (
        f"30 20 0:26 / {tmp_path}/v2 rw - cgroup2 cgroup2 rw,nsdelegate\n"
        f"31 20 0:27 /docker {tmp_path}/v1 rw,nosuid shared:5 - cgroup cgroup rw,cpu,memory\n"
        f"32 20 0:28 / {tmp_path}/other rw - cgroup cgroup rw,cpu\n"
    )
    texts = {
        "/proc/self/cgroup": "4:cpu,memory:/docker/c\n0::/a/b\n",
        "/proc/self/mountinfo": mountinfo,
    }
    read_text = cgroups.read_text
    monkeypatch.setattr(cgroups, "read_text", lambda path: texts.get(path) or read_text(path))
    assert memory_cgroups() == [
        MemoryCgroup(f"{tmp_path}/v2/a/b", None, 0, 0),
        MemoryCgroup(f"{tmp_path}/v2/a", 1000, 100, 15),
        MemoryCgroup(f"{tmp_path}/v1/c", None, 0, 0),
    ]
    assert probe_feature("memory_cgroup").limit == 1000
    (tmp_path / "v2/a/memory.max").write_text("max\n")
    assert probe_feature("memory_cgroup") == Feature(
        "memory_cgroup",
        True,
        "no limit is set",
        probe_feature("memory_cgroup").needs,
        probe_feature("memory_cgroup").remedy,
    )
    texts["/proc/self/mountinfo"] = "1 1 0:1 / / rw - ext4 /dev/vda rw\n"
    denied("memory_cgroup", "no memory cgroup")
