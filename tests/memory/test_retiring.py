"""A retired memory object: closed for everyone, its descriptor kept for a successor."""

from __future__ import annotations

import errno
import fcntl
import os
import threading

import pytest

from memdesc import Access, ClosedError, PageKind, page_size
from memdesc.memory.memfd import OwnedObject, find_owned


def owned(max_access: Access = Access.READ_ONLY) -> OwnedObject:
    return OwnedObject("frames", 4 * page_size, pages=PageKind.BASE, max_access=max_access)


def test_a_retired_object_is_closed_for_everyone() -> None:
    memory = owned()
    fd = memory.own_fd()
    assert memory.retire()
    for ask in (
        memory.fileno,
        memory.seals,
        lambda: memory.open(Access.READ_ONLY),
        lambda: memory.grant(Access.READ_ONLY, user=os.geteuid()),
    ):
        with pytest.raises(ClosedError):
            ask()
    memory.close()
    assert os.fstat(fd).st_ino == memory.identity[1]  # kept all the same
    assert memory.abandon()
    assert not memory.abandon()
    with pytest.raises(OSError):
        os.fstat(fd)


def test_what_is_closed_can_not_be_retired() -> None:
    memory = owned()
    memory.close()
    assert not memory.retire()


def test_a_successor_is_an_object_of_its_own() -> None:
    memory = owned(max_access=Access.READ_WRITE)
    memory.retire()
    next_ = memory.successor(Access.READ_ONLY)
    assert next_.identity == memory.identity
    assert next_.max_access is Access.READ_ONLY
    assert find_owned(memory.identity) is next_
    with pytest.raises(ClosedError):
        memory.successor(Access.READ_ONLY)  # there is one
    assert not memory.abandon()
    with pytest.raises(ClosedError):
        memory.open(Access.READ_ONLY)
    memory.close()
    del memory
    os.close(next_.open(Access.READ_ONLY))
    assert find_owned(next_.identity) is next_
    next_.close()


def test_who_looks_for_a_retired_object_spoils_it() -> None:
    """He is about to map the memory once more, and might do so where no lease sees it."""
    memory = owned()
    memory.retire()
    assert find_owned(memory.identity) is None
    for ask in (memory.is_held_by_others, lambda: memory.successor(Access.READ_ONLY)):
        with pytest.raises(ClosedError):
            ask()


def test_nobody_waits_for_a_retired_object() -> None:
    """Another thread holds its lock: it counts as held, for this time."""
    memory = owned()
    memory.retire()
    locked, done = threading.Event(), threading.Event()

    def hold() -> None:
        with memory._lock:
            locked.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert locked.wait(60)
    try:
        assert memory.is_held_by_others()
        with pytest.raises(ClosedError):
            memory.successor(Access.READ_ONLY)
    finally:
        done.set()
        thread.join()
    assert not memory.is_held_by_others()


def test_a_retired_object_that_is_dropped_closes_what_it_kept() -> None:
    memory = owned()
    fd, identity = memory.own_fd(), memory.identity
    memory.retire()
    del memory
    with pytest.raises(OSError):
        os.fstat(fd)
    assert find_owned(identity) is None


def opened(memory: OwnedObject, flags: int) -> int:
    return os.open(f"/proc/self/fd/{memory._remains}", flags)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
def test_others_are_seen_while_they_hold_it(flags: int) -> None:
    memory = owned()
    memory.retire()
    assert not memory.is_held_by_others()
    other = opened(memory, flags)
    assert memory.is_held_by_others()
    os.close(other)
    assert not memory.is_held_by_others()


def test_the_question_breaks_nobody_s_opening() -> None:
    """Opened again and again by another thread meanwhile: he waits a little, nobody is killed."""
    memory = owned()
    memory.retire()
    stop = threading.Event()
    failures: list[OSError] = []

    def opener() -> None:
        while not stop.is_set():
            try:
                os.close(opened(memory, os.O_RDWR))
            except OSError as error:
                failures.append(error)

    thread = threading.Thread(target=opener)
    thread.start()
    answers = [memory.is_held_by_others() for _ in range(500)]
    stop.set()
    thread.join()
    assert failures == []
    assert set(answers) <= {True, False}
    assert not memory.is_held_by_others()


def test_a_system_without_leases_can_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = owned()
    memory.retire()
    call = fcntl.fcntl

    def without(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETLEASE:
            raise OSError(errno.EINVAL, "fcntl")
        return call(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", without)
    with pytest.raises(OSError) as caught:
        memory.is_held_by_others()
    assert caught.value.errno == errno.EINVAL
