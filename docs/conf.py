"""Sphinx configuration. `make docs` builds with warnings as errors."""

from __future__ import annotations

import tomllib
from pathlib import Path

from sphinx.application import Sphinx

project = "memdesc"
author = "the memdesc authors"
copyright = "the memdesc authors"
_project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
release = version = _project["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["deflist", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"memdesc {release}"

# Too large to be installed for their names.
autodoc_mock_imports = ["torch", "dask", "distributed", "prometheus_client"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_numpy_docstring = True
napoleon_google_docstring = False
napoleon_use_ivar = True


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", split_attributes, priority=400)  # before napoleon's


def split_attributes(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Write `a, b : int` of a section Attributes as two attributes, as napoleon does not."""
    if "Attributes" not in lines:
        return
    start = lines.index("Attributes") + 2
    split = []
    for line in lines[start:]:
        names, colon, kind = line.partition(" : ")
        if not colon or line.startswith(" "):
            split.append(line)
        else:
            split += [f"{one} : {kind}" for one in names.split(", ")]
    lines[start:] = split
