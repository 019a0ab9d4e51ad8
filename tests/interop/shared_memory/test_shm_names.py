"""Names: who answers for a block, whoever ends, closes or is killed; and what is left behind."""

import contextlib
import ctypes
import errno
import itertools
import multiprocessing
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from children import NOBODY, become, finish, in_child, kill, start
from shm_both import left_in, memfds_of, run_python

from memdesc import (
    AccessDeniedError,
    BlockExistsError,
    BlockNotFoundError,
    InvalidArgument,
    MappingError,
    MappingReason,
    NotPrivilegedError,
    RangeError,
    UnsupportedError,
)
from memdesc.interop.shared_memory import SharedMemory, folder, holders, keeping, names

Closing = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def nothing_in_the_folder(runtime_dir: Path) -> Iterator[None]:
    yield
    assert left_in(runtime_dir) == []


class Holder:
    """A process that has a block open, until it is told to end or is killed."""

    def __init__(self, name: str, *, create: bool = False) -> None:
        ready, told = os.pipe()
        self._end, self._stop = os.pipe()
        self.pid = start(self._hold, name, create, ready, told)
        os.close(told)
        assert os.read(ready, 1) == b"r", "the holder failed"
        os.close(ready)

    def _hold(self, name: str, create: bool, ready: int, told: int) -> None:
        os.close(ready)
        os.close(self._stop)
        block = SharedMemory(name, create=create, size=100)
        if create:
            block.buf[:4] = b"here"
        os.write(told, b"r")
        os.read(self._end, 1)
        block.close()

    def kill(self) -> None:
        kill(self.pid)
        self._forget()

    def finish(self) -> None:
        self._forget()
        assert finish(self.pid) == 0

    def _forget(self) -> None:
        os.close(self._stop)
        os.close(self._end)


@pytest.mark.slow
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_name_leads_to_the_memory_while_one_lives(order: tuple[int, ...]) -> None:
    holders = [Holder("frames", create=True), Holder("frames"), Holder("frames")]
    for victim in order:
        block = SharedMemory("frames")
        assert bytes(block.buf[:4]) == b"here"
        block.close()
        holders[victim].kill()
    with pytest.raises(BlockNotFoundError):
        SharedMemory("frames")


def test_a_killed_maker_leaves_neither_memory_nor_a_name() -> None:
    Holder("frames", create=True).kill()
    with pytest.raises(BlockNotFoundError) as caught:
        SharedMemory("frames")
    assert caught.value.errno == errno.ENOENT


def test_the_name_of_the_dead_can_be_used_again(closing: Closing) -> None:
    Holder("frames", create=True).kill()
    block = closing(SharedMemory("frames", create=True, size=5))
    assert bytes(block.buf) == bytes(5)


def test_every_first_block_of_a_process_sweeps_what_the_dead_left(runtime_dir: Path) -> None:
    first, second = Holder("one", create=True), Holder("two", create=True)
    other = Holder("two")
    block = SharedMemory("two")
    block.unlink()
    block.close()
    for holder in (first, second, other):
        holder.kill()
    assert len(left_in(runtime_dir)) == 6, "two folders, three files and a name"
    ended = run_python(
        "from memdesc.interop.shared_memory import SharedMemory\n"
        "block = SharedMemory(create=True, size=1)\nblock.unlink()\n"
    )
    assert ended.returncode == 0, ended.stderr


def test_a_process_that_ends_takes_its_names_along() -> None:
    ended = run_python(
        "from memdesc.interop.shared_memory import SharedMemory\n"
        "one = SharedMemory('one', create=True, size=1)\n"
        "two = SharedMemory('two', create=True, size=1)\ntwo.close()\n"
        "del SharedMemory\n"
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_last_holder_unlinks_after_it_closed(closing: Closing) -> None:
    holder = Holder("frames", create=True)
    block = SharedMemory("frames")
    holder.finish()
    block.close()
    with contextlib.suppress(BlockNotFoundError):
        SharedMemory("other")
    block.unlink()
    with pytest.raises(BlockNotFoundError):
        block.unlink()


def test_the_maker_holds_it_until_another_process_unlinked_it(closing: Closing) -> None:
    block = SharedMemory("frames", create=True, size=100)
    block.close()
    assert memfds_of("self", "frames") == 1
    pid = start(lambda: SharedMemory("frames").unlink())
    assert finish(pid) == 0
    closing(SharedMemory(create=True, size=1))  # any call looks
    assert memfds_of("self", "frames") == 0


def blocks_of(name: str) -> list[int]:
    """The bytes of a block that each descriptor of this process to it shows."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{fd}").startswith(f"/memfd:{name}."):
                found.append(os.stat(f"/proc/self/fd/{fd}").st_blocks * 512)
    return found


@pytest.mark.parametrize("first", ["close", "unlink"])
@pytest.mark.parametrize("leaving", [1, 3])
def test_the_last_user_frees_the_pages_also_where_the_maker_sleeps(
    closing: Closing, first: str, leaving: int
) -> None:
    block = SharedMemory("frames", create=True, size=100_000)
    block.close()
    assert blocks_of("frames")[0] >= 100_000, "who comes is to find it"

    def use() -> None:
        others = [SharedMemory("frames") for _ in range(leaving)]
        if first == "unlink":
            others[0].unlink()
        for other in others:
            other.close()
        if first == "close":
            others[0].unlink()

    assert finish(start(use)) == 0
    assert blocks_of("frames") == [0]
    closing(SharedMemory(create=True, size=1))
    assert blocks_of("frames") == []


def test_pages_that_someone_uses_untold_are_not_freed() -> None:
    block = SharedMemory("frames", create=True, size=100_000)
    block.buf[:4] = b"here"
    descriptor = block.as_descriptor()  # as a service has it, or who got it over a socket
    block.close()

    def use() -> None:
        other = SharedMemory("frames")
        other.unlink()
        other.close()

    assert finish(start(use)) == 0
    assert min(blocks_of("frames")) >= 100_000
    assert descriptor.read_bytes(0, 4) == b"here"
    descriptor.close()
    block.close()
    assert blocks_of("frames") == []


def test_pages_that_a_fork_child_uses_are_not_freed(closing: Closing) -> None:
    block = SharedMemory("frames", create=True, size=100_000)
    block.buf[:4] = b"here"
    (ready, told), (end, stop) = os.pipe(), os.pipe()

    def look() -> None:
        os.close(stop)
        other = SharedMemory("frames")
        view = other.buf[:4]

        def hold(view: memoryview) -> None:
            other.close()
            os.write(told, b"r")
            os.read(end, 1)
            assert bytes(view) == b"here"

        pid = start(hold, view)
        other.unlink()
        view.release()
        other.close()
        os.write(told, b"r")
        assert finish(pid) == 0

    block.close()
    pid = start(look)
    for _ in range(2):
        assert os.read(ready, 1) == b"r"
    assert blocks_of("frames")[0] >= 100_000
    os.close(stop)
    assert finish(pid) == 0
    block.close()
    assert blocks_of("frames") == []
    for fd in (ready, told, end):
        os.close(fd)


def test_without_leases_the_maker_frees_them_at_its_next_call(
    monkeypatch: pytest.MonkeyPatch, closing: Closing
) -> None:
    block = SharedMemory("frames", create=True, size=100_000)
    block.close()

    def use() -> None:
        def refuse(_: int) -> bool:
            raise PermissionError(errno.EACCES, "no leases")

        monkeypatch.setattr(names, "held_by_others", refuse)
        other = SharedMemory("frames")
        other.unlink()
        other.close()

    assert finish(start(use)) == 0
    assert blocks_of("frames")[0] >= 100_000
    block.close()
    assert blocks_of("frames") == []


def test_the_maker_lets_go_when_it_unlinks_what_it_closed() -> None:
    block = SharedMemory("frames", create=True, size=100)
    block.close()
    other = SharedMemory("frames")
    other.close()
    other.unlink()
    assert memfds_of("self", "frames") == 0


def test_many_that_await_their_end_are_looked_after_in_turn() -> None:
    blocks = [SharedMemory(f"block-{number}", create=True, size=1) for number in range(50)]
    for block in blocks:
        block.close()

    def unlink_all() -> None:
        for number in range(50):
            other = SharedMemory(f"block-{number}")
            other.unlink()
            other.close()

    assert finish(start(unlink_all)) == 0
    for _ in range(4):
        blocks[0].close()
    assert memfds_of("self", "block-0") == memfds_of("self", "block-49") == 0


def test_a_fork_child_answers_for_what_it_inherited(closing: Closing) -> None:
    block = SharedMemory("frames", create=True, size=100)
    closed = SharedMemory("closed", create=True, size=100)
    closed.close()
    (ready, told), (end, stop) = os.pipe(), os.pipe()

    def hold() -> None:
        os.close(stop)
        assert memfds_of("self", "closed") == 0, "that is the maker's alone"
        SharedMemory("closed").close()
        os.write(told, b"r")
        os.read(end, 1)
        block.buf[:5] = b"child"
        block.close()

    pid = start(hold)
    assert os.read(ready, 1) == b"r"
    block.buf[:5] = b"first"
    closed.unlink()
    # The parent holds it no longer; as if it had ended.
    block.close()
    keeping.name_gone(block._holding)
    again = SharedMemory("frames")
    assert bytes(again.buf[:5]) == b"first"
    os.close(stop)
    assert finish(pid) == 0
    assert bytes(again.buf[:5]) == b"child"
    again.close()
    again.unlink()
    for fd in (ready, told, end):
        os.close(fd)


def test_children_of_multiprocessing_find_names_until_they_have_ended() -> None:
    """The parent's main thread is done before they look; it waits for them first."""
    ended = run_python(
        "import atexit, multiprocessing, sys\n"
        "from memdesc.interop.shared_memory import SharedMemory\n"
        "context = multiprocessing.get_context('fork')\n"
        "done = context.Event()\n"
        "def look(name):\n"
        "    assert done.wait(50)\n"
        "    found = SharedMemory(name)\n"
        "    print(bytes(found.buf[:4]), flush=True)\n"
        "    found.close()\n"
        "child = context.Process(target=look, args=('late',))\n"
        "child.start()\n"
        "block = SharedMemory('late', create=True, size=4)\n"
        "block.buf[:4] = b'late'\n"
        "atexit.register(done.set)\n"
    )
    assert (ended.stdout, ended.returncode) == ("b'late'\n", 0), ended.stderr


def _open_and_end(name: str) -> None:
    kept.append(SharedMemory(name))
    kept.append(SharedMemory(create=True, size=1))


kept: list[SharedMemory] = []


def test_a_child_of_multiprocessing_that_ends_leaves_nothing(
    closing: Closing, runtime_dir: Path
) -> None:
    block = closing(SharedMemory("frames", create=True, size=3))
    before = left_in(runtime_dir)
    child = multiprocessing.get_context("fork").Process(target=_open_and_end, args=("frames",))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    child.close()
    assert left_in(runtime_dir) == before
    assert block.size == 3


def test_who_ends_while_others_have_the_lock_goes_as_if_he_was_killed(
    closing: Closing, runtime_dir: Path
) -> None:
    first = SharedMemory("first", create=True, size=1)
    own = folder.folder()
    reader, writer = os.pipe()

    def end() -> None:
        blocks = [SharedMemory(f"late{number}", create=True, size=1) for number in range(3)]
        os.write(writer, b"r")
        kept.extend(blocks)
        signal.sigwait([signal.SIGUSR1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(names, "_MOMENT", 0.05)
            keeping._end()

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    pid = start(end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
    assert os.read(reader, 1) == b"r"
    os.close(reader)
    os.close(writer)
    with folder.changing(own):
        os.kill(pid, signal.SIGUSR1)
        assert finish(pid) == 0
        assert sorted(os.listdir(f"{own}/names")) == ["first", "late0", "late1", "late2"]
    with pytest.raises(BlockNotFoundError):
        SharedMemory("late0")
    closing(SharedMemory("late1", create=True, size=5))
    names.sweep_all()
    assert sorted(os.listdir(f"{own}/names")) == ["first", "late1"]
    first.close()
    first.unlink()


def test_names_of_one_who_ends_go_with_the_lock_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def end() -> int:
        SharedMemory("other", create=True, size=1).unlink()
        for number in range(5):
            kept.append(SharedMemory(f"late{number}", create=True, size=1))
        kept[1].unlink()
        taken: list[str] = []
        real = names.changing

        def changing(own: str, timeout: float = 5.0) -> Any:
            taken.append(own)
            return real(own, timeout)

        monkeypatch.setattr(names, "changing", changing)
        keeping._end()
        assert os.listdir(f"{folder.folder()}/names") == []
        return len(taken)

    assert in_child(end) == 1


def test_an_array_that_outlives_its_block_answers_for_the_name() -> None:
    import numpy as np

    holder = Holder("frames", create=True)
    array = np.ndarray((100,), "u1", buffer=SharedMemory("frames").buf)
    holder.kill()
    other = SharedMemory("frames")
    other.buf[0] = 77
    assert array[0] == 77
    other.close()
    other.unlink()


# -- what is told is not believed ------------------------------------------------------------------


def entries(name: str) -> Path:
    record = folder.read_record(folder.folder(), name)
    assert record is not None
    return Path(folder.folder()) / "blocks" / record.token


def forge(name: str, pid: int, started: int, fd: int) -> Path:
    entry = entries(name) / f"{pid}.{started}.{fd}.999"
    entry.touch()
    return entry


def test_a_descriptor_that_means_something_else_now_is_not_opened(closing: Closing) -> None:
    block = closing(SharedMemory("frames", create=True, size=100))
    other = closing(SharedMemory("other", create=True, size=100))
    for real in entries("frames").iterdir():
        real.unlink()
    pipe = os.pipe()  # to open the end for reading of a FIFO without a writer would wait
    for fd in (other.fileno(), *pipe, 987_654):
        forge("frames", os.getpid(), 1, fd)
    with pytest.raises(BlockNotFoundError):
        SharedMemory("frames")
    assert not Path(folder.folder(), "names", "frames").is_symlink(), "it was swept"
    for fd in pipe:
        os.close(fd)
    block.close()
    with pytest.raises(BlockNotFoundError):
        block.unlink()


def test_what_a_number_means_only_after_a_look_at_it_is_not_opened(
    closing: Closing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To open it could wait for who serves that file, or start something."""
    block = closing(SharedMemory("frames", create=True, size=100))
    for real in entries("frames").iterdir():
        real.unlink()
    number = os.dup(block.fileno())
    forge("frames", os.getpid(), 1, number)
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    readlink = os.readlink

    def look(path: str) -> str:
        shown = readlink(path)
        if path.startswith("/proc/"):
            os.dup2(reader, number)
        return shown

    with monkeypatch.context() as patched:
        patched.setattr(holders.os, "readlink", look)
        there = SharedMemory("frames")  # what was looked at, which is the block still
    assert there.size == 100
    poll = select.poll()
    poll.register(reader, 0)
    assert poll.poll(0) == []  # POLLHUP: somebody opened it for writing, and closed it
    there.close()
    for fd in (number, reader):
        os.close(fd)


def test_entries_of_the_dead_go_when_someone_looks(closing: Closing) -> None:
    block = closing(SharedMemory("frames", create=True, size=100))
    pid = start(lambda: None)
    finish(pid)
    dead = [forge("frames", pid, number, 3) for number in range(20)]
    SharedMemory("frames").close()
    assert not any(entry.exists() for entry in dead)
    assert len(list(entries("frames").iterdir())) == 1 and block.size == 100


def test_what_is_no_record_is_no_block(runtime_dir: Path, closing: Closing) -> None:
    closing(SharedMemory(create=True, size=1))
    for number, target in enumerate(["nonsense", "0123456789abcdef.0", "0123456789abcdef.-1"]):
        link = Path(folder.folder(), "names", f"bad{number}")
        link.symlink_to(target)
        with pytest.raises(BlockNotFoundError):
            SharedMemory(link.name)
        with pytest.raises(BlockExistsError):
            SharedMemory(link.name, create=True, size=1)
        link.unlink()


def test_a_size_that_the_memory_has_not_is_refused(closing: Closing) -> None:
    block = closing(SharedMemory("frames", create=True, size=100))
    link = Path(folder.folder(), "names", "frames")
    link.unlink()
    link.symlink_to(f"{block._holding.token}.1000000")
    with pytest.raises(RangeError):
        SharedMemory("frames")


def test_the_name_of_another_block_is_not_unlinked(closing: Closing) -> None:
    block = SharedMemory("frames", create=True, size=100)
    block.unlink()
    following = closing(SharedMemory("frames", create=True, size=50))
    with pytest.raises(BlockNotFoundError) as caught:
        block.unlink()
    assert caught.value.errno == errno.ENOENT
    block.close()
    other = SharedMemory("frames")
    assert other.size == following.size == 50
    other.close()


@pytest.mark.parametrize(
    "name", ["", "/", ".", "..", "/..", "a/b", "a/", "nul\0", "x" * 256, "\ud800", 5]
)
def test_names_that_are_none(name: Any) -> None:
    for create in (True, False):
        with pytest.raises(InvalidArgument):
            SharedMemory(name, create=create, size=1)


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "a b\n(deleted)", "-rf *", "~", "\udcff"])
def test_names_that_are_some(closing: Closing, name: str) -> None:
    block = closing(SharedMemory(name, create=True, size=3))
    block.buf[:] = b"abc"
    other = SharedMemory(name)
    assert (bytes(other.buf), other.name) == (b"abc", name)
    other.close()


def test_a_folder_that_others_may_enter_is_not_used(runtime_dir: Path) -> None:
    block = SharedMemory("frames", create=True, size=3)
    runtime_dir.chmod(0o755)
    with pytest.raises(AccessDeniedError):
        SharedMemory("other", create=True, size=1)
    with pytest.raises(AccessDeniedError):
        SharedMemory("frames")
    runtime_dir.chmod(0o700)
    block.close()
    block.unlink()


def test_another_user_finds_nothing(closing: Closing, tmp_path: Path) -> None:
    block = closing(SharedMemory("frames", create=True, size=3))

    def look() -> None:
        become(NOBODY)
        with pytest.raises((BlockNotFoundError, AccessDeniedError)):
            SharedMemory(block.name)
        with pytest.raises(AccessDeniedError) as refused:  # and it is told of this, not of later
            SharedMemory(block.name, create=True, size=1)
        assert refused.value.errno == errno.EACCES

    if os.geteuid() == NOBODY:
        pytest.skip("this is that other user")
    in_child(look)


def test_a_folder_that_has_gone_keeps_no_descriptor(runtime_dir: Path) -> None:
    block = SharedMemory("frames", create=True, size=3)
    other = SharedMemory("frames")
    (place,) = runtime_dir.glob(f"*/blocks/{block._holding.token}")
    before = memfds_of("self", "frames")
    shutil.rmtree(place)
    place.touch()  # then what is beneath it can not even be looked for
    other.close()
    assert memfds_of("self", "frames") < before
    place.unlink()
    block.unlink()
    block.close()
    assert memfds_of("self", "frames") == 0


def test_a_holder_that_can_not_be_looked_into_says_so() -> None:
    """A process that is not dumpable, as one is that changed its user, is closed to its like."""
    (ready, told), (end, stop) = os.pipe(), os.pipe()

    def hide() -> None:
        os.close(stop)
        block = SharedMemory("frames", create=True, size=3)
        ctypes.CDLL(None).prctl(4, 0)  # PR_SET_DUMPABLE
        os.write(told, b"r")
        os.read(end, 1)
        ctypes.CDLL(None).prctl(4, 1)
        block.unlink()
        block.close()

    pid = start(hide)
    assert os.read(ready, 1) == b"r"
    try:
        os.listdir(f"/proc/{pid}/fd")
        SharedMemory("frames").close()  # this process may look into every other
    except PermissionError:
        with pytest.raises(NotPrivilegedError) as caught:
            SharedMemory("frames")
        assert caught.value.errno == errno.EACCES
        with pytest.raises(BlockExistsError):
            SharedMemory("frames", create=True, size=1)
    for fd in (ready, told, end, stop):
        os.close(fd)
    assert finish(pid) == 0


@pytest.mark.slow
def test_a_stopped_holder_is_no_obstacle() -> None:
    holder = Holder("frames", create=True)
    os.kill(holder.pid, signal.SIGSTOP)
    block = SharedMemory("frames")
    assert bytes(block.buf[:4]) == b"here"
    os.kill(holder.pid, signal.SIGCONT)
    holder.finish()
    block.close()
    block.unlink()


def test_no_descriptor_left_is_said_and_leaves_nothing(runtime_dir: Path) -> None:
    def without() -> None:
        block = SharedMemory("frames", create=True, size=3)
        before = left_in(runtime_dir)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.dup(0)
        os.close(lowest)
        for spare in range(7):  # each call that makes one fails once
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + spare, limits[1]))
            for arguments in ({"name": "frames"}, {"name": "more", "create": True, "size": 3}):
                try:
                    SharedMemory(**arguments).close()
                except OSError as error:
                    assert error.errno == errno.EMFILE, error
                    if isinstance(error, MappingError):
                        assert error.reason is MappingReason.TOO_MANY_FILES
                else:
                    if arguments["name"] == "more":
                        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                        SharedMemory("more").unlink()
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert left_in(runtime_dir) == before
        block.unlink()
        block.close()

    in_child(without)


def test_a_full_disk_under_the_names_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, closing: Closing, runtime_dir: Path
) -> None:
    block = closing(SharedMemory("frames", create=True, size=3))
    before = left_in(runtime_dir)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for call in ("symlink", "mkdir"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(OSError) as caught:
                SharedMemory("new", create=True, size=3)
            assert caught.value.errno == errno.ENOSPC
            if call == "symlink":
                with pytest.raises(OSError):
                    SharedMemory("frames")
                block.close()  # the maker goes on holding it as it did
                again = memfds_of("self", "frames")
        assert left_in(runtime_dir) == before
        assert (memfds_of("self", "new"), memfds_of("self", "frames")) == (0, again)
    other = SharedMemory("frames")
    assert other.size == 3
    other.close()


def test_without_proc_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.stat

    def gone(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if path == "/proc/self/ns/pid":
            raise FileNotFoundError(errno.ENOENT, "No such file", path)
        return real(path, *args, **options)

    monkeypatch.setattr(os, "stat", gone)
    for create in (True, False):
        with pytest.raises(UnsupportedError):
            SharedMemory("frames", create=create, size=1)


def test_another_pid_namespace_has_names_of_its_own(closing: Closing, runtime_dir: Path) -> None:
    block = closing(SharedMemory("frames", create=True, size=3))
    program = (
        "from memdesc.interop.shared_memory import SharedMemory\n"
        "try:\n    SharedMemory('frames')\nexcept FileNotFoundError:\n"
        "    block = SharedMemory('frames', create=True, size=7)\n"
        "    print(SharedMemory('frames').size)\n    block.unlink()\n"
    )
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", program]
    probe = subprocess.run([*command[:4], "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"no pid namespace can be made here: {probe.stderr.strip()}")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.stdout, ended.returncode) == ("7\n", 0), ended.stderr
    SharedMemory("frames").close()
    assert block.size == 3


def test_a_block_stays_where_it_was_made_whatever_the_environment_says_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    block = SharedMemory("frames", create=True, size=3, reserve=1 << 16)
    with monkeypatch.context() as patch:
        tmp_path.chmod(0o700)
        patch.setenv("MEMDESC_RUNTIME_DIR", str(tmp_path))
        with pytest.raises(BlockNotFoundError):
            SharedMemory("frames")
        block.grow(1 << 15)
        block.close()
    other = SharedMemory("frames")
    assert other.size == 1 << 15
    other.close()
    with monkeypatch.context() as patch:
        patch.setenv("MEMDESC_RUNTIME_DIR", str(tmp_path))
        block.unlink()


def test_unlinking_where_the_folder_is_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("MEMDESC_RUNTIME_DIR", str(tmp_path))
    block = SharedMemory("frames", create=True, size=3)
    shutil.rmtree(folder.folder())
    with pytest.raises(BlockNotFoundError):
        block.unlink()
    block.buf[0] = 1
    block.close()
    assert memfds_of("self", "frames") == 0
