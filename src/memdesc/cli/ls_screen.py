"""`memdesc ls` on the screen: a line for each service; with its buffers, and who has them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from memdesc.cli.looking import tell_others
from memdesc.cli.printer import Printer
from memdesc.cli.words import amount, count, harmless, named, user

_NUMBERS = ("clients", "shares", "queues", "streams")
STATES = {
    "silent": "does not answer (stopped, or busy?)",
    "denied": "tells its own user and root alone",
    "unknown": "does not say what it has",
    "dead": "dead: no one listens; the next service there sweeps it",
    "missing": "there is no such service",
}


class LsScreen(Printer):
    """Tells the list."""

    def tell(self, report: dict[str, Any], *, long: bool) -> None:
        """Tell all of it; `long`: with buffers."""
        services = report["services"]
        if not services:
            self._line("No services.")
        elif any(one["state"] == "serving" for one in services) and not long:
            self._head()
        for number, one in enumerate(services):
            if long and one["state"] == "serving":
                if number:
                    self._line()
                self._service(one)
            else:
                self._row(one, report["others"])
        self._no_service(report["buffers"], long=long)
        for one in report["in_transit"]:
            self._in_transit(one)
        if long and report["hidden_tasks"]:
            self._line(hidden(report["hidden_tasks"], report["hidden_pids"]), style="yellow")
        if report["held_up_pids"]:
            self._line(held_up(report["held_up_pids"]), style="yellow")

    # -- services --------------------------------------------------------------------------------

    def _columns(self) -> tuple[int, int]:
        """Give the widths of name and program, which share what the others leave."""
        left = self._width - (9 + 7 + 1 + 8 * len(_NUMBERS))
        name = max(left * 4 // 9, 10)
        return name, max(left - name, 10)

    def _head(self) -> None:
        name, program = self._columns()
        head = "".join(f"{one:>8}" for one in _NUMBERS)
        self._plain(
            f"{'service':<{name}} {'pid':>8} {'user':<6} {'program':<{program}}{head}", "bold"
        )

    def _row(self, one: dict[str, Any], others: Sequence[str]) -> None:
        name, program = self._columns()
        if one["state"] != "serving":
            who = "" if one["pid"] is None else f" (task {one['pid']}, {_program(one, 30)})"
            there = f"; {tell_others(others)}" if others else ""
            self._line(
                f"{harmless(one['name'], 60)}{who}: {STATES[one['state']]}{there}",
                hang=4,
                style="yellow",
            )
            return
        numbers = "".join(f"{one[key]:>8,}" for key in _NUMBERS)
        pid = "-" if one["pid"] is None else one["pid"]
        self._plain(
            f"{named(one['name'], name):<{name}} {pid:>8} {user(one['user']):<6} "
            f"{_program(one, program):<{program}}{numbers}"
        )

    def _service(self, one: dict[str, Any]) -> None:
        moved = ", superseded" if one["superseded"] else ""
        self._line(
            f"{harmless(one['name'], 60)}: task {one['pid']}, {_program(one, 40)}, user "
            f"{user(one['user'])}{moved}",
            hang=4,
            style="bold",
        )
        told = [count(one[key], key[:-1]) for key in (*_NUMBERS, "methods", "calls")]
        self._line(", ".join(told), indent=2)
        for client in one["connected"]:
            more = "" if not client["calls"] else f", {count(client['calls'], 'call')} in flight"
            self._line(
                f"client {client['pid']}  {_program(client, 40)}, user {user(client['user'])}"
                + more,
                indent=2,
                hang=4,
            )
        for buffer in one["buffers"]:
            self._buffer(buffer, one["pid"])

    # -- buffers ---------------------------------------------------------------------------------

    def _buffer(self, buffer: dict[str, Any], owner: int | None) -> None:
        facts = [f"{buffer['kind']} {harmless(buffer['name'], 40)}"]
        nbytes = buffer["nbytes"]
        if nbytes is None and buffer["objects"]:
            nbytes = buffer["objects"][0]["nbytes"]
        if nbytes is not None:
            facts.append(amount(nbytes))
        facts += _facts(buffer)
        if buffer["kind"] != "queue":  # of which each client has its own
            facts += _made_of(buffer["objects"])
        self._line(", ".join(facts), indent=2, hang=4)
        for object_ in buffer["objects"]:
            for holder in object_["holders"]:
                self._holder(holder, owner, object_["nbytes"])

    def _holder(self, one: dict[str, Any], owner: int | None, nbytes: int | None) -> None:
        facts = [one["access"] or "open, not mapped"]
        if nbytes is not None and 0 < one["mapped"] < nbytes:
            facts.append(f"{amount(one['mapped'])} of it")
        if one["wired"]:
            facts.append(f"wires {amount(one['wired'])}")
        if one["pid"] == owner:
            facts.append("the service")
        room = max(self._width - 58, 14)
        self._plain(f"    {one['pid']:>8}  {_program(one, room):<{room}}  {', '.join(facts)}")

    def _no_service(self, buffers: Sequence[dict[str, Any]], *, long: bool) -> None:
        if not buffers:
            return
        total = sum(one["nbytes"] or 0 for one in buffers)
        told = f"{count(len(buffers), 'buffer')} of no service, {amount(total)}"
        if not long:
            self._line(f"{told}: --long lists them.")
            return
        self._line()
        self._line(f"{told}:", style="bold")
        for one in buffers:
            self._buffer(one, None)

    def _in_transit(self, one: dict[str, Any]) -> None:
        """Tell of what one process keeps for receivers of multiprocessing, if it does."""
        if one["handles"]:
            allowed = "" if one["limit"] is None else f" of {amount(one['limit'])}"
            self._line(
                f"On their way with task {one['pid']} ({_program(one, 40)}): "
                f"{count(one['handles'], 'handle')}, {count(one['objects'], 'object')}, "
                f"{amount(one['nbytes'])}{allowed}",
                hang=4,
            )

    def _plain(self, text: str, style: str = "") -> None:
        """Print a row as it is."""
        self._row_of(text[: self._width].rstrip(), style)


def _facts(buffer: dict[str, Any]) -> list[str]:
    """Say what the service tells of a buffer."""
    kind = buffer["kind"]
    if kind == "share":
        how = buffer["access"]
        if how == "read-only":
            how += ", sealed" if buffer["enforced"] else ", by courtesy"
        return [how, *(["with a rule of its own"] if buffer["ruled"] else [])]
    if kind == "stream":
        return [f"{buffer['slots']:,} slots", f"{buffer['published']:,} published"]
    if kind == "subscriber":
        return [
            f"client {buffer['client'] or '-'}",
            harmless(buffer["policy"], 20),
            f"{buffer['offered']:,} offered",
            f"{buffer['dropped']:,} dropped",
            f"{buffer['held']:,} held",
        ]
    if kind == "queue":
        to = "to each client" if buffer["direction"] == "out" else "from each client"
        return [to, *(["wired"] if buffer["wired"] else [])]
    if kind == "queue end":
        return [
            f"client {buffer['client']}",
            f"{buffer['entries']:,} entries",
            f"{buffer['dropped']:,} dropped",
        ]
    return [] if buffer["ours"] else ["perhaps another program's"]


def _made_of(objects: Sequence[dict[str, Any]]) -> list[str]:
    """Say what the kernel shows of its pages."""
    kinds = sorted({one["pages"] for one in objects if one["pages"]})
    if not kinds:
        return ["its memory is not seen from here"]
    told = [f"{' and '.join(kinds)} pages"]
    for what in ("huge", "wired"):
        if (nbytes := sum(one[what] for one in objects)) and what not in kinds:
            told.append(f"{amount(nbytes)} {what}")
    return told


def hidden(tasks: int, pids: Sequence[int] = ()) -> str:
    """Say that some tasks could not be looked at, which, and what shows them."""
    remedy = "run as root to see more" if os.geteuid() else "this root may not trace all"
    return f"{count(tasks, 'task')}{_which(pids)} can not be looked at from here: {remedy}."


def held_up(pids: Sequence[int]) -> str:
    """Say that some tasks hold up whoever looks at them, and which."""
    return f"{count(len(pids), 'task')}{_which(pids)} held up the look at what they have: left out."


def _which(pids: Sequence[int]) -> str:
    if not pids:
        return ""
    return f" ({', '.join(map(str, pids[:8]))}{', ...' if len(pids) > 8 else ''})"


def _program(one: dict[str, Any], most: int) -> str:
    return harmless(one["program"], most) or "-"
