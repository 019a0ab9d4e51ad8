"""The VM objects: as the kernel shows them, and what is refused of strangers' ones."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from children import in_child
from huge_pool import huge_pages

from memdesc import (
    Access,
    AllocationError,
    BufferMemoryDescriptor,
    ClosedError,
    InvalidArgument,
    MappingError,
    MappingReason,
    PageKind,
    _core,
    page_size,
)
from memdesc.mapping import Extent, map_extents
from memdesc.memory.foreign import ForeignObject
from memdesc.memory.memfd import OwnedObject, check_name, find_owned, reopen

SIZE = 4 * page_size
SIZE_SEALS = _core.F_SEAL_GROW | _core.F_SEAL_SHRINK


def owned(
    name: str = "frames", max_access: Access = Access.READ_ONLY, **options: Any
) -> OwnedObject:
    options = {"pages": PageKind.BASE, **options}
    return OwnedObject(name, options.pop("size", SIZE), max_access=max_access, **options)


# ── What we make ─────────────────────────────────────────────────────────────────────────────


def test_a_memfd_as_the_kernel_shows_it() -> None:
    memory = owned()
    fd = memory.fileno()
    status = os.fstat(fd)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert (status.st_size, status.st_blocks) == (SIZE, 0)
    memory.reserve(page_size, SIZE - page_size)
    assert os.fstat(fd).st_blocks * 512 == SIZE - page_size
    assert memory.identity == (status.st_dev, status.st_ino)
    assert (
        fcntl.fcntl(fd, fcntl.F_GET_SEALS) & ~_core.F_SEAL_EXEC
        == SIZE_SEALS
        == (memory.seals() & ~_core.F_SEAL_EXEC)
    )
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert os.readlink(f"/proc/self/fd/{fd}") == "/memfd:frames (deleted)"
    memory.close()


def test_it_can_not_be_executed_where_the_kernel_knows_of_that() -> None:
    memory = owned()
    try:
        probe = os.memfd_create("probe", _core.MFD_NOEXEC_SEAL)
    except OSError as error:
        pytest.skip(f"MFD_NOEXEC_SEAL: {error.strerror}")
    os.close(probe)
    assert memory.seals() & _core.F_SEAL_EXEC
    with pytest.raises(PermissionError):
        os.fchmod(memory.fileno(), 0o700)
    memory.close()


def test_an_older_kernel_gets_no_such_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 6.3 memfd_create answers EINVAL to the flag."""
    create, asked = os.memfd_create, []

    def older(name: str, flags: int) -> int:
        asked.append(flags)
        if flags & _core.MFD_NOEXEC_SEAL:
            raise OSError(errno.EINVAL, "memfd_create")
        return create(name, flags)

    monkeypatch.setattr(os, "memfd_create", older)
    memory = owned()
    assert len(asked) == 2
    assert memory.seals() == SIZE_SEALS
    memory.close()


@pytest.mark.parametrize(
    "change", [lambda fd: os.ftruncate(fd, 0), lambda fd: os.ftruncate(fd, 2 * SIZE)]
)
def test_its_size_stands_from_the_first(change: Callable[[int], None]) -> None:
    memory = owned()
    with pytest.raises(PermissionError) as caught:
        change(memory.fileno())
    assert caught.value.errno == errno.EPERM
    memory.close()


def test_no_descriptor_outlives_close() -> None:
    memory = owned()
    fd = memory.fileno()
    memory.close()
    memory.close()
    with pytest.raises(OSError):
        os.fstat(fd)
    with pytest.raises(ClosedError):
        memory.fileno()
    with pytest.raises(ClosedError):
        memory.grant(Access.READ_ONLY, user=os.geteuid())


def test_an_object_is_found_by_what_maps_show_as_long_as_it_lives() -> None:
    memory = owned()
    identity = memory.identity
    assert find_owned(identity) is memory
    memory.close()
    del memory
    assert find_owned(identity) is None


@contextmanager
def no_lease_kills() -> Iterator[None]:
    """A broken lease sends SIGIO, which kills; this thread gets a harmless signal instead."""
    before = signal.signal(signal.SIGRTMIN, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGRTMIN, before)


def lease(fd: int) -> int:
    """Ask whether this description is the only one of its file: 0, or the kernel's errno."""
    fcntl.fcntl(fd, 10, signal.SIGRTMIN)  # F_SETSIG
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        return error.errno or 0
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return 0


def test_a_grant_has_a_description_of_its_own_which_a_lease_sees() -> None:
    memory = owned()
    with no_lease_kills():
        assert lease(memory.fileno()) == 0
        granted = memory.grant(Access.READ_ONLY, user=os.geteuid())
        assert lease(memory.fileno()) == errno.EAGAIN
        window = map_extents([Extent(memory, 0, SIZE)], Access.READ_ONLY)
        os.close(granted)
        assert lease(memory.fileno()) == errno.EAGAIN  # a mapping holds its description too
        del window
        assert lease(memory.fileno()) == 0
    memory.close()


def test_the_owner_s_own_view_is_nobody_else_to_a_lease() -> None:
    with BufferMemoryDescriptor(SIZE) as buffer, no_lease_kills():
        assert lease(buffer.memory.fileno()) == 0
        other = buffer.map(access=Access.READ_ONLY, unique=True)
        assert lease(buffer.memory.fileno()) == errno.EAGAIN
        del other
        assert lease(buffer.memory.fileno()) == 0


@pytest.mark.parametrize("access", Access)
def test_a_further_mapping_of_the_owner_is_seen_by_a_lease(access: Access) -> None:
    """Only the first view shares the owner's description: what else is mapped is told from it."""
    with BufferMemoryDescriptor(SIZE, max_access=Access.READ_WRITE) as buffer, no_lease_kills():
        assert lease(buffer.memory.own_fd()) == 0
        other = buffer.map(access=access, unique=True)
        assert lease(buffer.memory.own_fd()) == errno.EAGAIN
        other.unmap()
        assert lease(buffer.memory.own_fd()) == 0


def test_after_the_seal_no_further_writable_mapping_can_be_had() -> None:
    memory = owned()
    os.close(memory.grant(Access.READ_ONLY, user=os.geteuid()))
    with pytest.raises(MappingError) as caught:
        map_extents([Extent(memory, 0, SIZE)], Access.READ_WRITE)
    assert (caught.value.reason, caught.value.errno) == (MappingReason.ACCESS, errno.EPERM)
    memory.close()


def test_asking_for_the_owner_s_descriptor_is_noted() -> None:
    with BufferMemoryDescriptor(SIZE) as buffer:
        buffer.memory.own_fd()
        buffer.memory.seals()
        buffer.map(unique=True).unmap()
        assert not buffer.memory.lifecycle.exposed
        buffer.memory.fileno()
        assert buffer.memory.lifecycle.exposed


def test_a_grant_is_open_for_no_more_than_was_granted() -> None:
    for max_access, mode in [(Access.READ_ONLY, os.O_RDONLY), (Access.READ_WRITE, os.O_RDWR)]:
        memory = owned(max_access=max_access)
        granted = memory.grant(max_access, user=os.geteuid())
        assert fcntl.fcntl(granted, fcntl.F_GETFL) & os.O_ACCMODE == mode
        assert fcntl.fcntl(granted, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        os.close(granted)
        memory.close()


@pytest.mark.parametrize("name", ["", "a" * 249, "ü" * 124, "tab\there", "\U0001f4f7", "a/b"])
def test_names_that_a_memfd_carries(name: str) -> None:
    memory = owned(name)
    assert os.readlink(f"/proc/self/fd/{memory.fileno()}").startswith("/memfd:")
    assert check_name(name) == name
    memory.close()


@pytest.mark.parametrize("name", ["a" * 250, "ü" * 125, "nul\0nul"])
def test_names_that_it_does_not(name: str) -> None:
    with pytest.raises(InvalidArgument):
        BufferMemoryDescriptor(1, name=name)


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("last", [0, 1, 2])
def test_no_descriptor_left(last: int, lazy: bool) -> None:
    """EMFILE at each step of making one: creating, opening it again, mapping it."""

    def with_few() -> tuple[str, int | None]:
        spare = []
        try:
            while True:
                spare.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
        for fd in spare[:last]:
            os.close(fd)
        try:
            BufferMemoryDescriptor(page_size, lazy=lazy)
        except (AllocationError, MappingError) as error:
            return type(error).__name__, error.errno
        finally:
            for fd in spare[last:]:
                os.close(fd)
        return "made", None

    limit = (64, 64)
    kind, number = in_child(
        with_few, before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    )
    if last == 2:
        assert (kind, number) == ("made", None)
    else:
        assert (kind, number) == ("AllocationError", errno.EMFILE)


# ── What strangers give ──────────────────────────────────────────────────────────────────────


@contextmanager
def stranger(seals: int = SIZE_SEALS, size: int = SIZE, flags: int = 0) -> Iterator[int]:
    """A memfd as a peer that does not use this library makes one."""
    fd = os.memfd_create("stranger", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC | flags)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)


def refused(fd: int, **options: bool) -> MappingError:
    """What making an object of a copy of the descriptor raises; the copy must be closed by it."""
    copy = os.dup(fd)
    with pytest.raises(MappingError) as caught:
        ForeignObject(copy, Access.READ_WRITE, **options)
    with pytest.raises(OSError):
        os.fstat(copy)
    return caught.value


@pytest.mark.parametrize("seals", [0, _core.F_SEAL_GROW, _core.F_SEAL_FUTURE_WRITE])
def test_a_memfd_that_can_shrink_is_refused(seals: int) -> None:
    with stranger(seals) as fd:
        error = refused(fd)
        assert (error.reason, error.errno) == (MappingReason.CAN_SHRINK, errno.EPERM)
        trusted = ForeignObject(os.dup(fd), Access.READ_ONLY, trust_size=True)
        assert trusted.size == SIZE
        trusted.close()


@pytest.mark.parametrize("flags", [os.O_PATH, os.O_WRONLY])
def test_a_descriptor_that_can_not_be_read_is_refused(flags: int) -> None:
    with stranger() as fd:
        other = os.open(f"/proc/self/fd/{fd}", flags)
        error = refused(other)
        os.close(other)
        assert (error.reason, error.errno) == (MappingReason.ACCESS, errno.EACCES)


def a_file() -> int:
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"x" * SIZE)
        return os.dup(file.fileno())


def a_pipe() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def a_socket() -> int:
    with socket.socket(socket.AF_UNIX) as sock:
        return os.dup(sock.fileno())


def a_directory() -> int:
    return os.open("/", os.O_RDONLY | os.O_DIRECTORY)


def a_device() -> int:
    return os.open("/dev/zero", os.O_RDWR)


def a_tmpfs_file() -> int:
    """Of shmem, as a memfd is, but with a name, and no seal was allowed."""
    try:
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
            file.write(b"x" * SIZE)
            return os.dup(file.fileno())
    except OSError as error:
        pytest.skip(f"no file can be made in /dev/shm: {error.strerror}")


@pytest.mark.parametrize(
    "make", [a_file, a_pipe, a_socket, a_directory, a_device, lambda: os.eventfd(0), a_tmpfs_file]
)
def test_what_is_no_memfd_is_refused(make: Callable[[], int]) -> None:
    fd = make()
    error = refused(fd)
    assert (error.reason, error.errno) == (MappingReason.CAN_SHRINK, errno.EPERM)
    regular = stat.S_ISREG(os.fstat(fd).st_mode)
    if not regular:
        error = refused(fd, trust_size=True)
        assert (error.reason, error.errno) == (MappingReason.ACCESS, errno.EACCES)
    os.close(fd)


def test_an_empty_object_holds_no_range() -> None:
    with stranger(size=0) as fd:
        nothing = ForeignObject(os.dup(fd), Access.READ_ONLY)
        with pytest.raises(MappingError) as caught:
            map_extents([Extent(nothing, 0, 1)], Access.READ_ONLY)
        assert caught.value.reason is MappingReason.OUT_OF_RANGE
        nothing.close()


def test_the_rights_are_the_least_of_what_is_said_what_is_open_and_what_is_sealed() -> None:
    with stranger() as fd:
        reader = reopen(fd, Access.READ_ONLY)
        for given, claimed, most, enforced in [
            (fd, Access.READ_WRITE, Access.READ_WRITE, True),
            (fd, Access.READ_ONLY, Access.READ_ONLY, False),
            (reader, Access.READ_WRITE, Access.READ_ONLY, False),
        ]:
            object_ = ForeignObject(os.dup(given), claimed)
            assert (object_.max_access, object_.enforced) == (most, enforced)
            object_.close()
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _core.F_SEAL_FUTURE_WRITE)
        object_ = ForeignObject(os.dup(fd), Access.READ_WRITE)
        assert (object_.max_access, object_.enforced) == (Access.READ_ONLY, True)
        with pytest.raises(MappingError) as caught:
            object_.open(Access.READ_WRITE)
        assert caught.value.reason is MappingReason.ACCESS
        object_.close()
        with pytest.raises(ClosedError):
            object_.open(Access.READ_ONLY)
        os.close(reader)


def test_what_is_writable_is_passed_on_read_only_only_as_a_courtesy() -> None:
    with stranger() as fd:
        object_ = ForeignObject(os.dup(fd), Access.READ_WRITE)
        with pytest.raises(MappingError) as caught:
            object_.grant(Access.READ_ONLY, user=os.geteuid())
        assert (caught.value.reason, caught.value.errno) == (
            MappingReason.NOT_ENFORCED,
            errno.EPERM,
        )
        courtesy = object_.grant(Access.READ_ONLY, enforced=False, user=os.geteuid())
        assert fcntl.fcntl(courtesy, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        os.close(courtesy)
        object_.close()


def test_a_lease_of_the_giver_does_not_hold_us_up() -> None:
    """Opening a leased file waits for its holder, 45 s by default, unless told not to."""
    with stranger() as first, no_lease_kills():
        fd = os.open(f"/proc/self/fd/{first}", os.O_RDWR)
    with no_lease_kills():
        fcntl.fcntl(fd, 10, signal.SIGRTMIN)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        object_ = ForeignObject(os.dup(fd), Access.READ_WRITE)
        opened: list[int] = []
        thread = threading.Thread(target=lambda: opened.append(object_.open(Access.READ_ONLY)))
        thread.start()
        thread.join(20)
        assert opened, "opening waited for the holder of the lease"
        with pytest.raises(BlockingIOError):
            reopen(fd, Access.READ_ONLY)
        os.close(opened.pop())
        object_.close()
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        os.close(fd)


# ── Huge pages ───────────────────────────────────────────────────────────────────────────────


def test_huge_memory_that_a_stranger_may_write_is_refused() -> None:
    huge = PageKind.HUGE.page_size
    if not huge:
        pytest.skip("this kernel has no huge pages")
    with stranger(size=huge, flags=os.MFD_HUGETLB) as fd:
        error = refused(fd)
        assert (error.reason, error.errno) == (MappingReason.CAN_SHRINK, errno.EPERM)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _core.F_SEAL_FUTURE_WRITE)
        object_ = ForeignObject(os.dup(fd), Access.READ_WRITE)
        assert (object_.max_access, object_.page_size) == (Access.READ_ONLY, huge)
        object_.close()


def test_every_size_of_huge_page_is_known_for_what_it_is() -> None:
    """A mapping rounded to the wrong page size would lie over its neighbours."""
    sizes = [
        int(folder.name.split("-")[1].removesuffix("kB")) * 1024
        for folder in Path("/sys/kernel/mm/hugepages").glob("hugepages-*")
    ]
    if not sizes:
        pytest.skip("this kernel has no huge pages")
    for size in sizes:
        flags = os.MFD_HUGETLB | (size.bit_length() - 1) << 26  # MFD_HUGE_SHIFT
        with stranger(SIZE_SEALS | _core.F_SEAL_FUTURE_WRITE, size, flags) as fd:
            object_ = ForeignObject(os.dup(fd), Access.READ_ONLY)
            assert object_.page_size == size
            object_.close()


def test_huge_memory_as_the_kernel_shows_it() -> None:
    huge = PageKind.HUGE.page_size
    with huge_pages(2):
        memory = owned(size=2 * huge, pages=PageKind.HUGE)
        status = os.fstat(memory.fileno())
        assert (status.st_size, memory.page_size) == (2 * huge, huge)
        assert memory.seals() & SIZE_SEALS == SIZE_SEALS
        assert stat.S_IMODE(status.st_mode) == 0o600
        granted = memory.grant(Access.READ_ONLY, user=os.geteuid())
        received = ForeignObject(granted, Access.READ_WRITE)
        assert (received.page_size, received.max_access) == (huge, Access.READ_ONLY)
        received.close()
        memory.close()


def test_a_fixed_address_is_of_the_memory_s_own_pages() -> None:
    huge = PageKind.HUGE.page_size
    with huge_pages(1), BufferMemoryDescriptor(huge, pages=PageKind.HUGE) as buffer:
        place = _core.reserve_memory(3 * huge).address
        aligned = place + -place % huge
        with pytest.raises(MappingError) as caught:
            buffer.map(unique=True, at_address=aligned + page_size)
        assert caught.value.reason is MappingReason.ADDRESS_UNALIGNED
        assert caught.value.errno == errno.EINVAL
        with buffer.map(unique=True, at_address=aligned) as mapping:
            assert mapping.address == aligned
        del mapping, caught
    del buffer
