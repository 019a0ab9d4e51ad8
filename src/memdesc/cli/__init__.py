"""The command line: `memdesc COMMAND`. Needs the `cli` extra (click, rich)."""
