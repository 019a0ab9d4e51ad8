"""Many names, threads and processes at once; whatever happens, each name is one block or none."""

import os
import random
import signal
import threading
from pathlib import Path

import pytest
from children import finish, start
from shm_both import left_in

from memdesc import BlockExistsError, BlockNotFoundError
from memdesc.interop.shared_memory import SharedMemory

pytestmark = pytest.mark.slow

NAMES = 100


def storm(seed: int, turns: int, failures: list[BaseException]) -> None:
    """Make, attach, look, unlink and close at random: nothing but the two errors may come."""
    chance = random.Random(seed)
    held: list[SharedMemory] = []
    try:
        for _ in range(turns):
            number = chance.randrange(NAMES)
            try:
                if chance.random() < 0.5:
                    block = SharedMemory(f"name-{number}", create=True, size=number + 1)
                    block.buf[:] = bytes([number]) * (number + 1)
                else:
                    block = SharedMemory(f"name-{number}")
                assert block.size == number + 1
                assert set(bytes(block.buf)) <= {number, 0}
                held.append(block)
                if len(held) > 10:
                    block = held.pop(chance.randrange(len(held)))
                    if chance.random() < 0.7:
                        block.unlink()
                    block.close()
            except (BlockExistsError, BlockNotFoundError):
                pass
    except BaseException as error:  # noqa: BLE001 (told by the test)
        failures.append(error)
    for block in held:
        block.close()


def clean_up() -> None:
    for number in range(NAMES):
        try:
            block = SharedMemory(f"name-{number}")
            block.unlink()
            block.close()
        except BlockNotFoundError:
            pass


def test_threads(runtime_dir: Path) -> None:
    failures: list[BaseException] = []
    threads = [threading.Thread(target=storm, args=(n, 100, failures)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    clean_up()
    assert left_in(runtime_dir) == []


def test_processes_of_which_some_are_killed(runtime_dir: Path) -> None:
    def run(seed: int) -> None:
        failures: list[BaseException] = []
        storm(seed, 10**9 if seed % 2 else 100, failures)
        assert failures == []

    ready = SharedMemory("name-0", create=True, size=1)
    pids = {seed: start(run, seed) for seed in range(6)}
    for seed, pid in pids.items():
        if seed % 2 == 0:
            assert finish(pid) == 0
    for seed, pid in pids.items():
        if seed % 2:
            os.kill(pid, signal.SIGKILL)
            assert finish(pid) == -signal.SIGKILL
    ready.close()
    clean_up()
    SharedMemory("name-0", create=True, size=1).unlink()
    from memdesc.interop.shared_memory import names

    names.sweep_all()
    assert left_in(runtime_dir) == []
