"""Arrow tables in memory: read in place by PyArrow, their form checked without it.

* `reading`     the table that lies in some memory
* `validating`  that it holds together
* `messages`    what Arrow's streams and files are made of

What writes tables is `memdesc.interop.arrow`.
"""

ARROW = "arrow"
"""What the content of a share, or of an array's entry, is called that is an Arrow stream or file:
who looks at it by its name gets a table."""
