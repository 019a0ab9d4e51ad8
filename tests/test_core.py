"""The compiled core: what it exports, how its calls fail, what they copy, who holds the GIL.

Its mappings and views are tested in test_core_memory.py.
"""

import ast
import errno
import fcntl
import inspect
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from core_tools import ANYWHERE, READ_WRITE, UNMAPPED, memfd, private, with_fd, with_memory

from memdesc import _core
from memdesc._core import _native
from memdesc.vm.pages import page_size

SOURCE = Path(__file__).parent.parent / "src/memdesc/_core"


# --- One list of what it exports --------------------------------------------------------------


def contract() -> dict[str, ast.stmt]:
    """The names of _native.pyi."""
    names: dict[str, ast.stmt] = {}
    for node in ast.parse((SOURCE / "_native.pyi").read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = node
    return names


def test_the_contract_the_package_and_the_module_export_the_same_names() -> None:
    package = ast.parse((SOURCE / "__init__.py").read_text())
    listed = {
        alias.asname
        for node in package.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    compiled = {name for name in vars(_native) if not name.startswith("_")}
    assert listed == set(contract()) == compiled
    assert all(getattr(_core, name) is getattr(_native, name) for name in compiled)


def test_the_classes_have_the_members_of_the_contract() -> None:
    for name, node in contract().items():
        if not isinstance(node, ast.ClassDef):
            continue
        stated = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        stated -= {"__buffer__", "_export"}  # the first is C until 3.12, the second a subclass's
        members = {member for member in vars(getattr(_core, name)) if not member.startswith("_")}
        assert members == {member for member in stated if not member.startswith("_")}
        assert all(hasattr(getattr(_core, name), member) for member in stated)


def test_the_functions_have_the_parameters_of_the_contract() -> None:
    files = [*SOURCE.glob("*.pyx"), *SOURCE.glob("*.pxi")]
    source = "".join(path.read_text() for path in files)
    written = {
        name: [part.split("not None")[0].split()[-1] for part in parameters.split(",") if part]
        for name, parameters in re.findall(r"^def (\w+)\(([^)]*)\):$", source, re.M)
    }
    stated = {
        name: [argument.arg for argument in node.args.args]
        for name, node in contract().items()
        if isinstance(node, ast.FunctionDef)
    }
    assert written == stated


def test_methods_tell_their_parameters() -> None:
    """For help() and the reference: a builtin has no signature unless its text begins with it."""
    assert list(inspect.signature(_core.RingProducer.enqueue).parameters)[1:] == ["data", "timeout"]
    assert list(inspect.signature(_core.StreamPool.loan).parameters)[1:] == ["timeout"]


def test_every_header_compiles_alone() -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler on this machine")
    headers = sorted(SOURCE.glob("*.h"))
    assert headers
    for header in headers:
        options = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-x", "c"]
        subprocess.run([compiler, *options, header], check=True, timeout=60)


# --- How it fails -----------------------------------------------------------------------------


def ended_task() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def sealed_fd() -> int:
    fd = memfd()
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _core.F_SEAL_GROW)
    return fd


BIG = 1 << 62

FAILURES: list[tuple[str, str, int, Callable[[], object]]] = [
    ("map_memory", "mmap", errno.EINVAL, lambda: _core.map_memory(0, 0, 1, *ANYWHERE)),
    ("map_memory", "mmap", errno.ENOMEM, lambda: _core.map_memory(0, BIG, 1, *ANYWHERE)),
    ("map_memory", "mmap", errno.EBADF, lambda: _core.map_memory(0, page_size, 1, 1, -1, 0)),
    (
        "map_memory",
        "mmap",
        errno.EEXIST,
        lambda: with_memory(
            private(),
            lambda taken: _core.map_memory(
                taken.address,
                page_size,
                _core.PROT_READ,
                _core.MAP_PRIVATE | _core.MAP_ANONYMOUS | _core.MAP_FIXED_NOREPLACE,
                -1,
                0,
            ),
        ),
    ),
    ("reserve_memory", "mmap", errno.EINVAL, lambda: _core.reserve_memory(0)),
    ("reserve_memory", "mmap", errno.ENOMEM, lambda: _core.reserve_memory(BIG)),
    (
        "place_memory",
        "mmap",
        errno.EBADF,
        lambda: _core.place_memory(_core.reserve_memory(page_size), 0, page_size, 1, 1, -1, 0),
    ),
    (
        "duplicate_memory",
        "mremap",
        errno.EINVAL,
        lambda: with_memory(private(), lambda own: _core.duplicate_memory(own.address, page_size)),
    ),
    (
        "duplicate_memory",
        "mremap",
        errno.EFAULT,
        lambda: _core.duplicate_memory(UNMAPPED, page_size),
    ),
    (
        "move_memory",
        "mremap",
        errno.EINVAL,
        lambda: _core.move_memory(private(), 0, page_size, private(2 * page_size), 1),
    ),
    (
        "exchange_memory",
        "mremap",
        errno.EINVAL,
        lambda: _core.exchange_memory(-1, private(), 0, page_size, private(2 * page_size), 1, 9),
    ),
    ("mprotect", "mprotect", errno.EINVAL, lambda: _core.mprotect(UNMAPPED + 1, page_size, 1)),
    ("mprotect", "mprotect", errno.ENOMEM, lambda: _core.mprotect(UNMAPPED, page_size, 1)),
    ("madvise", "madvise", errno.EINVAL, lambda: _core.madvise(UNMAPPED, page_size, 9999)),
    ("madvise", "madvise", errno.ENOMEM, lambda: _core.madvise(UNMAPPED, page_size, 3)),
    ("mlock", "mlock", errno.ENOMEM, lambda: _core.mlock(UNMAPPED, page_size)),
    ("munlock", "munlock", errno.ENOMEM, lambda: _core.munlock(UNMAPPED, page_size)),
    ("mincore", "mincore", errno.ENOMEM, lambda: _core.mincore(UNMAPPED, page_size)),
    (
        "process_vm_readv",
        "process_vm_readv",
        errno.EFAULT,
        lambda: _core.process_vm_readv(os.getpid(), bytearray(8), UNMAPPED),
    ),
    (
        "process_vm_readv",
        "process_vm_readv",
        errno.ESRCH,
        lambda: _core.process_vm_readv(ended_task(), bytearray(8), UNMAPPED),
    ),
    (
        "process_vm_writev",
        "process_vm_writev",
        errno.EFAULT,
        lambda: with_memory(
            private(prot=_core.PROT_READ),
            lambda own: _core.process_vm_writev(os.getpid(), b"x", own.address),
        ),
    ),
    ("stat_cached", "statx", errno.EBADF, lambda: _core.stat_cached(-1, b"")),
    ("stat_cached", "statx", errno.ENOENT, lambda: _core.stat_cached(-1, b"/proc/self/fd/none")),
    ("pidfd_getfd", "pidfd_getfd", errno.EBADF, lambda: _core.pidfd_getfd(-1, 0)),
    (
        "pidfd_getfd",
        "pidfd_getfd",
        errno.EBADF,
        lambda: with_fd(
            lambda: os.pidfd_open(os.getpid()), lambda pidfd: _core.pidfd_getfd(pidfd, 1 << 30)
        ),
    ),
    # EINVAL as well where the kernel can not name memory at all.
    (
        "name_memory",
        "prctl",
        errno.EINVAL,
        lambda: _core.name_memory(UNMAPPED, page_size, b"bad [name]"),
    ),
    ("fallocate", "fallocate", errno.EBADF, lambda: _core.fallocate(-1, 0, 0, page_size)),
    (
        "fallocate",
        "fallocate",
        errno.EINVAL,
        lambda: with_fd(memfd, lambda fd: _core.fallocate(fd, 0, 0, 0)),
    ),
    (
        "fallocate",
        "fallocate",
        errno.EPERM,
        lambda: with_fd(sealed_fd, lambda fd: _core.fallocate(fd, 0, 0, 2 * page_size)),
    ),
]


@pytest.mark.parametrize(
    ("call", "number", "fails"),
    [row[1:] for row in FAILURES],
    ids=[f"{name}-{errno.errorcode[number]}" for name, _, number, _ in FAILURES],
)
def test_a_failure_is_oserror_with_errno_and_the_calls_name(
    call: str, number: int, fails: Callable[[], object]
) -> None:
    with pytest.raises(OSError) as caught:
        fails()
    assert caught.value.errno == number
    assert caught.value.strerror == f"{call}: {os.strerror(number)}"


def test_every_call_of_the_kernel_is_seen_failing() -> None:
    functions = {name for name, node in contract().items() if isinstance(node, ast.FunctionDef)}
    no_call = {
        "copy_memory",
        "copy_words",
        "zero_memory",
        "buffer_address",
        "note_fork",
        "note_slots",
    }
    no_call.add("watch_stores")  # whose errno is the machine's: see test_core_snapshot.py
    no_call |= {name for name in functions if "uring" in name}  # see dma/test_uring.py
    no_call |= {"pread", "pwrite", "dio_alignment"}  # there too
    assert {name for name, *_ in FAILURES} == functions - no_call


@pytest.mark.parametrize(
    "call",
    [
        lambda n: _core.reserve_memory(n),
        lambda n: _core.mlock(n, page_size),
        lambda n: _core.mlock(0, n),
        lambda n: _core.map_memory(0, n, 0, *ANYWHERE),
        lambda n: _core.process_vm_readv(os.getpid(), bytearray(1), n),
        lambda n: _core.Window(private(), n, 1, True),
        lambda n: _core.Window(private(), 0, n, True),
    ],
)
@pytest.mark.parametrize("number", [-1, -(2**63), 2**64, 2**200])
def test_integers_that_are_no_address_overflow(call: Callable[[int], object], number: int) -> None:
    with pytest.raises(OverflowError):
        call(number)


def test_memory_is_made_by_the_kernel_only() -> None:
    with pytest.raises(TypeError):
        _core.MappedMemory()


# --- Copies -----------------------------------------------------------------------------------


def test_copy_memory_copies_and_refuses_other_sizes() -> None:
    target = bytearray(5)
    _core.copy_memory(target, b"bytes")
    assert target == b"bytes"
    for source in (b"byte", b"bytes!"):
        with pytest.raises(ValueError):
            _core.copy_memory(target, source)
    with pytest.raises(BufferError):
        _core.copy_memory(b"const", b"bytes")
    assert target == b"bytes"
    target.append(0)  # no view is left on it


def test_copy_memory_of_overlapping_ranges() -> None:
    data = bytearray(range(100))
    view = memoryview(data)
    _core.copy_memory(view[10:90], view[0:80])
    assert data[10:90] == bytes(range(80))


def test_zero_memory_clears_a_part_and_stays_within() -> None:
    memory = private(2 * page_size)
    window = memoryview(_core.Window(memory, 0, 2 * page_size, True))
    window[:] = b"a" * 2 * page_size
    _core.zero_memory(memory, 10, page_size)
    assert bytes(window) == b"a" * 10 + bytes(page_size) + b"a" * (page_size - 10)
    for at, length in [(0, 2 * page_size + 1), (2 * page_size, 1), (2 * page_size + 1, 0)]:
        with pytest.raises(ValueError):
            _core.zero_memory(memory, at, length)


def test_process_vm_calls_copy_and_are_short_at_a_hole() -> None:
    reserved = _core.reserve_memory(3 * page_size)
    _core.place_memory(reserved, 0, 2 * page_size, READ_WRITE, *ANYWHERE)
    here = os.getpid()
    assert _core.process_vm_writev(here, b"a" * 3 * page_size, reserved.address) == 2 * page_size
    into = bytearray(3 * page_size)
    assert _core.process_vm_readv(here, into, reserved.address) == 2 * page_size
    assert into == b"a" * 2 * page_size + bytes(page_size)


def test_process_vm_calls_want_the_right_buffers() -> None:
    with pytest.raises(BufferError):
        _core.process_vm_readv(os.getpid(), b"const", UNMAPPED)
    with pytest.raises(TypeError):
        _core.process_vm_writev(os.getpid(), 5, UNMAPPED)  # type: ignore[arg-type]


@pytest.mark.slow
def test_one_process_vm_call_moves_2_gib_less_a_page_at_most() -> None:
    step = 64 << 20
    over = (2 << 30) + step
    fd = memfd(step)  # mapped over and over: much address space, little memory
    try:
        wide = _core.reserve_memory(over)
        for at in range(0, over, step):
            _core.place_memory(wide, at, step, READ_WRITE, _core.MAP_SHARED, fd, 0)
    finally:
        os.close(fd)
    window = _core.Window(wide, 0, over, True)
    most = 0x7FFF_FFFF // page_size * page_size  # MAX_RW_COUNT of the kernel
    assert _core.process_vm_readv(os.getpid(), window, wide.address) == most
    assert _core.process_vm_writev(os.getpid(), window, wide.address) == most


# --- The GIL ----------------------------------------------------------------------------------

LONG = 32 << 20


def _copy() -> Callable[[], object]:
    target, source = bytearray(LONG), bytearray(LONG)
    return lambda: _core.copy_memory(target, source)


def _zero() -> Callable[[], object]:
    memory = private(LONG)
    return lambda: _core.zero_memory(memory, 0, LONG)


def _populate() -> Callable[[], object]:
    memory = private(LONG)
    return lambda: (
        _core.madvise(memory.address, LONG, 4),  # MADV_DONTNEED: the next one has to work
        _core.madvise(memory.address, LONG, _core.MADV_POPULATE_WRITE),
    )


def _allocate() -> Callable[[], object]:
    def call() -> None:
        with_fd(lambda: memfd(LONG), lambda fd: _core.fallocate(fd, 0, 0, LONG))

    return call


def _read_task() -> Callable[[], object]:
    into, source = bytearray(LONG), bytearray(LONG)
    address = _core.buffer_address(source)[0]
    return lambda: (_core.process_vm_readv(os.getpid(), into, address), source)


def _write_task() -> Callable[[], object]:
    source, into = bytearray(LONG), bytearray(LONG)
    address = _core.buffer_address(into)[0]
    return lambda: (_core.process_vm_writev(os.getpid(), source, address), into)


def _map_populated() -> Callable[[], object]:
    populate = 0x8000  # MAP_POPULATE
    flags = _core.MAP_PRIVATE | _core.MAP_ANONYMOUS | populate
    return lambda: _core.map_memory(0, LONG, READ_WRITE, flags, -1, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "prepare", [_copy, _zero, _populate, _allocate, _read_task, _write_task, _map_populated]
)
def test_long_calls_let_other_threads_run(prepare: Callable[[], Callable[[], object]]) -> None:
    call = prepare()
    ticks = 0
    stop = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(0)  # gives the GIL back each time

    thread = threading.Thread(target=tick)
    interval = sys.getswitchinterval()
    # No thread is made to give the GIL up: the other one runs when the call lets it, or never.
    sys.setswitchinterval(3600)
    try:
        thread.start()
        deadline = time.monotonic() + 30
        seen = 0
        while not seen and time.monotonic() < deadline:
            before = ticks
            call()
            seen = ticks - before
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    assert seen > 0
