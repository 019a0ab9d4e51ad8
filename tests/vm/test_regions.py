"""Regions: the parser against the kernel's format, and the records against real mappings."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from itertools import pairwise
from pathlib import Path

import pytest
from children import become, in_child
from hypothesis import given, strategies as st
from programs import Start, huge_memfd, mapped

from memdesc import _core
from memdesc.errors import InvalidArgument, NotPrivilegedError, TaskGoneError
from memdesc.vm.pages import Access, Address, page_size
from memdesc.vm.regions import (
    ObjectKind,
    Region,
    VMObject,
    details,
    details_in,
    find_holes,
    holes,
    parse_maps,
    parse_smaps,
    parse_status,
    region_at,
    regions,
    regions_in,
    task_status,
)
from memdesc.vm.task import Task

# --- Text, as fs/proc/task_mmu.c writes it (show_vma_header_prefix, seq_pad, seq_path) ---------


def format_region(region: Region) -> str:
    major, minor = region.object.device
    line = (
        f"{region.start:08x}-{region.end:08x} {region.permissions} {region.offset:08x} "
        f"{major:02x}:{minor:02x} {region.object.inode} "
    )
    path = region.path.replace("\n", "\\012")
    return (line.ljust(73) + path if path else line) + "\n"


def format_maps(found: list[Region]) -> str:
    return "".join(map(format_region, found))


_NAMES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\\"), min_size=1
) | st.sampled_from(["a b", "x (deleted)", "new\nline", "\udcff\udc80", "a\u2028b\x0b\x85", "-"])
_PATHS = (
    st.just("")
    | st.sampled_from(["[heap]", "[stack]", "[vdso]", "anon_inode:[io_uring]"])
    | st.builds("[anon:{}]".format, _NAMES)
    | st.builds("/{}".format, _NAMES)
    | st.builds("/memfd:{} (deleted)".format, _NAMES)
)


@st.composite
def _lines(draw: st.DrawFn) -> list[str]:
    borders = sorted(draw(st.sets(st.integers(0, 2**52 - 1), max_size=12)))
    lines = []
    for start, end in zip(borders[::2], borders[1::2], strict=False):
        permissions = "".join(draw(st.sampled_from([pair[0], pair[1]])) for pair in _PERMISSIONS)
        line = (
            f"{start * page_size:08x}-{end * page_size:08x} {permissions} "
            f"{draw(st.integers(0, 2**63 - 1)):08x} {draw(st.integers(0, 4095)):02x}:"
            f"{draw(st.integers(0, 2**20 - 1)):02x} {draw(st.integers(0, 2**64 - 1))} "
        )
        path = draw(_PATHS).replace("\n", "\\012")
        lines.append((line.ljust(73) + path if path else line) + "\n")
    return lines


_PERMISSIONS = ["r-", "w-", "x-", "sp"]


@given(_lines())
def test_formatting_what_was_parsed_gives_the_text_again(lines: list[str]) -> None:
    text = "".join(lines)
    found = parse_maps(text)
    assert len(found) == len(lines)
    assert format_maps(found) == text


@given(_lines(), st.integers(0, 2**64 - 1), st.integers(1, 2**52))
def test_parsing_a_part_gives_what_overlaps_it(lines: list[str], low: int, length: int) -> None:
    text, high = "".join(lines), low + length
    expected = [one for one in parse_maps(text) if one.end > low and one.start < high]
    assert parse_maps(text, low, high) == expected


@given(_lines(), st.integers(0, 2**62), st.integers(1, 2**62 - 1))
def test_holes_and_regions_make_up_the_range(lines: list[str], address: int, length: int) -> None:
    inside = parse_maps("".join(lines), address, address + length)
    pieces = [(start, start + size) for start, size in find_holes(inside, address, length)]
    pieces += [(max(r.start, address), min(r.end, address + length)) for r in inside]
    pieces.sort()
    assert pieces[0][0] == address
    assert pieces[-1][1] == address + length
    assert all(one[1] == other[0] for one, other in pairwise(pieces))
    assert all(start < end for start, end in pieces)


def test_the_text_of_every_task_here_comes_back_the_same() -> None:
    seen = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            text = os.fsdecode(Path(f"/proc/{name}/maps").read_bytes())
        except OSError:
            continue  # ended meanwhile, or not ours to look at
        assert format_maps(parse_maps(text)) == text
        seen += len(text)
    assert seen


@pytest.mark.parametrize(
    ("inode", "path", "kind", "name"),
    [
        (0, "", ObjectKind.ANONYMOUS, ""),
        (0, "[heap]", ObjectKind.ANONYMOUS, "[heap]"),
        (0, "[stack]", ObjectKind.ANONYMOUS, "[stack]"),
        (0, "[anon:pool]", ObjectKind.ANONYMOUS, "[anon:pool]"),
        (0, "[vdso]", ObjectKind.SPECIAL, "[vdso]"),
        (0, "[vvar_vclock]", ObjectKind.SPECIAL, "[vvar_vclock]"),
        (7, "anon_inode:[perf_event]", ObjectKind.SPECIAL, "anon_inode:[perf_event]"),
        (7, "[anon_shmem:pool]", ObjectKind.SHARED_ANONYMOUS, "pool"),
        (7, "/dev/zero (deleted)", ObjectKind.SHARED_ANONYMOUS, "/dev/zero"),
        (7, "/dev/zero", ObjectKind.FILE, "/dev/zero"),
        (7, "/memfd:a b (deleted)", ObjectKind.MEMFD, "a b"),
        (7, "/memfd: (deleted)", ObjectKind.MEMFD, ""),
        (7, "/memfd:x", ObjectKind.FILE, "/memfd:x"),  # a file that is only called so
        (7, "/SYSV00000000 (deleted)", ObjectKind.SYSV, "/SYSV00000000"),
        (7, "/anon_hugepage (deleted)", ObjectKind.HUGETLB, "/anon_hugepage"),
        (7, "/tmp/a\\012b (deleted)", ObjectKind.FILE, "/tmp/a\nb"),
        (7, "/usr/lib/libc.so.6", ObjectKind.FILE, "/usr/lib/libc.so.6"),
    ],
)
def test_the_kind_of_each_object(inode: int, path: str, kind: ObjectKind, name: str) -> None:
    line = f"7f0000000000-7f0000002000 rw-s 00003000 103:0a {inode} ".ljust(73) + path + "\n"
    (region,) = parse_maps(line)
    assert region.object == VMObject(kind, (0x103, 0x0A), inode, name)
    assert region.object.identity == ((0x103, 0x0A, 7) if inode else None)


def test_the_rights_of_a_region() -> None:
    def rights(permissions: str) -> tuple[object, ...]:
        none = VMObject(ObjectKind.ANONYMOUS, (0, 0), 0, "")
        one = Region(Address(0x1000), Address(0x3000), permissions, 0x5000, none, "")
        assert one.length == 0x2000
        assert one.offset_of(0x1800) == 0x5800
        return one.readable, one.writable, one.executable, one.shared, one.access

    assert rights("rw-s") == (True, True, False, True, Access.READ_WRITE)
    assert rights("r-xp") == (True, False, True, False, Access.READ_ONLY)
    assert rights("---p") == (False, False, False, False, None)
    assert rights("-w-s") == (False, True, False, True, None)


def test_details_leave_out_what_the_kernel_does() -> None:
    (one,) = parse_smaps("1000-2000 rw-p 00000000 00:00 0 \nSize: 4 kB\nKernelPageSize: 4 kB\n")
    assert (one.page_size, one.resident, one.huge, one.flags) == (4096, 0, 0, ())
    assert parse_smaps("") == []


def test_a_kernel_thread_has_no_memory() -> None:
    status = parse_status("Name:\tkthreadd\nPid:\t2\n")
    assert set(vars_of(status)) == {0}


def vars_of(record: object) -> list[int]:
    return [getattr(record, name) for name in record.__slots__]  # type: ignore[attr-defined]


# --- Real mappings of this process -----------------------------------------------------------


def test_a_memfd_is_found_with_its_object(own: Task) -> None:
    fd = os.memfd_create("two words")
    try:
        os.ftruncate(fd, 4 * page_size)
        with mapped(4 * page_size, mmap.MAP_SHARED, fd) as address:
            _core.mprotect(address + page_size, page_size, mmap.PROT_READ)
            found = regions_in(own, address, 4 * page_size)
            status = os.fstat(fd)
    finally:
        os.close(fd)
    assert [(one.start - address, one.length, one.offset) for one in found] == [
        (0, page_size, 0),
        (page_size, page_size, page_size),
        (2 * page_size, 2 * page_size, 2 * page_size),
    ]
    assert [one.access for one in found] == [
        Access.READ_WRITE,
        Access.READ_ONLY,
        Access.READ_WRITE,
    ]
    for one in found:
        assert one.shared
        assert one.path == "/memfd:two words (deleted)"
        assert one.object.kind is ObjectKind.MEMFD
        assert one.object.name == "two words"
        assert one.object.inode == status.st_ino
        assert os.makedev(*one.object.device) == status.st_dev


@pytest.mark.parametrize(
    ("flags", "kind", "shared"),
    [
        (mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, ObjectKind.SHARED_ANONYMOUS, True),
        (mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, ObjectKind.ANONYMOUS, False),
    ],
)
def test_anonymous_memory(own: Task, flags: int, kind: ObjectKind, shared: bool) -> None:
    with mapped(3 * page_size, flags) as address:
        region = region_at(own, address + page_size + 1)
        assert region is not None
        assert (region.object.kind, region.shared) == (kind, shared)
        assert (region.object.identity is not None) is shared
        assert region.start <= address < region.end


def test_two_shared_anonymous_mappings_are_two_objects(own: Task) -> None:
    flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
    with mapped(page_size, flags) as one, mapped(page_size, flags) as other:
        first, second = region_at(own, one), region_at(own, other)
        assert first and second
        assert first.object.identity != second.object.identity


@pytest.mark.parametrize("name", ["plain", "two words", "new\nline", "late (deleted)", "\udcff"])
def test_a_file_of_any_name(own: Task, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(bytes(page_size))
    with path.open("rb") as file:
        with mapped(page_size, mmap.MAP_SHARED, file.fileno(), mmap.PROT_READ) as address:
            before = region_at(own, address)
            path.unlink()
            after = region_at(own, address)
    assert before and after
    assert before.path == str(path)
    assert after.path == f"{path} (deleted)"
    assert after.object.name == str(path)
    assert after.object.kind is ObjectKind.FILE
    assert after.object.identity == before.object.identity


def test_where_nothing_is_mapped() -> None:
    def look() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        memory = _core.reserve_memory(3 * page_size)
        hole = memory.address + page_size
        with Task.current() as own:
            assert region_at(own, hole) is not None
            assert holes(own, memory.address, 3 * page_size) == []
            assert libc.munmap(ctypes.c_void_p(hole), ctypes.c_size_t(page_size)) == 0
            assert region_at(own, hole) is None
            assert holes(own, memory.address, 3 * page_size) == [(hole, page_size)]
            assert holes(own, hole + 5, 7) == [(hole + 5, 7)]

    in_child(look)  # its own memory, which nobody else maps anything into


@pytest.mark.parametrize(
    ("address", "length"), [(-1, 1), (0, 0), (0, -1), (2**63 - 1, 1), (0, 2**63), (2**64, 1)]
)
def test_what_is_no_range_is_refused(own: Task, address: int, length: int) -> None:
    for use in (regions_in, holes, details_in):
        with pytest.raises(InvalidArgument):
            use(own, address, length)


def test_details_tell_what_is_in_memory(own: Task) -> None:
    fd = os.memfd_create("details")
    try:
        os.ftruncate(fd, 4 * page_size)
        with mapped(4 * page_size, mmap.MAP_SHARED, fd) as address:
            (before,) = details_in(own, address, 1)
            _core.madvise(address, 3 * page_size, _core.MADV_POPULATE_WRITE)
            (after,) = details_in(own, address, 1)
    finally:
        os.close(fd)
    assert before.page_size == after.page_size == page_size
    assert (before.resident, after.resident) == (0, 3 * page_size)
    assert after.proportional == 3 * page_size
    assert (after.locked, after.swapped, after.huge) == (0, 0, 0)
    assert {"rd", "wr", "sh"} <= set(after.flags)
    assert after.region.object.kind is ObjectKind.MEMFD


def test_locked_memory_shows(own: Task) -> None:
    with mapped(2 * page_size, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS) as address:
        before = task_status(own).locked
        try:
            _core.mlock(address, 2 * page_size)
        except OSError as error:
            pytest.skip(f"no memory can be locked here: {error}")
        (one,) = details_in(own, address, 1)
        assert task_status(own).locked == before + 2 * page_size
        assert one.locked == 2 * page_size
        assert "lo" in one.flags


@pytest.mark.alone
def test_huge_pages_show(own: Task, huge_page: int) -> None:
    with huge_memfd(huge_page) as fd, mapped(huge_page, mmap.MAP_SHARED, fd) as address:
        _core.madvise(address, huge_page, _core.MADV_POPULATE_WRITE)
        (one,) = details_in(own, address, huge_page)
        assert task_status(own).hugetlb >= huge_page
    assert one.page_size == huge_page
    assert one.region.object.kind is ObjectKind.HUGETLB
    assert one.region.object.name == "huge"
    assert one.private_hugetlb + one.shared_hugetlb == huge_page
    assert "ht" in one.flags


def test_details_and_regions_agree(own: Task) -> None:
    found = {one.region.start: one for one in details(own)}
    mapped_now = regions(own)
    shared = [one for one in mapped_now if one.start in found]
    assert len(shared) > len(mapped_now) // 2
    assert sum(one.resident for one in found.values()) > 0


def test_the_sums_are_the_kernels(own: Task) -> None:
    with mapped(64 * page_size, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS) as address:
        before = task_status(own)
        _core.madvise(address, 64 * page_size, _core.MADV_POPULATE_WRITE)
        after = task_status(own)
    # The kernel keeps the counters per CPU and may be off by some pages of each.
    assert after.shared - before.shared >= 32 * page_size
    assert after.resident >= after.shared
    assert after.resident == after.anonymous + after.file + after.shared


# --- Other tasks -----------------------------------------------------------------------------

_MAPS_A_BUFFER = """
import mmap, os
buffer = mmap.mmap(-1, 54321)
fd = os.memfd_create('theirs')
os.ftruncate(fd, 8192)
other = mmap.mmap(fd, 8192)
"""


def test_the_regions_of_a_task_that_knows_nothing_of_us(start: Start) -> None:
    with Task(start(_MAPS_A_BUFFER).pid) as task:
        found = regions(task)
        (shared,) = [one for one in found if one.object.kind is ObjectKind.SHARED_ANONYMOUS]
        (memfd,) = [one for one in found if one.object.kind is ObjectKind.MEMFD]
        assert shared.length == -(-54321 // page_size) * page_size
        assert memfd.object.name == "theirs"
        assert regions_in(task, shared.start, 1) == [shared]
        assert sorted(found, key=lambda one: one.start) == found


def test_a_task_that_has_ended(start: Start) -> None:
    child = start()
    with Task(child.pid) as task:
        child.kill()
        child.wait()
        for use in (regions, details, task_status):
            with pytest.raises(TaskGoneError) as caught:
                use(task)
            assert caught.value.errno == errno.ESRCH


def test_a_task_of_another_user() -> None:
    parent = os.getpid()

    def look() -> list[int | None]:
        become(65534)
        found = []
        with Task(parent) as task:
            for use in (regions, details):
                try:
                    use(task)
                except NotPrivilegedError as error:
                    assert "CAP_SYS_PTRACE" in str(error)
                    found.append(error.errno)
            assert task_status(task).resident > 0  # needs no privilege
        return found

    assert in_child(look) == [errno.EACCES, errno.EACCES]


_MANY = """
import mmap
rights = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
# Neighbours of unlike rights never join, so each stays a region.
keep = [mmap.mmap(-1, 4096, prot=rights[i % 2]) for i in range(20000)]
"""


@pytest.mark.slow
def test_a_task_of_very_many_regions(start: Start) -> None:
    with Task(start(_MANY).pid) as task:
        found = regions(task)
        assert len(found) > 20000
        assert len({one.object.identity for one in found}) > 20000
        assert region_at(task, found[10000].start) == found[10000]
