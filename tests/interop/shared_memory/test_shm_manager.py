"""SharedMemoryManager: what the documentation promises, of both modules; and that it keeps."""

import os
import signal
from multiprocessing import ProcessError
from pathlib import Path

import pytest
from shm_both import OURS, Kind, left_in, run_python

pytestmark = pytest.mark.slow


def test_it_makes_blocks_until_it_is_shut_down(kind: Kind) -> None:
    manager = kind.SharedMemoryManager()
    with pytest.raises(ValueError):
        manager.SharedMemory(size=9)
    manager.start()
    with pytest.raises(ProcessError):
        manager.get_server()
    sl = manager.ShareableList(range(4))
    raw = manager.SharedMemory(size=128)
    letters = manager.ShareableList("alpha")
    assert (list(sl), raw.size, list(letters)) == ([0, 1, 2, 3], 128, list("alpha"))
    again = kind.ShareableList(name=sl.shm.name)
    assert list(again) == [0, 1, 2, 3]
    os.kill(manager._process.pid, signal.SIGINT)  # as a terminal sends it to all: ignored
    raw2 = manager.SharedMemory(1)
    raw.close()
    block = kind.SharedMemory(raw.name)
    block.close()
    manager.shutdown()
    for name in (sl.shm.name, raw.name, raw2.name, letters.shm.name):
        with pytest.raises(FileNotFoundError):
            kind.SharedMemory(name)
    with pytest.raises(ProcessError):
        manager.get_server()
    for held in (sl.shm, letters.shm, again.shm, raw2):
        held.close()


def test_leaving_the_block_releases_all(kind: Kind) -> None:
    with kind.SharedMemoryManager() as manager:
        sl = manager.ShareableList("howdy")
        name = manager.SharedMemory(size=128).name
        sl.shm.close()
        assert list(kind.ShareableList(name=sl.shm.name)) == list("howdy")
    for gone in (sl.shm.name, name):
        with pytest.raises(FileNotFoundError):
            kind.ShareableList(name=gone)


def test_it_keeps_blocks_whose_maker_was_killed(runtime_dir: Path) -> None:
    with OURS.SharedMemoryManager() as manager:
        ended = run_python(
            "import os, sys\nfrom memdesc.interop.shared_memory import SharedMemoryManager\n"
            "manager = SharedMemoryManager(sys.argv[1], bytes.fromhex(sys.argv[2]))\n"
            "manager.connect()\nblock = manager.SharedMemory(10)\nblock.buf[:4] = b'kept'\n"
            "print(block.name, flush=True)\nos.kill(os.getpid(), 9)\n",
            manager.address,
            bytes(manager._authkey).hex(),
        )
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        block = OURS.SharedMemory(ended.stdout.strip())
        assert bytes(block.buf[:4]) == b"kept"
        block.unlink()  # before the manager does: no error there
        block.close()
    assert left_in(runtime_dir) == []
