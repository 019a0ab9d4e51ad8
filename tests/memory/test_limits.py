"""What can be had before the kernel kills for it: the books, and the kernel itself."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from children import in_child
from huge_pool import free_pages, huge_pages
from memory_cgroup import ENTER, memory_cgroup

from memdesc import (
    AllocationError,
    BufferMemoryDescriptor,
    InvalidArgument,
    MappingError,
    MappingReason,
    PageKind,
    _core,
    page_size,
)
from memdesc.memory import limits
from memdesc.memory.limits import available, check_available
from memdesc.memory.page_kinds import meminfo
from memdesc.vm import cgroups
from memdesc.vm.cgroups import MemoryCgroup

MIB = 1 << 20

# ── Cgroups' files, of both versions ─────────────────────────────────────────────────────────


def write_group(folder: Path, limit: str, used: int, stat: dict[str, int], version: int) -> None:
    """A cgroup's folder with the files that the kernel shows there."""
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        2: ("memory.max", "memory.current"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names[version], (limit, str(used)), strict=True):
        (folder / name).write_text(text + "\n")
    (folder / "memory.stat").write_text("".join(f"{key} {value}\n" for key, value in stat.items()))


STAT_1 = {
    "cache": 9,
    "inactive_file": 1,
    "active_file": 2,
    "total_inactive_file": 4096,
    "total_active_file": 8192,
}
STAT_2 = {"anon": 7, "inactive_file": 4096, "active_file": 8192}


@pytest.mark.parametrize(("version", "stat"), [(1, STAT_1), (2, STAT_2)])
def test_a_cgroup_of_each_version_is_read(
    tmp_path: Path, version: int, stat: dict[str, int]
) -> None:
    write_group(tmp_path, str(64 * MIB), 20 * MIB, stat, version)
    kind = {1: "cgroup", 2: "cgroup2"}[version]
    group = cgroups._read_group(str(tmp_path), *cgroups._FILES[kind])
    assert group == MemoryCgroup(str(tmp_path), 64 * MIB, 20 * MIB, 12288)


@pytest.mark.parametrize(("version", "text"), [(1, str(2**63 - 4096)), (2, "max")])
def test_no_limit_is_none(tmp_path: Path, version: int, text: str) -> None:
    write_group(tmp_path, text, 1, {}, version)
    group = cgroups._read_group(
        str(tmp_path), *cgroups._FILES["cgroup" if version == 1 else "cgroup2"]
    )
    assert group is not None
    assert group.limit is None


def test_a_folder_without_the_files_is_no_cgroup(tmp_path: Path) -> None:
    assert cgroups._read_group(str(tmp_path), *cgroups._FILES["cgroup2"]) is None


def test_memberships_of_both_versions() -> None:
    text = "9:name=systemd:/\n5:cpu,memory:/docker/ab:c\n2:cpuacct:/x\n0::/user.slice/a\n"
    assert cgroups._memberships(text) == {"cgroup": "/docker/ab:c", "cgroup2": "/user.slice/a"}


def test_mounts_of_both_versions_wherever_they_are() -> None:
    text = (
        "25 19 0:22 / /sys/fs/cgroup/memory rw,nosuid shared:9 - cgroup cgroup rw,memory\n"
        "26 19 0:23 /docker/ab /cg rw - cgroup2 cgroup2 rw,nsdelegate\n"
        "27 19 0:24 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
        "28 19 8:1 / / rw - ext4 /dev/sda1 rw\n"
    )
    assert cgroups._mounts(text) == [
        ("cgroup", "/sys/fs/cgroup/memory", "/"),
        ("cgroup2", "/cg", "/docker/ab"),
    ]


def test_the_tightest_cgroup_is_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [
        MemoryCgroup("/inner", 100 * MIB, 30 * MIB, 10 * MIB),  # leaves 80
        MemoryCgroup("/middle", None, 500 * MIB, 0),
        MemoryCgroup("/outer", 200 * MIB, 190 * MIB, 15 * MIB),  # leaves 25
    ]
    monkeypatch.setattr(limits, "memory_cgroups", lambda: groups)
    room = available()
    assert room.nbytes == 25 * MIB
    assert "/outer" in room.limit
    check_available(25 * MIB, "a test")
    with pytest.raises(AllocationError) as caught:
        check_available(25 * MIB + 1, "a test")
    assert (caught.value.errno, caught.value.requested, caught.value.available) == (
        errno.ENOMEM,
        25 * MIB + 1,
        25 * MIB,
    )


def test_a_cgroup_over_its_limit_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "memory_cgroups", lambda: [MemoryCgroup("/g", 10, 20, 0)])
    assert available().nbytes == 0


def test_the_machine_is_a_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "memory_cgroups", list)
    assert 0 < available().nbytes <= meminfo()["MemTotal"]


@pytest.mark.parametrize("nbytes", [1 << 50, 1 << 62, 2**63 - page_size])
def test_more_than_the_machine_has_is_refused(nbytes: int) -> None:
    with pytest.raises(AllocationError) as caught:
        BufferMemoryDescriptor(nbytes)
    error = caught.value
    assert error.errno == errno.ENOMEM
    assert error.requested == nbytes
    assert error.available is not None
    assert 0 <= error.available < nbytes
    assert isinstance(error, MemoryError)


def test_a_length_that_no_page_can_hold() -> None:
    with pytest.raises(InvalidArgument):
        BufferMemoryDescriptor(2**63 - 1)


# ── A real cgroup ────────────────────────────────────────────────────────────────────────────

ASK = (
    "import sys\n"
    + ENTER
    + """
import memdesc as md
from memdesc.memory.limits import available
small = md.BufferMemoryDescriptor(8 << 20)
try:
    md.BufferMemoryDescriptor(int(sys.argv[2]), lazy=sys.argv[3] == "lazy").write_bytes(
        0, b"x" * int(sys.argv[2]))
except md.AllocationError as error:
    print(error.errno, error.requested, error.available, available().nbytes)
small.write_bytes(0, b"still alive")
"""
)


def in_cgroup(nbytes: int, how: str) -> subprocess.CompletedProcess[str]:
    with memory_cgroup(64 * MIB) as group:
        command = [sys.executable, "-c", ASK, str(group.folder), str(nbytes), how]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_past_a_cgroup_s_limit_it_is_an_exception_and_no_kill() -> None:
    done = in_cgroup(256 * MIB, "reserved")
    assert done.returncode == 0, done.stderr
    number, requested, left, later = map(int, done.stdout.split())
    assert (number, requested) == (errno.ENOMEM, 256 * MIB)
    assert 0 < left <= 56 * MIB  # 64 less the 8 that it has, and the program itself
    assert abs(left - later) < 8 * MIB


def test_the_same_memory_taken_lazily_is_a_kill() -> None:
    """What reserving spares: the kernel answers the touch that is too much with SIGKILL."""
    done = in_cgroup(96 * MIB, "lazy")
    assert done.returncode == -9, done.stderr


# ── Other things that run out ────────────────────────────────────────────────────────────────


def test_an_empty_pool_of_huge_pages() -> None:
    huge = PageKind.HUGE.page_size
    if not huge:
        pytest.skip("this kernel has no huge pages")
    more = (free_pages() + 1) * huge
    with pytest.raises(AllocationError) as caught:
        BufferMemoryDescriptor(more, pages=PageKind.HUGE)
    assert caught.value.errno == errno.ENOMEM
    assert (caught.value.requested, caught.value.available) == (more, more - huge)


def test_a_pool_that_another_empties_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = PageKind.HUGE.page_size
    if not huge:
        pytest.skip("this kernel has no huge pages")
    monkeypatch.setattr("memdesc.memory.allocation.check_available", lambda *_: None)
    with pytest.raises(AllocationError) as caught:
        BufferMemoryDescriptor((free_pages() + 1) * huge, pages=PageKind.HUGE)
    assert caught.value.errno in (errno.ENOMEM, errno.ENOSPC)


def test_huge_pages_are_counted_apart() -> None:
    with huge_pages(2):
        huge = PageKind.HUGE.page_size
        before = available(PageKind.HUGE).nbytes
        with BufferMemoryDescriptor(huge + 1, pages=PageKind.HUGE, recycle=False):
            assert available(PageKind.HUGE).nbytes == before - 2 * huge
        assert available(PageKind.HUGE).nbytes == before


def test_exhausted_maps() -> None:
    """A child maps single pages, which the kernel can not merge, until it is refused."""

    def exhaust() -> tuple[str, int | None]:
        buffer = BufferMemoryDescriptor(page_size)
        held = []
        anywhere = _core.MAP_PRIVATE | _core.MAP_ANONYMOUS
        try:
            while True:
                prot = (_core.PROT_READ, _core.PROT_NONE)[len(held) % 2]
                held.append(_core.map_memory(0, page_size, prot, anywhere, -1, 0))
        except OSError as error:
            assert error.errno == errno.ENOMEM
        try:
            for _ in range(100):
                held.append(buffer.map(unique=True))
        except MappingError as error:
            outcome = error.reason.name, error.errno
        else:
            outcome = "mapped", None
        del held[:1000]
        buffer.map(unique=True).unmap()  # with room again it goes
        return outcome

    if int(Path("/proc/sys/vm/max_map_count").read_text()) > 1 << 18:
        pytest.skip("vm.max_map_count is too high to be reached in a test")
    assert in_child(exhaust) == (MappingReason.TOO_MANY_MAPPINGS.name, errno.ENOMEM)


def test_no_descriptor_left_to_map_with() -> None:
    def exhaust() -> tuple[str, int | None]:
        buffer = BufferMemoryDescriptor(page_size)
        held = []
        try:
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
        try:
            buffer.map(unique=True)
        except MappingError as error:
            return error.reason.name, error.errno
        finally:
            for fd in held:
                os.close(fd)
        return "mapped", None

    outcome = in_child(exhaust, before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    assert outcome == (MappingReason.TOO_MANY_FILES.name, errno.EMFILE)


def test_an_address_space_that_is_full() -> None:
    def exhaust() -> tuple[str, int | None]:
        buffer = BufferMemoryDescriptor(16 * MIB, lazy=True)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * page_size
        resource.setrlimit(resource.RLIMIT_AS, (used + 8 * MIB, used + 8 * MIB))
        try:
            buffer.map(unique=True)
        except MappingError as error:
            return error.reason.name, error.errno
        return "mapped", None

    assert in_child(exhaust) == (MappingReason.NO_SPACE.name, errno.ENOMEM)
