"""The thresholds that hold in this process, and where they come from.

In this order; nothing here measures:
1. what this process set by `set_thresholds`, or measured by `calibrate`;
2. `$MEMDESC_CALIBRATION`: values (`inline=8192,mapping=never`), or with a slash in it the path
   of a calibration file;
3. the file `$XDG_CACHE_HOME/memdesc/calibration.json`, else `~/.cache/memdesc/...`;
4. the defaults of `Thresholds`.

A file is JSON: `thresholds`, an object of bytes or null (never); what is not named is the default.
One that was measured has `measured` (when) and `key` (kernel, number of CPUs, version of the
library), and counts only where that key is this machine's. One written by hand needs neither, and
counts anywhere. What can not be used is ignored with a warning in the log, and never an error.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import TYPE_CHECKING, Any

from memdesc.crossing.sizes import Thresholds
from memdesc.errors import InvalidArgument, MemdescError

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger("memdesc.crossing")

VARIABLE = "MEMDESC_CALIBRATION"
_LARGEST_FILE = 64 << 10


class Origin(Enum):
    """Where thresholds come from."""

    DEFAULT = "the defaults, measured on the development machine"
    MEASURED = "measured on this machine"
    BY_HAND = "set by hand"


@dataclass(frozen=True, slots=True)
class Calibration:
    """Thresholds, and where they come from.

    Attributes
    ----------
    thresholds : Thresholds
    origin : Origin
    where : str
        The file or variable, or the call that set them.
    measured : str
        When, as ISO 8601 in UTC; empty if they were not.
    figures : mapping
        What was measured: {way: {bytes: seconds}}, medians. Empty if nothing was.
    """

    thresholds: Thresholds
    origin: Origin
    where: str
    measured: str = ""
    figures: Mapping[str, Mapping[int, float]] = field(default_factory=dict)


_current: Calibration | None = None


def thresholds() -> Thresholds:
    """Give the thresholds that hold in this process now. Measures nothing."""
    return (_current or calibration()).thresholds


def calibration() -> Calibration:
    """Give the thresholds that hold in this process now, with where they come from.

    The variable and the file are read when this is first asked, and again after
    `set_thresholds(None)`. Fork: a child has its parent's.
    """
    global _current
    if _current is None:
        _current = _found()
    return _current


def set_thresholds(given: Thresholds | Calibration | None) -> None:
    """Set the thresholds of this process; None goes back to those of the variable or the file.

    Examples
    --------
    >>> set_thresholds(Thresholds(inline=0))
    >>> thresholds().inline, calibration().origin
    (0, <Origin.BY_HAND: 'set by hand'>)
    >>> set_thresholds(None)
    """
    global _current
    if isinstance(given, Thresholds):
        given = Calibration(given, Origin.BY_HAND, "set_thresholds")
    if given is not None and not isinstance(given, Calibration):
        raise InvalidArgument(
            f"{given!r} are no thresholds: give a Thresholds, or None", errno=errno.EINVAL
        )
    _current = given


def calibration_file() -> Path | None:
    """Give the path of the file that holds, whether it is there or not; None where none can be."""
    from pathlib import Path

    path = _file()
    return None if path is None else Path(path)


def _file() -> str | None:
    told = os.environ.get(VARIABLE, "")
    if "/" in told:
        return told
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(folder):  # such a value is to be ignored: XDG Base Directory
        folder = os.path.expanduser("~/.cache")
    return f"{folder}/memdesc/calibration.json" if os.path.isabs(folder) else None


def save_calibration(found: Calibration) -> Path:
    """Keep a calibration for later processes of this user, and give the file's path.

    The file is replaced as a whole, so a reader finds the old one or the new one; mode 0600.

    Raises
    ------
    MemdescError
        It can not be written (EACCES, EROFS, ENOSPC, …), or there is no home for it (ENOENT).
    """
    import json
    import tempfile

    path = calibration_file()
    if path is None:
        raise MemdescError(
            f"the calibration can not be kept: this user has no home; name a file in ${VARIABLE}",
            errno=errno.ENOENT,
        )
    record = {
        "key": machine_key(),
        "measured": found.measured,
        "thresholds": asdict(found.thresholds),
        "figures": found.figures,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=".calibration-")  # 0600
        try:
            with open(fd, "w") as file:
                json.dump(record, file, indent=1)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise MemdescError(
            f"the calibration can not be kept in {path} ({error.strerror}): name another file in "
            f"${VARIABLE}, or set the thresholds there (inline=…,mapping=…)",
            errno=error.errno,
        ) from error
    return path


def machine_key() -> dict[str, Any]:
    """What a measurement holds for: this kernel, so many CPUs, this version of the library."""
    # By its name: a room does not import the face above it.
    version = sys.modules["memdesc"].__version__
    return {"kernel": os.uname().release, "cpus": os.cpu_count(), "memdesc": version}


def _found() -> Calibration:
    told = os.environ.get(VARIABLE, "")
    if told and "/" not in told:
        try:
            return Calibration(_parse_values(told), Origin.BY_HAND, f"${VARIABLE}")
        except (ValueError, TypeError) as error:  # InvalidArgument is a ValueError
            _ignored(f"${VARIABLE}", error)
    path = _file()
    if path is not None:
        try:
            return _read(path)
        except FileNotFoundError:
            pass  # nothing was measured yet
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            _ignored(path, error)
    return Calibration(Thresholds(), Origin.DEFAULT, "memdesc.crossing.Thresholds")


def _ignored(origin: str, error: Exception) -> None:
    log.warning(
        "calibration.ignored %s: %s", origin, error, extra={"origin": origin, "why": str(error)}
    )


def _parse_values(text: str) -> Thresholds:
    """Read `inline=8192,mapping=never`."""
    values: dict[str, int | None] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals:
            raise InvalidArgument(
                f"{part!r} is not NAME=BYTES or NAME=never, nor a path", errno=errno.EINVAL
            )
        values[name.strip()] = None if value.strip() == "never" else int(value)
    return _made(values)


def _made(values: object) -> Thresholds:
    names = {each.name for each in fields(Thresholds)}
    if not isinstance(values, dict) or not values.keys() <= names:
        raise InvalidArgument(
            f"{values!r} are no thresholds: there are {', '.join(sorted(names))}",
            errno=errno.EINVAL,
        )
    return Thresholds(**values)


def _read(path: str) -> Calibration:
    import json

    # Not blocking: a FIFO is not waited for.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_FILE:
            raise InvalidArgument(
                f"it is no file of at most {_LARGEST_FILE:,} bytes", errno=errno.EINVAL
            )
        if status.st_uid not in (os.geteuid(), 0):
            raise InvalidArgument(f"it belongs to user {status.st_uid}", errno=errno.EINVAL)
        record = json.loads(file.read(_LARGEST_FILE))
    if not isinstance(record, dict) or "thresholds" not in record:
        raise InvalidArgument("it has no `thresholds`", errno=errno.EINVAL)
    found = _made(record["thresholds"])
    measured, key = record.get("measured", ""), record.get("key")
    if not measured:
        return Calibration(found, Origin.BY_HAND, path)
    if key != machine_key():
        raise InvalidArgument(
            f"it was measured on {key}, this is {machine_key()}: measure again", errno=errno.EINVAL
        )
    figures = {
        str(way): {int(size): float(seconds) for size, seconds in by_size.items()}
        for way, by_size in record.get("figures", {}).items()
    }
    return Calibration(found, Origin.MEASURED, path, str(measured), figures)
