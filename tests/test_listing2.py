"""Listing 2: memory of a C program that knows nothing of us, by pid and address."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from listing2_program import LENGTH, Program, compiled, running
from privilege import Privilege, run_as

import memdesc as md
from memdesc.mapping import LocalMemoryMap
from memdesc.vm.physical import same_pages

OUT_IN = md.Direction.OUT_IN


@pytest.fixture(scope="module")
def program_file() -> Iterator[Path]:
    with compiled() as file:
        yield file


@pytest.fixture
def program(program_file: Path) -> Iterator[Program]:
    with running(program_file) as started:
        yield started


@pytest.fixture
def task(program: Program) -> Iterator[md.Task]:
    with md.Task(program.process.pid) as held:
        yield held


def map_or_skip(descriptor: md.MemoryDescriptor, **how: int) -> LocalMemoryMap:
    try:
        return descriptor.map(**how)
    except md.MappingError as error:
        if error.reason is md.MappingReason.NOT_PRIVILEGED:
            pytest.skip("the kernel does not open the objects of other tasks to this process")
        raise


def refusal(descriptor: md.MemoryDescriptor) -> md.MappingReason:
    with pytest.raises(md.MappingError) as caught:
        descriptor.map()
    return caught.value.reason


def test_its_buffer_is_mapped_without_a_copy(program: Program, task: md.Task) -> None:
    theirs = md.MemoryDescriptor.with_address_range(program.buffer, LENGTH, OUT_IN, task=task)
    mapping = map_or_skip(theirs)
    assert len(mapping) == LENGTH
    assert mapping.access is md.Access.READ_WRITE
    view = memoryview(mapping)
    assert view[:13] == b"written by C\0"

    # The page that both have touched is one frame, where frames can be seen; all is one object.
    own = md.Task.current()
    proof = same_pages(own, mapping.address, task, program.buffer, 13)
    assert proof, proof
    assert proof.denied or proof.proof == "frames"
    assert same_pages(own, mapping.address, task, program.buffer, LENGTH)

    view[:20] = b"changed from Python\0"
    assert program.says() == "changed from Python"
    view[8:13] = b" far\0"
    assert program.says() == "changed  far"
    # And back: the program's end of it, stored to as the program itself would.
    try:
        md.copyout(b"stored", task, program.buffer)
    except md.NotPrivilegedError:
        pytest.skip("mapped and stored to; the kernel denies this process a store on their side")
    assert view[:6] == b"stored"


def test_a_part_from_the_middle_of_a_page(program: Program, task: md.Task) -> None:
    start = program.buffer + md.page_size + 100
    theirs = md.MemoryDescriptor.with_address_range(start, 5000, OUT_IN, task=task)
    mapping = map_or_skip(theirs)
    assert (len(mapping), mapping.address % md.page_size) == (5000, 100)
    whole = md.MemoryDescriptor.with_address_range(program.buffer, LENGTH, OUT_IN, task=task).map()
    memoryview(mapping)[:4] = b"here"
    assert memoryview(whole)[md.page_size + 100 :][:4] == b"here"


def test_malloc_memory_is_refused(program: Program, task: md.Task) -> None:
    theirs = md.MemoryDescriptor.with_address_range(program.malloced, LENGTH, OUT_IN, task=task)
    assert refusal(theirs) is md.MappingReason.PRIVATE_MEMORY
    assert md.copyin(task, program.malloced, 6) == b"malloc"
    assert theirs.read_bytes(0, 6) == b"malloc"


def test_two_objects_are_refused_and_mapped_when_allowed(program: Program, task: md.Task) -> None:
    length, page = 2 * md.page_size, md.page_size
    describe = md.MemoryDescriptor.with_address_range
    theirs = describe(program.two_objects, length, OUT_IN, task=task)
    assert refusal(theirs) is md.MappingReason.SEVERAL_OBJECTS
    several = describe(program.two_objects, length, OUT_IN, task=task, allow_several_objects=True)
    mapping = map_or_skip(several)
    view = memoryview(mapping)
    assert len(view) == length
    assert (view[:8], view[page : page + 8]) == (b"object 0", b"object 1")
    view[page - 2 : page + 2] = b"over"
    assert theirs.read_bytes(page - 2, 4) == b"over"
    assert same_pages(md.Task.current(), mapping.address, task, program.two_objects, length)


def test_a_range_with_a_hole_is_refused(program: Program, task: md.Task) -> None:
    # The address space begins above vm.mmap_min_addr, far below any program.
    theirs = md.MemoryDescriptor.with_address_range(md.page_size, 100, OUT_IN, task=task)
    assert refusal(theirs) is md.MappingReason.NOT_MAPPED


def test_the_mapping_outlives_the_program(program: Program, task: md.Task) -> None:
    theirs = md.MemoryDescriptor.with_address_range(program.buffer, LENGTH, OUT_IN, task=task)
    mapping = map_or_skip(theirs)
    program.process.kill()
    assert program.process.wait(20) == -signal.SIGKILL
    view = memoryview(mapping)
    assert view[:13] == b"written by C\0"
    assert not any(view[md.page_size :])  # pages that nobody had touched are there, too
    view[-1] = 7
    assert view[-1] == 7
    fresh = md.MemoryDescriptor.with_address_range(program.buffer, LENGTH, OUT_IN, task=task)
    assert refusal(fresh) is md.MappingReason.TASK_GONE
    with pytest.raises(md.TaskGoneError) as caught:
        md.copyin(task, program.buffer, 1)
    assert caught.value.errno == errno.ESRCH


UNPRIVILEGED = """
import re, subprocess, sys
import memdesc as md
with subprocess.Popen(sys.argv[1], stdin=-1, stdout=-1, text=True) as program:
    try:
        lines = [program.stdout.readline() for _ in range(4)]
        address = int(re.search("@ (0x[0-9a-f]+)", lines[0])[1], 16)
        with md.Task(program.pid) as task:
            describe = md.MemoryDescriptor.with_address_range
            theirs = describe(address, 54321, md.Direction.OUT_IN, task=task)
            try:
                theirs.map()
                print("mapped")
            except md.MappingError as error:
                print(error.reason.name)
            try:
                print(md.copyinstr(task, address, 100).decode())
                md.copyout(b"changed from Python\\0", task, address)
            except md.NotPrivilegedError:
                print("not copied")
        program.stdin.write("go on\\n")
        program.stdin.flush()
        print(program.stdout.readline(), end="")
    finally:
        program.kill()
"""


@pytest.mark.slow
@pytest.mark.parametrize("privilege", [Privilege.USER, Privilege.CONTAINER])
def test_without_the_privilege_it_is_copied(program_file: Path, privilege: Privilege) -> None:
    done = run_as(privilege, UNPRIVILEGED, str(program_file))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "NOT_PRIVILEGED",
        "written by C",
        "buffer says: changed from Python",
    ]
