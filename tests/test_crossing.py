"""How a block crosses: the rules, where the thresholds come from, and their measuring."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from children import NOBODY, become, in_child
from hypothesis import given, strategies as st

from memdesc import crossing
from memdesc.crossing import Origin, Thresholds, Way, measurement, way_for, way_to_copy
from memdesc.errors import (
    AllocationError,
    InvalidArgument,
    MemdescError,
    PeerGoneError,
    UnsupportedError,
)
from memdesc.testing import failing
from memdesc.vm.pages import Direction

SIZES = Thresholds(inline=100, mapping=1000, copy_on_write=2000, copy_by_mapping=5000)
NEVER = Thresholds(inline=100, mapping=None, copy_on_write=None)
OUT, IN, OUT_IN = Direction.OUT, Direction.IN, Direction.OUT_IN


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.delenv("MEMDESC_CALIBRATION", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    crossing.set_thresholds(None)
    yield tmp_path / "memdesc" / "calibration.json"
    crossing.set_thresholds(None)


def way(nbytes: int, sizes: Thresholds = SIZES, **more: Any) -> Way:
    kind = {"direction": OUT, "shareable": True, "readable": True} | more
    choice = way_for(nbytes, thresholds=sizes, **kind)
    assert choice.reason
    return choice.way


# -- The rules ------------------------------------------------------------------------------------


def test_what_can_be_shared_for_the_time_of_a_call() -> None:
    for direction in (OUT, IN, OUT_IN):
        found = [way(size, direction=direction) for size in (0, 100, 101, 999, 1000, 1 << 40)]
        assert found == [Way.INLINE] * 2 + [Way.PROCESS_VM] * 2 + [Way.MAPPING] * 2
    assert way(101, readable=False) is Way.MAPPING
    assert way(1 << 40, NEVER) is Way.PROCESS_VM
    assert way(1 << 40, NEVER, readable=False) is Way.MAPPING


def test_what_is_kept_is_kept_by_value() -> None:
    assert [way(size, keeps=True) for size in (100, 1999, 2000)] == [
        Way.INLINE,
        Way.PROCESS_VM,
        Way.COPY_ON_WRITE,
    ]
    assert way(101, keeps=True, readable=False) is Way.COPY_ON_WRITE
    assert way(1 << 40, NEVER, keeps=True) is Way.PROCESS_VM


@pytest.mark.parametrize("direction", [IN, OUT_IN])
@pytest.mark.parametrize("size", [1, 1 << 30])
def test_what_is_kept_and_written_is_the_same_memory(direction: Direction, size: int) -> None:
    assert way(size, direction=direction, keeps=True) is Way.MAPPING
    with pytest.raises(InvalidArgument):
        way(size, direction=direction, keeps=True, shareable=False)


def test_private_memory() -> None:
    assert [way(size, shareable=False) for size in (100, 101, 1 << 40)] == [
        Way.INLINE,
        Way.PROCESS_VM,
        Way.PROCESS_VM,
    ]
    assert way(101, shareable=False, readable=False) is Way.MAPPING


@given(
    st.integers(0, 1 << 50),
    st.sampled_from([OUT, IN, OUT_IN]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_no_choice_is_one_that_can_not_be(
    nbytes: int, direction: Direction, shareable: bool, readable: bool, keeps: bool
) -> None:
    if keeps and direction is not OUT and not shareable:
        return
    found = way(nbytes, direction=direction, shareable=shareable, readable=readable, keeps=keeps)
    assert found is not Way.PROCESS_VM or readable
    assert found is not Way.COPY_ON_WRITE or (shareable and keeps and direction is OUT)
    assert found is not Way.INLINE or nbytes <= SIZES.inline


def test_copying_from_a_task() -> None:
    assert way_to_copy(4999, mappable=True, thresholds=SIZES).way is Way.PROCESS_VM
    assert way_to_copy(5000, mappable=True, thresholds=SIZES).way is Way.MAPPING
    assert way_to_copy(5000, mappable=False, thresholds=SIZES).way is Way.PROCESS_VM
    assert way_to_copy(1 << 40, mappable=True, thresholds=NEVER).way is Way.PROCESS_VM


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: way(-1),
        lambda: way(1, direction=Direction.NONE),
        lambda: way(1, direction="outward"),
        lambda: way_to_copy(-1, mappable=True),
        lambda: Thresholds(inline=None),  # type: ignore[arg-type]
        lambda: Thresholds(inline=-1),
        lambda: Thresholds(mapping=True),
        lambda: Thresholds(mapping="1"),  # type: ignore[arg-type]
        lambda: crossing.set_thresholds(4096),  # type: ignore[arg-type]
    ],
)
def test_what_makes_no_sense(wrong: Any) -> None:
    with pytest.raises(InvalidArgument):
        wrong()


# -- Where the thresholds come from ---------------------------------------------------------------


def test_the_defaults_where_nothing_was_measured(own_cache: Path) -> None:
    found = crossing.calibration()
    assert (found.origin, found.thresholds) == (Origin.DEFAULT, Thresholds())
    assert Thresholds().inline == 4096
    assert not own_cache.exists()


def test_thresholds_set_in_this_process_are_those_that_rules_take() -> None:
    crossing.set_thresholds(Thresholds(inline=7))
    assert crossing.calibration().origin is Origin.BY_HAND
    kind = {"direction": OUT, "shareable": False, "readable": True}
    assert [way_for(size, **kind).way for size in (7, 8)] == [Way.INLINE, Way.PROCESS_VM]
    crossing.set_thresholds(None)
    assert crossing.thresholds() == Thresholds()


def measured() -> crossing.Calibration:
    sizes = Thresholds(inline=8192, mapping=None)
    figures = {"INLINE": {1024: 1.5e-6}}
    return crossing.Calibration(
        sizes, Origin.MEASURED, "calibrate", "2026-01-01T00:00:00Z", figures
    )


def test_what_was_kept_is_found_again(own_cache: Path) -> None:
    assert crossing.save_calibration(measured()) == own_cache
    assert stat.S_IMODE(own_cache.stat().st_mode) == 0o600
    assert os.listdir(own_cache.parent) == [own_cache.name]
    found = crossing.calibration()
    assert (found.thresholds, found.origin) == (measured().thresholds, Origin.MEASURED)
    assert (found.where, found.figures) == (str(own_cache), measured().figures)
    assert found.measured == "2026-01-01T00:00:00Z"


def test_a_folder_that_can_not_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEMDESC_CALIBRATION", str(tmp_path / "file" / "calibration.json"))
    with pytest.raises(MemdescError) as caught:
        crossing.save_calibration(measured())
    assert caught.value.errno in (errno.ENOTDIR, errno.EEXIST)
    monkeypatch.setenv("MEMDESC_CALIBRATION", str(tmp_path))  # a folder is in its place
    (tmp_path / "x").touch()
    with pytest.raises(MemdescError) as caught:
        crossing.save_calibration(measured())
    assert caught.value.errno in (errno.EISDIR, errno.ENOTEMPTY, errno.EBUSY, errno.EACCES)
    assert not list(tmp_path.parent.glob(".calibration-*"))


def test_a_file_by_hand_holds_anywhere(own_cache: Path) -> None:
    own_cache.parent.mkdir()
    own_cache.write_text('{"thresholds": {"inline": 64, "copy_on_write": null}}')
    found = crossing.calibration()
    assert found.origin is Origin.BY_HAND
    assert found.thresholds == Thresholds(inline=64, copy_on_write=None)


def test_a_file_of_another_machine_is_ignored(
    own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    crossing.save_calibration(measured())
    record = json.loads(own_cache.read_text())
    for name, value in record["key"].items():
        own_cache.write_text(json.dumps(record | {"key": record["key"] | {name: f"not {value}"}}))
        crossing.set_thresholds(None)
        assert crossing.calibration().origin is Origin.DEFAULT
    assert [entry.levelno for entry in caplog.records] == [logging.WARNING] * 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"thresholds": 5}',
        '{"thresholds": {"inline": "many"}}',
        '{"thresholds": {"inline": null}}',
        '{"thresholds": {"inline": -1}}',
        '{"thresholds": {"unheard_of": 1}}',
        '{"thresholds": {}, "measured": "x", "key": 1}',
        "[" * 10_000,
        '{"thresholds": {}}' + " " * (64 << 10),
        "\x00\xff",
    ],
    ids=lambda text: text[:30],
)
def test_a_corrupt_file_is_ignored_with_a_warning(
    own_cache: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    own_cache.parent.mkdir()
    own_cache.write_text(text, encoding="latin-1")
    assert crossing.thresholds() == Thresholds()
    assert [entry.levelno for entry in caplog.records] == [logging.WARNING]


def test_corrupt_figures_are_ignored(own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    crossing.save_calibration(measured())
    record = json.loads(own_cache.read_text())
    for figures in ([], {"INLINE": 5}, {"INLINE": {"x": 1}}):
        own_cache.write_text(json.dumps(record | {"figures": figures}))
        crossing.set_thresholds(None)
        assert crossing.calibration().origin is Origin.DEFAULT
    assert len(caplog.records) == 3


def test_a_fifo_is_not_waited_for(own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    own_cache.parent.mkdir()
    os.mkfifo(own_cache)
    assert crossing.thresholds() == Thresholds()
    assert len(caplog.records) == 1


def test_a_file_of_another_user_is_ignored(
    own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own_cache.parent.mkdir()
    own_cache.write_text('{"thresholds": {"inline": 64}}')
    try:
        os.chown(own_cache, NOBODY - 1, -1)
    except PermissionError as error:
        pytest.skip(f"a file can not be given to another user: {error}")
    assert crossing.thresholds() == Thresholds()
    assert len(caplog.records) == 1


def test_the_variable_holds_values(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    crossing.save_calibration(measured())
    monkeypatch.setenv("MEMDESC_CALIBRATION", "inline=64, mapping=never")
    assert crossing.thresholds() == Thresholds(inline=64, mapping=None)
    assert crossing.calibration().origin is Origin.BY_HAND
    assert not caplog.records
    for wrong in ("64", "inline=x", "inline=never", "unheard_of=1", "inline=-5"):
        monkeypatch.setenv("MEMDESC_CALIBRATION", wrong)
        crossing.set_thresholds(None)
        assert crossing.calibration().origin is Origin.MEASURED  # the file is next
    assert len(caplog.records) == 5


def test_the_variable_holds_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own.json"
    monkeypatch.setenv("MEMDESC_CALIBRATION", str(path))
    assert crossing.save_calibration(measured()) == path == crossing.calibration_file()
    assert crossing.calibration().where == str(path)


def test_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", "relative")
    assert crossing.calibration_file() is None
    assert crossing.thresholds() == Thresholds()
    with pytest.raises(MemdescError) as caught:
        crossing.save_calibration(measured())
    assert caught.value.errno == errno.ENOENT


def test_importing_and_asking_measures_nothing(own_cache: Path) -> None:
    code = (
        "import sys, memdesc.crossing as c; c.thresholds(); "
        "sys.exit('subprocess' in sys.modules and c.calibration().origin.name != 'DEFAULT')"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
    assert not own_cache.exists()


# -- Measuring ------------------------------------------------------------------------------------


@given(st.integers(0, 12), st.lists(st.floats(0.9, 1.1), min_size=24, max_size=24))
def test_a_border_is_found_in_spite_of_noise(where: int, noise: list[float]) -> None:
    sizes = [1 << power for power in range(12)]
    below = {size: (1 + index / 2) * noise[index] for index, size in enumerate(sizes)}
    above = {
        size: (1 + index / 2) * (2 if index < where else 0.5) * noise[12 + index]
        for index, size in enumerate(sizes)
    }
    assert measurement.border_of(below, above) == (sizes[where] if where < 12 else None)


def test_one_size_measured_badly_moves_no_border() -> None:
    below = dict.fromkeys(range(10), 1.0)
    above = {size: 2.0 if size < 5 else 0.5 for size in range(10)}
    assert measurement.border_of(below, above | {1: 0.9, 8: 1.2}) == 5
    assert measurement.border_of(below, above, margin=3) is None


def test_where_the_receiver_may_not_read_the_giver() -> None:
    figures = {"INLINE": {1024: 1.0, 2048: 3.0}, "MAPPING": {1024: 2.0, 2048: 2.0}}
    assert measurement.judge(figures) == Thresholds(inline=1024)


@pytest.mark.slow
def test_calibrating_measures_every_way_and_holds(own_cache: Path) -> None:
    told: list[float] = []
    found = crossing.calibrate(told.append)
    assert found.origin is Origin.MEASURED
    assert crossing.calibration() is found
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert {"INLINE", "MAPPING", "COPY_ON_WRITE"} <= found.figures.keys()
    assert all(0 < time < 10 for by in found.figures.values() for time in by.values())
    assert 1024 <= found.thresholds.inline <= 65536
    assert not own_cache.exists()  # kept only when asked
    crossing.save_calibration(found)
    crossing.set_thresholds(None)
    again = crossing.calibration()
    assert (again.thresholds, again.figures) == (found.thresholds, found.figures)


@pytest.mark.slow
def test_calibrating_where_copying_is_filtered_away() -> None:
    with failing("process_vm_readv", errno.ENOSYS, times=None):
        found = crossing.calibrate()
    assert "PROCESS_VM" not in found.figures
    assert found.thresholds == Thresholds(inline=found.thresholds.inline)


@pytest.mark.slow
def test_calibrating_as_another_user() -> None:
    def as_nobody() -> str:
        try:
            return crossing.calibrate().origin.name
        except MemdescError as error:
            tried = subprocess.run([sys.executable, "-c", "import memdesc"], check=False)
            assert tried.returncode, error
            pytest.skip("this interpreter and library may not be used by another user")

    def run() -> str:
        try:
            return as_nobody()
        except PermissionError as error:
            pytest.skip(f"this interpreter may not be run by another user: {error}")

    assert in_child(run, before=lambda: become(NOBODY)) == "MEASURED"


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.EPERM, errno.EMFILE, errno.EINVAL])
def test_what_fails_while_it_measures(number: int) -> None:
    with failing("map_memory", number), pytest.raises(MemdescError) as caught:
        crossing.calibrate()
    assert caught.value.errno == number
    assert isinstance(caught.value, AllocationError) == (number == errno.EMFILE)
    assert crossing.calibration().origin is Origin.DEFAULT


@pytest.mark.slow
def test_a_helper_that_can_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(UnsupportedError):
        crossing.calibrate()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(PeerGoneError) as caught:
        crossing.calibrate()
    assert caught.value.errno == errno.ECONNRESET
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(MemdescError):
        crossing.calibrate()
