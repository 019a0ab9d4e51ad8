"""Interrupts at every place where the interpreter looks for signals, one run for each."""

from __future__ import annotations

import dis
import functools
import os
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import pytest

import memdesc

_SOURCE = os.path.dirname(memdesc.__file__)
_LOOKS = {"CALL", "CALL_KW", "CALL_FUNCTION_EX", "RESUME", "JUMP_BACKWARD"}
"""Instructions after which CPython runs signal handlers."""
_OUT = memdesc.Direction.OUT
_names: dict[CodeType, dict[int, str]] = {}


class _Strike:
    """A trace function that raises KeyboardInterrupt at the n-th look for signals."""

    def __init__(self, number: int) -> None:
        self.left = number
        self._last: dict[FrameType, str] = {}

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_back is not None:
            self._last[frame.f_back] = ""  # a call of Python code: the look is at its head
        if not frame.f_code.co_filename.startswith(_SOURCE):
            return None
        frame.f_trace_opcodes = True
        # The head of a finalizer is left out: nothing written in Python survives a strike there.
        self._last[frame] = "" if frame.f_code.co_name == "__del__" else "RESUME"
        return self._step

    def _step(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "opcode":
            code = frame.f_code
            if code not in _names:
                _names[code] = {step.offset: step.opname for step in dis.get_instructions(code)}
            last, self._last[frame] = self._last.get(frame), _names[code].get(frame.f_lasti, "")
            if last in _LOOKS:
                self.left -= 1
                if self.left == 0:
                    self._stop(frame)
                    raise KeyboardInterrupt
        elif event == "return":
            self._last.pop(frame, None)
        return self._step

    def _stop(self, frame: FrameType | None) -> None:
        sys.settrace(None)
        self._last.clear()
        while frame is not None:
            frame.f_trace = None
            frame = frame.f_back


def interrupted(prepare: Callable[[], Callable[[], object]]) -> Iterator[int]:
    """Do what `prepare` gives, interrupted at the first look, at the second, ... until it is done.

    Gives the number of each, so that the caller sees what is left. Skips the test where the
    interpreter does not tell of instructions in a frame that asks for them when it is called.
    """
    if not _tells_of_instructions():
        pytest.skip("this interpreter traces no instructions of functions that are called")
    yield from _interrupted(prepare)


@functools.cache
def _tells_of_instructions() -> bool:
    strikes = _interrupted(lambda: lambda: memdesc.MemoryDescriptor.with_buffer(b"x", _OUT))
    return sum(1 for _ in strikes) > 3


def _interrupted(prepare: Callable[[], Callable[[], object]]) -> Iterator[int]:
    number = 0
    while True:
        number += 1
        work, strike = prepare(), _Strike(number)
        sys.settrace(strike)
        try:
            work()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        if strike.left > 0:
            return
        del work
        yield number
