"""Ten thousand clients killed under load: nothing left, nobody disturbed (MEMDESC_STORM=long).

A hundred otherwise.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

STORM = Path(__file__).with_name("client_storm.py")
LONG = os.environ.get("MEMDESC_STORM") == "long"


@pytest.mark.slow
@pytest.mark.timeout(3600 if LONG else 120)
def test_clients_that_are_killed_leave_nothing_and_disturb_nobody(capfd):
    kills, limit = (10_000, 3500) if LONG else (100, 110)
    with capfd.disabled() if LONG else nullcontext():
        run = subprocess.run(
            [sys.executable, STORM, "--kills", str(kills)], timeout=limit, check=False
        )
    assert run.returncode == 0
