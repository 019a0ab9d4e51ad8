"""The command `memdesc serve`, as click knows it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from memdesc.memory.page_kinds import PageKind

_PAGES = {
    "auto": PageKind.AUTO,
    "base": PageKind.BASE,
    "transparent": PageKind.TRANSPARENT_HUGE,
    "huge": PageKind.HUGE,
}


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="[NAME=]FILE[:DTYPE[:SHAPE]]...")
@click.option("--name", help="Of the service; by default the first FILE's, without its suffix.")
@click.option(
    "--pages",
    type=click.Choice(list(_PAGES)),
    default="auto",
    show_default=True,
    help="What the memory is made of; `huge` is reserved huge pages.",
)
@click.option("--wired", is_flag=True, help="Keep it resident (counts against `ulimit -l`).")
@click.option("--watch", is_flag=True, help="Reload when a FILE has changed.")
@click.option("--quiet", "-q", is_flag=True, help="Say nothing but errors.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="One JSON object on stdout for each change; told on stderr.",
)
def serve(
    files: tuple[str, ...],
    name: str | None,
    pages: str,
    wired: bool,
    watch: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Load FILEs once, and serve their arrays read-only to any number of processes.

    Takes .npy, .npz, .safetensors, and tables (.arrow, .arrows, .feather); any other FILE is raw
    bytes, or elements of DTYPE in a SHAPE like 8x1080x1920. In Python, md.connect(NAME)["array"]
    is an array, or a table, without copying.

    SIGHUP loads the FILEs anew: what is read then is of the new version, and who has the old one
    keeps it. If that fails the old one is served on. Exit status: 0 when ended by SIGTERM, 130 by
    Ctrl-C, 2 for unusable FILEs, 1 for what else fails.
    """
    from memdesc.cli.serve import Wishes, parse_file, refuse, run
    from memdesc.errors import InvalidArgument

    try:
        sources = [parse_file(text) for text in files]
    except InvalidArgument as error:
        sys.exit(refuse(error, as_json=as_json))
    if name is None:  # of "." too, which is refused as what it is: a directory
        name = Path(os.path.abspath(sources[0].path)).stem or "files"
    screen = None
    if not quiet:
        from memdesc.cli.serve_screen import ServeScreen

        screen = ServeScreen(name, to_stderr=as_json)
    sys.exit(run(Wishes(name, sources, _PAGES[pages], wired, watch), screen, as_json=as_json))
