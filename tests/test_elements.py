"""What an array's elements are is told without NumPy, and NumPy says the same."""

from __future__ import annotations

import errno
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import memdesc as md
from memdesc.mapping import elements_of
from memdesc.mapping.elements import _KNOWN, _known

TEXTS = [order + code for order, code in itertools.product(("", "<", ">", "="), _KNOWN)]


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_known_is_what_numpy_says(text: str) -> None:
    kind = np.dtype(text)
    assert _known(text) == (kind.str, kind.itemsize, kind.alignment)


@pytest.mark.parametrize("text", ["S5", "<U3", "f16", "float32", "?", "M8[ns]", "|i4", "V7", "e"])
def test_numpy_is_asked_about_the_rest(text: str) -> None:
    kind = np.dtype(text)
    assert _known(text) is None
    assert elements_of(text) == (kind.str, kind.itemsize, kind.alignment)


def test_what_is_no_text_is_numpy_s() -> None:
    assert elements_of(np.float32).dtype == "<f4"
    assert elements_of(np.dtype(">u2")) == (">u2", 2, 2)
    assert str(elements_of("f4")) == "<f4"


@pytest.mark.parametrize(
    "dtype", ["f5", "<<f4", "", "nonsense", "O", "f4,f4", "(2,2)f4", "S0", [("a", "f4")], 7]
)
def test_other_elements_are_refused(dtype: object) -> None:
    with pytest.raises(md.InvalidArgument) as caught:
        elements_of(dtype)  # type: ignore[arg-type]
    assert caught.value.errno == errno.EINVAL


@pytest.mark.slow
def test_a_program_that_serves_arrays_loads_no_numpy(tmp_path: Path, runtime_dir: Path) -> None:
    np.save(tmp_path / "table.npy", np.arange(6, dtype="<f4").reshape(2, 3))
    (tmp_path / "raw.bin").write_bytes(bytes(16))
    script = """
import sys
import memdesc as md
sources = ["table.npy", md.files.FileSource("raw.bin", dtype="u2", shape=(2, 4))]
with md.files.FileServer("arrays", sources) as server:
    server.service.share("more", md.BufferMemoryDescriptor(64), dtype="f8")
    print([name for name in ("numpy", "rich", "zipfile") if name in sys.modules])
    with md.connect("arrays") as connection:
        print(connection["table"].sum(), connection["raw"].shape, connection["more"].dtype)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n15.0 (2, 4) float64\n", done.stderr
