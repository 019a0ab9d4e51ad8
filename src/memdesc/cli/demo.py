"""The main job: the acts, then the comparison, as one report."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memdesc import __version__
from memdesc.cli import demo_acts as acts, demo_compare, demo_kernel as kernel
from memdesc.cli.demo_files import UnusableFile, check_files, examine, find_files
from memdesc.cli.demo_processes import ProgramFailed, Programs
from memdesc.cli.demo_screen import Screen
from memdesc.errors import MemdescError
from memdesc.memory.limits import available
from memdesc.services import folder

_MOST_BYTES = 128 << 20
_SECONDS = 18.0  # after so many no further round is begun: all is to end within 30 on two cores


def run(named: Sequence[Path], clients: int, screen: Screen) -> dict[str, Any]:
    """Run the demo; tell it on the screen, and give it as an object that JSON can carry.

    Returns
    -------
    dict
        `memdesc`, `kernel`, `python`, `cores`, `user`: where it ran; `seconds`: how long.

        `acts`: each with `title`, `happened`, `denied` (what the kernel denied, and what stood
        in), `failed`, and its readings.

        `files`: each with `path`, `nbytes`, `sha256`, `chosen` (found here, not named).

        `clients`: of each way. `job`: what is measured, in words.

        `ways`: by name (`memdesc`, `pipe`, `shared_memory`), each with `title` and `unavailable`
        (why it could not run here), or with `nbytes` (the files), `rounds` (`fill_seconds`,
        `fill_ways` (how the files were read) and `fill_bounced` (bytes that went through the page
        cache meanwhile),
        `first_byte_seconds`, `every_client_seconds`, `seconds`, `gb_per_second`, `bytes_copied`
        since the filling,
        `bytes_through_kernel` (rchar + wchar of all, messages included), `page_faults`
        (ru_minflt of all), `memory` (private, shared, file, huge, swapped, total), `wrong`
        results, `driver_met`), their `median`, `memory_before`, `pages` (`same`, `proof`,
        `denied`) and `killed` (after one client was killed midway: `others`, `others_wrong`,
        `segments`, `destroyed`, `driver_met`, `left`). Bytes and seconds.

        `left`: what the demo left behind. `failed`: every claim that did not hold; empty is
        success. A run that was stopped by a failure lacks what it did not come to.

    Raises
    ------
    UnusableFile
        One of `named` can not be used, or there is not memory enough for them.
    """
    begun = time.monotonic()
    paths = check_files(named)
    if paths:
        _check_memory([path.stat().st_size for path in paths], clients)
    fds, names = kernel.own_fds(), kernel.shm_names()
    report: dict[str, Any] = {
        "memdesc": __version__,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "user": os.geteuid(),
    }
    screen.begin(report)
    failed: list[str] = []
    report["failed"] = failed
    try:
        with _swept_folder(), Programs() as programs:
            report["acts"] = _play(programs, screen, failed)
            _compare(report, programs, paths, clients, screen, begun)
    except (MemdescError, ProgramFailed) as error:
        failed.append(f"{type(error).__name__}: {error}")
    report["left"] = _left(fds, names)
    failed += [f"left behind: {one}" for one in report["left"]]
    report["seconds"] = time.monotonic() - begun
    screen.end(report)
    return report


@contextmanager
def _swept_folder() -> Iterator[None]:
    """Fail early where services can not live; sweep what killed drivers have left."""
    folder.open_folder("demo")
    try:
        yield
    finally:
        folder.open_folder("demo")


def _play(programs: Programs, screen: Screen, failed: list[str]) -> list[dict[str, Any]]:
    """Play the acts, telling each as it ends."""
    played: list[dict[str, Any]] = []

    def tell(act: acts.Act) -> None:
        played.append(act.as_json())
        failed.extend(f"act {len(played)}: {claim}" for claim in act.failed)
        screen.tell_act(len(played), act)

    first, stage = acts.act_1(programs)
    tell(first)
    tell(acts.act_2(stage))
    tell(acts.act_3(programs))
    tell(acts.act_4(programs))
    tell(acts.act_5(stage))
    return played


def _compare(
    report: dict[str, Any],
    programs: Programs,
    named: list[Path],
    clients: int,
    screen: Screen,
    begun: float,
) -> None:
    """Compare the three ways on the files."""
    paths = named or find_files(_most_bytes(clients))
    sources = [examine(path) for path in paths]
    total = sum(source.nbytes for source in sources)
    report["files"] = [
        {
            "path": str(source.path),
            "nbytes": source.nbytes,
            "sha256": source.sha256,
            "chosen": not named,
        }
        for source in sources
    ]
    report["clients"] = clients
    report["job"] = (demo_compare.__doc__ or "").partition("\n\n")[2].strip()
    unavailable = _unavailable(total)
    ways = [way for way in demo_compare.WAYS if way not in unavailable]
    screen.begin_comparison(report)
    groups = demo_compare.start(programs, ways, clients)
    with screen.working(ways, total * clients * demo_compare.MOST_ROUNDS) as telling:
        found = demo_compare.compare(groups, sources, telling, begun + _SECONDS)
    report["ways"] = found | {
        way: {"title": demo_compare.WAYS[way], "unavailable": why}
        for way, why in unavailable.items()
    }
    for way in ways:
        report["failed"] += demo_compare.failures(way, found[way])
    screen.tell_comparison(report)


def _most_bytes(clients: int) -> int:
    """How much to look for: what memory and /dev/shm have room for, and the time."""
    most = min(_MOST_BYTES, available().nbytes // (4 * (clients + 2)))
    free = kernel.shm_free() * 9 // 10
    return min(most, free) if free > _MOST_BYTES // 8 else most


def _check_memory(sizes: Sequence[int], clients: int) -> None:
    """Refuse what does not fit: down the pipes every client gets a copy of its own."""
    needed = sum(sizes) * (clients + 2) + max(sizes) * clients
    room = available()
    if needed > room.nbytes:
        raise UnusableFile(
            f"{sum(sizes):,} bytes of files, of which {clients} clients each get a copy by pipe, "
            f"need {needed:,} bytes; {room.limit} leaves {room.nbytes:,}: name smaller files, or "
            "give fewer --clients"
        )


def _unavailable(total: int) -> dict[str, str]:
    """Tell which ways can not run here, and why."""
    free = kernel.shm_free()
    if total + (1 << 20) <= free:
        return {}
    return {
        "shared_memory": f"/dev/shm has {free:,} bytes free, {total:,} are needed: storing past "
        "that is SIGBUS"
    }


def _left(fds: set[str], names: set[str]) -> list[str]:
    """List what this process, or those that it started, have left."""
    runtime = Path(folder.runtime_folder())
    return [
        *(f"file descriptor {one}" for one in sorted(kernel.own_fds() - fds)),
        *(f"{kernel.SHM}/{name}" for name in kernel.abandoned_names(names)),
        *(f"socket {path}" for path in sorted(runtime.glob(f"demo-{os.getpid()}[!0-9]*"))),
        *(f"process {pid}" for pid in kernel.with_descendants([os.getpid()])[1:]),
    ]
