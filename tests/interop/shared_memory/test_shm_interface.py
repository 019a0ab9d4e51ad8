"""What the documentation of multiprocessing.shared_memory promises, of both modules."""

import array
import multiprocessing
import os
import pickle
import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from shm_both import Kind, run_python

Closing = Callable[[Any], Any]


def new_name() -> str:
    return f"memdesc-test-{secrets.token_hex(4)}"


def test_a_new_block_has_a_name_of_its_own_and_the_bytes_asked_for(
    kind: Kind, closing: Closing
) -> None:
    one, other = (closing(kind.SharedMemory(create=True, size=10)) for _ in range(2))
    assert isinstance(one.name, str) and one.name and one.name != other.name
    assert type(one.buf) is memoryview
    assert len(one.buf) == one.size == 10
    assert (one.buf.format, one.buf.itemsize, one.buf.ndim) == ("B", 1, 1)
    assert bytes(one.buf) == bytes(10)
    assert one.buf is one.buf


def test_the_example_of_the_documentation(kind: Kind) -> None:
    shm_a = kind.SharedMemory(create=True, size=10)
    buffer = shm_a.buf
    buffer[:4] = bytearray([22, 33, 44, 55])
    buffer[4] = 100
    shm_b = kind.SharedMemory(shm_a.name)
    assert array.array("b", shm_b.buf[:5]) == array.array("b", [22, 33, 44, 55, 100])
    shm_b.buf[:5] = b"howdy"
    assert bytes(shm_a.buf[:5]) == b"howdy"
    shm_b.close()
    shm_a.close()
    shm_a.unlink()


def test_the_example_with_numpy(kind: Kind) -> None:
    a = np.array([1, 1, 2, 3, 5, 8])
    shm = kind.SharedMemory(create=True, size=a.nbytes)
    b = np.ndarray(a.shape, dtype=a.dtype, buffer=shm.buf)
    b[:] = a[:]
    existing = kind.SharedMemory(name=shm.name)
    c = np.ndarray((6,), dtype=np.int64, buffer=existing.buf)
    assert c.tolist() == [1, 1, 2, 3, 5, 8]
    c[-1] = 888
    assert b.tolist() == [1, 1, 2, 3, 5, 888]
    del c
    existing.close()
    del b
    shm.close()
    shm.unlink()


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_name_that_is_given_is_the_name(kind: Kind, closing: Closing, slash: str) -> None:
    name = slash + new_name()
    block = closing(kind.SharedMemory(name, create=True, size=1))
    assert block.name == name
    block.buf[0] = 7
    for known in (name, name.lstrip("/")):
        other = kind.SharedMemory(known)
        assert other.buf[0] == 7
        other.close()


def test_attaching_ignores_the_size(kind: Kind, closing: Closing) -> None:
    block = closing(kind.SharedMemory(create=True, size=100))
    for size in (0, 1, 10**9):
        other = kind.SharedMemory(block.name, size=size)
        assert other.size == len(other.buf) == 100
        other.close()


@pytest.mark.parametrize(
    "arguments",
    [
        {"create": True},
        {"create": True, "size": 0},
        {"create": True, "size": -1},
        {"size": -2, "name": "any"},
        {},
        {"create": False, "size": 10},
    ],
)
def test_what_makes_no_sense_is_a_value_error(kind: Kind, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        kind.SharedMemory(**arguments)


def test_a_name_is_used_once(kind: Kind, closing: Closing) -> None:
    block = closing(kind.SharedMemory(new_name(), create=True, size=8))
    block.buf[:3] = b"one"
    with pytest.raises(FileExistsError):
        kind.SharedMemory(block.name, create=True, size=8)
    assert bytes(block.buf[:3]) == b"one"


def test_there_is_nothing_to_attach_to(kind: Kind) -> None:
    with pytest.raises(FileNotFoundError):
        kind.SharedMemory(new_name())


def test_close_does_not_destroy_the_block(kind: Kind, closing: Closing) -> None:
    block = closing(kind.SharedMemory(create=True, size=8))
    block.buf[:4] = b"kept"
    block.close()
    block.close()
    other = closing(kind.SharedMemory(block.name))
    assert bytes(other.buf[:4]) == b"kept"
    other.unlink()
    with pytest.raises(FileNotFoundError):
        kind.SharedMemory(block.name)


@pytest.mark.parametrize("first", ["close", "unlink"])
def test_close_and_unlink_come_in_either_order(kind: Kind, first: str) -> None:
    block = kind.SharedMemory(create=True, size=8)
    other = kind.SharedMemory(block.name)
    other.buf[:5] = b"still"
    if first == "close":
        block.close()
        block.unlink()
    else:
        block.unlink()
        assert bytes(block.buf[:5]) == b"still"
        block.close()
    assert bytes(other.buf[:5]) == b"still", "who has it open keeps it"
    with pytest.raises(FileNotFoundError):
        kind.SharedMemory(block.name)
    other.close()


def test_a_block_is_unlinked_once(kind: Kind) -> None:
    block = kind.SharedMemory(create=True, size=8)
    other = kind.SharedMemory(block.name)
    other.unlink()
    with pytest.raises(FileNotFoundError):
        block.unlink()
    block.close()
    other.close()


def test_name_size_and_buf_are_read_only(kind: Kind, closing: Closing) -> None:
    block = closing(kind.SharedMemory(create=True, size=8))
    for attribute in ("name", "size", "buf"):
        with pytest.raises(AttributeError):
            setattr(block, attribute, None)
    assert repr(block) == f"SharedMemory({block.name!r}, size=8)"
    block.close()
    assert (block.name, block.size) == (block.name, 8)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_attaches_by_the_name(kind: Kind, closing: Closing, protocol: int) -> None:
    block = closing(kind.SharedMemory(create=True, size=1 << 20))
    block.buf[:6] = b"pickle"
    pickled = pickle.dumps(block, protocol=protocol)
    assert len(pickled) < 200
    other = pickle.loads(pickled)
    assert type(other) is kind.SharedMemory
    assert (other.name, other.size) == (block.name, block.size)
    other.buf[:6] = b"newval"
    assert bytes(block.buf[:6]) == b"newval"
    other.close()
    block.close()
    block.unlink()
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickled)


def test_a_closed_view_can_not_be_used(kind: Kind, closing: Closing) -> None:
    block = closing(kind.SharedMemory(create=True, size=8))
    buffer = block.buf
    block.close()
    with pytest.raises(ValueError):
        buffer[0]


def test_another_process_attaches_also_when_the_maker_has_closed(kind: Kind) -> None:
    block = kind.SharedMemory(create=True, size=16)
    block.buf[:5] = b"howdy"
    name = block.name
    block.close()
    ended = run_python(
        f"import sys\nfrom {kind.module} import SharedMemory\n"
        "block = SharedMemory(sys.argv[1])\n"
        "print(bytes(block.buf[:5]), block.size)\n"
        "block.close()\nblock.unlink()\n",
        name,
    )
    assert (ended.stdout, ended.returncode) == ("b'howdy' 16\n", 0), ended.stderr
    with pytest.raises(FileNotFoundError):
        kind.SharedMemory(name)
    with pytest.raises(FileNotFoundError):
        block.unlink()


def _write(block: Any, name: str, kind: str) -> None:
    """In a child: through the object that came, and through one of the same name."""
    module = __import__(kind, fromlist=["SharedMemory"])
    block.buf[:5] = b"HELLO"
    other = module.SharedMemory(name)
    other.buf[5:8] = b", !"
    other.close()
    block.close()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_it_is_an_argument_of_a_process(kind: Kind, closing: Closing, method: str) -> None:
    block = closing(kind.SharedMemory(create=True, size=8))
    context = multiprocessing.get_context(method)
    child = context.Process(target=_write, args=(block, block.name, kind.module))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    child.close()
    assert bytes(block.buf) == b"HELLO, !"


def test_a_process_started_by_fork_has_what_its_parent_had_open(
    kind: Kind, closing: Closing
) -> None:
    block = closing(kind.SharedMemory(create=True, size=8))
    pid = os.fork()
    if pid == 0:
        try:
            block.buf[:5] = b"child"
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert bytes(block.buf[:5]) == b"child"
