"""`memdesc doctor` on the screen: tables that fit 80 columns, plain lines where it is piped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn

from memdesc.cli.printer import Printer

_LABELS = {
    "inline": "in the message, up to",
    "mapping": "mapped and used in place, from",
    "copy_on_write": "copy-on-write, from",
    "copy_by_mapping": "copyin by mapping first, from",
}


class DoctorScreen(Printer):
    """Tells the examination, on stdout or (beside `--json`) on stderr."""

    @contextmanager
    def calibrating(self) -> Iterator[Callable[[float], None]]:
        """Show on a terminal how much was measured."""
        if not self._console.is_terminal:
            yield lambda _: None
            return
        columns = (TextColumn("calibrating"), BarColumn(None))
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task("", total=1.0)
            yield lambda done: progress.update(task, completed=done)

    def tell(self, report: dict[str, Any]) -> None:
        """Tell all of it."""
        user = "root" if report["user"] == 0 else f"user {report['user']}"
        self._line(
            f"memdesc {report['memdesc']} on Linux {report['kernel']}, Python {report['python']}, "
            f"{report['cpus']} CPUs, as {user}"
        )
        self._heading("What this machine and this process allow")
        for feature in report["features"]:
            self._feature(feature)
        self._heading("Limits")
        for limit in report["limits"]:
            self._limit(limit)
        self._heading("How a block crosses")
        self._thresholds(report["thresholds"])
        self._end(report)

    def _heading(self, text: str) -> None:
        self._line()
        self._line(text, style="bold")

    def _feature(self, feature: dict[str, Any]) -> None:
        state, style = "yes", "green"
        if not feature["available"]:
            state, style = ("DENIED", "bold red") if feature["matters"] else ("no", "yellow")
        self._line(
            f"{state:<7} {feature['name']:<18} {feature['why']}", indent=2, hang=29, style=style
        )
        if not feature["available"]:
            self._line(f"needs {feature['needs']}", indent=29)
            self._line(f"remedy: {feature['remedy']}", indent=29)

    def _limit(self, limit: dict[str, Any]) -> None:
        if "setting" in limit:
            text = limit["setting"]
        else:
            text = _amount(limit["value"], limit["unit"])
            if limit["in_use"] is not None:
                text += f", {limit['in_use']:,} in use"
            if limit.get("hard", limit["value"]) != limit["value"]:
                text += f"; can be raised to {_amount(limit['hard'], '').strip()}"
            text += f" ({limit['about']})"
        self._line(f"{limit['name']:<30} {text}", indent=2, hang=33)

    def _thresholds(self, thresholds: dict[str, Any]) -> None:
        for name, label in _LABELS.items():
            value = thresholds["values"][name]
            shown = "never" if value is None else f"{value:,} bytes"
            self._line(f"{label:<30} {shown}", indent=2, hang=33)
        told = {
            "default": "The defaults. To measure this machine: memdesc doctor --calibrate",
            "by_hand": f"Set by hand: {thresholds['where']}",
            "measured": f"Measured {thresholds['measured']}: {thresholds['where']}",
        }
        self._line(told[thresholds["origin"]], indent=2)

    def _end(self, report: dict[str, Any]) -> None:
        self._line()
        if not report["failed"]:
            self._line("All that matters is usable.", style="bold")
            return
        self._line("NOT USABLE HERE:", style="bold red")
        remedies = {one["name"]: one["remedy"] for one in report["features"]}
        for name in report["failed"]:
            why = remedies.get(name, report["calibration_failure"])
            self._line(f"{name}: {why}", indent=2, hang=4)


def _amount(value: int | None, unit: str) -> str:
    return "no limit" if value is None else f"{value:,} {unit}"
