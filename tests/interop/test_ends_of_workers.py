"""Workers that keep what they sent themselves, since their first process keeps nothing, and end."""

from __future__ import annotations

import errno
import multiprocessing
import os
import select
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import multiprocessing_children as children
import pytest
from children import start
from puppets import end_holder

import memdesc as md
from memdesc.handover import transit
from memdesc.interop import multiprocessing as handles

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def no_holder() -> Iterator[None]:
    end_holder()
    yield
    assert transit.ways.holder is None, "this process sent nothing"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_worker_that_is_at_its_end_stays_for_who_comes(method: str) -> None:
    """The thread of its queue sends when finalizers run already."""
    context = multiprocessing.get_context(method)
    queue: Any = context.Queue()
    process = context.Process(target=children.put_own, args=(queue,))
    process.start()
    process.join(0.5)
    assert queue.get(timeout=60).read_bytes(0, 6) == b"of his"
    process.join(60)
    assert process.exitcode == 0
    process.close()
    queue.close()


@pytest.mark.slow
def test_an_executor_whose_workers_do_one_task_each() -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        1, mp_context=spawn, initializer=handles.install, max_tasks_per_child=1
    ) as executor:
        futures = [executor.submit(children.make, 10) for _ in range(2)]
        got = [future.result(60) for future in futures]
    assert [array.sum() for array in got] == [45, 45]
    assert all(md.descriptor_of(array) is not None for array in got)


def test_where_nobody_comes_it_goes_and_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    ours, theirs = multiprocessing.Pipe()

    def send() -> None:
        transit._STAYS = 0.05
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: os.write(2, str(message).encode())  # type: ignore[assignment]
        children.put_own(theirs)

    with ours, theirs:
        process = multiprocessing.get_context("fork").Process(target=send)
        process.start()
        process.join(60)
        assert process.exitcode == 0
        process.close()
        with pytest.raises(handles.HandleLostError) as lost:
            ours.recv()
    assert lost.value.errno == errno.ECONNREFUSED
    assert "1 handle(s) of" in capfd.readouterr().err


def test_it_does_not_stay_for_one_who_has_ended() -> None:
    lives, ends = os.pipe()
    ours, theirs = multiprocessing.Pipe()

    def send() -> None:
        transit._STAYS = 3600.0
        children.put_own(theirs)

    def begin() -> None:
        multiprocessing.get_context("fork").Process(target=send).start()
        ours.poll(60)
        os._exit(0)  # without waiting for it

    with ours, theirs:
        pid = start(begin)
        os.close(ends)
        assert select.select([lives], [], [], 60)[0], "the worker stays"
        assert os.read(lives, 1) == b""
        assert os.waitpid(pid, 0)[1] == 0
    os.close(lives)


def test_what_was_forgotten_is_not_stayed_for() -> None:
    ours, theirs = multiprocessing.Pipe()

    def send() -> None:
        transit._STAYS = 3600.0
        children.put_own(theirs)
        handles.forget_in_transit()

    with ours, theirs:
        process = multiprocessing.get_context("fork").Process(target=send)
        process.start()
        process.join(60)
        assert process.exitcode == 0
        process.close()
