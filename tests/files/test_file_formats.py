"""What is in files is found; what they say falsely of themselves is refused before it costs."""

from __future__ import annotations

import errno
import io
import struct
import tempfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_files import DTYPES, check_same, loaded, old, refused, safetensors, with_header
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as npst
from numpy.lib import format as npy_format

import memdesc as md
from memdesc import files

SHAPES = npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
ARRAYS = npst.arrays(npst.scalar_dtypes(), SHAPES)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=20)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="md-") as name:
        yield Path(name)


@settings(max_examples=30, deadline=None)
@given(
    array=ARRAYS,
    version=st.sampled_from([(1, 0), (2, 0), (3, 0)]),
    order=st.sampled_from(["C", "F"]),
)
def test_npy_of_every_version(
    folder: Path, array: np.ndarray, version: tuple[int, int], order: str
) -> None:
    array = np.asarray(array, order=order)
    with (folder / "one.npy").open("wb") as file:
        npy_format.write_array(file, array, version)
    (found,) = loaded(old(folder / "one.npy")).values()
    check_same(found, array)
    assert found.flags.f_contiguous == array.flags.f_contiguous


@settings(max_examples=15, deadline=None)
@given(arrays=st.dictionaries(NAMES, ARRAYS, min_size=1, max_size=4), packed=st.booleans())
def test_npz_stored_and_deflated(folder: Path, arrays: dict[str, np.ndarray], packed: bool) -> None:
    names = {f"a{number}": one for number, one in enumerate(arrays.values())}
    (np.savez_compressed if packed else np.savez)(folder / "one.npz", **names)
    found = loaded(old(folder / "one.npz"))
    assert list(found) == list(names)
    for name, array in names.items():
        check_same(found[name], array)


@settings(max_examples=30, deadline=None)
@given(
    tensors=st.dictionaries(
        NAMES.filter(lambda name: name != "*"),
        st.sampled_from(sorted(DTYPES)).flatmap(
            lambda kind: st.tuples(st.just(kind), npst.arrays(DTYPES[kind], SHAPES))
        ),
        min_size=1,
        max_size=5,
    )
)
def test_safetensors(folder: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    (folder / "one.safetensors").write_bytes(safetensors(tensors, made_by="a test"))
    found = files.load(old(folder / "one.safetensors"))
    arrays = found.arrays()
    assert set(arrays) == set(tensors)
    for name, (_, tensor) in tensors.items():
        check_same(arrays[name], tensor)
        assert arrays[name].flags.aligned
        assert not arrays[name].flags.writeable


def test_dtypes_that_numpy_has_not_come_as_integers(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "b": ("BF16", np.arange(6, dtype="<u2").reshape(2, 3)),
        "f": ("F8_E4M3", np.arange(5, dtype="u1")),
    }
    path.write_bytes(safetensors(tensors))
    found = files.load(path).arrays()
    check_same(found["b"], tensors["b"][1])
    assert [(one.stored_as, one.dtype) for one in found.entries] == [
        ("BF16", "<u2"),
        ("F8_E4M3", "|u1"),
    ]


def test_an_entry_of_an_archive_that_is_no_array_is_bytes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("notes.txt", b"hello")
        archive.writestr("folder/", b"")
        archive.writestr("empty", b"")
    found = loaded(tmp_path / "a.npz")
    assert {name: array.tobytes() for name, array in found.items()} == {
        "notes.txt": b"hello",
        "empty": b"",
    }


def test_raw_files(tmp_path: Path) -> None:
    path = tmp_path / "frames.bin"
    path.write_bytes(bytes(range(24)))
    assert loaded(path)["frames"].tobytes() == bytes(range(24))
    source = files.FileSource(path, "x", "<u2", (3, 4))
    check_same(loaded(source)["x"], np.frombuffer(bytes(range(24)), "<u2").reshape(3, 4))
    assert loaded(files.FileSource(path, dtype="f8"))["frames"].shape == (3,)
    for dtype, shape, number in [
        ("<u2", (3, 5), errno.EBADMSG),
        ("V5", None, errno.EBADMSG),
        ("O", None, errno.EINVAL),
        ("i4,f4", None, errno.EINVAL),
        ("nonsense", None, errno.EINVAL),
    ]:
        with pytest.raises(md.InvalidArgument) as caught:
            files.load(files.FileSource(path, dtype=dtype, shape=shape))
        assert caught.value.errno == number
    with pytest.raises(md.InvalidArgument):
        files.FileSource(path, shape=(24,))


# -- hostile ---------------------------------------------------------------------------------------


def refuse_all(path: Path, contents: dict[str, bytes]) -> None:
    for what, content in contents.items():
        try:
            told = refused(path, content)
        except BaseException as error:
            error.add_note(what)
            raise
        assert "offset" in told, what


def npy(header: bytes, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    length = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + length + header + data


def described(dtype: str = "'<f8'", shape: str = "(2,)", order: str = "False") -> bytes:
    return f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()


HOSTILE_NPY = {
    "no magic": b"rubbish that is long enough",
    "shorter than its magic": b"\x93NUM",
    "ends in the header's length": b"\x93NUMPY\1\0\1",
    "ends in the header": npy(described(), b"")[:-5],
    "of version 4": npy(described(), bytes(16), (4, 0)),
    "a header of 4 GiB": b"\x93NUMPY\2\0" + struct.pack("<I", 2**32 - 1) + b" " * 100,
    "a header without end": npy(b"{" * 9000, bytes(16)),
    "a header that nests": npy(b"(" * 9000 + b")" * 9000, bytes(16)),
    "a header that computes": npy(described(shape="(2**2,)"), bytes(32)),
    "no dict": npy(b"[1, 2]", bytes(16)),
    "a field too many": npy(described()[:-4] + b", 'x': 1}", bytes(16)),
    "fewer bytes than it says": npy(described(), bytes(15)),
    "more bytes than it says": npy(described(), bytes(17)),
    "objects": npy(described("'O'"), bytes(16)),
    "fields": npy(described("[('a', '<f8')]"), bytes(16)),
    "fields in a word": npy(described("'i4,i4'"), bytes(16)),
    "an array as element": npy(described("'(2,)f8'"), bytes(32)),
    "no dtype": npy(described("'<q9'"), bytes(16)),
    "a dtype of no size": npy(described("'S0'"), b""),
    "a negative extent": npy(described(shape="(-2,)"), bytes(16)),
    "an extent that is a bool": npy(described(shape="(True, 2)"), bytes(16)),
    "a shape that is a list": npy(described(shape="[2]"), bytes(16)),
    "more than all memory": npy(described(shape=f"({1 << 62},)"), bytes(16)),
    "more than can be counted": npy(described(shape=f"({1 << 62}, {1 << 62}, 4)"), bytes(16)),
    "empty, and too large": npy(described(shape=f"(0, {1 << 62}, 16)"), b""),
    "too many dimensions": npy(described(shape="(" + "1, " * 70 + ")"), bytes(8)),
    "an order that is a number": npy(described(order="3"), bytes(16)),
}


def test_hostile_npy(tmp_path: Path) -> None:
    refuse_all(tmp_path / "bad.npy", HOSTILE_NPY)


def tensor(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LARGE = 1 << 62
HOSTILE_SAFETENSORS = {
    "shorter than the length": b"\1\2\3",
    "a header of more than the file": struct.pack("<Q", 100) + b"{}",
    "a header of 2**63": struct.pack("<Q", 1 << 63) + b"{}",
    "a header above the limit": struct.pack("<Q", 100_000_001) + b"{}",
    "no UTF-8": with_header(b'{"\xff": 1}'),
    "UTF-16": with_header('{"a": 1}'.encode("utf-16")),
    "no JSON": with_header(b"{nothing}"),
    "spaces before": with_header(b' {"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'),
    "no object": with_header([1]),
    "nested without end": with_header(b'{"a":' * 20000),
    "nothing in it": with_header({}),
    "a number of a thousand digits": with_header(b'{"a": ' + b"9" * 5000 + b"}"),
    "metadata of numbers": with_header({"__metadata__": {"a": 1}, "x": tensor()}, bytes(8)),
    "a name twice": with_header(
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},'
        b'"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
        b"1",
    ),
    "a tensor that is none": with_header({"a": 3}),
    "no shape": with_header({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "a shape of floats": with_header({"a": tensor(shape=[2.0])}, bytes(8)),
    "a shape of bools": with_header({"a": tensor(shape=[True, 2])}, bytes(8)),
    "a negative extent": with_header({"a": tensor(shape=[-2])}, bytes(8)),
    "three offsets": with_header({"a": tensor(offsets=[0, 4, 8])}, bytes(8)),
    "offsets backwards": with_header({"a": tensor(offsets=[8, 0])}, bytes(8)),
    "behind the end": with_header({"a": tensor(offsets=[8, 16])}, bytes(8)),
    "an unknown dtype": with_header({"a": tensor("F128")}, bytes(8)),
    "half bytes": with_header({"a": tensor("F4", [16])}, bytes(8)),
    "a size that is not its shape's": with_header({"a": tensor(shape=[3])}, bytes(8)),
    "a million dimensions": with_header({"a": tensor(shape=[LARGE] * 1_000_000)}, bytes(8)),
    "a shape that overflows": with_header({"a": tensor(shape=[LARGE, 4])}, bytes(8)),
    "overlapping": with_header({"a": tensor(), "b": tensor(offsets=(4, 12))}, bytes(12)),
    "a hole": with_header({"a": tensor(), "b": tensor(offsets=(9, 17))}, bytes(17)),
    "a hole at first": with_header({"a": tensor(offsets=(1, 9))}, bytes(9)),
    "bytes behind": with_header({"a": tensor()}, bytes(9)),
    "bytes missing": with_header({"a": tensor()}, bytes(7)),
    "a name too long": with_header({"a" * 1025: tensor()}, bytes(8)),
    "a name that is no text": with_header(b'{"\\ud800": {"dtype": "U8", "shape": [1], '
    b'"data_offsets": [0, 1]}}', b"1"),
}  # fmt: skip


def test_hostile_safetensors(tmp_path: Path) -> None:
    refuse_all(tmp_path / "bad.safetensors", HOSTILE_SAFETENSORS)


def archive(*entries: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as made:
        for name, data in entries:
            made.writestr(name, data)
    return out.getvalue()


GOOD = npy(described(), bytes(16))


def patched(content: bytes, field: int, value: int, *, size: int = 4, nth: int = 0) -> bytes:
    """An archive with a number in its n-th directory entry replaced, by APPNOTE's 4.3.12."""
    at = -1
    for _ in range(nth + 1):
        at = content.index(b"PK\1\2", at + 1)
    return content[: at + field] + value.to_bytes(size, "little") + content[at + field + size :]


FLAGS, METHOD, PACKED, SIZE, START = 8, 10, 20, 24, 42
BOMB = archive(("a.npy", npy(described(shape="(1024, 1024)"), bytes(8 << 20))), method=8)
HOSTILE_NPZ = {
    "no archive": b"PK\3\4" + bytes(100),
    "cut": archive(("a.npy", GOOD))[:-10],
    "nothing in it": archive(),
    "an entry past the end": patched(archive(("a.npy", GOOD)), START, 1 << 30),
    "an entry that is not there": patched(archive(("a.npy", GOOD)), START, 3),
    "packed larger than the file": patched(archive(("a.npy", GOOD)), PACKED, 1 << 30),
    "stored, but grows": patched(archive(("a.npy", GOOD)), SIZE, 1 << 31),
    "stored, but shrinks": patched(archive(("a.npy", GOOD)), SIZE, 10),
    "a bomb's claim": patched(BOMB, SIZE, 0xFFFF_FFF0),
    "deflated to more than it says": patched(BOMB, SIZE, 1000),
    "two entries in one place": patched(archive(("a.npy", GOOD), ("b.npy", GOOD)), START, 0, nth=1),
    "an entry without a name": archive(("a.npy", GOOD)).replace(b"a.npy", b"\0.npy"),
    "encrypted": patched(archive(("a.npy", GOOD)), FLAGS, 1, size=2),
    "another method": archive(("a.npy", GOOD), method=zipfile.ZIP_BZIP2),
    "a .npy that is none": archive(("a.npy", b"rubbish")),
    "a .npy that ends": archive(("a.npy", GOOD[:20])),
    "a .npy with bytes behind": archive(("a.npy", GOOD + b"x")),
    "a deflated .npy that ends": archive(("a.npy", GOOD[:-1]), method=8),
    "damaged": archive(("a.npy", GOOD)).replace(bytes(16), b"\1" * 16, 1),
    "damaged header": archive(("a.npy", GOOD)).replace(b"<f8", b"<f8"[::-1], 1),
}


def test_hostile_npz(tmp_path: Path) -> None:
    refuse_all(tmp_path / "bad.npz", HOSTILE_NPZ)


def inside_one_another() -> bytes:
    """An archive whose first entry lies within the second: the first has so long a header."""
    small, large = b"A" * 1000, 200_000
    name, extra, second = 1, 65_000, 1200
    content = bytearray(300_000)
    content[: 30 + name] = local_header(b"a", small, extra)
    content[30 + name + extra : 30 + name + extra + len(small)] = small
    content[second : second + 30 + name] = local_header(b"b", bytes(large), 0)
    packed = bytes(content[second + 30 + name :][:large])
    directory = directory_entry(b"a", small, 0) + directory_entry(b"b", packed, second)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2, 2, len(directory), len(content), 0)
    return bytes(content) + directory + end


def local_header(name: bytes, data: bytes, extra: int) -> bytes:
    form, size = "<4s5H3L2H", len(data)
    return struct.pack(form, b"PK\3\4", 20, 0, 0, 0, 0, 0, size, size, len(name), extra) + name


def directory_entry(name: bytes, data: bytes, start: int) -> bytes:
    size = len(data)
    fields = (20, 20, 0, 0, 0, 0, zlib.crc32(data), size, size, len(name), 0, 0, 0, 0, 0, start)
    return struct.pack("<4s6H3L5H2L", b"PK\1\2", *fields) + name


def test_entries_inside_one_another_are_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(inside_one_another())
    found = loaded(old(path))
    assert found["a"].tobytes() == b"A" * 1000
    assert (found["b"].nbytes, found["b"].tobytes().count(b"A")) == (200_000, 1000)


def test_what_a_header_says_takes_no_multiple_of_the_file(tmp_path: Path) -> None:
    entry = directory_entry(b"a", b"", 0)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, len(entry) * 66_000, 0, 0)
    values = b'{"a": [' + b"[]," * 3_000_000 + b"[]]}"
    hostile = {
        "many.npz": entry * 66_000 + end,
        "many.safetensors": with_header(values, bytes(8)),
    }
    for name, content in hostile.items():
        path = tmp_path / name
        path.write_bytes(content)
        nbytes = len(content)
        del content
        assert most_memory(path) < 4 * nbytes, name
    large = tmp_path / "sparse.npz"
    with large.open("wb") as file:
        nbytes = file.truncate(200 << 20)
        file.seek(nbytes)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, nbytes, 0, 0))
    assert most_memory(large) < nbytes // 2


def most_memory(path: Path) -> int:
    """Bytes that Python takes at most until a file is refused."""
    tracemalloc.start()
    try:
        refused(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_deflated_entry_that_is_damaged(tmp_path: Path) -> None:
    content = bytearray(archive(("a.npy", npy(described(), b"0123456789abcdef")), method=8))
    content[len(content) // 3] ^= 0xFF
    refused(tmp_path / "bad.npz", bytes(content))


def test_entries_of_one_name(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        content = archive(("a.npy", GOOD), ("a.npy", GOOD))
    refused(tmp_path / "bad.npz", content, errno.EEXIST)


SEEDS = {
    ".npy": npy(described(), bytes(16)),
    ".npz": archive(("a.npy", GOOD), ("b.npy", GOOD), method=8),
    ".safetensors": safetensors({"a": ("F32", np.zeros(2, "f4")), "b": ("U8", np.zeros(3, "u1"))}),
}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_is_refused_or_loads(folder: Path, data: st.DataObject) -> None:
    suffix = data.draw(st.sampled_from(sorted(SEEDS)))
    content = bytearray(SEEDS[suffix])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(1, len(content)))]
    path = folder / f"damaged{suffix}"
    path.write_bytes(content)
    try:
        loaded(old(path))
    except md.InvalidArgument as error:
        assert error.errno in (errno.EBADMSG, errno.EEXIST)
