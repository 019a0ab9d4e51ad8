"""CPython's own tests of multiprocessing.shared_memory, run on ours by the switch."""

import re
from pathlib import Path

import pytest
from shm_both import left_in, run_python

PROGRAM = """
import multiprocessing.managers, sys, unittest
import memdesc.interop.shared_memory as ours
ours.install()
try:
    from test import _test_multiprocessing as theirs
except ImportError as error:
    sys.exit(f"no tests: {error}")
ours.ShareableList._get_packing_format = ours.ShareableList._form  # they look into the list

class Tests(theirs._TestSharedMemory, unittest.TestCase):
    TYPE = "processes"
    Process = multiprocessing.get_context("fork").Process

    # These patch a private function that chooses names, or look at what the tracker prints.
    test_shared_memory_basics = test_shared_memory_recreate = None
    test_shared_memory_cleaned_after_process_termination = None
    test_shared_memory_tracking = test_shared_memory_untracking = None
    test_shared_memory_name_with_embedded_null = None

assert theirs.shared_memory.SharedMemory is ours.SharedMemory
unittest.main(argv=["tests"])
"""


@pytest.mark.slow
def test_the_tests_of_cpython_pass(runtime_dir: Path) -> None:
    ended = run_python(PROGRAM, timeout=100)
    if "no tests: " in ended.stderr:
        pytest.skip(f"this Python came without its own tests: {ended.stderr.strip()}")
    assert ended.returncode == 0, ended.stderr
    ran = re.search(r"Ran (\d+) tests", ended.stderr)
    assert ran is not None and int(ran[1]) >= 9, ended.stderr
    assert left_in(runtime_dir) == []
