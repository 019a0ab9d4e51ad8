"""The core's part of snapshots: words copied whole, mappings moved, stores held up meanwhile."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest
from core_tools import is_mapped, private, shared

from memdesc import _core
from memdesc.vm.pages import page_size


def window(memory: _core.MappedMemory) -> memoryview:
    return memoryview(_core.Window(memory, 0, memory.length, True))


@pytest.mark.parametrize("start", range(9))
@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 16, 63, 64, 65, 4000])
@pytest.mark.parametrize("to", [0, 3, 8])
def test_copy_words_copies_any_range(start: int, length: int, to: int) -> None:
    source = window(private())
    source[:] = os.urandom(page_size)
    target = bytearray(length + 20)
    _core.copy_words(memoryview(target)[to : to + length], source[start : start + length])
    assert target == bytes(to) + bytes(source[start : start + length]) + bytes(20 - to)


@pytest.mark.parametrize("start", [0, 1, 8])
@pytest.mark.parametrize("to", [0, 1, 8])
def test_copy_words_copies_large_blocks(start: int, to: int) -> None:
    source = os.urandom(1 << 20)
    target = bytearray(len(source))
    length = len(source) - 71
    _core.copy_words(memoryview(target)[to : to + length], memoryview(source)[start:][:length])
    assert target[to : to + length] == source[start : start + length]
    assert not any(target[to + length :])


def test_copy_words_refuses_other_sizes() -> None:
    with pytest.raises(ValueError):
        _core.copy_words(bytearray(5), b"four")


def test_a_moved_mapping_lies_over_the_other() -> None:
    source, target = shared(4 * page_size), shared(4 * page_size)
    window(source)[:] = b"s" * 4 * page_size
    view = window(target)
    view[:] = b"t" * 4 * page_size
    before = source.address
    _core.move_memory(source, page_size, 2 * page_size, target, page_size)
    assert bytes(view[::page_size]) == b"tsst"
    assert (source.address, source.length) == (before + 3 * page_size, page_size)
    assert not is_mapped(before)
    assert not is_mapped(before + 2 * page_size)
    assert bytes(window(source)[:1]) == b"s"


def test_a_wholly_moved_mapping_is_nobodys() -> None:
    source, target = private(), private()
    at = source.address
    _core.move_memory(source, 0, page_size, target, 0)
    assert source.length == 0
    taken = _core.map_memory(
        at, page_size, 1, _core.MAP_PRIVATE | _core.MAP_ANONYMOUS | _core.MAP_FIXED_NOREPLACE, -1, 0
    )
    del source
    assert is_mapped(taken.address)  # the source did not unmap what came after it


@pytest.mark.parametrize(
    ("at", "length", "to"), [(0, 8192, 0), (4096, 4096, 0), (0, 4096, 4096), (2**40, 1, 0)]
)
def test_a_move_stays_within_its_ranges(at: int, length: int, to: int) -> None:
    source, target = private(), private()
    with pytest.raises(ValueError):
        _core.move_memory(source, at, length, target, to)
    with pytest.raises(ValueError):
        _core.exchange_memory(-1, source, at, length, target, to, length)
    with pytest.raises(ValueError):
        _core.exchange_memory(-1, source, 0, page_size, target, 0, page_size + 1)


def watching(memory: _core.MappedMemory) -> int:
    try:
        return _core.watch_stores(memory.address, memory.length)
    except OSError as error:
        pytest.skip(f"no userfaultfd for stores here: {error.strerror}")


def test_what_can_not_be_watched_is_an_error() -> None:
    memory = shared()
    os.close(watching(memory))
    with pytest.raises(OSError) as caught:
        _core.watch_stores(memory.address + 1, memory.length)
    assert caught.value.errno == errno.EINVAL
    assert (caught.value.strerror or "").startswith("userfaultfd: ")


def test_an_exchange_that_fails_leaves_the_target() -> None:
    source, target = shared(), shared(2 * page_size)
    window(target)[:4] = b"here"
    watch = watching(target)
    with pytest.raises(OSError):
        _core.exchange_memory(watch, source, 0, page_size, target, 1, 4)
    with pytest.raises(OSError):
        _core.exchange_memory(
            watch, shared(2 * page_size), 0, 2 * page_size, shared(2 * page_size), 0, 4
        )
    window(target)[:5] = b"still"  # no longer held up
    os.close(watch)
    assert source.length == page_size


@pytest.mark.slow
def test_no_store_is_lost_while_memory_is_exchanged() -> None:
    size = 4 << 20
    target = shared(size)
    cells = window(target).cast("Q")
    stop = threading.Event()
    counts = [0] * 3

    def store(number: int) -> None:
        count, places = 0, range(number, size // 8, 5003)
        while not stop.is_set():
            count += 1
            for place in places:
                cells[place] = count
        counts[number] = count

    watch = watching(target)
    os.close(watch)
    threads = [threading.Thread(target=store, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            time.sleep(0.01)
            watch = watching(target)
            _core.exchange_memory(watch, shared(size), 0, size, target, 0, size)
            os.close(watch)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for number in range(3):
        assert {cells[place] for place in range(number, size // 8, 5003)} == {counts[number]}
