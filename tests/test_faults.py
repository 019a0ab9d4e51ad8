"""memdesc.testing.failing: the core's calls fail when told to, and only then."""

import errno
import os
import threading

import pytest

from memdesc import _core
from memdesc.testing import failing
from memdesc.vm.pages import page_size


def _memory() -> _core.MappedMemory:
    return _core.reserve_memory(page_size)


def test_the_first_call_fails_and_the_next_is_the_kernels() -> None:
    memory = _memory()
    real = _core.mprotect
    with failing("mprotect", errno.EACCES) as fault:
        with pytest.raises(OSError) as caught:
            _core.mprotect(memory.address, page_size, _core.PROT_READ)
        _core.mprotect(memory.address, page_size, _core.PROT_READ)
    assert caught.value.errno == errno.EACCES
    assert str(caught.value) == f"[Errno 13] mprotect: {os.strerror(errno.EACCES)}"
    assert (fault.calls, fault.failures) == (2, 1)
    assert _core.mprotect is real


@pytest.mark.parametrize(
    ("after", "times", "expected"),
    [
        (0, 1, "x...."),
        (2, 1, "..x.."),
        (1, 2, ".xx.."),
        (3, None, "...xx"),
        (0, None, "xxxxx"),
        (0, 0, "....."),
        (9, 1, "....."),
    ],
)
def test_after_and_times_choose_the_calls(after: int, times: int | None, expected: str) -> None:
    seen = ""
    with failing("reserve_memory", errno.ENOMEM, after=after, times=times) as fault:
        for _ in range(5):
            try:
                _memory()
                seen += "."
            except OSError:
                seen += "x"
    assert seen == expected
    assert fault.failures == expected.count("x")


def test_nested_faults_of_two_calls_and_of_one() -> None:
    real = _core.munlock
    with failing("mlock", errno.ENOMEM), failing("munlock", errno.EPERM):
        with failing("munlock", errno.EAGAIN):
            with pytest.raises(OSError) as inner:
                _core.munlock(0, 0)
        with pytest.raises(OSError) as outer:
            _core.munlock(0, 0)
        with pytest.raises(OSError) as other:
            _core.mlock(0, 0)
    assert [e.value.errno for e in (inner, outer, other)] == [
        errno.EAGAIN,
        errno.EPERM,
        errno.ENOMEM,
    ]
    assert _core.munlock is real


def test_it_is_put_back_when_the_block_raises() -> None:
    real = _core.mlock
    with pytest.raises(RuntimeError), failing("mlock", errno.ENOMEM):
        raise RuntimeError
    assert _core.mlock is real


def test_threads_share_one_count() -> None:
    failures = []

    def call() -> None:
        for _ in range(200):
            try:
                _core.munlock(0, 0)
            except OSError:
                failures.append(1)

    with failing("munlock", errno.EPERM, after=100, times=50) as fault:
        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (fault.calls, fault.failures, len(failures)) == (800, 50, 50)


@pytest.mark.parametrize("name", ["no_such_call", "Window", "PROT_READ"])
def test_only_functions_of_the_core_can_fail(name: str) -> None:
    with pytest.raises(ValueError), failing(name, errno.EPERM):
        pass


@pytest.mark.parametrize("counts", [{"after": -1}, {"times": -1}])
def test_negative_counts_are_refused(counts: dict[str, int]) -> None:
    with pytest.raises(ValueError), failing("mlock", errno.EPERM, **counts):
        pass
