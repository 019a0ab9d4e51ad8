"""copyin and copyout of tasks that end, that the kernel denies, or that copy for us."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from children import NOBODY, become, capability, in_child

# ruff: noqa: F811 (fixtures are imported, and named again where they are used)
from copy_targets import (  # noqa: F401
    CAP_SYS_PTRACE,
    NS_LAST_PID,
    PATTERN,
    SIZE,
    OwnTask,
    Program,
    child,
    faults,
    program,
    target,
)

from memdesc import _core
from memdesc.copyio import (
    Route,
    copyin,
    copyinstr,
    copyout,
    register_copier,
    route,
    unregister_copier,
)
from memdesc.errors import (
    AllocationError,
    InvalidArgument,
    MemdescError,
    NotPrivilegedError,
    TaskGoneError,
    UnsupportedError,
)
from memdesc.testing import failing
from memdesc.vm.pages import page_size
from memdesc.vm.task import Task

# ── Tasks that end ───────────────────────────────────────────────────────────────────────────


def test_a_task_that_has_ended(child: Program) -> None:
    child.process.kill()
    for call in (
        lambda: copyin(child.task, child.address, 8),
        lambda: copyout(b"x", child.task, child.address),
        lambda: copyinstr(child.task, child.address, 8),
        lambda: route(child.task),
    ):
        child.task.wait(30)
        with pytest.raises(TaskGoneError) as caught:
            call()
        assert caught.value.errno == errno.ESRCH


@pytest.mark.parametrize("after", [False, True], ids=["before the kernel copies", "after it"])
@pytest.mark.parametrize("name", ["process_vm_readv", "process_vm_writev"])
def test_a_task_that_ends_during_the_copy(
    child: Program, monkeypatch: pytest.MonkeyPatch, name: str, after: bool
) -> None:
    # Copied or not: nothing is given out that may be of another process by now.
    call = getattr(_core, name)

    def with_death(pid: int, buffer: Any, at: int) -> int:
        moved = call(pid, buffer, at) if after else 0
        child.process.kill()
        assert child.task.wait(30)
        return moved or call(pid, buffer, at)

    monkeypatch.setattr(_core, name, with_death)
    with pytest.raises(TaskGoneError):
        if name == "process_vm_readv":
            copyin(child.task, child.address, 8)
        else:
            copyout(b"12345678", child.task, child.address)


@pytest.mark.parametrize("number", [errno.EFAULT, errno.EPERM])
def test_what_a_stranger_with_its_pid_answers_is_not_taken_for_the_tasks(
    child: Program, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def of_a_stranger(pid: int, buffer: Any, at: int) -> int:
        child.process.kill()
        assert child.task.wait(30)
        raise OSError(number, "process_vm_readv: as another process's memory answers")

    monkeypatch.setattr(_core, "process_vm_readv", of_a_stranger)
    with pytest.raises(TaskGoneError):
        copyin(child.task, child.address, 8)


def test_a_recycled_pid_is_not_mistaken_for_the_task() -> None:
    def start() -> int:
        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(0)
        return pid

    def recycle() -> None:
        secret = (ctypes.c_char * 6)(*b"secret")
        first = start()
        task = Task(first)
        end(first)
        for _ in range(50):
            try:
                NS_LAST_PID.write_text(str(first - 1))
            except OSError as error:
                pytest.skip(f"pids can not be chosen: {error}")
            second = start()
            if second == first:
                break
            end(second)
        else:
            pytest.skip("other processes took the pid each time")
        try:
            found = bytearray(6)
            _core.process_vm_readv(second, found, ctypes.addressof(secret))
            assert found == b"secret"  # the pid alone would have given a stranger's bytes
            with pytest.raises(TaskGoneError):
                copyin(task, ctypes.addressof(secret), 6)
            with pytest.raises(TaskGoneError):
                copyout(b"poison", task, ctypes.addressof(secret))
        finally:
            end(second)

    def end(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    in_child(recycle)


# ── What the kernel denies, and the connection that stands in ────────────────────────────────


def without_tracing() -> None:
    """Lose the right to trace every task; a hidden child is then out of reach."""
    if capability(CAP_SYS_PTRACE):
        become(NOBODY)


def denied(call: Callable[[], Any]) -> NotPrivilegedError:
    with pytest.raises(NotPrivilegedError) as caught:
        call()
    assert caught.value.errno == errno.EPERM
    return caught.value


def test_a_task_that_this_user_may_not_trace(child: Program) -> None:
    child.ask("h")

    def try_all() -> str:
        denied(lambda: copyin(child.task, child.address, 8))
        denied(lambda: copyout(b"x", child.task, child.address))
        denied(lambda: copyinstr(child.task, child.address, 8))
        return str(denied(lambda: route(child.task)))

    message = in_child(try_all, before=without_tracing)
    assert "CAP_SYS_PTRACE" in message
    assert "connect" in message


def test_a_task_of_another_user(child: Program) -> None:
    if not capability(CAP_SYS_PTRACE):
        pytest.skip("only a holder of CAP_SYS_PTRACE starts from being allowed")
    assert copyin(child.task, child.address, 8) == PATTERN[:8]

    def as_a_third() -> None:
        denied(lambda: copyin(child.task, child.address, 8))

    in_child(as_a_third, before=lambda: become(NOBODY - 1))


class OverPipes:
    """The C program copies for us, as a connected task does; counts how often."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.calls = 0

    def read(self, address: int, buffer: memoryview) -> int:
        self.calls += 1
        count, _, text = self.program.ask(f"r {address} {len(buffer)}").partition(" ")
        buffer[: int(count)] = bytes.fromhex(text)
        return int(count)

    def write(self, address: int, data: memoryview) -> int:
        self.calls += 1
        return int(self.program.ask(f"w {address} {data.hex()}"))


def test_where_the_kernel_denies_it_the_connection_copies(child: Program) -> None:
    child.ask("h")
    child.unmap(10)

    def by_connection() -> None:
        copier = OverPipes(child)
        register_copier(child.task, copier)
        assert route(child.task) is Route.CONNECTION
        assert copyin(child.task, child.address, 3 * page_size) == PATTERN[: 3 * page_size]
        assert copyout(b"name\0", child.task, child.address + 20) == 5
        assert copyinstr(child.task, child.address + 20, 100) == b"name"
        assert child.read(20, 5) == b"name\0"
        before = 10 * page_size
        faults(lambda: copyin(child.task, child.address, SIZE), SIZE, before)
        faults(lambda: copyout(bytes(SIZE), child.task, child.address), SIZE, before)
        assert copier.calls == 7
        unregister_copier(child.task, copier)
        denied(lambda: copyin(child.task, child.address, 8))

    in_child(by_connection, before=without_tracing)


def test_the_kernel_is_asked_first(child: Program) -> None:
    if route(child.task) is not Route.PROCESS_VM:
        pytest.skip("the kernel denies this process its own child")
    copier = OverPipes(child)
    register_copier(child.task, copier)
    try:
        assert route(child.task) is Route.PROCESS_VM
        assert copyin(child.task, child.address, 8) == PATTERN[:8]
        assert copier.calls == 0
    finally:
        unregister_copier(child.task, copier)


def test_where_a_filter_hides_the_calls(child: Program) -> None:
    with failing("process_vm_readv", errno.ENOSYS, times=None):
        with pytest.raises(UnsupportedError) as caught:
            copyin(child.task, child.address, 8)
        assert caught.value.errno == errno.ENOSYS
        with pytest.raises(UnsupportedError):
            route(child.task)
        copier = OverPipes(child)
        register_copier(child.task, copier)
        assert copyin(child.task, child.address, 8) == PATTERN[:8]
        unregister_copier(child.task, copier)


def test_what_a_copier_raises_is_passed_on(child: Program) -> None:
    class Failing:
        def read(self, address: int, buffer: memoryview) -> int:
            raise TaskGoneError("the connection ended", errno=errno.ESRCH)

        def write(self, address: int, data: memoryview) -> int:
            raise NotPrivilegedError("the task refused", errno=errno.EPERM)

    copier = Failing()
    register_copier(child.task, copier)
    with failing("process_vm_readv", errno.EPERM), pytest.raises(TaskGoneError) as gone:
        copyin(child.task, child.address, 8)
    assert "the connection ended" in str(gone.value)
    with failing("process_vm_writev", errno.EPERM), pytest.raises(NotPrivilegedError) as refused:
        copyout(b"x", child.task, child.address)
    assert "the task refused" in str(refused.value)
    unregister_copier(child.task, copier)


def test_copiers_are_registered_per_task_and_the_latest_is_taken(child: Program) -> None:
    first, second = OverPipes(child), OverPipes(child)
    register_copier(child.task, first)
    with Task(child.task.pid) as same:
        register_copier(same, second)
    with failing("process_vm_readv", errno.EPERM, times=None):
        copyin(child.task, child.address, 8)
        unregister_copier(child.task, second)
        copyin(child.task, child.address, 8)
        assert (first.calls, second.calls) == (1, 1)
        unregister_copier(child.task, first)
        denied(lambda: copyin(child.task, child.address, 8))
    with pytest.raises(InvalidArgument):
        unregister_copier(child.task, first)


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOMEM, AllocationError), (errno.EINVAL, MemdescError)]
)
def test_other_answers_of_the_kernel(number: int, kind: type[MemdescError]) -> None:
    source = OwnTask()
    with failing("process_vm_readv", number), pytest.raises(kind) as caught:
        copyin(source.task, source.address, 8)
    assert caught.value.errno == number
    with failing("process_vm_readv", number), pytest.raises(kind):
        route(source.task)
    source.close()
