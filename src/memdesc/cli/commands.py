"""The commands, as click knows them.

Each imports what it is made of when it runs: a shell that completes a word starts all of this.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType

import click

from memdesc import __version__
from memdesc.cli import completion
from memdesc.cli.reader_gone import Commands
from memdesc.cli.serve_command import serve
from memdesc.errors import MemdescError


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="memdesc %(version)s")
def memdesc() -> None:
    """Memory descriptors: other processes use the very same pages, without copying."""


@memdesc.command()
@click.argument(
    "files", nargs=-1, type=click.Path(readable=False, path_type=Path), metavar="[FILE]..."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout; told on stderr.")
@click.option(
    "--clients",
    type=click.IntRange(1, 16),
    default=4,
    show_default=True,
    help="Client processes in the comparison.",
)
def demo(files: tuple[Path, ...], as_json: bool, clients: int) -> None:
    """Show the main job on live processes, then compare it with what the library replaces.

    Brings FILEs (or large files that it finds on this machine) into shared buffers. Exit status:
    0 if all that was claimed held, 1 if something did not (it is named), 2 for unusable FILEs.
    """
    from memdesc.cli.demo import run
    from memdesc.cli.demo_files import UnusableFile
    from memdesc.cli.demo_screen import Screen
    from memdesc.cli.words import harmless

    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGHUP, _stop)
    screen = Screen(to_stderr=as_json)
    try:
        report = run(list(files), clients, screen)
    except UnusableFile as error:
        print(f"memdesc demo: {harmless(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("memdesc demo: interrupted; all that it had started was ended", file=sys.stderr)
        sys.exit(130)
    if as_json:
        print(json.dumps(report, indent=2))
    sys.exit(1 if report["failed"] else 0)


@memdesc.command()
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on stdout; the rest on stderr."
)
@click.option(
    "--calibrate", is_flag=True, help="Measure the thresholds anew (about a second); keep them."
)
def doctor(as_json: bool, calibrate: bool) -> None:
    """Tell what this machine and this process allow, and what to do where it is denied.

    Everything is tried, and no setting is changed. Exit status: 0 if all that matters is usable,
    1 if something is not (it is named, with the remedy).
    """
    from memdesc import crossing
    from memdesc.cli.doctor import examine
    from memdesc.cli.doctor_screen import DoctorScreen

    screen = DoctorScreen(to_stderr=as_json)
    failure = ""
    try:
        if calibrate:
            try:
                with screen.calibrating() as progress:
                    found = crossing.calibrate(progress)
                path = crossing.save_calibration(found)
                crossing.set_thresholds(replace(found, where=str(path)))
            except MemdescError as error:
                failure = str(error)
        report = examine(failure)
    except KeyboardInterrupt:
        print("memdesc doctor: interrupted; no setting was changed", file=sys.stderr)
        sys.exit(130)
    screen.tell(report)
    if as_json:
        print(json.dumps(report, indent=2))
    sys.exit(1 if report["failed"] else 0)


@memdesc.command(short_help="List services, their buffers, and who maps them how.")
@click.argument("service", required=False, shell_complete=completion.services)
@click.option("--long", "-l", is_flag=True, help="With buffers, and who maps each how.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, with all of it.")
def ls(service: str | None, long: bool, as_json: bool) -> None:
    """List services, or one SERVICE with its buffers, and who maps them with which access.

    Asks the services of this user (root: of all), and looks at the tasks that this user may look
    at. Nothing is opened, mapped or removed. Exit status: 0; 1 if SERVICE is not there.
    """
    from memdesc.cli.looking import GONE
    from memdesc.cli.ls import gather
    from memdesc.cli.ls_screen import LsScreen
    from memdesc.cli.words import as_json as to_json

    report = gather(service)
    missing = service is not None and report["services"][0]["state"] in GONE
    if as_json:
        print(to_json(report))
    else:
        LsScreen(to_stderr=missing).tell(report, long=long or service is not None)
    sys.exit(1 if missing else 0)


@memdesc.command(short_help="Show what moves in services, live.")
@click.argument("service", required=False, shell_complete=completion.services)
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=2.0,
    show_default=True,
    help="Seconds from one look to the next.",
)
@click.option("--once", is_flag=True, help="One table; its rates are of one interval.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object on a line for each look.")
def top(service: str | None, interval: float, once: bool, as_json: bool) -> None:
    """Show what moves: calls, entries, slots and bytes a second, and memory.

    Of each service, or of one SERVICE. Live on a terminal, where q or Ctrl-C ends it; one table
    where it is piped. Exit status: 0; 1 if SERVICE is not there.
    """
    from memdesc.cli.looking import check_there
    from memdesc.cli.top import Looks
    from memdesc.cli.top_screen import TopScreen
    from memdesc.cli.words import as_json as to_json

    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGHUP, _stop)
    screen = TopScreen(to_stderr=False)
    if service is not None:
        check_there(service)
    with Looks(service) as looks, contextlib.suppress(KeyboardInterrupt):
        if screen.live and not once and not as_json:
            screen.run(looks, interval)
            return
        looks.look()
        while True:
            time.sleep(interval)
            report = looks.look()
            if not as_json:
                screen.tell(report)
            else:
                print(to_json(report, indent=None), flush=True)
            if once or not as_json:
                return


memdesc.add_command(serve)


@memdesc.command("map", short_help="Draw an address space, and who else has what is in it.")
@click.argument("task", metavar="PID|SERVICE", shell_complete=completion.tasks)
@click.option("--all", "whole", is_flag=True, help="Every region in a band of its own.")
@click.option(
    "--svg", type=click.Path(path_type=Path), metavar="FILE", help="Draw it into FILE instead."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object, with every region.")
def map_(task: str, whole: bool, svg: Path | None, as_json: bool) -> None:
    """Draw the address space of PID, or of SERVICE, and who else has what is shared in it.

    The address spaces of other users' tasks are for root. Exit status: 0; 1 if there is no such
    task, or nothing of its address space may be seen (it says what would show it).
    """
    from memdesc.cli.looking import pid_of
    from memdesc.cli.map import gather
    from memdesc.cli.map_screen import MapScreen
    from memdesc.cli.map_svg import draw
    from memdesc.cli.words import as_json as to_json, harmless

    # A service whose name is a number is had by its path.
    pid = click.IntRange(1, 2**31 - 1)(task) if task.isdecimal() else pid_of(task)
    report = gather(pid)
    if svg is not None and report["hidden"] is None:
        try:
            svg.write_text(draw(report, fold=not whole), encoding="ascii")
        except OSError as error:
            print(f"memdesc map: {harmless(str(svg))}: {error.strerror}", file=sys.stderr)
            sys.exit(1)
    if as_json:
        print(to_json(report))
    elif svg is None or report["hidden"] is not None:
        MapScreen(to_stderr=False).tell(report, fold=not whole)
    sys.exit(0 if report["hidden"] is None else 1)


def _stop(number: int, _: FrameType | None) -> None:
    """End by way of every `finally`, as Ctrl-C does."""
    sys.exit(128 + number)
