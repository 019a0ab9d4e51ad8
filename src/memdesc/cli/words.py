"""Words and figures that several screens show. What strangers chose is made harmless here."""

from __future__ import annotations

import json
import os
from typing import Any

from memdesc.errors import MemdescError, TimedOutError
from memdesc.vm.patience import look_at
from memdesc.vm.task import Task

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_INTERPRETERS = ("python", "pypy")


def harmless(text: str, most: int = 0) -> str:
    """Give a stranger's text as it can be shown: on one line, without what moves a cursor.

    What is not ASCII is escaped too: text may run backwards, or look like another. With `most`,
    so many characters at most.
    """
    cut = text[: most or None]
    shown = "".join(
        one if " " <= one <= "~" else one.encode("unicode_escape").decode() for one in cut
    )
    if most and max(len(shown), len(text)) > most:
        shown = shown[: max(most - 2, 1)] + ".."
    return shown


def named(name: str, most: int) -> str:
    """Give a service's name in so many characters; of a path its end, which tells most."""
    shown = harmless(name)
    if "/" in shown and len(shown) > most:
        return ".." + shown[2 - most :]
    return harmless(name, most)


def as_json(report: Any, indent: int | None = 2) -> str:
    """Give a record as JSON; what is no text in it (surrogates of odd names) is escaped."""
    return json.dumps(_texts(report), indent=indent)


def _texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _texts(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_texts(one) for one in value]
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    return value


def amount(nbytes: int | None) -> str:
    """Give bytes to three figures: `8.00 MiB`; exactly below 1 KiB; `-` for None."""
    if nbytes is None:
        return "-"
    value, unit = float(nbytes), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    if not unit:
        return f"{nbytes} B"
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {_UNITS[unit]}"


def short(nbytes: float | None) -> str:
    """Give bytes in at most five characters: `47.5M`, in powers of 1024; `.` for none."""
    if nbytes is None:
        return "-"
    value = float(nbytes)
    for unit in ("", "K", "M", "G", "T", "P"):
        if value < 999.5:
            return "." if not value else f"{value:.{1 if unit and value < 99.95 else 0}f}{unit}"
        value /= 1024
    return f"{value:.0f}E"


def rate(value: float | None) -> str:
    """Give events a second, short: `12`, `3.4k`, `1.2M`; `-` for None, `.` for none."""
    if value is None:
        return "-"
    for unit in ("", "k", "M", "G"):
        if value < 999.5:
            return "." if not value else f"{value:.{0 if value >= 9.95 else 1}f}{unit}"
        value /= 1000
    return f"{value:.0f}T"


def count(number: int, what: str, ending: str = "s") -> str:
    """Give `1 buffer`, `2 buffers`."""
    return f"{number:,} {what}{'' if number == 1 else ending}"


def user(uid: int | None) -> str:
    """Name a user."""
    return "-" if uid is None else "root" if uid == 0 else str(uid)


def program_of(pid: int) -> str:
    """Tell what a process runs: the program's file name, with Python its script's too.

    Empty where it has ended. The process can call itself as it likes.
    """
    try:
        with Task(pid) as task:
            words = _arguments(task) or [os.fsencode(task.name)]
    except MemdescError:
        return ""
    name, *arguments = (os.fsdecode(word) for word in words)
    name = os.path.basename(name)
    if name.startswith(_INTERPRETERS):
        script = _script(arguments)
        name += f" {script}" if script else ""
    return name


def _arguments(task: Task) -> list[bytes]:
    """Give a task's arguments; none where it has none, or does not let them be read.

    They are read out of its memory, whose lock it may keep.
    """
    try:
        path = task.proc_path("cmdline")
        text = look_at(task, f"read {path}", lambda: _beginning(path))
    except (TimedOutError, OSError):
        return []
    words = text.split(b"\0")
    return words if words[0] else []


def _beginning(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read(4096)


def _script(arguments: list[str]) -> str:
    """Give the script, the module or `-c` of an interpreter's arguments."""
    for number, word in enumerate(arguments):
        if word == "-c":
            return word
        if word == "-m":
            return " ".join(arguments[number : number + 2])
        if word in ("-X", "-W"):
            arguments[number + 1 : number + 2] = ["-"]
        elif word and not word.startswith("-"):
            return os.path.basename(word)
    return ""
