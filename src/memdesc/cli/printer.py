"""How every command writes: ASCII, at most 100 columns; plain where piped, NO_COLOR respected."""

from __future__ import annotations

import textwrap

from rich.console import Console
from rich.text import Text

_WIDEST = 100


class _Console(Console):
    """Leaves it to `commands` what happens when whoever read has gone: the same for all."""

    def on_broken_pipe(self) -> None:
        """Let the error through that rich is handling."""
        raise  # noqa: PLE0704


class Printer:
    """Writes paragraphs to stdout, or to stderr (beside `--json`)."""

    def __init__(self, *, to_stderr: bool) -> None:
        self._console = _Console(stderr=to_stderr, highlight=False, markup=False, emoji=False)
        self._width = min(self._console.width, _WIDEST)

    def _line(self, text: str = "", *, indent: int = 0, hang: int = 0, style: str = "") -> None:
        """Print a paragraph, wrapped to the width."""
        wrapped = textwrap.wrap(
            text,
            self._width,
            initial_indent=" " * indent,
            subsequent_indent=" " * (hang or indent),
            break_on_hyphens=False,
        )
        self._row_of("\n".join(wrapped), style)

    def _row_of(self, text: str, style: str = "") -> None:
        """Print lines as they are."""
        # Surrogates of odd file names can not be printed.
        whole = text.encode(errors="backslashreplace").decode()
        self._console.print(Text(whole, style=style), soft_wrap=True)
