"""Runs a program with our shared memory in place of the standard library's.

python -m memdesc.interop.shared_memory program.py ARGUMENTS
"""

from __future__ import annotations

import os
import runpy
import sys

from memdesc.interop.shared_memory import install


def main() -> None:
    """Run the program that the command line names, as Python would."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m memdesc.interop.shared_memory program.py ARGUMENTS")
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    install()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
