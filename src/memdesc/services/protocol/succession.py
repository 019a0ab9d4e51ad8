"""How the name of a living service passes to the next."""

from __future__ import annotations

import msgspec

from memdesc.portable import Natural


class TakeOver(msgspec.Struct, frozen=True, tag=True):
    """Client → service: let me serve your name from now on."""

    id: Natural


class HandedOver(msgspec.Struct, frozen=True, tag=True):
    """The answer, with the listening socket. Nobody takes connections from it until `Took`."""

    id: Natural


class Took(msgspec.Struct, frozen=True, tag=True):
    """Client → service: I have what I need; with the answer (Done) the name is mine."""

    id: Natural


class Moved(msgspec.Struct, frozen=True, tag=True):
    """Service → client: another task serves this name now. Instead of Welcome: connect again."""


Message = TakeOver | HandedOver | Took | Moved
Answer = HandedOver
