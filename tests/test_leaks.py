"""memdesc.testing.leak_guard: it names each kind of thing that a block leaves behind."""

import multiprocessing
import multiprocessing.resource_sharer
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from memdesc import _core
from memdesc.testing import LeakError, LeakKind, Resources, find_leaks, leak_guard
from memdesc.vm.pages import page_size

pytest_plugins = ["pytester"]

Undo = Callable[[], object]


def _leave_fd() -> Undo:
    fd = os.memfd_create("left", os.MFD_CLOEXEC)
    return lambda: os.close(fd)


def _leave_mapping() -> Undo:
    fd = os.memfd_create("left", os.MFD_CLOEXEC)
    os.truncate(fd, page_size)
    held = [_core.map_memory(0, page_size, _core.PROT_READ, _core.MAP_SHARED, fd, 0)]
    os.close(fd)
    return held.clear


def _leave_locked() -> Undo:
    memory = _core.map_memory(0, page_size, _core.PROT_READ, _core.MAP_PRIVATE | 0x20, -1, 0)
    try:
        _core.mlock(memory.address, page_size)
    except OSError as error:
        pytest.skip(f"one page can not be locked here ({error.strerror})")
    held = [memory]
    return held.clear


def _leave_thread() -> Undo:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="left")
    thread.start()

    def undo() -> None:
        end.set()
        thread.join()

    return undo


def _leave_child() -> Undo:
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    )

    def undo() -> None:
        child.communicate()

    return undo


def _leave_zombie() -> Undo:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet waited for
    return lambda: os.waitpid(pid, 0)


def _leave_shm() -> Undo:
    path = Path("/dev/shm") / f"memdesc-left-{secrets.token_hex(8)}"
    try:
        file = path.open("x")  # held open: the guards of tests that run beside see whose it is
    except OSError as error:
        pytest.skip(f"/dev/shm can not be written here ({error.strerror})")

    def undo() -> None:
        path.unlink()
        file.close()

    return undo


def _leave_socket() -> Undo:
    path = Path(os.environ["MEMDESC_RUNTIME_DIR"]) / "left"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    return path.unlink


LEAVERS = {
    _leave_fd: LeakKind.FD,
    _leave_mapping: LeakKind.MAPPING,
    _leave_locked: LeakKind.LOCKED,
    _leave_thread: LeakKind.THREAD,
    _leave_child: LeakKind.CHILD,
    _leave_zombie: LeakKind.CHILD,
    _leave_shm: LeakKind.SHM,
    _leave_socket: LeakKind.SOCKET,
}


@pytest.mark.parametrize("leave", LEAVERS, ids=lambda leave: leave.__name__)
def test_each_kind_is_named_and_is_gone_when_undone(leave: Callable[[], Undo]) -> None:
    undo: Undo | None = None
    with leak_guard():
        try:
            with pytest.raises(LeakError) as caught, leak_guard(settle=0):
                undo = leave()
        finally:
            if undo is not None:
                undo()
    kinds = {leak.kind for leak in caught.value.leaks}
    # A child that waits for its standard input leaves the pipe's descriptor too, and so on.
    assert kinds - {LeakKind.FD} == {LEAVERS[leave]} - {LeakKind.FD}
    assert LEAVERS[leave] in kinds
    assert all(leak.what in str(caught.value) for leak in caught.value.leaks)


@pytest.mark.parametrize("leave", LEAVERS, ids=lambda leave: leave.__name__)
def test_what_is_allowed_is_not_an_error(leave: Callable[[], Undo]) -> None:
    with leak_guard(allow={LEAVERS[leave], LeakKind.FD}, settle=0):
        undo = leave()
    undo()


def test_every_kind_is_tested() -> None:
    assert set(LEAVERS.values()) == set(LeakKind)


def test_nothing_left_is_no_error() -> None:
    with leak_guard(settle=0):
        for leave in LEAVERS:
            if LEAVERS[leave] not in (LeakKind.LOCKED, LeakKind.SHM):  # these may skip
                leave()()


def test_it_collects_cycles_before_it_complains() -> None:
    class Cycle:
        pass

    with leak_guard():
        cycle = Cycle()
        cycle.me, cycle.keep = cycle, _leave_mapping()  # type: ignore[attr-defined]
        del cycle


def test_it_waits_for_what_ends_a_little_later() -> None:
    ends = threading.Event()
    with leak_guard(settle=30):
        threading.Thread(target=ends.wait).start()
        threading.Timer(0.05, ends.set).start()


def test_an_error_of_the_block_is_not_hidden() -> None:
    undo: list[Undo] = []
    with pytest.raises(RuntimeError), leak_guard(settle=0):
        undo.append(_leave_fd())
        raise RuntimeError
    undo[0]()


def test_a_descriptor_that_became_another_one_is_seen() -> None:
    fd = os.memfd_create("first")
    before = Resources.now()
    other = os.memfd_create("second")
    os.dup2(other, fd)
    os.close(other)
    leaks = find_leaks(before, Resources.now())
    os.close(fd)
    assert [leak.what for leak in leaks] == [f"{fd}: /memfd:second (deleted)"]


# Opens the file, and names it a second time as sem_open(3) does.
OTHER = """
import os, sys
path = sys.argv[1]
file = open(path + ".first", "x")
os.link(path + ".first", path)
os.unlink(path + ".first")
print(1, flush=True)
input()
"""


def test_a_name_in_dev_shm_that_another_living_process_uses_is_its_own() -> None:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("/dev/shm can not be written here")
    path = Path("/dev/shm") / f"memdesc-other-{secrets.token_hex(8)}"
    before = Resources.now()
    # Started by a shell that ends at once: no child of ours, like a test that runs beside.
    with subprocess.Popen(
        ["/bin/sh", "-c", 'exec 3<&0; "$@" <&3 &', "sh", sys.executable, "-c", OTHER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as shell:
        assert shell.stdin is not None and shell.stdout is not None
        shell.wait(timeout=30)
        assert shell.stdout.readline() == b"1\n"
        during = find_leaks(before, Resources.now())
        shell.stdin.write(b"\n")
        shell.stdin.close()
        assert shell.stdout.read() == b""  # the other one has ended
        with path.open():  # now it is ours
            afterwards = find_leaks(before, Resources.now())
            path.unlink()
    assert [leak.what for leak in during if leak.kind is LeakKind.SHM] == []
    assert [leak.what for leak in afterwards if leak.kind is LeakKind.SHM] == [str(path)]


def _put(queue: "multiprocessing.Queue[int]") -> None:
    queue.put(1)


def _run_a_process(context: multiprocessing.context.BaseContext) -> None:
    queue = context.Queue()
    process = context.Process(target=_put, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == 1
    process.join()
    process.close()
    queue.close()
    queue.join_thread()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_helpers_of_multiprocessing_last_by_design(method: str) -> None:
    with leak_guard():
        _run_a_process(multiprocessing.get_context(method))


def test_the_resource_sharer_lasts_by_design_and_its_cache_does_not() -> None:
    fd = os.memfd_create("shared")
    with leak_guard():
        multiprocessing.resource_sharer.DupFd(fd)
        os.close(fd)
        multiprocessing.resource_sharer.stop(timeout=30)
        handle = multiprocessing.resource_sharer._resource_sharer
        handle.register(lambda *_: None, lambda: None)  # starts it again, holding nothing
    multiprocessing.resource_sharer.stop(timeout=30)


# In a process of its own, where the thread is not there before.
CONNECTED = """
import sys, threading
import memdesc as md
from memdesc.testing import LeakError, leak_guard

with leak_guard():
    with md.Service("first") as service, md.connect("first") as client:
        service.share("frames", md.BufferMemoryDescriptor(100))
        assert len(client.map("frames")) == 100
    del client, service
assert "memdesc-io" in [thread.name for thread in threading.enumerate()]
try:
    with leak_guard(settle=0):
        left = md.Service("second")
except LeakError as error:
    print(sorted({leak.kind.value for leak in error.leaks}))
left.close()
"""


@pytest.mark.slow
def test_the_io_thread_lasts_by_design_and_services_do_not(runtime_dir: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", CONNECTED], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.stdout, result.stderr) == ("['fd', 'socket']\n", "")


def test_the_fixture_guards_every_test(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # what the conftest imports
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
    pytester.makepyfile(
        """
        import os, pytest
        def test_leaves(): os.memfd_create("left")
        @pytest.mark.leaves("fd", reason="to show that it may")
        def test_may(): os.memfd_create("allowed")
        @pytest.mark.leaves("fd")
        def test_gives_no_reason(): pass
        def test_fails():
            held = os.memfd_create("held")
            assert False
        def test_clean(): pass
        @pytest.mark.parametrize("n", range(3))
        def test_skips(n): pytest.skip("the true reason")
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=3, failed=1, errors=2, skipped=3)
    result.stdout.fnmatch_lines_random(
        ["*fd * /memfd:left (deleted)*", "*`leaves` needs a reason*", "    3  the true reason"]
    )
    assert "memfd:allowed" not in result.stdout.str()
    assert "memfd:held" not in result.stdout.str()
