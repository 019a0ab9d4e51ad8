"""docs/protocol.md has every message, every field and every limit, as they are."""

from __future__ import annotations

import re

import msgspec
import pytest
from protocol_tables import BLOCK, MESSAGES, PAGE, with_tables

from memdesc.services import folder, protocol
from memdesc.services.protocol import calls

TEXT = PAGE.read_text()


def test_its_tables_are_those_of_the_types():
    """If not: python tests/docs/protocol_tables.py"""
    assert with_tables(TEXT) == TEXT


@pytest.mark.parametrize("message", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_message_and_field_is_there(message):
    (section,) = re.findall(rf"^### {message.__name__}\n(.*?)(?=^###? |\Z)", TEXT, re.M | re.S)
    for field in msgspec.structs.fields(message):
        assert f"| `{field.encode_name}` |" in section


def test_every_capability_has_a_block():
    capabilities = {kind.__module__.rpartition(".")[2] for kind in MESSAGES}
    assert capabilities | {"memory"} == set(BLOCK.findall(TEXT))


def test_its_numbers():
    for number in (protocol.MAX_MESSAGE, protocol.MAX_COPY, folder.BACKLOG):
        assert f"{number:,}" in TEXT
    for kind in ("BYTES", "VIEW", "ARRAY", "DESCRIPTOR"):
        assert f"| {getattr(calls, f'EXT_{kind}')} |" in TEXT
