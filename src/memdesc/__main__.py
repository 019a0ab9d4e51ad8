"""`python -m memdesc`: the command line."""

from memdesc.cli import main

if __name__ == "__main__":
    main()
