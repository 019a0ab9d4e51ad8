"""The known defects of multiprocessing.shared_memory: the original shows them, ours has none.

The original runs in processes of its own, some of which die of it. Where this CPython has mended a
defect, its test says so and skips.
"""

import os
import pickle
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
from shm_both import OURS, THEIRS, Kind, run_python

import memdesc as md
from memdesc.interop import multiprocessing as shm_multiprocessing

Closing = Callable[[Any], Any]


def mended(what: str) -> None:
    pytest.skip(f"CPython {sys.version.split()[0]} has mended it: {what}")


def program(kind: Kind, text: str) -> str:
    """A program that may well die of it, and leaves no core file then."""
    quiet = "import resource\nresource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
    return f"{quiet}from {kind.module} import SharedMemory, ShareableList\n{text}"


def run(kind: Kind, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python(program(kind, text), *arguments)


@pytest.mark.slow
def test_a_process_that_attached_does_not_destroy_what_others_use(
    kind: Kind, closing: Closing
) -> None:
    """cpython#82300: the tracker of the process that attached unlinks the block when that ends."""
    block = closing(kind.SharedMemory(create=True, size=10))
    block.buf[:4] = b"used"
    ended = run(kind, "import sys\nSharedMemory(sys.argv[1]).close()\n", block.name)
    assert ended.returncode == 0
    if kind.ours:
        assert ended.stderr == ""
        other = kind.SharedMemory(block.name)
        assert bytes(other.buf[:4]) == b"used"
        other.close()
        return
    try:
        kind.SharedMemory(block.name).close()
    except FileNotFoundError:
        assert "resource_tracker" in ended.stderr
    else:
        mended("the tracker leaves alone what it did not make")


def test_track_is_an_argument_that_changes_nothing(closing: Closing) -> None:
    for track in (True, False):
        block = closing(OURS.SharedMemory(create=True, size=10, track=track))
        OURS.SharedMemory(block.name, track=not track).close()
        assert OURS.SharedMemory(block.name).size == 10


def test_the_collector_raises_no_buffer_error(kind: Kind) -> None:
    """cpython#155003: __del__ raises while a view lives, and the descriptor is lost."""
    ended = run(
        kind,
        "import os\nblock = SharedMemory(create=True, size=10)\nname = block.name\n"
        "view = memoryview(block.buf)\n"
        "before = len(os.listdir('/proc/self/fd'))\n"
        "block.unlink()\ndel block\n"
        "view[0] = 7\nassert view[0] == 7\ndel view\n"
        "print(before - len(os.listdir('/proc/self/fd')))\n",
    )
    assert ended.returncode == 0, ended.stderr
    if kind.ours:
        assert (ended.stdout, ended.stderr) == ("2\n", "")
    elif "BufferError" not in ended.stderr:
        mended("no BufferError from __del__")


def test_close_while_a_view_lives(kind: Kind) -> None:
    block = kind.SharedMemory(create=True, size=10)
    view = np.frombuffer(block.buf, "u1")
    if kind.ours:
        block.close()
        assert view[0] == 0
    else:
        try:
            with pytest.raises(BufferError):
                block.close()
        finally:
            del view
            block.close()
    block.unlink()


_FULL = """
import ctypes, os, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=64k"):
    sys.exit(f"mount: {os.strerror(ctypes.get_errno())}")
block = SharedMemory(create=True, size=1 << 20)
print("made", flush=True)
block.buf[:] = bytes(1 << 20)
print("filled", flush=True)
block.close()
block.unlink()
"""


def test_a_full_file_system_is_no_sigbus(kind: Kind) -> None:
    """cpython#114390: the pages come at the first store, and where there are none, SIGBUS."""
    for options in (["--mount"], ["--user", "--map-root-user", "--mount"]):
        probe = subprocess.run(
            ["unshare", *options, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"],
            capture_output=True,
            text=True,
            check=False,
        )
        if probe.returncode == 0:
            break
    else:
        pytest.skip(f"no mounts of its own can be made here: {probe.stderr.strip()}")
    command = ["unshare", *options, sys.executable, "-c", program(kind, _FULL)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if kind.ours:
        assert (ended.stdout, ended.returncode) == ("made\nfilled\n", 0), ended.stderr
    elif ended.returncode != -signal.SIGBUS:
        assert "OSError" in ended.stderr, ended.stderr
        mended("a full /dev/shm is an OSError")
    else:
        assert ended.stdout == "made\n"


def test_who_can_write_can_not_take_the_pages_away(kind: Kind) -> None:
    """cpython#81366: not a memfd, so there are no seals, and ftruncate by anybody kills."""
    text = (
        "import os, sys\nblock = SharedMemory(create=True, size=5000)\n"
        "other = SharedMemory(block.name)\n"
        "fd = other.fileno() if hasattr(other, 'fileno') else other._fd\n"
        "try:\n    os.ftruncate(fd, 0)\nexcept PermissionError:\n    print('refused')\n"
        "block.unlink()\nprint(block.buf[4999], flush=True)\n"
    )
    ended = run(kind, text)
    if kind.ours:
        assert (ended.stdout, ended.returncode) == ("refused\n0\n", 0), ended.stderr
    elif ended.returncode == 0:
        mended("truncating does not reach others")
    else:
        assert ended.returncode == -signal.SIGBUS


def test_nothing_of_it_is_in_dev_shm(closing: Closing) -> None:
    name = f"memdesc-test-{secrets.token_hex(4)}"
    block = closing(OURS.SharedMemory(name, create=True, size=10))
    assert not os.path.exists(f"/dev/shm/{name}")
    assert os.readlink(f"/proc/self/fd/{block.fileno()}").startswith(f"/memfd:{name}.")


def test_a_killed_process_leaves_no_memory(kind: Kind) -> None:
    """With the process group dies the tracker too, as in a container that is stopped."""
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            program(
                kind,
                "import time\nblock = SharedMemory(create=True, size=10)\n"
                "print(block.name, flush=True)\ntime.sleep(60)\n",
            ),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    name = child.stdout.readline().strip()
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    if kind.ours:
        with pytest.raises(FileNotFoundError):
            kind.SharedMemory(name)
        return
    try:
        left = kind.SharedMemory(name)
    except FileNotFoundError:
        mended("nothing is left by killed processes")
    left.close()
    left.unlink()


def test_memory_of_a_buffer_that_was_made_to_be_shared_is_not_copied(closing: Closing) -> None:
    """cpython#83948: around memory that exists; possible of memory that was made to be shared."""
    block = closing(OURS.SharedMemory(create=True, size=8000))
    array = np.ndarray((1000,), "f8", buffer=block.buf)
    array[:] = np.arange(1000)
    with block.as_descriptor() as descriptor:
        view = descriptor.map().array((1000,), "f8")
        array[0] = -1
        assert view[0] == -1 and view[999] == 999
        del view


def test_what_a_pickle_carries_does_not_grow_with_the_memory(kind: Kind, closing: Closing) -> None:
    """cpython#89467: no bytes in the pickle; arrays over it travel out of band, without a copy."""
    small = closing(kind.SharedMemory(create=True, size=1))
    large = closing(kind.SharedMemory(create=True, size=1 << 22))
    assert len(pickle.dumps(large, 5)) - len(pickle.dumps(small, 5)) < 10
    array = np.ndarray((1 << 19,), "f8", buffer=large.buf)
    beside: list[pickle.PickleBuffer] = []
    carried = pickle.dumps(array, 5, buffer_callback=beside.append)
    assert len(carried) < 300
    again = pickle.loads(carried, buffers=beside)
    array[5] = 2.5
    assert again[5] == 2.5
    beside[0].release()
    del again, array


def test_arrays_over_it_travel_as_handles_through_multiprocessing(closing: Closing) -> None:
    """cpython#89467 again, of `ForkingPickler`, with which Queue, Pipe and Pool send."""
    block = closing(OURS.SharedMemory(create=True, size=8 << 10))
    array = np.ndarray((1 << 10,), "f8", buffer=block.buf)
    with shm_multiprocessing.installed(access=md.Access.READ_WRITE):
        carried = ForkingPickler.dumps(array[10:20])
        assert len(carried) < 1000
        again = ForkingPickler.loads(carried)
    again[0] = 4.5
    assert array[10] == 4.5
    block.close()
    del array
    assert again[0] == 4.5


def test_the_descriptor_under_an_array_is_found(closing: Closing) -> None:
    block = closing(OURS.SharedMemory(create=True, size=800, reserve=1 << 16))
    reader = OURS.SharedMemory(block.name, readonly=True)
    array = np.ndarray((100,), "f8", buffer=block.buf)
    found = md.descriptor_of(array)
    assert found is not None and found.length == 800
    block.grow(1600)
    assert md.descriptor_of(array) is found
    part = md.descriptor_of(np.frombuffer(reader.buf, "f8")[3:])
    assert part is not None and (part.length, part.max_access) == (776, md.Access.READ_ONLY)
    block.close()
    assert md.descriptor_of(array) is found, "the array is there still"
    reader.close()
    del array, found, part


@pytest.mark.parametrize("how", ["closed", "collected"])
def test_an_array_on_dead_shared_memory_is_no_segmentation_fault(kind: Kind, how: str) -> None:
    """numpy#23305, #18294, cpython#102349."""
    text = (
        "import gc, numpy as np\n"
        "def make():\n"
        "    block = SharedMemory(create=True, size=1 << 24)\n"
        "    array = np.ndarray((1 << 24,), 'u1', buffer=block.buf)\n"
        "    array[:] = 9\n"
        "    block.unlink()\n"
        "    CLOSE\n"
        "    return array\n"
        "array = make()\ngc.collect()\nprint(int(array.sum()) // 9, flush=True)\n"
    ).replace("CLOSE", "block.close()" if how == "closed" else "pass")
    ended = run(kind, text)
    if kind.ours:
        assert (ended.stdout, ended.returncode) == (f"{1 << 24}\n", 0), ended.stderr
    elif ended.returncode == 0:
        mended("arrays keep the memory")
    else:
        assert ended.returncode in (-signal.SIGSEGV, -signal.SIGBUS)


def test_memory_that_arrays_lie_in_can_grow(kind: Kind, closing: Closing) -> None:
    """cpython#115635: mmap refuses to be resized while there are views."""
    if not kind.ours:
        block = closing(kind.SharedMemory(create=True, size=100))
        view = block.buf[:10]
        with pytest.raises(BufferError):
            block._mmap.resize(1 << 20)
        view.release()
        return
    block = closing(kind.SharedMemory(create=True, size=100, reserve=1 << 20))
    array = np.ndarray((100,), "u1", buffer=block.buf)
    block.grow(1 << 20)
    block.buf[0] = 3
    assert array[0] == 3 and block.size == 1 << 20


def test_the_name_of_a_new_block_is_not_destroyed_by_an_old_one(kind: Kind) -> None:
    name = f"memdesc-test-{secrets.token_hex(4)}"
    old = kind.SharedMemory(name, create=True, size=10)
    kind.SharedMemory(name).unlink()
    new = kind.SharedMemory(name, create=True, size=10)
    if kind.ours:
        with pytest.raises(md.BlockNotFoundError):
            old.unlink()
        kind.SharedMemory(name).close()
        new.unlink()
    else:
        old.unlink()
        with pytest.raises(FileNotFoundError):
            new.unlink()
    old.close()
    new.close()


def test_a_list_that_can_not_be_made_leaves_nothing() -> None:
    name = f"memdesc-test-{secrets.token_hex(4)}"
    with pytest.raises(ValueError):
        OURS.ShareableList([2**70], name=name)
    with pytest.raises(FileNotFoundError):
        OURS.SharedMemory(name)
    assert THEIRS.module != OURS.module
