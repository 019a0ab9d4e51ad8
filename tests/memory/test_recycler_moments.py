"""Memory comes back at any moment, in any thread: nothing waits, nothing is lost."""

from __future__ import annotations

import _thread
import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from children import in_child
from puppets import wait_until
from recycling import KIB, freed, fresh_recycler, identity_of, statistics

from memdesc import BufferMemoryDescriptor, Contents, recycler
from memdesc.memory import pressure
from memdesc.memory.limits import Available

SIZE = 256 * KIB
WATCHER = "memdesc-recycle"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    with fresh_recycler():
        yield


def watchers() -> int:
    """How many threads watch, as the kernel shows them."""
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ends just now
            names.append(path.read_text().strip())
    return names.count(WATCHER)


# ── In the midst of the recycler itself ──────────────────────────────────────────────────────


def test_memory_freed_by_the_thread_that_is_inside_is_taken_in_after() -> None:
    """The collector, or a signal handler, strikes while this thread changes the books."""
    inside: list[object] = []
    buffer = BufferMemoryDescriptor(SIZE)

    def work() -> None:
        buffer.close()
        gc.collect()
        inside.append(statistics().kept_blocks)
        inside.append(recycler.trim())  # nobody is asked to wait for himself
        with BufferMemoryDescriptor(SIZE) as other:
            inside.append(identity_of(other) != identity)

    identity = identity_of(buffer)
    recycler._recycler._inside(work, None)
    assert inside == [0, 0, True]
    assert statistics().kept_blocks == 2  # both


def test_memory_freed_while_another_thread_is_inside_waits_for_nobody() -> None:
    within, go_on = threading.Event(), threading.Event()

    def work() -> None:
        within.set()
        assert go_on.wait(60)

    thread = threading.Thread(target=lambda: recycler._recycler._inside(work, None))
    thread.start()
    try:
        assert within.wait(60)
        buffers = [fresh_outside() for _ in range(3)]
        while buffers:
            buffers.pop().close()
        assert statistics().kept_blocks == 0
    finally:
        go_on.set()
        thread.join()
    assert statistics().kept_blocks == 3


def fresh_outside() -> BufferMemoryDescriptor:
    """A buffer that asks the recycler for nothing, but may be kept."""
    from memdesc.memory.kept import Kind

    buffer = BufferMemoryDescriptor(SIZE, recycle=False)
    assert buffer._allocation is not None
    buffer._allocation.kind = Kind(buffer.pages, buffer.max_access, buffer.name)
    return buffer


@pytest.mark.slow
def test_signal_handlers_allocate_and_free_in_the_midst_of_it() -> None:
    kept: list[BufferMemoryDescriptor] = []
    struck = 0

    def handler(*_: object) -> None:
        nonlocal struck
        struck += 1
        if kept:
            kept.pop().close()
        else:
            kept.append(BufferMemoryDescriptor(SIZE))
        signal.setitimer(signal.ITIMER_REAL, 0.0005)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0005)
        while struck < 200:
            with BufferMemoryDescriptor(SIZE) as buffer:
                assert buffer.read_bytes(0, 4) == bytes(4)
                buffer.write_bytes(0, b"used")
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    while kept:
        kept.pop().close()
    recycler.trim()
    assert (statistics().kept_bytes, statistics().kept_blocks) == (0, 0)


@pytest.mark.slow
def test_four_threads_allocate_and_free() -> None:
    """Each fills what it has with a sign of its own, and finds it so, and fresh ones zero."""
    failures: list[str] = []

    def run(sign: int) -> None:
        rng = random.Random(sign)
        held: list[tuple[BufferMemoryDescriptor, memoryview]] = []
        for _ in range(300):
            if held and (len(held) > 5 or rng.random() < 0.5):
                buffer, view = held.pop(rng.randrange(len(held)))
                if view[0] != sign or view[-1] != sign or view[len(view) // 2] != sign:
                    failures.append("overwritten")
                if rng.random() < 0.5:
                    buffer.close()
                del buffer, view
            else:
                nbytes = rng.choice([64, 100, 128, 256]) * KIB - rng.choice([0, 7])
                zeroed = rng.random() < 0.5
                contents = Contents.ZEROED if zeroed else Contents.UNDEFINED
                buffer = BufferMemoryDescriptor(nbytes, contents=contents)
                view = memoryview(buffer)
                if zeroed and bytes(view) != bytes(nbytes):
                    failures.append("not zero")
                view[:] = bytes([sign]) * nbytes
                held.append((buffer, view))

    threads = [threading.Thread(target=run, args=(sign,)) for sign in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    seen = statistics()
    assert seen.hits > 0
    assert seen.kept_bytes == sum(size * blocks for size, blocks in seen.sizes.items())
    assert seen.kept_blocks == sum(seen.sizes.values())
    recycler.trim()
    assert statistics().kept_bytes == statistics().kept_blocks == 0


# ── Memory pressure ──────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_under_memory_pressure_all_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    freed()
    wait_until(lambda: watchers() == 1)
    monkeypatch.setattr(recycler, "is_stalling", lambda: True)
    wait_until(lambda: statistics().kept_bytes == 0)
    wait_until(lambda: watchers() == 0)  # nothing is kept, so nobody watches


@pytest.mark.slow
def test_where_room_gets_short_what_is_kept_does_too(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = [BufferMemoryDescriptor(SIZE) for _ in range(4)]
    while buffers:
        buffers.pop().close()
    assert statistics().kept_blocks == 4
    monkeypatch.setattr(recycler, "available", lambda: Available(9 * SIZE, "less", ""))
    wait_until(lambda: statistics().kept_blocks == 1)  # an eighth of 9 and of what is kept
    assert statistics().trimmed_bytes == 3 * SIZE


@pytest.mark.slow
def test_one_thread_watches_and_ends_with_what_is_kept() -> None:
    for _ in range(3):
        freed(name="a")
        freed(name="b")
        wait_until(lambda: watchers() == 1)
        recycler.trim()
        wait_until(lambda: watchers() == 0)


def test_without_a_thread_to_watch_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", none_left)
    freed()
    assert statistics().kept_blocks == 0


@pytest.mark.parametrize(
    ("text", "stalling"),
    [
        ("some avg10=0.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00", False),
        ("some avg10=9.99 avg60=80.00 avg300=0.00 total=1\nfull avg10=99.00", False),
        ("some avg10=10.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00", True),
        (None, False),
    ],
)
def test_what_the_kernel_tells_of_stalls(
    text: str | None, stalling: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / "memory").write_text(text)
    monkeypatch.setattr(pressure, "_PRESSURE", tmp_path / "memory")
    assert pressure.is_stalling() is stalling


def test_this_kernel_is_asked() -> None:
    assert pressure.is_stalling() in (True, False)


# ── Fork ─────────────────────────────────────────────────────────────────────────────────────


def test_before_a_fork_all_is_given_back() -> None:
    freed()
    wait_until(lambda: watchers() == 1)

    def child() -> tuple[int, int, int]:
        mapped = Path("/proc/self/maps").read_text().count("/memfd:memdesc ")
        identity = freed()
        with BufferMemoryDescriptor(SIZE) as buffer:
            same = identity_of(buffer) == identity
        return mapped, same, statistics().kept_blocks

    assert in_child(child) == (0, True, 1)  # the child's own recycler works
    assert statistics().kept_blocks == 0
    freed()
    assert statistics().kept_blocks == 1  # and the parent's goes on


def test_a_fork_finds_no_thread_of_the_recycler() -> None:
    """CPython warns who forks where there are threads."""
    freed()
    wait_until(lambda: watchers() == 1)
    watch = recycler._recycler._watch
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    assert not watch._running
    os.waitpid(pid, 0)
    wait_until(lambda: watchers() == 0)


def test_memory_that_a_child_inherited_is_no_one_s_next() -> None:
    buffer = BufferMemoryDescriptor(SIZE)
    view = memoryview(buffer)
    in_child(lambda: None)
    buffer.close()
    del buffer
    view.release()
    assert statistics().kept_blocks == 0


def test_a_child_lets_go_of_what_its_parent_was_about_to_keep() -> None:
    """Retired before the fork, its last view in the child goes after it."""
    buffer = BufferMemoryDescriptor(SIZE)
    view = memoryview(buffer)
    buffer.close()
    del buffer

    def child() -> int:
        view.release()
        return statistics().kept_blocks

    assert in_child(child) == 0
    view.release()
    assert statistics().kept_blocks == 0


@pytest.mark.slow
def test_forks_amid_threads_that_free() -> None:
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            freed()

    threads = [threading.Thread(target=churn) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            # What of it another thread freed just before the fork is not used again by either.
            assert in_child(lambda: identity_unlike_parent()) is True
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def identity_unlike_parent() -> bool:
    """In the child: a new buffer is of memory that is the child's alone."""
    with BufferMemoryDescriptor(SIZE) as buffer:
        identity = identity_of(buffer)
        try:
            parent = Path(f"/proc/{os.getppid()}/maps").read_text()
        except PermissionError:
            return True
        return f" {identity[1]} " not in parent


# ── The end of the program ───────────────────────────────────────────────────────────────────

ENDINGS = {
    "kept": "md.BufferMemoryDescriptor(1 << 20).close()",
    "alive": "buffer = md.BufferMemoryDescriptor(1 << 20)",
    "a view": "view = memoryview(md.BufferMemoryDescriptor(1 << 20))",
    "a cycle": "c = [md.BufferMemoryDescriptor(1 << 20)]; c.append(c); del c",
    "an array": "import numpy; array = md.BufferMemoryDescriptor(1 << 20).array()",
    "a module": "sys.kept = md.BufferMemoryDescriptor(1 << 20)",
    "at exit": "import atexit; b = md.BufferMemoryDescriptor(1 << 20); atexit.register(b.close)",
    "first at exit": (
        "import atexit; atexit.register(lambda: md.BufferMemoryDescriptor(1 << 20).close())"
    ),
    "kept, then at exit": (
        "import atexit\n"
        "atexit.register(lambda: md.BufferMemoryDescriptor(1 << 20).close())\n"
        "md.BufferMemoryDescriptor(1 << 20).close()"
    ),
    "an exception": "b = md.BufferMemoryDescriptor(1 << 20); v = memoryview(b); 1 / 0",
    "a thread": (
        "import threading\n"
        "def run():\n"
        "    while True:\n"
        "        md.BufferMemoryDescriptor(1 << 20).close()\n"
        "threading.Thread(target=run, daemon=True).start()"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_end_of_a_program_is_quiet(ending: str) -> None:
    code = f"import sys, memdesc as md\n{ENDINGS[ending]}\n"
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", code], capture_output=True, text=True, timeout=60
    )
    if ending == "an exception":
        assert done.stderr.count("Traceback") == 1
        assert done.stderr.strip().endswith("ZeroDivisionError: division by zero")
    else:
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
