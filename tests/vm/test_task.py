"""Tasks: real processes, held, ended, recycled."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from children import become, in_child
from programs import Start

from memdesc.errors import (
    AllocationError,
    ClosedError,
    InvalidArgument,
    MemdescError,
    NotPrivilegedError,
    TaskGoneError,
    UnsupportedError,
)
from memdesc.vm import patience, task as module
from memdesc.vm.task import Credentials, Task


def ended() -> subprocess.Popen[bytes]:
    """Give a process that has ended and is not waited for: a zombie."""
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    return child


def test_the_current_task_is_this_process() -> None:
    with Task.current() as task:
        assert task.pid == os.getpid()
        assert task.is_current
        assert task.alive
        assert task.credentials == Credentials(os.getpid(), os.geteuid(), os.getegid())
        assert repr(task) == f"<Task {os.getpid()} of user {os.geteuid()}>"
        assert task.proc_path("maps") == f"/proc/{os.getpid()}/maps"


def test_the_start_time_is_the_kernels() -> None:
    with open("/proc/self/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    with Task.current() as task:
        assert task.start_time == int(fields[19])


def test_a_task_of_another_process(start: Start) -> None:
    child = start()
    with Task(child.pid) as task:
        assert (task.pid, task.alive, task.is_current) == (child.pid, True, False)
        assert task.name == Path(f"/proc/{child.pid}/comm").read_text().strip()
        assert not task.wait(0.01)
        child.kill()
        assert task.wait(30)
        assert not task.alive  # not waited for yet: a zombie has ended
        child.wait()
        assert not task.alive


@pytest.mark.parametrize("name", ["a) R (b", ") 1 2 3", "(((", "x y"])
def test_a_command_name_with_parentheses_and_spaces(start: Start, name: str) -> None:
    child = start(f"open('/proc/self/comm', 'w').write({name!r})")
    with Task(child.pid) as task, Task.current() as own:
        assert task.name == name
        assert task.start_time >= own.start_time


@pytest.mark.parametrize("pid", [0, -1, -(2**31), 2**31, 2**63, "1", 1.5, None])
def test_what_is_no_pid_is_refused(pid: object) -> None:
    with pytest.raises(InvalidArgument):
        Task(pid)  # type: ignore[arg-type]


def test_a_pid_that_never_was() -> None:
    with pytest.raises(TaskGoneError) as caught:
        Task(2**31 - 1)
    assert caught.value.errno == errno.ESRCH


def test_a_zombie_has_ended() -> None:
    child = ended()
    with pytest.raises(TaskGoneError) as caught:
        Task(child.pid)
    assert caught.value.errno == errno.ESRCH
    child.wait()


def test_a_recycled_pid_is_not_mistaken_for_the_task(start: Start) -> None:
    child = start()
    with Task(child.pid) as task:
        began = task.start_time
    with Task(child.pid, start_time=began) as again:
        assert again == task
    with pytest.raises(TaskGoneError) as caught:
        Task(child.pid, start_time=began - 1)
    assert caught.value.errno == errno.ESRCH
    assert str(began) in str(caught.value)


def test_a_pid_recycled_while_it_is_opened(monkeypatch: pytest.MonkeyPatch, start: Start) -> None:
    # The pidfd is of a process that has ended; by the time /proc is read the pid is another's.
    gone = ended()
    pidfd = os.pidfd_open(gone.pid)
    gone.wait()
    monkeypatch.setattr(os, "pidfd_open", lambda pid: pidfd)
    with pytest.raises(TaskGoneError):
        Task(start().pid)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pidfd)  # the failed construction has closed it


def test_a_thread_is_not_a_task() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        with pytest.raises(InvalidArgument) as caught:
            Task(thread.native_id or 0)
        assert caught.value.errno == errno.EINVAL
    finally:
        stop.set()
        thread.join()


def test_equality_and_hash_go_by_pid_and_start_time(start: Start) -> None:
    child = start()
    with Task(child.pid) as one, Task(child.pid) as two, Task.current() as other:
        assert one == two
        assert hash(one) == hash(two)
        assert one.fileno() != two.fileno()
        assert one != other
        assert one != child.pid
        assert {one: "found"}[two] == "found"


def test_copies_are_tasks_of_their_own(start: Start) -> None:
    with Task(start().pid) as task:
        for twin in (copy.copy(task), pickle.loads(pickle.dumps(task))):
            assert twin == task
            assert twin.fileno() != task.fileno()
            twin.close()
        assert task.alive


def test_a_pickled_task_that_has_ended_is_not_opened(start: Start) -> None:
    child = start()
    with Task(child.pid) as task:
        data = pickle.dumps(task)
    child.kill()
    child.wait()
    with pytest.raises(TaskGoneError):
        pickle.loads(data)


def test_a_closed_task() -> None:
    task = Task.current()
    fd = task.fileno()
    task.close()
    task.close()
    assert repr(task).endswith(", closed>")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    uses: list[Callable[[], object]] = [
        task.fileno,
        lambda: task.alive,
        lambda: task.wait(0),
        lambda: task.name,
        lambda: task.check_alive("look"),
        task.__enter__,
    ]
    for use in uses:
        with pytest.raises(ClosedError):
            use()


def test_dropping_a_task_closes_it() -> None:
    task = Task.current()
    fd = task.fileno()
    del task
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_closing_never_closes_a_number_that_is_anothers_now() -> None:
    task = Task.current()
    fd = task.fileno()
    task.close()
    other = os.memfd_create("other")
    try:
        assert other == fd  # the kernel gives the lowest free number
        task.close()
        del task
        os.fstat(other)
    finally:
        os.close(other)


def test_the_pidfd_is_not_inherited_by_programs() -> None:
    with Task.current() as task:
        assert not os.get_inheritable(task.fileno())


def test_a_fork_child_is_another_task() -> None:
    def look() -> tuple[bool, bool, bool, bool]:
        with Task.current() as own:
            return own.is_current, own == parent, parent.is_current, parent.alive

    with Task.current() as parent:
        assert in_child(look) == (True, False, False, True)


def test_a_pidfd_becomes_a_task(start: Start) -> None:
    child = start()
    pidfd = os.pidfd_open(child.pid)
    with Task.from_pidfd(pidfd) as task:
        assert task.pid == child.pid
        assert task.fileno() == pidfd
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pidfd)


@pytest.mark.parametrize("waited_for", [False, True])
def test_a_pidfd_of_a_process_that_has_ended(waited_for: bool) -> None:
    child = ended()
    pidfd = os.pidfd_open(child.pid)
    if waited_for:
        child.wait()
    with pytest.raises(TaskGoneError) as caught:
        Task.from_pidfd(pidfd)
    assert caught.value.errno == errno.ESRCH
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pidfd)
    child.wait()


def test_what_is_no_pidfd_stays_the_callers() -> None:
    fd = os.memfd_create("no-pidfd")
    try:
        with pytest.raises(InvalidArgument) as caught:
            Task.from_pidfd(fd)
        assert caught.value.errno == errno.EBADF
        os.fstat(fd)
    finally:
        os.close(fd)
    with pytest.raises(InvalidArgument):
        Task.from_pidfd(fd)  # closed
    with pytest.raises(InvalidArgument):
        Task.from_pidfd(-1)


_IN_NAMESPACE = """
import sys
from memdesc.errors import NotPrivilegedError
from memdesc.vm.task import Task
try:
    Task.from_pidfd(int(sys.argv[1]))
except NotPrivilegedError as error:
    print("denied", error.errno)
"""


def test_a_task_outside_the_pid_namespace() -> None:
    unshare = ["unshare", "--pid", "--fork", "--mount-proc"]
    tried = subprocess.run([*unshare, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no pid namespace can be made: {tried.stderr.strip()}")
    pidfd = os.pidfd_open(os.getpid())
    try:
        command = [*unshare, sys.executable, "-c", _IN_NAMESPACE, str(pidfd)]
        run = subprocess.run(
            command, pass_fds=[pidfd], capture_output=True, text=True, timeout=60, check=False
        )
    finally:
        os.close(pidfd)
    assert run.stdout.split() == ["denied", str(int(errno.EPERM))], run.stderr


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        (errno.EMFILE, AllocationError),
        (errno.ENFILE, AllocationError),
        (errno.ENOMEM, AllocationError),
        (errno.EPERM, NotPrivilegedError),
        (errno.ENOSYS, UnsupportedError),
        (errno.ENODEV, MemdescError),
    ],
)
def test_each_refusal_of_pidfd_open(
    monkeypatch: pytest.MonkeyPatch, refusal: int, expected: type[MemdescError]
) -> None:
    def refuse(pid: int) -> int:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "pidfd_open", refuse)
    with pytest.raises(expected) as caught:
        Task(os.getpid())
    assert type(caught.value) is expected
    assert caught.value.errno == refusal
    assert isinstance(caught.value.__cause__, OSError)


def test_no_file_descriptor_left() -> None:
    def exhaust(left: int) -> int | None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        fds = [os.memfd_create("filler") for _ in range(highest + 1)]  # fills the gaps too
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(fds) + 1 + left, hard))
        try:
            Task(os.getpid())
        except AllocationError as error:
            return error.errno
        return None

    # No room for the pidfd; room for it, but not for what is read under /proc.
    assert in_child(exhaust, 0) == errno.EMFILE
    assert in_child(exhaust, 1) == errno.EMFILE
    assert in_child(exhaust, 2) is None


def test_what_is_denied_names_the_privilege() -> None:
    parent = os.getpid()

    def look() -> tuple[int | None, str]:
        become(65534)
        with Task(parent) as task:
            try:
                task.read_proc("maps", "read its map")
            except NotPrivilegedError as error:
                return error.errno, str(error)
        return None, ""

    number, message = in_child(look)
    assert number == errno.EACCES
    assert "CAP_SYS_PTRACE" in message


def test_a_living_task_that_proc_does_not_show() -> None:
    with Task.current() as task, pytest.raises(NotPrivilegedError) as caught:
        task.read_proc("no-such-file", "read what is not there")
    assert caught.value.errno == errno.ENOENT


def test_reading_of_a_task_that_ends_meanwhile(start: Start) -> None:
    child = start()
    with Task(child.pid) as task:
        fd = task.open_proc("maps", "read its map")
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert os.read(fd, 100) == b""  # a zombie's map reads as empty, not as an error
        os.close(fd)
        with pytest.raises(TaskGoneError):
            task.read_proc("maps", "read its map")
        with pytest.raises(TaskGoneError):
            _ = task.name
        with pytest.raises(TaskGoneError) as caught:
            task.check_alive("test")
        assert caught.value.errno == errno.ESRCH


def test_a_zombie_met_after_reading_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    child = start()
    with Task(child.pid) as task:
        read_file = patience.read_file

        def read_and_kill(path: str) -> bytes:
            data = read_file(path)
            child.kill()
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            return data

        monkeypatch.setattr("memdesc.vm.task.read_file", read_and_kill)
        with pytest.raises(TaskGoneError):
            task.read_proc("status", "read its status")


@pytest.mark.parametrize("timeout", [-1, -0.001, float("nan")])
def test_what_is_no_timeout_is_refused(timeout: float) -> None:
    with Task.current() as task, pytest.raises(InvalidArgument):
        task.wait(timeout)


def test_waiting_for_ever_ends_with_the_task(start: Start) -> None:
    child = start()
    ended_at: list[bool] = []
    with Task(child.pid) as task:
        waiter = threading.Thread(target=lambda: ended_at.append(task.wait()))
        waiter.start()
        child.kill()
        waiter.join(60)
        assert ended_at == [True]
        assert task.wait(1e300)  # longer than poll can be asked for


def test_a_long_wait_goes_in_turns(monkeypatch: pytest.MonkeyPatch, start: Start) -> None:
    monkeypatch.setattr(module, "_LONGEST_POLL", 1)
    child = start()
    with Task(child.pid) as task:
        assert not task.wait(0.02)
        child.kill()
        assert task.wait(60)


class _Interrupted(Exception):
    pass


def test_waiting_gives_way_to_signals(start: Start) -> None:
    def interrupt(*_: object) -> None:
        raise _Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with Task(start().pid) as task, pytest.raises(_Interrupted):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            task.wait(100)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_the_pidfd_can_be_polled_by_others(start: Start) -> None:
    child = start()
    with Task(child.pid) as task:
        assert select.select([task], [], [], 0)[0] == []
        child.kill()
        assert select.select([task], [], [], 60)[0] == [task]


def test_credentials_are_the_effective_ones() -> None:
    def look() -> tuple[Credentials, int]:
        try:
            os.setresgid(-1, 1234, -1)
            os.setresuid(-1, 4321, -1)
        except PermissionError as error:
            pytest.skip(f"this user can not become another one: {error}")
        with Task.current() as task:
            return task.credentials, os.getpid()

    credentials, pid = in_child(look)
    assert credentials == Credentials(pid, 4321, 1234)
