"""Arrays out of files, loaded once past the page cache, and served to any number of processes.

* `FileServer`     loads files, serves their arrays read-only, and swaps to new versions
* `load`           brings the arrays of files into one descriptor
* `FileSource`     a file, and what to make of it

From below: `sources` (files, checked and watched for change), `formats` (what is in them: `npy`,
`npz`, `safetensors`, `arrow`, raw bytes), `placing` (where each array goes in memory), `loading`,
`serving`.
"""

from memdesc.files.loading import Loaded as Loaded, load as load
from memdesc.files.serving import (
    FileServer as FileServer,
    FileServerStatistics as FileServerStatistics,
)
from memdesc.files.sources import FileSource as FileSource

__all__ = ["FileServer", "FileServerStatistics", "FileSource", "Loaded", "load"]
