"""The demo on the screen: live on a terminal, plain lines where it is piped.

All text is ASCII and fits 80 columns; NO_COLOR is rich's to respect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from memdesc.cli.demo_acts import Act, mb, shorten
from memdesc.cli.demo_compare import MOST_ROUNDS, WAYS
from memdesc.cli.printer import Printer
from memdesc.cli.words import harmless


class Screen(Printer):
    """Tells the demo, on stdout or (beside `--json`) on stderr."""

    def begin(self, report: dict[str, Any]) -> None:
        """Tell where it runs."""
        user = "root" if report["user"] == 0 else f"user {report['user']}"
        self._line(
            f"memdesc {report['memdesc']} on Linux {report['kernel']}, Python {report['python']}, "
            f"{report['cores']} cores, as {user}"
        )

    def tell_act(self, number: int, act: Act) -> None:
        """Tell an act."""
        self._line()
        self._line(f"Act {number}  {act.title}", style="bold")
        for sentence in act.happened:
            self._line(sentence, indent=7)
        for sentence in act.denied:
            self._line(f"Denied here: {sentence}", indent=7, style="yellow")
        for claim in act.failed:
            self._line(f"FAILED: {claim}", indent=7, style="bold red")

    def begin_comparison(self, report: dict[str, Any]) -> None:
        """Tell the job."""
        files = report["files"]
        total = sum(one["nbytes"] for one in files)
        found = " found here" if files[0]["chosen"] else ""
        self._line()
        self._line(
            f"One job, three ways: {_count(len(files), 'file')}{found}, {mb(total)}, "
            f"{_count(report['clients'], 'client process', 'es')}",
            style="bold",
        )
        for one in files:
            name = harmless(one["path"])
            self._line(f"{mb(one['nbytes']):>10}  {one['sha256'][:12]}  {name}", indent=7, hang=26)

    @contextmanager
    def working(self, ways: Sequence[str], total: int) -> Iterator[_Bars | _Lines]:
        """Show the work as it goes on."""
        self._line()
        if not self._console.is_terminal:
            yield _Lines(self)
            self._line()
            return
        columns = (
            TextColumn("{task.description:<30}"),
            BarColumn(None),
            TextColumn("{task.fields[state]:<18}"),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            yield _Bars(progress, ways, total)

    def tell_comparison(self, report: dict[str, Any]) -> None:
        """Tell the table, and what its rows mean."""
        ways = [report["ways"][way] for way in WAYS]
        self._line(_row("", ("memdesc", "Pipe", "shared_memory")), style="bold")
        for label, read in _ROWS:
            cells = ["not here" if "unavailable" in way else read(way) for way in ways]
            self._line(_row(label, cells))
        self._line()
        rounds = max(len(way.get("rounds", ())) for way in ways)
        for note in _notes(report, rounds):
            self._line(note, indent=2)

    def end(self, report: dict[str, Any]) -> None:
        """Tell how it ended."""
        self._line()
        left = report["left"]
        seconds = f"{report['seconds']:.1f} s"
        if not report["failed"]:
            self._line(f"All that was claimed held. Left behind: nothing. {seconds}", style="bold")
            return
        self._line(f"DID NOT HOLD ({seconds}):", style="bold red")
        for claim in report["failed"]:
            self._line(claim, indent=2)
        if not left:
            self._line("Left behind: nothing.", indent=2)

    def plain(self, text: str) -> None:
        """Print a line as it is."""
        self._line(text, indent=2)


class _Lines:
    """Progress where no one watches: a line for each turn."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def advance(self, way: str, nbytes: int) -> None:
        """Say nothing yet."""

    def finish_round(self, way: str, number: int, rate: float) -> None:
        """Say how fast the turn was."""
        self._screen.plain(f"round {number}: {WAYS[way]}, {rate:.2f} GB/s")


class _Bars:
    """Progress on a terminal: a bar for each way."""

    def __init__(self, progress: Progress, ways: Sequence[str], total: int) -> None:
        self._progress = progress
        self._total = total
        self._tasks: dict[str, TaskID] = {
            way: progress.add_task(WAYS[way], total=total, state="") for way in ways
        }

    def advance(self, way: str, nbytes: int) -> None:
        """Move the way's bar."""
        self._progress.advance(self._tasks[way], nbytes)

    def finish_round(self, way: str, number: int, rate: float) -> None:
        """Put the bar where the turn ends, and say how fast it was."""
        self._progress.update(
            self._tasks[way],
            completed=self._total * number // MOST_ROUNDS,
            state=f"round {number}: {rate:.2f} GB/s",
        )


def _count(number: int, what: str, ending: str = "s") -> str:
    return f"{number} {what}{'' if number == 1 else ending}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.1 else f"{seconds * 1e3:,.0f} ms"


def _pages(way: dict[str, Any]) -> str:
    pages = way["pages"]
    if pages["same"] is None:
        return "hidden"
    return f"same ({pages['proof']})" if pages["same"] else "no: copies"


def _after_kill(way: dict[str, Any]) -> str:
    killed = way["killed"]
    if killed["left"]:
        return f"{len(killed['left'])} left"
    return "name destroyed" if killed["destroyed"] else "nothing left"


def _others(way: dict[str, Any]) -> str:
    killed = way["killed"]
    right = killed["others"] - len({one.partition(":")[0] for one in killed["others_wrong"]})
    return f"{right} of {killed['others']}"


_ROWS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("first byte at a client", lambda way: _time(way["median"]["first_byte_seconds"])),
    ("  at every client", lambda way: _time(way["median"]["every_client_seconds"])),
    ("work of all clients", lambda way: f"{way['median']['gb_per_second']:.2f} GB/s"),
    ("bytes copied", lambda way: _bytes(way["median"]["bytes_copied"])),
    ("page faults", lambda way: f"{way['median']['page_faults']:,.0f}"),
    ("memory of all processes", lambda way: mb(way["rounds"][-1]["memory"]["total"])),
    (
        "  of it for the job",
        lambda way: mb(way["rounds"][-1]["memory"]["total"] - way["memory_before"]["total"]),
    ),
    ("pages of client, driver", _pages),
    ("kill -9 of one client", _after_kill),
    ("  others, right results", _others),
    ("(filling, before that)", lambda way: _time(way["median"]["fill_seconds"])),
)


def _bytes(nbytes: float) -> str:
    return mb(int(nbytes)) if nbytes else "0"


def _row(label: str, cells: Sequence[str]) -> str:
    return f"  {label:<25}" + "".join(f"{cell:>17}" for cell in cells)


def _notes(report: dict[str, Any], rounds: int) -> Iterator[str]:
    """Say what the table means, and what it could not say."""
    clients = report["clients"]
    medians = f"Medians of {rounds} rounds, in turn." if rounds > 1 else "One round."
    yield (
        f"{medians} The clock runs from when the driver, with all files "
        "in its memory, begins to hand over; every client (half SHA-256, half byte counts) works "
        "through all files and keeps them. All results are checked against the files."
    )
    yield (
        "Copied: after the filling. Faults: ru_minflt of all. Memory: Pss and huge pages of "
        "driver, clients and their helpers, when every client has all files. A buffer's filling "
        "makes its pages; shared_memory makes and fills its own while it hands over."
    )
    ours = report["ways"]["memdesc"]
    last = ours["rounds"][-1]
    yield (
        f"Filling: memdesc read the files by {' and '.join(last['fill_ways'])}, "
        f"{mb(last['fill_bounced'])} of them through the page cache; the others out of the page "
        "cache, where this demo had just read them."
    )
    through = ours["median"]["bytes_through_kernel"]
    yield (
        f"What all {clients + 1} memdesc processes read and wrote meanwhile (rchar, wchar): "
        f"{through / 1e3:,.0f} kB, messages and looks into /proc."
    )
    if ours["pages"]["denied"]:
        stood_in = {"object": "the same object and offset (maps)"}.get(ours["pages"]["proof"], "")
        yield (
            f"Denied here: page frames ({shorten(ours['pages']['denied'])}). "
            f"Stood in: {stood_in or 'nothing'}."
        )
    killed = report["ways"]["shared_memory"].get("killed", {})
    if killed.get("destroyed"):
        yield (
            f"shared_memory: the killed client's resource tracker unlinked "
            f"{len(killed['destroyed'])} of {killed['segments']} segments while the others "
            "were using them: no one can attach any more."
        )
    for way in report["ways"].values():
        if "unavailable" in way:
            yield f"{way['title']} could not run here: {way['unavailable']}."
