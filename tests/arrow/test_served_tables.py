"""Tables out of Arrow files, and tables that are shared as such: opened by name, as tables."""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
feather = pytest.importorskip("pyarrow.feather")

from arrow_tables import of_every_type, stream_of  # noqa: E402
from puppets import Puppet  # noqa: E402
from table_children import inodes_of  # noqa: E402
from test_hostile_tables import frozen, mutated  # noqa: E402

import memdesc as md  # noqa: E402
from memdesc.interop import arrow, multiprocessing as handles  # noqa: E402
from memdesc.services import sharing  # noqa: E402
from memdesc.services.arrays import ArrayEntry, encode  # noqa: E402
from memdesc.tables.messages import NotArrow, check_stream  # noqa: E402

TRADES = {"price": [99.5, None, 101.0], "symbol": ["A", "B", None]}
SERVE = [sys.executable, "-c", "from memdesc.cli import main; main()", "serve", "--json"]


def old(path: Path, data: bytes) -> Path:
    """A file as if it had been written long ago: one of this very moment is waited for."""
    path.write_bytes(data)
    os.utime(path, (0, len(data)))
    return path


def reader(data: bytes) -> Any:
    def read(offset: int, nbytes: int, what: str) -> bytes:
        piece = data[offset : offset + nbytes]
        assert len(piece) == nbytes, what  # it asks for no more than there is
        return piece

    return read


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "file"), [(".arrow", True), (".arrows", False)])
def test_every_type_is_a_table_by_its_name(suffix: str, file: bool, tmp_path: Path) -> None:
    ours = of_every_type().drop_columns(["dense", "deep"] if file else [])
    path = old(tmp_path / f"trades{suffix}", stream_of(ours, file=file))
    with md.files.FileServer("market", path) as server, md.connect("market") as connection:
        before = pa.total_allocated_bytes()
        theirs = connection["trades"]
        arrays = connection.arrays()
        assert pa.total_allocated_bytes() == before
        (entry,) = arrays.entries
        assert (entry.content, entry.nbytes) == ("arrow", path.stat().st_size)
        for table in (theirs, arrays["trades"], server.loaded.arrays()["trades"]):
            assert table.equals(ours, check_metadata=True)
            assert inodes_of(table) == inodes_of(theirs) != {0}
        (share,) = [one for one in connection.shares() if one.name == "trades"]
        assert (share.content, share.dtype, share.writable) == ("arrow", None, False)
        assert bytes(connection.map("trades")) == path.read_bytes()
    with handles.installed():  # and it outlives both, and is sent on
        for table in (theirs, arrays["trades"]):
            got = ForkingPickler.loads(bytes(ForkingPickler.dumps(table)))
            assert inodes_of(got) == inodes_of(theirs)


def test_beside_arrays_and_swapped(tmp_path: Path) -> None:
    feather.write_feather(pa.table(TRADES), tmp_path / "trades.feather", "uncompressed")
    np.save(tmp_path / "weights.npy", np.arange(5.0))
    paths = [tmp_path / "weights.npy", tmp_path / "trades.feather"]
    with md.files.FileServer("market", paths) as server, md.connect("market") as connection:
        first, before = connection["trades"], connection.arrays()
        feather.write_feather(pa.table({"n": [1, 2]}), tmp_path / "new", "uncompressed")
        (tmp_path / "new").replace(tmp_path / "trades.feather")
        assert server.reload().version == 2
        assert connection["trades"].to_pydict() == {"n": [1, 2]}
        assert connection.arrays()["trades"].to_pydict() == {"n": [1, 2]}
        assert connection["weights"].tolist() == [0, 1, 2, 3, 4]
        assert first.to_pydict() == before["trades"].to_pydict() == TRADES
        old(tmp_path / "trades.feather", b"ARROW1\0\0")
        with pytest.raises(md.InvalidArgument) as no:
            server.reload()
        assert no.value.errno == errno.EBADMSG
        assert connection["trades"].to_pydict() == {"n": [1, 2]}  # served on


def test_of_what_is_no_table_the_reader_is_told(tmp_path: Path) -> None:
    """Its form is right, so it is served; what is in it the reader finds wrong."""
    wrong = bytearray(stream_of(pa.table({"s": ["one", "two"]})))
    at = wrong.index((3).to_bytes(4, "little") + (6).to_bytes(4, "little"))
    wrong[at : at + 4] = (1 << 30).to_bytes(4, "little")  # the first text ends out of range
    path = old(tmp_path / "trades.arrow", bytes(wrong))
    with md.files.FileServer("market", path), md.connect("market") as connection:
        for look in (lambda: connection["trades"], lambda: connection.arrays()["trades"]):
            with pytest.raises(md.InvalidArgument) as no:
                look()
            assert no.value.errno == errno.EBADMSG


def swapped(data: bytes) -> bytes:
    """The same stream as a machine of the other byte order would call it."""
    schema = bytes(pa.ipc.MessageReader.open_stream(data).read_next_message().metadata)
    out = bytearray(data)
    from memdesc.tables import messages

    root = int.from_bytes(schema[:4], "little")
    table = messages._follow(schema, messages._field(schema, root, messages._HEADER))
    # The writer leaves out what is the default: let an absent field have the place of another.
    vtable = table - int.from_bytes(schema[table : table + 4], "little", signed=True)
    at = data.index(schema) + vtable
    out[at + 4 : at + 6] = schema[vtable + 6 : vtable + 8]
    return bytes(out)


def unusable() -> dict[str, tuple[bytes, int]]:
    numbers = pa.table({"n": range(1000)})
    pieces = [pa.array(words).dictionary_encode() for words in (["a"], ["a", "b"])]
    in_pieces = pa.table({"d": pa.chunked_array(pieces)})
    stream, file = stream_of(numbers), stream_of(numbers, file=True)
    body = stream[: stream.index(b"\xff\xff\xff\xff", 4)]
    return {
        "compressed": (stream_of(numbers, file=True, compression="lz4"), errno.ENOTSUP),
        "a dictionary in pieces": (
            stream_of(in_pieces, emit_dictionary_deltas=True),
            errno.ENOTSUP,
        ),
        "the other byte order": (swapped(stream), errno.ENOTSUP),
        "Feather 1": (b"FEA1" + bytes(60) + b"FEA1", errno.ENOTSUP),
        "no Arrow": (b"PAR1" * 100, errno.EBADMSG),
        "a magic number": (b"ARROW1\0\0", errno.EBADMSG),
        "a file cut off": (file[:-1], errno.EBADMSG),
        "a file without its index": (b"ARROW1\0\0" + stream, errno.EBADMSG),
        "an index of all": (
            file[:-10] + len(file).to_bytes(4, "little") + b"ARROW1",
            errno.EBADMSG,
        ),
        "a file that does not end": (
            b"ARROW1\0\0" + stream[:-8] + bytes(8) + (8).to_bytes(4, "little") + b"ARROW1",
            errno.EBADMSG,
        ),
        "no schema": (b"\xff\xff\xff\xff" + bytes(4), errno.EBADMSG),
        "two schemas": (body + stream, errno.EBADMSG),
        "a batch first": (stream[len(body) :], errno.EBADMSG),
        "a message cut off": (stream[:-100], errno.EBADMSG),
        "too few bytes": (b"\xff", errno.EBADMSG),
    }


@pytest.mark.parametrize("what", unusable())
def test_what_no_reader_could_use_is_not_served(what: str, tmp_path: Path) -> None:
    data, number = unusable()[what]
    path = old(tmp_path / "trades.arrow", data)
    with pytest.raises(md.InvalidArgument) as no:
        md.files.load(path)
    assert no.value.errno == number
    assert str(path) in str(no.value)
    with pytest.raises(md.InvalidArgument) as given:
        md.files.load(md.files.FileSource(path, dtype="u1"))
    assert given.value.errno == errno.EINVAL


def test_every_beginning_is_refused_or_a_stream_that_ends_there() -> None:
    for file in (False, True):
        table = pa.concat_tables([pa.table({"n": [1, 2]}), pa.table({"n": [3]})])
        data = stream_of(table, file=file)
        whole = []
        for length in range(1, len(data)):
            try:
                check_stream(reader(data[:length]), length)
            except NotArrow as error:
                assert error.errno == errno.EBADMSG
                assert 0 <= error.offset <= length
            else:
                whole.append(arrow.table(frozen(data[:length])).num_rows)
        assert whole == ([] if file else [0, 2, 3])
        check_stream(reader(data), len(data))


@pytest.mark.slow
def test_mutated_files_are_refused_or_read_as_far_as_they_say() -> None:
    choose, seen = random.Random(2), Counter[str]()
    whole = of_every_type()
    seeds = [stream_of(whole), stream_of(whole.drop_columns(["dense", "deep"]), file=True)]
    seeds += [stream_of(whole.select([name]), file=True) for name in ("text", "f8", "runs")]
    for _ in range(5000):
        data = mutated(choose.choice(seeds), choose)
        try:
            check_stream(reader(data), len(data))
            seen["read"] += 1
        except NotArrow as error:
            seen[errno.errorcode[error.errno]] += 1
    assert set(seen) >= {"read", "EBADMSG"}


# -- without PyArrow -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_needs_no_pyarrow_and_a_reader_is_told_what_to_install(tmp_path: Path) -> None:
    path = old(tmp_path / "trades.arrow", stream_of(pa.table(TRADES), file=True))
    with Puppet() as server, Puppet() as other:
        for puppet in (server, other):
            puppet.do("import sys; sys.modules['pyarrow'] = None")
        server.do(f"s = md.files.FileServer('market', {str(path)!r})")
        with md.connect("market") as connection:
            assert connection["trades"].to_pydict() == TRADES
        other.do("c = md.connect('market')")
        for look in ("c['trades']", "c.arrays()['trades']"):
            told = other.do(
                "def look():\n"
                f"    try:\n        return repr({look})\n"
                "    except ModuleNotFoundError as error:\n        return error.name, str(error)\n"
            )
            name, told = other.do("look()")
            assert name == "pyarrow"
            assert "memdesc[arrow]" in told
        assert other.do("bytes(c.map('trades'))[:6].decode()") == "ARROW1"
        assert other.do("len(c.arrays())") == 1
        server.do("s.close()")


@pytest.mark.slow
def test_the_command_serves_tables(tmp_path: Path) -> None:
    path = tmp_path / "trades.feather"
    feather.write_feather(pa.table(TRADES), path, "uncompressed")
    other = subprocess.PIPE
    with subprocess.Popen([*SERVE, str(path)], stdout=other, stderr=other) as process:
        try:
            assert process.stdout is not None
            loaded = json.loads(process.stdout.readline())
            assert [(one["name"], one["content"]) for one in loaded["arrays"]] == [
                ("trades", "arrow")
            ]
            with md.connect("trades", timeout=60) as connection:
                assert connection["trades"].to_pydict() == TRADES
                feather.write_feather(pa.table({"n": [7]}), tmp_path / "new", "uncompressed")
                (tmp_path / "new").replace(path)
                process.send_signal(signal.SIGHUP)
                until = time.monotonic() + 60
                while json.loads(process.stdout.readline())["event"] != "swapped":
                    assert time.monotonic() < until
                assert connection["trades"].to_pydict() == {"n": [7]}
        finally:
            process.send_signal(signal.SIGTERM)
            _, told = process.communicate(timeout=60)
    assert (process.returncode, b"trades" in told) == (0, True)
    feather.write_feather(pa.table(TRADES), path, "lz4")
    done = subprocess.run([*SERVE, str(path)], capture_output=True, timeout=60, check=False)
    assert done.returncode == 2
    record = json.loads(done.stdout.splitlines()[-1])
    assert (record["event"], record["errno"]) == ("unusable", errno.ENOTSUP)


# -- shared as a table -----------------------------------------------------------------------------


def test_a_table_is_shared_as_one() -> None:
    with md.Service("market") as market, md.connect("market") as connection:
        market.share("trades", arrow.to_descriptor(TRADES), content="arrow")
        market.share("bytes", arrow.to_descriptor(TRADES))
        assert connection["trades"].to_pydict() == TRADES
        assert arrow.table(connection["bytes"]).to_pydict() == TRADES
        table = connection["trades"]
        gc.collect()
        with handles.installed():
            got = ForkingPickler.loads(bytes(ForkingPickler.dumps(table)))
        assert inodes_of(got) == inodes_of(table) != {0}


def test_what_can_not_be_shared_as_a_table_is_refused() -> None:
    data = stream_of(pa.table(TRADES))
    descriptor, buffer = arrow.to_descriptor(TRADES), md.BufferMemoryDescriptor(len(data))
    private = md.MemoryDescriptor.with_buffer(bytearray(data), md.Direction.OUT)
    with md.Service("market") as market:
        with pytest.raises(md.SealedError) as no:
            market.share("trades", buffer, content="arrow")
        assert no.value.errno == errno.EPERM
        for wrong in ({"content": "parquet"}, {"content": "arrow", "dtype": "u1"}):
            with pytest.raises(md.InvalidArgument) as invalid:
                market.share("trades", descriptor, **wrong)
            assert invalid.value.errno == errno.EINVAL
        with pytest.raises(md.MappingError):
            market.share("trades", private, content="arrow")
        with pytest.raises(md.InvalidArgument, match="to_descriptor"):
            market.share("trades", arrow.table(descriptor), content="arrow")
        assert not market.shares()


def test_a_service_that_lies_of_its_content_is_seen_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sharing, "_check_content", lambda *_: None)
    data = stream_of(pa.table(TRADES))
    buffer = md.BufferMemoryDescriptor(len(data))
    buffer.write_bytes(0, data)
    with md.Service("market") as market, md.connect("market") as connection:
        market.share("open", buffer, content="arrow")
        market.share("junk", frozen(b"junk" * 100), content="arrow")
        market.share("unknown", frozen(b"of a later version"), content="parquet")
        with pytest.raises(md.SealedError) as no:
            connection["open"]
        assert no.value.errno == errno.EPERM
        with pytest.raises(md.InvalidArgument) as invalid:
            connection["junk"]
        assert invalid.value.errno == errno.EBADMSG
        assert connection["unknown"].tobytes() == b"of a later version"


def test_a_catalogue_that_lies_of_its_content_is_seen_through() -> None:
    data = stream_of(pa.table(TRADES))
    entries = [
        ArrayEntry("whole", "u1", (len(data),), False, 0, len(data), content="arrow"),
        ArrayEntry("part", "u1", (9,), False, 8, 9, content="arrow"),
        ArrayEntry("nothing", "u1", (0,), False, 0, 0, content="arrow"),
        ArrayEntry("unknown", "<u2", (2,), False, 0, 4, content="parquet"),
    ]
    end = encode(1, entries)
    buffer = md.BufferMemoryDescriptor(len(data) + len(end))
    buffer.write_bytes(0, data + end)
    with md.Service("market") as market, md.connect("market") as connection:
        market.share("open", buffer)
        market.share("frozen", buffer.snapshot())
        with pytest.raises(md.SealedError) as no:
            connection.arrays("open")["whole"]
        assert no.value.errno == errno.EPERM
        arrays = connection.arrays("frozen")
        assert arrays["whole"].to_pydict() == TRADES
        for name in ("part", "nothing"):
            with pytest.raises(md.InvalidArgument) as invalid:
                arrays[name]
            assert invalid.value.errno == errno.EBADMSG
        assert arrays["unknown"].shape == (2,)


def test_those_who_look_after_it_are_told() -> None:
    from click.testing import CliRunner

    from memdesc.cli.commands import memdesc

    with md.Service("market") as market:
        market.share("trades", arrow.to_descriptor(TRADES), content="arrow")
        done = CliRunner().invoke(memdesc, ["ls", "--json", "market"])
    assert done.exit_code == 0
    assert '"content": "arrow"' in done.output


@pytest.mark.slow
def test_a_successor_shares_it_on() -> None:
    with Puppet() as puppet:
        puppet.do("from memdesc.interop import arrow")
        puppet.do("s = md.Service('market')")
        puppet.do(f"s.share('trades', arrow.to_descriptor({TRADES!r}), content='arrow')")
        with md.Service("market", take_over=True), md.connect("market") as connection:
            puppet.kill()
            assert connection["trades"].to_pydict() == TRADES
