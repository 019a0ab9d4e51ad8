"""`python -m memdesc`: the command line."""

import sys

from memdesc.cli import main

if __name__ == "__main__":
    sys.exit(main())
