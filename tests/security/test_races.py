"""What two threads, a fork, a signal or another process do in the middle of something else."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from children import in_child

import memdesc as md
from memdesc import (
    Access,
    BufferMemoryDescriptor,
    MemoryDescriptor,
    UnsupportedError,
    copyio,
    page_size,
)
from memdesc.copyio import copiers
from memdesc.memory import memfd
from memdesc.memory.memfd import OwnedObject
from memdesc.services import folder
from memdesc.testing.faults import failing

USES: dict[str, Callable[[BufferMemoryDescriptor], object]] = {
    "grant": lambda buffer: os.close(buffer.memory.grant(Access.READ_ONLY, user=0)),
    "map": lambda buffer: buffer.map(unique=True),
    "unmap": lambda buffer: buffer.map().unmap(),
    "prepare_count": lambda buffer: buffer.prepare_count,
    "close": lambda buffer: buffer.close(),
}


@contextmanager
def held(*locks: Any) -> Iterator[None]:
    """Another thread holds the locks meanwhile."""
    ready, enough = threading.Event(), threading.Event()

    def hold() -> None:
        for lock in locks:
            lock.acquire()
        ready.set()
        enough.wait(60)
        for lock in locks:
            lock.release()

    holder = threading.Thread(target=hold)
    holder.start()
    ready.wait(60)
    try:
        yield
    finally:
        enough.set()
        holder.join()


@pytest.mark.parametrize("use", USES)
def test_a_fork_child_waits_for_no_thread_of_its_parent(use: str) -> None:
    with BufferMemoryDescriptor(page_size) as buffer, buffer.map(unique=True) as mapping:
        with held(buffer._lock, buffer.memory._lock, mapping._lock):
            in_child(lambda: USES[use](buffer) and None, timeout=20)
            in_child(mapping.unmap, timeout=20)


def test_a_fork_child_does_not_keep_the_lock_on_the_folder(runtime_dir: Path) -> None:
    with md.Service("first"):
        pass
    with folder.locked(runtime_dir):
        pid = os.fork()
        if pid == 0:
            signal.pause()  # lives on, and never leaves the block
            os._exit(1)
    try:
        with folder.locked(runtime_dir, timeout=2):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("use", ["grant", "open"])
def test_memory_closed_by_another_thread_gives_no_other_file(
    use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number is free then, and the next file to be opened gets it: it would be handed out."""
    buffer = BufferMemoryDescriptor(page_size)
    memory, reopen = buffer.memory, memfd.reopen
    closer = threading.Thread(target=buffer.close)
    decoys: list[int] = []

    def slowly(fd: int, access: Access) -> int:
        closer.start()
        closer.join(0.2)  # as long as the thread may be off the processor
        decoys.extend(os.open("/dev/zero", os.O_RDWR) for _ in range(4))
        return reopen(fd, access)

    monkeypatch.setattr(memfd, "reopen", slowly)
    try:
        if use == "grant":
            given = memory.grant(Access.READ_ONLY, user=os.geteuid())
        else:
            given = memory.open(Access.READ_ONLY)
        assert (os.fstat(given).st_dev, os.fstat(given).st_ino) == memory.identity
        os.close(given)
    finally:
        closer.join()
        for fd in decoys:
            os.close(fd)
    with pytest.raises(md.ClosedError):
        memory.open(Access.READ_ONLY)


def test_two_that_seal_at_once_both_succeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork child grants the same memory: what we saw of its seals may be old already."""
    with BufferMemoryDescriptor(page_size) as buffer:
        memory, look = buffer.memory, OwnedObject.seals
        before = memory.seals()
        in_child(lambda: USES["grant"](buffer))
        answers = iter([before])
        monkeypatch.setattr(OwnedObject, "seals", lambda self: next(answers, None) or look(self))
        USES["grant"](buffer)
        assert memory.seals() & memory.lifecycle.row.seals == memory.lifecycle.row.seals


def test_sealing_that_fails_gives_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with BufferMemoryDescriptor(page_size) as buffer:
        other = os.open(f"/proc/self/fd/{buffer.memory.fileno()}", os.O_RDONLY)
        try:
            # By a descriptor that is open for reading alone the kernel lets nobody seal: EPERM.
            monkeypatch.setattr(OwnedObject, "own_fd", lambda self: other)
            with pytest.raises(PermissionError):
                USES["grant"](buffer)
        finally:
            os.close(other)


@pytest.mark.parametrize("times", [1, 3, 40])
def test_a_signal_does_not_stop_the_reserving_of_memory(times: int) -> None:
    with failing("fallocate", errno.EINTR, times=times) as fault:
        with BufferMemoryDescriptor(page_size * 3) as buffer:
            buffer.write_bytes(0, b"x" * buffer.length)
            assert buffer.page_counts().resident == 3
    assert fault.failures == times


# The interrupt may strike within pathlib's own open(), whose file the collector then shuts.
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_an_interrupt_does_stop_it() -> None:
    def handler(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with failing("fallocate", errno.EINTR, times=None), pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            BufferMemoryDescriptor(page_size)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_without_proc_it_is_said() -> None:
    """In a mount namespace of its own, where /proc lies no more."""
    program = (
        "import memdesc as md\n"
        "try: md.BufferMemoryDescriptor(100)\n"
        "except md.UnsupportedError as error: print(error.errno, '/proc' in str(error))\n"
    )
    hide = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    script = 'mount -t tmpfs none /proc && exec "$0" -c "$1"'
    try:
        tried = subprocess.run(
            [*hide, "mount -t tmpfs none /proc"], capture_output=True, text=True, timeout=30
        )
    except FileNotFoundError as missing:
        pytest.skip(f"unshare is not installed: {missing}")
    if tried.returncode:
        pytest.skip(f"/proc can not be hidden here: {tried.stderr.strip()}")
    ran = subprocess.run(
        [*hide, script, sys.executable, program], capture_output=True, text=True, timeout=30
    )
    assert (ran.stdout, ran.stderr) == (f"{errno.ENOENT} True\n", "")


def test_a_descriptor_that_can_not_be_opened_again_without_proc() -> None:
    with pytest.raises(UnsupportedError) as caught:
        memfd.reopen(-1, Access.READ_ONLY)
    assert caught.value.errno == errno.ENOENT


def test_every_kind_has_a_lock_that_a_fork_renews() -> None:
    with BufferMemoryDescriptor(page_size) as buffer:
        kinds: list[MemoryDescriptor] = [
            buffer,
            md.SubMemoryDescriptor(buffer, 0, 1),
            md.MultiMemoryDescriptor([buffer]),
            MemoryDescriptor.with_buffer(bytearray(1), md.Direction.OUT),
            MemoryDescriptor.with_address_range(buffer.address, 1, md.Direction.OUT),
        ]
        before = [kind._lock for kind in kinds]
        assert in_child(lambda: all(k._lock is not b for k, b in zip(kinds, before, strict=True)))
        assert all(k._lock is b for k, b in zip(kinds, before, strict=True))


class NoCopier:
    """Copies nothing."""

    def read(self, address: int, buffer: memoryview) -> int:
        return 0

    def write(self, address: int, data: memoryview) -> int:
        return 0


@pytest.mark.parametrize("moment", ["setdefault", "get"])
def test_the_collector_may_end_a_connection_while_another_begins_or_ends(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, stays, dropped, fresh = md.Task.current(), NoCopier(), NoCopier(), NoCopier()
    fell_in = []

    class Interrupted(dict[Any, Any]):
        def _collect(self, when: str) -> None:
            if when == moment and not fell_in:
                fell_in.append(when)
                copyio.unregister_copier(task, dropped)  # as a finalizer does, at any moment

        def setdefault(self, key: Any, default: Any = None) -> Any:
            self._collect("setdefault")
            return super().setdefault(key, default)

        def get(self, key: Any, default: Any = None) -> Any:
            self._collect("get")
            return super().get(key, default)

    def work() -> None:
        copyio.register_copier(task, fresh)
        copyio.unregister_copier(task, fresh)

    known = {id(stays): stays, id(dropped): dropped}
    monkeypatch.setattr(copiers, "_copiers", Interrupted({(task.pid, task.start_time): known}))
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert fell_in
    assert copiers._copiers == {(task.pid, task.start_time): {id(stays): stays}}


def test_a_copier_holds_no_task() -> None:
    """Whose it is another connection's may be: it would keep the pidfd of that."""
    first, second = md.Task.current(), md.Task.current()
    one, other = NoCopier(), NoCopier()
    copyio.register_copier(first, one)
    gone = weakref.ref(first)
    copyio.register_copier(second, other)
    copyio.unregister_copier(first, one)
    del first
    assert gone() is None
    assert copiers.copier_of(second) is other
    copyio.unregister_copier(second, other)
    assert copiers.copier_of(second) is None


def test_copiers_are_registered_in_a_fork_child_too() -> None:
    with md.Service("first"), held(copiers._copiers_lock):
        in_child(lambda: copyio.register_copier(md.Task.current(), NoCopier()), timeout=20)


def test_an_interrupt_just_after_sending_ends_no_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with md.Service("first") as service, BufferMemoryDescriptor(page_size) as buffer:
        service.share("it", buffer)
        with md.connect("first") as connection:
            put = type(connection)._put

            def interrupted(self: md.Connection, message: Any, fds: Any) -> bool:
                put(self, message, fds)
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(type(connection), "_put", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    connection.map("it")
            assert connection.map("it").length == page_size
            assert not connection._pending
