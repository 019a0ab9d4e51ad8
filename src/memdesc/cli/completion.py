"""What a shell completes: names of services, and pids of tasks that this user may look at.

Whatever is wrong, a shell in the middle of a line is told nothing of it.
"""

from __future__ import annotations

import os

import click
from click.shell_completion import CompletionItem

from memdesc.cli.words import harmless, program_of


def services(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete the name of a service; nobody is asked."""
    from memdesc.cli.looking import sockets

    return [
        CompletionItem(name)
        for name, _path in sockets()
        if name.startswith(begun) and harmless(name) == name
    ]


def tasks(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete a pid, or the name of a service."""
    return [*pids(context, parameter, begun), *services(context, parameter, begun)]


def pids(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete a pid, with its program beside it where the shell shows that."""
    from memdesc.vm.holders import all_pids

    found = []
    for pid in sorted(all_pids()):
        if str(pid).startswith(begun) and os.access(f"/proc/{pid}/exe", os.F_OK):
            found.append(CompletionItem(str(pid), help=harmless(program_of(pid), 60)))
    return found
