"""Whether an error that was handled holds anything: nothing may wait for the collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

from puppets import wait_until


class DidNotFail(AssertionError):
    """What was to fail did not."""


class Local:
    """What a function that fails has."""


@contextmanager
def no_collector() -> Iterator[None]:
    """Leave to the collector what is garbage, so that it can be told."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def lets_go(action: Callable[[], object], *kinds: type[BaseException], within: float = 5) -> bool:
    """Have it fail; tell whether its caller's variables go with the error, and all else too."""
    gc.collect()  # what a test left that failed goes when it likes
    seen = []

    def program() -> None:
        local = Local()
        seen.append(weakref.ref(local))
        action()

    failed = False
    try:
        program()
    except kinds:
        failed = True
    if not failed:
        raise DidNotFail(f"it did not raise {kinds}")
    return _is_gone(seen, within)


async def lets_go_async(action: Callable[[], Awaitable[object]], *kinds: type[Exception]) -> bool:
    """As `lets_go`, of a coroutine. It is awaited twice: here, and as a task, which keeps it."""
    import asyncio

    seen = []

    async def program() -> None:
        local = Local()
        seen.append(weakref.ref(local))
        await action()

    failed = 0
    try:
        await program()
    except kinds:
        failed += 1
    task = asyncio.create_task(program())
    try:
        await task
    except kinds:
        failed += 1
    del task
    if failed < 2:
        raise DidNotFail(f"it did not raise {kinds}")
    await asyncio.sleep(0)  # what the loop had to do with the task is done
    return _is_gone(seen)


def _is_gone(seen: list[weakref.ref[Local]], within: float = 5) -> bool:
    """Whether it goes by itself, soon: another thread may be on its way out of a function."""
    if _kept_errors():
        return False
    with suppress(AssertionError):
        wait_until(lambda: all(one() is None for one in seen), timeout=within)
    return all(one() is None for one in seen)


def _kept_errors() -> int:
    """Count, and collect, errors that only the collector finds."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    found = sum(isinstance(one, BaseException) for one in gc.garbage)
    gc.garbage.clear()
    gc.collect()
    return found
