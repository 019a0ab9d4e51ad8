"""Dask's workers of one host hand over memory: a cluster of two, in a process of its own."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from puppets import Puppet, wait_until

pytest.importorskip("distributed", reason="Dask's distributed is not installed")

HERE = str(Path(__file__).parent)
LENGTH = 1 << 20
pytestmark = pytest.mark.slow


class Cluster:
    """A puppet with a cluster, which runs functions of `dask_jobs`."""

    def __init__(self, folder: Path) -> None:
        self.puppet = Puppet()
        self.puppet.do(f"import sys; sys.path.insert(0, {HERE!r})")
        self.puppet.do("import dask_jobs", timeout=60)
        self.puppet.do(f"dask_jobs.start({str(folder)!r})", timeout=100)

    def ask(self, call: str, *arguments: Any) -> Any:
        told = ", ".join(map(repr, arguments))
        return self.puppet.do(f"dask_jobs.{call}({told})", timeout=100)

    def end(self) -> None:
        self.puppet.do("dask_jobs.stop()", timeout=60)
        assert self.puppet.finish() == 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("dask"))
    with made.puppet:
        yield made
        if made.puppet.process.poll() is None:  # the last test ends it, where it runs here
            made.end()


def inboxes() -> set[str]:
    """Every inbox of this network namespace."""
    lines = Path("/proc/net/unix").read_text(errors="replace").splitlines()
    return {line.split()[-1] for line in lines if "@memdesc-dask-" in line}


def test_the_receiver_maps_the_very_pages_and_can_not_write_them(cluster: Cluster) -> None:
    told = cluster.ask("same_pages")
    seen, owner = told["seen"], told["owner"]
    assert seen["inode"] == owner[0]
    expected = np.arange(LENGTH, dtype="f4")
    assert seen["digest"] == owner[1] == hashlib.sha256(expected.tobytes()).hexdigest()
    assert seen["enforced"] is True
    assert set(seen["denied"]) == {"array", "mapping", "pwrite", "reopened"}
    assert told["stored"] == [7.0, -1.0]


@pytest.mark.parametrize(
    "form",
    ["fortran", "reversed", "steps", "half", "times", "big endian", "transposed"],
)
def test_arrays_of_any_layout_go_as_handles(cluster: Cluster, form: str) -> None:
    told = cluster.ask("sent", form)
    assert (told["equal"], told["writable"], told["handles"]) == (True, False, 1)


@pytest.mark.parametrize(
    "form",
    ["small", "part", "fields", "writable by others", "private", "objects", "masked"],
)
def test_what_can_not_or_should_not_be_handed_over_goes_as_bytes(
    cluster: Cluster, form: str
) -> None:
    told = cluster.ask("sent", form)
    assert (told["equal"], told["writable"], told["handles"]) == (True, True, 0)


def test_arrays_in_collections_go_as_handles(cluster: Cluster) -> None:
    assert cluster.ask("nested") == [15.0, [3]]


def test_what_was_received_is_passed_on_to_an_attached_client(cluster: Cluster) -> None:
    assert cluster.ask("passed_on") == [True, 10.0, False, 1, 10.0, 1]


def test_what_is_replicated_is_one_set_of_pages(cluster: Cluster) -> None:
    assert cluster.ask("replicated") == [9.0, [1]]


def test_the_scheduler_relays_bytes(cluster: Cluster) -> None:
    assert cluster.ask("by_scheduler") == [9.0, True, 0]


def test_a_literal_and_what_is_scattered_are_bytes(cluster: Cluster) -> None:
    assert cluster.ask("literal") == [9.0, [0]]
    assert cluster.ask("scattered") == [[9.0, True], [0]]


@pytest.mark.parametrize("kind", ["buffer", "sub", "snapshot", "multi"])
def test_descriptors_arrive_as_descriptors_either_way(cluster: Cluster, kind: str) -> None:
    told = cluster.ask("descriptor", kind)
    length = {"sub": 8192, "multi": (1 << 20) + 100}.get(kind, 1 << 20)
    direction = "OUT" if kind == "snapshot" else "IN"
    expected = ["ReceivedMemoryDescriptor", length, direction, "READ_ONLY", True, "memory"]
    assert told["handles"] == [1]
    assert told["pulled"] == expected
    assert told["pushed"] == expected


def test_a_closed_descriptor_is_one_in_the_task_that_gets_it(cluster: Cluster) -> None:
    assert "was closed" in cluster.ask("closed")


def test_managed_memory_counts_what_is_described(cluster: Cluster) -> None:
    assert cluster.ask("accounted") == [4 * LENGTH, 1 << 20]


def test_a_handle_that_is_lost_is_asked_for_again_as_bytes(cluster: Cluster) -> None:
    told = cluster.ask("lost")
    assert told["value"] == [9.0, True]
    assert told["told"] == [0, 1]
    assert told["again"] is False


def test_private_memory_is_copied_once_for_all_who_ask(cluster: Cluster) -> None:
    told = cluster.ask("copied")
    assert told["values"] == [9.0, False]
    assert told["counts"] == [1, 2]
    assert told["same"] is True
    assert told["kept"] == 1


def test_a_sender_that_is_killed_takes_no_handle_with_it(cluster: Cluster) -> None:
    told = cluster.ask("sender_killed")
    assert told == {"first": 9.0, "again": False, "handles": [1]}


def test_nothing_is_left_behind(cluster: Cluster) -> None:
    wait_until(lambda: cluster.ask("held") == [[0, 0, 0], [0, 0, 0]])
    told = cluster.ask("workers")
    pids, names = {pid for pid, _ in told}, {name for _, name in told}
    assert len(names) == 2 and names <= inboxes()
    cluster.end()
    wait_until(lambda: not names & inboxes())
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
