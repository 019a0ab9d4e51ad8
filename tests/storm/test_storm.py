"""A thousand SIGKILLs at random moments leave nothing behind (a few, unless MEMDESC_STORM=long)."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

STORM = Path(__file__).with_name("storm.py")


@pytest.mark.slow
@pytest.mark.alone
def test_the_storm_leaves_nothing_behind(capfd):
    long = os.environ.get("MEMDESC_STORM") == "long"
    kills, limit = (1000, 3000) if long else (40, 110)
    with capfd.disabled() if long else nullcontext():
        run = subprocess.run(
            [sys.executable, STORM, "--kills", str(kills)], timeout=limit, check=False
        )
    assert run.returncode == 0
