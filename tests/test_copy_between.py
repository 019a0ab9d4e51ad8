"""copy_between: two other tasks or this one, ranges that overlap; and copyin by a mapping."""

from __future__ import annotations

import errno
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from children import NOBODY, become, capability, in_child

# ruff: noqa: F811 (fixtures are imported, and named again where they are used)
from copy_targets import (  # noqa: F401
    CAP_SYS_PTRACE,
    NONE,
    PATTERN,
    READ,
    SIZE,
    OwnTask,
    Program,
    Target,
    child,
    program,
)
from hypothesis import given, settings, strategies as st

import memdesc as md
from memdesc import _core, crossing
from memdesc.copyio import between, copy_between, copyin_into, register_copier, unregister_copier
from memdesc.errors import (
    CopyError,
    InvalidArgument,
    NotPrivilegedError,
    TaskGoneError,
    UnsupportedError,
)
from memdesc.testing import failing
from memdesc.vm.objects import open_object
from memdesc.vm.pages import Access, page_size
from memdesc.vm.regions import region_at
from memdesc.vm.task import Task


@pytest.fixture
def second(program: Path) -> Iterator[Program]:
    started = Program(program)
    yield started
    started.close()


@pytest.fixture(params=["two tasks", "from here", "to here", "here", "one other task"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Target, Target]]:
    """A source with PATTERN and a target; each is either a C program or the own task."""
    kind = request.param
    program = request.getfixturevalue("program")
    made: list[Target] = []

    def add(own: bool) -> Target:
        made.append(OwnTask() if own else Program(program))
        return made[-1]

    try:
        source = add(kind in ("from here", "here"))
        target = source if kind == "one other task" else add(kind in ("to here", "here"))
        for task in (source.task, target.task):
            try:
                md.copyin(task, made[0].address if task is source.task else target.address, 1)
            except (NotPrivilegedError, UnsupportedError) as error:
                pytest.skip(f"this process may not copy from a child of its own: {error}")
        yield source, target
    finally:
        for one in made:
            one.close()


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a page and a half, so that a copy takes several."""
    monkeypatch.setattr(between, "BOUNCE", page_size * 3 // 2)


def fails(call: Callable[[], Any], task: Task, address: int, completed: int) -> None:
    with pytest.raises(CopyError) as caught:
        call()
    error = caught.value
    assert (error.errno, error.completed) == (errno.EFAULT, completed)
    assert (error.pid, error.address) == (task.pid, address)


def test_all_bytes_arrive(pair: tuple[Target, Target], small_steps: None) -> None:
    source, target = pair
    half = SIZE // 2
    assert copy_between(
        source.task, source.address + half, target.task, target.address + 3, half - 7
    ) == (half - 7)
    assert (
        target.read(0, half) == PATTERN[:3] + PATTERN[half:][: half - 7] + PATTERN[half - 4 : half]
    )


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_ranges_of_one_task_end_as_memmove_leaves_them(data: st.DataObject) -> None:
    nbytes = data.draw(st.integers(0, SIZE), label="nbytes")
    here = data.draw(st.integers(0, SIZE - nbytes), label="from")
    there = data.draw(st.integers(0, SIZE - nbytes), label="to")
    step = data.draw(st.sampled_from([1000, page_size, 5000, SIZE]), label="step")
    own = OwnTask()
    before, between.BOUNCE = between.BOUNCE, step
    try:
        with Task.current() as same:  # another object, the same task
            copied = copy_between(own.task, own.address + here, same, own.address + there, nbytes)
        model = bytearray(PATTERN)
        model[there : there + nbytes] = PATTERN[here : here + nbytes]
        assert copied == nbytes
        assert own.read(0, SIZE) == model
    finally:
        between.BOUNCE = before
        own.close()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_hole_anywhere_is_told_exactly(data: st.DataObject) -> None:
    """Source and target are apart: the first bytes arrive, up to the hole of whichever side."""
    source, target = OwnTask(), OwnTask()
    before = between.BOUNCE
    between.BOUNCE = data.draw(st.sampled_from([1000, page_size, 5000]), label="step")
    try:
        nbytes = data.draw(st.integers(1, 4 * page_size), label="nbytes")
        here = data.draw(st.integers(0, SIZE - nbytes), label="from")
        there = data.draw(st.integers(0, SIZE - nbytes), label="to")
        hole = data.draw(st.integers(0, SIZE // page_size - 1), label="hole")
        in_source = data.draw(st.booleans(), label="in the source")
        holed, at = (source, here) if in_source else (target, there)
        holed.protect(hole, NONE)
        first = max(hole * page_size - at, 0)
        met = at < (hole + 1) * page_size and at + nbytes > hole * page_size
        copied = first if met else nbytes

        def copy() -> int:
            return copy_between(
                source.task, source.address + here, target.task, target.address + there, nbytes
            )

        if met:
            fails(copy, holed.task, holed.address + at + first, copied)
        else:
            assert copy() == nbytes
        holed.protect(hole, READ | _core.PROT_WRITE)
        model = PATTERN[:there] + PATTERN[here : here + copied] + PATTERN[there + copied :]
        assert target.read(0, SIZE) == model
    finally:
        between.BOUNCE = before
        source.close()
        target.close()


@given(hole=st.integers(0, 7), in_source=st.booleans(), shift=st.integers(1, 2 * page_size))
@settings(max_examples=60, deadline=None)
def test_a_hole_met_while_copying_from_the_end(hole: int, in_source: bool, shift: int) -> None:
    own, step, nbytes = OwnTask(), page_size, 6 * page_size
    before, between.BOUNCE = between.BOUNCE, step
    try:
        own.protect(hole, NONE)
        try:
            copy_between(own.task, own.address, own.task, own.address + shift, nbytes)
        except CopyError as error:
            done = error.completed
            assert error.address is not None
            low = error.address - own.address
            assert hole * page_size <= low < (hole + 1) * page_size
        else:
            done = nbytes
            assert hole * page_size >= nbytes + shift
        own.protect(hole, READ | _core.PROT_WRITE)
        after, end = own.read(0, SIZE), nbytes + shift
        assert after[end - done : end] == PATTERN[nbytes - done : nbytes]
        assert after[end:] == PATTERN[end:]
        untouched = max(end - done - step, 0)
        assert after[:untouched] == PATTERN[:untouched]
    finally:
        between.BOUNCE = before
        own.close()


def test_protected_memory(child: Program, second: Program) -> None:
    second.protect(2, READ)
    start = second.address + page_size
    fails(
        lambda: copy_between(child.task, child.address, second.task, start, 2 * page_size),
        second.task,
        second.address + 2 * page_size,
        page_size,
    )
    assert second.read(page_size, page_size) == PATTERN[:page_size]


def test_no_bytes_look_at_nothing(child: Program, second: Program) -> None:
    child.process.kill()
    assert child.task.wait(30)
    assert copy_between(child.task, 0, second.task, 1 << 63, 0) == 0


@pytest.mark.parametrize("which", [0, 1])
def test_addresses_of_the_kernel(child: Program, second: Program, which: int) -> None:
    places = [child.address, second.address]
    places[which] = (1 << 63) - 4
    task = (child, second)[which].task
    with failing("process_vm_readv", errno.EIO) as fault:
        fails(
            lambda: copy_between(child.task, places[0], second.task, places[1], 8),
            task,
            places[which],
            0,
        )
    assert fault.calls == 0


@pytest.mark.parametrize(
    "wrong",
    [(None, 0, None, 0, -1), (None, -1, None, 0, 1), (None, 0, None, "0", 1), (1, 0, None, 0, 1)],
)
def test_what_makes_no_sense(wrong: tuple[Any, ...]) -> None:
    with Task.current() as task:
        arguments = [task if one is None else one for one in wrong]
        with pytest.raises(InvalidArgument):
            copy_between(*arguments)


@pytest.mark.parametrize("which", [0, 1])
def test_a_task_that_has_ended(child: Program, second: Program, which: int) -> None:
    gone = (child, second)[which]
    gone.process.kill()
    assert gone.task.wait(30)
    with pytest.raises(TaskGoneError) as caught:
        copy_between(child.task, child.address, second.task, second.address, 8)
    assert caught.value.errno == errno.ESRCH
    assert str(gone.task.pid) in str(caught.value)


@pytest.mark.parametrize("which", ["process_vm_readv", "process_vm_writev"])
def test_a_task_that_ends_in_the_middle(
    child: Program,
    second: Program,
    which: str,
    small_steps: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What was read of a pid that may be a stranger's by now is not written to the target.
    call, calls = getattr(_core, which), []
    gone = child if which == "process_vm_readv" else second

    def with_death(pid: int, buffer: Any, at: int) -> int:
        calls.append(at)
        moved: int = call(pid, buffer, at)
        if len(calls) == 3:
            gone.process.kill()
            assert gone.task.wait(30)
        return moved

    monkeypatch.setattr(_core, which, with_death)
    with pytest.raises(TaskGoneError):
        copy_between(child.task, child.address, second.task, second.address, SIZE)
    assert len(calls) == 3
    if gone is child:
        second.ask(f"w {second.address} 00")  # it lives, and has what was read before
        assert second.read(0, 8) == b"\0" + PATTERN[1:8]


def test_signals_are_honoured_between_blocks(
    child: Program, second: Program, small_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    writev, calls = _core.process_vm_writev, []

    def counted(pid: int, buffer: Any, at: int) -> int:
        calls.append(at)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return writev(pid, buffer, at)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_core, "process_vm_writev", counted)
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            copy_between(child.task, child.address, second.task, second.address, SIZE)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(calls) == 2


def test_without_the_right_to_either(child: Program, second: Program) -> None:
    second.ask("h")

    def denied() -> str:
        with pytest.raises(NotPrivilegedError) as caught:
            copy_between(child.task, child.address, second.task, second.address, 8)
        assert caught.value.errno == errno.EPERM
        with pytest.raises(NotPrivilegedError):
            copy_between(second.task, second.address, child.task, child.address, 8)
        return str(caught.value)

    assert "CAP_SYS_PTRACE" in in_child(
        denied, before=lambda: become(NOBODY) if capability(CAP_SYS_PTRACE) else None
    )


def test_a_connection_stands_in_for_the_kernel(child: Program, second: Program) -> None:
    class OverPipes:
        def __init__(self, program: Program) -> None:
            self.program = program

        def read(self, address: int, buffer: memoryview) -> int:
            count, _, text = self.program.ask(f"r {address} {len(buffer)}").partition(" ")
            buffer[: int(count)] = bytes.fromhex(text)
            return int(count)

        def write(self, address: int, data: memoryview) -> int:
            return int(self.program.ask(f"w {address} {data.hex()}"))

    copiers = [(one.task, OverPipes(one)) for one in (child, second)]
    for task, copier in copiers:
        register_copier(task, copier)
    try:
        child.unmap(9)
        with (
            failing("process_vm_readv", errno.EPERM, times=None),
            failing("process_vm_writev", errno.EPERM, times=None),
        ):
            start = child.address + 100
            assert copy_between(child.task, start, second.task, second.address, 9000) == 9000
            fails(
                lambda: copy_between(child.task, child.address, second.task, second.address, SIZE),
                child.task,
                child.address + 9 * page_size,
                9 * page_size,
            )
        assert second.read(0, 9 * page_size) == PATTERN[: 9 * page_size]
    finally:
        for task, copier in copiers:
            unregister_copier(task, copier)


# -- copyin by a mapping, where the thresholds say so ---------------------------------------------

MIB = 1 << 20


@pytest.fixture
def by_mapping() -> Iterator[None]:
    crossing.set_thresholds(crossing.Thresholds(copy_by_mapping=MIB))
    yield
    crossing.set_thresholds(None)


def test_shared_anonymous_memory_is_copied_by_mapping_it(by_mapping: None) -> None:
    with mmap.mmap(-1, 4 * MIB) as memory, Task.current() as task:
        memory[:] = os.urandom(4 * MIB)
        address = _core.buffer_address(memory)[0]
        expected = memory[5 : 5 + 3 * MIB]
        region = region_at(task, address)
        assert region is not None
        try:
            os.close(open_object(task, region, Access.READ_ONLY))
        except NotPrivilegedError as error:
            assert md.copyin(task, address + 5, 3 * MIB) == expected  # by the kernel then
            pytest.skip(f"the object can not be opened: {error}")
        with failing("process_vm_readv", errno.EIO, times=None) as fault:
            assert md.copyin(task, address + 5, 3 * MIB) == expected
            room = bytearray(MIB)
            assert copyin_into(task, address + 7, room) == MIB
            assert room == memory[7 : 7 + MIB]
        assert fault.calls == 0


def test_small_blocks_are_never_mapped(by_mapping: None) -> None:
    crossing.set_thresholds(crossing.Thresholds(copy_by_mapping=0))
    with mmap.mmap(-1, MIB) as memory, Task.current() as task:
        with failing("map_memory", errno.EIO, times=None) as fault:
            assert md.copyin(task, _core.buffer_address(memory)[0], MIB - 1) == bytes(MIB - 1)
        assert fault.calls == 0


def test_what_could_be_taken_away_is_not_mapped(by_mapping: None) -> None:
    fd = os.memfd_create("not sealed")
    os.ftruncate(fd, 2 * MIB)
    with mmap.mmap(fd, 2 * MIB) as memory, Task.current() as task:
        os.close(fd)
        address = _core.buffer_address(memory)[0]
        with failing("map_memory", errno.EIO, times=None) as fault:
            assert md.copyin(task, address, 2 * MIB) == bytes(2 * MIB)
        assert fault.calls == 0


def test_a_sealed_memfd_is_mapped_and_a_failure_falls_back(by_mapping: None) -> None:
    import fcntl

    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 2 * MIB)
    with mmap.mmap(fd, 2 * MIB) as memory, Task.current() as task:
        memory[:9] = b"different"
        seals = _core.F_SEAL_SHRINK | _core.F_SEAL_FUTURE_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        address, expected = _core.buffer_address(memory)[0], memory[:]
        with failing("process_vm_readv", errno.EIO, times=None) as fault:
            assert md.copyin(task, address, 2 * MIB) == expected
        assert fault.calls == 0
        with failing("map_memory", errno.ENOMEM, times=None) as fault:
            assert md.copyin(task, address, 2 * MIB) == expected
        assert fault.failures == 1
    os.close(fd)


def test_holes_and_private_memory_are_the_kernels_to_copy(by_mapping: None) -> None:
    with mmap.mmap(-1, 2 * MIB) as memory, Task.current() as task:
        address = _core.buffer_address(memory)[0]
        _core.mprotect(address + MIB, page_size, NONE)
        fails(lambda: md.copyin(task, address, 2 * MIB), task, address + MIB, MIB)
        _core.mprotect(address + MIB, page_size, READ | _core.PROT_WRITE)
        private = bytearray(os.urandom(2 * MIB))
        found = md.copyin(task, _core.buffer_address(private)[0], 2 * MIB)
        assert found == private


def test_a_task_that_ended_is_found_also_by_mapping(child: Program, by_mapping: None) -> None:
    child.process.kill()
    assert child.task.wait(30)
    with pytest.raises(TaskGoneError):
        md.copyin(child.task, child.address, 2 * MIB)


def test_errors_say_of_which_side_they_are() -> None:
    room = bytearray(8)
    place = _core.buffer_address(room)[0]
    with md.Task.current() as task:
        for side, at in (("source", (-1, place)), ("target", (place, -1)), ("target", (place, ""))):
            with pytest.raises(md.InvalidArgument, match=f"{side}_address is "):
                md.copy_between(task, at[0], task, at[1], 8)  # type: ignore[arg-type]
        for side, at in (("source", (1 << 64, place)), ("target", (place, 1 << 64))):
            with pytest.raises(md.CopyError, match=f"{side} address 0x1") as caught:
                md.copy_between(task, at[0], task, at[1], 8)
            assert caught.value.errno == errno.EFAULT
        with pytest.raises(md.InvalidArgument, match="source is of type"):
            md.copy_between(5, place, task, place, 8)  # type: ignore[arg-type]
        with pytest.raises(md.InvalidArgument, match="target is of type"):
            md.copy_between(task, place, 5, place, 8)  # type: ignore[arg-type]
