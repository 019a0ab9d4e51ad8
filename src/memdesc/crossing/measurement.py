"""Measures the thresholds on this machine: about a second, with a helper process.

Each way really crosses: a message asks the helper, which hands a block over, and this process
uses it once. Sizes and ways take turns in rounds, so that what else the machine does meets all of
them, and of the rounds the medians count. A threshold is where the sum over all sizes of the
logarithms of the times is least, if one way is taken below it and the other from it on: one size
that was measured badly can not move it far.
"""

from __future__ import annotations

import errno
import math
import os
import socket as sockets
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from memdesc import _core
from memdesc.crossing import giver
from memdesc.crossing.settings import Calibration, Origin, set_thresholds
from memdesc.crossing.sizes import Thresholds
from memdesc.crossing.ways import Way
from memdesc.errors import (
    AllocationError,
    MemdescError,
    PeerGoneError,
    TaskGoneError,
    TimedOutError,
    UnsupportedError,
    describe_errno,
)
from memdesc.memory.limits import check_available
from memdesc.vm.pages import page_size
from memdesc.vm.task import Task

_KIB, _MIB = 1 << 10, 1 << 20
_SIZES = tuple(_KIB << power for power in range(13))
"""1 KiB to 4 MiB."""

_LARGEST_INLINE = 64 * _KIB
"""Messages hold no more than that beside the rest."""

_SMALLEST_FROZEN = 64 * _KIB
_WARM = (4 * _MIB, 16 * _MIB)
_ROUNDS, _FEWEST, _SECONDS = 31, 7, 1.0
_FREEZING_MARGIN = 1.25
"""A snapshot must save a fifth: the giver's next store to each page costs a fault and a copy."""

_MAPPING_MARGIN = 1.5
"""`copyin` maps only where that saves a third: finding the object costs, too."""

_TIMEOUT = 20
_HELPER = (
    "import sys, socket; sys.path[:] = {path!r}; from memdesc.crossing.giver import serve; "
    "serve(*map(lambda fd: socket.socket(fileno=fd), {fds!r}))"
)

Figures = dict[str, dict[int, float]]
"""Medians in seconds by way and size."""

COPIED, MAPPED = "COPY_WARM", "COPY_BY_MAPPING"
"""Copying into memory that is warm, by the kernel and through a mapping."""


def calibrate(progress: Callable[[float], None] | None = None) -> Calibration:
    """Measure the thresholds on this machine, and let them hold in this process.

    Takes about a second, three where the machine is busy. `save_calibration` keeps the result
    for later processes.

    Parameters
    ----------
    progress : callable, optional
        Is told now and then how much is done, from 0 to 1.

    Returns
    -------
    Calibration
        With the medians in `figures`. Where the kernel does not let this process read its
        child's memory, `mapping`, `copy_on_write` and `copy_by_mapping` are the defaults, and
        `inline` is measured against mapping.

    Raises
    ------
    UnsupportedError
        This program does not know a Python to start the helper with.
    AllocationError
        No room for the 64 MiB that it takes meanwhile (ENOMEM), or no file descriptors (EMFILE).
    PeerGoneError, TimedOutError
        The helper ended, or did not answer in 20 s (ECONNRESET, ETIMEDOUT).

    Notes
    -----
    Linux: one child process, memfds, process_vm_readv of that child. No setting is changed.
    """
    check_available(64 * _MIB, "calibrating")
    try:
        with _helper() as helper:
            figures = _measure(helper, progress or (lambda _: None))
    except TaskGoneError as error:
        raise _explain(error) from error
    except MemdescError:
        raise
    except OSError as error:
        raise _explain(error) from error
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    found = Calibration(judge(figures), Origin.MEASURED, "calibrate", stamp, figures)
    set_thresholds(found)
    return found


def judge(figures: Mapping[str, Mapping[int, float]]) -> Thresholds:
    """Tell the thresholds that the medians say: {way: {bytes: seconds}}. Pure."""
    inline = figures[Way.INLINE.name]
    mapped = figures[Way.MAPPING.name]
    copied = figures.get(Way.PROCESS_VM.name)
    border = border_of(inline, copied or mapped)
    largest = max(size for size in inline if border is None or size < border or size == min(inline))
    if not copied:
        return Thresholds(inline=largest)
    return Thresholds(
        inline=largest,
        mapping=border_of(copied, mapped),
        copy_on_write=border_of(copied, figures[Way.COPY_ON_WRITE.name], margin=_FREEZING_MARGIN),
        copy_by_mapping=border_of(figures[COPIED], figures[MAPPED], margin=_MAPPING_MARGIN),
    )


def border_of(
    below: Mapping[int, float], above: Mapping[int, float], *, margin: float = 1.0
) -> int | None:
    """Find the size from which `above` is the better way, or None where it never is.

    `margin` is how many times faster it must be to count as better.
    """
    sizes = sorted(below.keys() & above.keys())
    gains = [math.log(below[size] / (above[size] * margin)) for size in sizes]
    # Of each size the gain if the border were there; the first of equals, 0 for none at all.
    best, least = None, 0.0
    for index, size in enumerate(sizes):
        gain = sum(gains[index:])
        if gain > least:
            best, least = size, gain
    return best


@dataclass(frozen=True, slots=True)
class _Helper:
    """The helper process, as a task, and the two sockets to it."""

    task: Task
    orders: sockets.socket
    blocks: sockets.socket

    def order(self, kind: int, way: Way, size: int) -> int:
        """Have it do something; give the nanoseconds that it took."""
        return giver.order(self.orders, kind, way, size)


@contextmanager
def _helper() -> Iterator[_Helper]:
    """Start the helper; it ends with the block."""
    import subprocess  # here, as few programs calibrate, and every one imports this module

    if not sys.executable:
        raise UnsupportedError(
            "calibrating needs a helper process, and this program does not know a Python to start "
            "it with: set sys.executable, or set the thresholds by hand (set_thresholds)",
            errno=errno.ENOENT,
        )
    with ExitStack() as stack, ExitStack() as started:
        ours, theirs = [], []
        for _ in range(2):
            here, there = sockets.socketpair(sockets.AF_UNIX)
            ours.append(stack.enter_context(here))
            theirs.append(started.enter_context(there).fileno())
            for option in (sockets.SO_RCVTIMEO, sockets.SO_SNDTIMEO):
                here.setsockopt(sockets.SOL_SOCKET, option, struct.pack("ll", _TIMEOUT, 0))
        command = [sys.executable, "-c", _HELPER.format(path=sys.path, fds=theirs)]
        process = subprocess.Popen(command, pass_fds=theirs, stdin=subprocess.DEVNULL)
        try:
            started.close()
            task = stack.enter_context(Task(process.pid))
            yield _Helper(task, *ours)
        finally:
            process.kill()
            process.wait()


def _explain(error: OSError) -> MemdescError:
    if isinstance(error, BlockingIOError):  # SO_RCVTIMEO
        return TimedOutError(
            f"calibrating: the helper process did not answer in {_TIMEOUT} s",
            errno=errno.ETIMEDOUT,
        )
    if isinstance(error, (ConnectionError, TaskGoneError)):
        return PeerGoneError(
            f"calibrating: the helper process has ended ({error}); see what it wrote on stderr",
            errno=errno.ECONNRESET,
        )
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return AllocationError(
            f"calibrating: {describe_errno(error)}; close files, or raise `ulimit -n`",
            errno=error.errno,
        )
    return MemdescError(f"calibrating: {describe_errno(error)}", errno=error.errno)


@dataclass(frozen=True, slots=True)
class _Trial:
    """One thing that is timed in its rounds, every `stride`-th; `act` gives the nanoseconds."""

    name: str
    size: int
    act: Callable[[], int]
    stride: int = 1


def _measure(helper: _Helper, progress: Callable[[float], None]) -> Figures:
    import statistics

    times: dict[str, dict[int, list[int]]] = {}
    with ExitStack() as kept:
        trials = _trials(helper, kept)
        for trial in trials:  # once before it counts, so that all is warm
            trial.act()
            times.setdefault(trial.name, {})[trial.size] = []
        start = time.monotonic()
        for turn in range(_ROUNDS):
            for trial in trials:
                if turn % trial.stride == 0:
                    times[trial.name][trial.size].append(trial.act())
            spent = (time.monotonic() - start) / _SECONDS
            progress(min(1.0, max(spent, (turn + 1) / _ROUNDS)))
            if spent >= 1 and turn + 1 >= _FEWEST:
                break
    progress(1.0)
    return {
        name: {size: statistics.median(samples) / 1e9 for size, samples in by_size.items()}
        for name, by_size in times.items()
    }


def _trials(helper: _Helper, kept: ExitStack) -> list[_Trial]:
    """Have the blocks made, and say what is to be timed."""
    for size in sorted({*_SIZES, *_WARM}):
        helper.order(giver.PREPARE, Way.MAPPING, size)
    readable = _may_read(helper)
    trials = []
    for size in _SIZES:
        if size <= _LARGEST_INLINE:
            trials.append(_crossing(helper, Way.INLINE, size))
        if readable:
            trials.append(_crossing(helper, Way.PROCESS_VM, size))
        if size >= page_size:
            trials.append(_crossing(helper, Way.MAPPING, size))
        if size >= _SMALLEST_FROZEN:
            trials.append(_crossing(helper, Way.COPY_ON_WRITE, size, 3))
    if readable:
        for size in _WARM:
            trials += _copies_into_warm_memory(helper, size, kept)
    return trials


def _crossing(helper: _Helper, way: Way, size: int, stride: int = 1) -> _Trial:
    def act() -> int:
        if way is Way.COPY_ON_WRITE:
            helper.order(giver.PREPARE, way, size)
        taken = helper.order(giver.HAND_OVER, way, size)
        start = time.perf_counter_ns()
        giver.take(helper.blocks, way, helper.task)
        return taken + time.perf_counter_ns() - start

    return _Trial(way.name, size, act, stride)


def _copies_into_warm_memory(helper: _Helper, size: int, kept: ExitStack) -> list[_Trial]:
    helper.order(giver.HAND_OVER, Way.MAPPING, size)
    fd = giver.take_header(helper.blocks)[2]
    kept.callback(os.close, fd)
    helper.order(giver.HAND_OVER, Way.PROCESS_VM, size)
    address = giver.take_header(helper.blocks)[1]
    room = bytearray(size)

    def copy() -> int:
        start = time.perf_counter_ns()
        _core.process_vm_readv(helper.task.pid, room, address)
        return time.perf_counter_ns() - start

    def copy_by_mapping() -> int:
        start = time.perf_counter_ns()
        _core.copy_memory(room, giver.map_block(fd, size))
        return time.perf_counter_ns() - start

    return [_Trial(COPIED, size, copy, 3), _Trial(MAPPED, size, copy_by_mapping, 3)]


def _may_read(helper: _Helper) -> bool:
    """Whether the kernel lets this process read the helper's memory."""
    helper.order(giver.HAND_OVER, Way.PROCESS_VM, _SIZES[0])
    address = giver.take_header(helper.blocks)[1]
    try:
        _core.process_vm_readv(helper.task.pid, bytearray(1), address)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOSYS):
            return False
        raise
    return True
