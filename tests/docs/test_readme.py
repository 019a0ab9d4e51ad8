"""README's first screen runs, and prints what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.mark.slow
def test_driver_and_client_print_what_the_readme_says(tmp_path):
    text = README.read_text()
    programs = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", text, re.S))
    assert set(programs) == {"driver", "client"}
    said = re.search(r"^\$ python driver\.py & python client\.py\n(.*?)```", text, re.S | re.M)
    for name, program in programs.items():
        (tmp_path / f"{name}.py").write_text(program)
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    driver = subprocess.Popen([sys.executable, tmp_path / "driver.py"], env=environment)
    try:
        client = subprocess.run(
            [sys.executable, tmp_path / "client.py"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert (client.stdout, client.stderr) == (said[1], "")
        assert driver.wait(30) == 0
    finally:
        driver.kill()
        driver.wait()
