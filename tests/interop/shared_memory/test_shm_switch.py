"""The switch: programs written for the standard library run with ours, children too."""

import multiprocessing
import subprocess
import sys
from multiprocessing import managers, shared_memory
from pathlib import Path

import pytest
from shm_both import OURS, THEIRS, left_in

from memdesc.interop.shared_memory import install, installed, uninstall

PROGRAM = """
import multiprocessing, sys
{first}
from multiprocessing import shared_memory
from multiprocessing.managers import SharedMemoryManager
from multiprocessing.shared_memory import SharedMemory, ShareableList


def work(block, name):
    block.buf[0] = 1
    other = shared_memory.SharedMemory(name)
    other.buf[1] = 2
    assert hasattr(other, "fileno"), other
    other.close()
    block.close()


def main(method):
    context = multiprocessing.get_context(method)
    block = SharedMemory(create=True, size=10)
    child = context.Process(target=work, args=(block, block.name))
    child.start()
    child.join(60)
    print(child.exitcode, bytes(block.buf[:2]), type(block).__module__, sys.argv[1:])
    block.close()
    block.unlink()


if __name__ == "__main__":
    main(sys.argv[1])
"""


def installed_now() -> list[object]:
    return [
        shared_memory.SharedMemory,
        shared_memory.ShareableList,
        managers.SharedMemoryManager,
    ]


OUR_CLASSES = [OURS.SharedMemory, OURS.ShareableList, OURS.SharedMemoryManager]
THEIR_CLASSES = [THEIRS.SharedMemory, THEIRS.ShareableList, THEIRS.SharedMemoryManager]


def test_it_is_put_in_and_taken_out() -> None:
    prepare = multiprocessing.spawn.get_preparation_data
    assert installed_now() == THEIR_CLASSES
    install()
    install()
    assert installed_now() == OUR_CLASSES
    with installed():
        assert installed_now() == OUR_CLASSES
    assert installed_now() == OUR_CLASSES, "as it was before the block"
    uninstall()
    uninstall()
    assert installed_now() == THEIR_CLASSES
    with pytest.raises(KeyError), installed():
        assert installed_now() == OUR_CLASSES
        raise KeyError
    assert installed_now() == THEIR_CLASSES
    assert multiprocessing.spawn.get_preparation_data is prepare


def test_code_that_asks_the_module_gets_ours() -> None:
    with installed():
        block = shared_memory.SharedMemory(create=True, size=10)
        sl = shared_memory.ShareableList([1, "b\0"])
    assert type(block) is OURS.SharedMemory and list(sl) == [1, "b\0"]
    for shm in (block, sl.shm):
        shm.close()
        shm.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("how", ["line", "runner"])
def test_a_program_and_its_children_use_ours(
    tmp_path: Path, runtime_dir: Path, how: str, method: str
) -> None:
    path = tmp_path / "program.py"
    under_main = "if __name__ == '__main__':\n    "
    line = "import memdesc.interop.shared_memory as shm; shm.install()"
    path.write_text(PROGRAM.format(first=under_main + line if how == "line" else ""))
    command = [sys.executable, *(["-m", OURS.module] if how == "runner" else [])]
    ended = subprocess.run(
        [*command, str(path), method], capture_output=True, text=True, timeout=60, check=False
    )
    expected = rf"0 b'\x01\x02' {OURS.SharedMemory.__module__} ['{method}']" + "\n"
    assert (ended.stdout, ended.stderr, ended.returncode) == (expected, "", 0)
    assert left_in(runtime_dir) == []


def test_the_runner_says_how_it_is_used() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", OURS.module], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1 and "program.py" in ended.stderr
