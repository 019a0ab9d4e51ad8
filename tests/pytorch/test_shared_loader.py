"""Batches in shared slots: those of torch's own loader, and never overwritten while held."""

from __future__ import annotations

import errno
import gc
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed in this environment")

import torch
from children import in_child
from torch.utils.data import DataLoader, TensorDataset
from torch_tools import Deadly, Failing, Images, Numbers, Sized, check

import memdesc as md
from memdesc.interop.torch import SharedDataLoader
from memdesc.testing import failing


def slots_mapped() -> set[str]:
    """The slots that this process has mapped, as the kernel names them."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.partition("/memfd:")[2].split()[0] for line in lines if "/memfd:batch-" in line}


def slot_of(tensor: torch.Tensor) -> str:
    """The name of the memory that a tensor lies in, as the kernel has it."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if start <= address < end:
            return line.partition("/")[2]
    raise AssertionError(hex(address))


@pytest.mark.slow
def test_the_batches_are_torchs_and_lie_in_slots() -> None:
    """Order, seeds, the smaller last batch and nested structures; two epochs."""
    options: dict[str, Any] = {"batch_size": 4, "shuffle": True, "num_workers": 2}
    ours = SharedDataLoader(Images(), generator=torch.Generator().manual_seed(5), **options)
    torchs = DataLoader(Images(), generator=torch.Generator().manual_seed(5), **options)
    assert isinstance(ours, DataLoader)
    assert len(ours) == len(torchs) == 6
    for epoch in range(2):
        seen = []
        for batch in ours:
            seen.append(check(batch))
            if ours.statistics().left_out == ours.statistics().batches:
                continue
            if epoch:
                assert slot_of(batch["image"]).startswith("memfd:batch-")
                assert slot_of(batch["pair"][0]) == slot_of(batch["image"])
        assert seen == [check(batch) for batch in torchs]
        assert len(seen[-1]) == 2
    told = ours.statistics()
    assert told.batches == 12
    assert told.left_out <= 1 + 2 * 2  # what was asked for before the first one came
    assert (told.slots, told.slot_nbytes % 4096) == (6, 0)
    # The default collate function stacks in the slot; only the numbers, 8 bytes each, are copied.
    assert told.copied_bytes <= 2 * 22 * 8
    assert len(slots_mapped()) == 6
    del batch, ours
    gc.collect()
    assert not slots_mapped()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_spawned_workers_that_stay_and_epochs_that_are_left() -> None:
    loader = SharedDataLoader(
        Images(40),
        4,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="spawn",
        slot_nbytes=64 << 10,
    )
    assert [number for batch in loader for number in check(batch)] == list(range(40))
    for _ in range(3):
        for batch in loader:
            assert check(batch)[0] in (0, 4)
            if check(batch)[0] == 4:
                break
    assert [number for batch in loader for number in check(batch)] == list(range(40))
    told = loader.statistics()
    # What an epoch left behind came back; for the next one's first two batches perhaps too late.
    assert told.left_out <= 3 * 2
    assert told.slots == 4
    del loader, batch


def test_without_workers_too() -> None:
    loader = SharedDataLoader(Images(), 4, slot_nbytes=1 << 16)
    numbers = []
    for batch in loader:
        numbers += check(batch)
        assert slot_of(batch["image"]).startswith("memfd:batch-")
    assert numbers == list(range(22))
    assert loader.statistics() == md.interop.torch.LoaderStatistics(6, 0, 22 * 8, 2, 1 << 16)


def test_a_batch_that_is_held_is_never_overwritten() -> None:
    loader = SharedDataLoader(Images(40), 2, slots=3, slot_nbytes=1 << 16)
    held = list(loader)
    assert [number for batch in held for number in check(batch)] == list(range(40))
    told = loader.statistics()
    assert (told.batches, told.left_out, told.slots) == (20, 17, 3)  # three slots, held all along
    part = held[1]["image"][1, 2, 3]
    del held
    after = list(zip(range(2), loader, strict=False))
    assert len(after) == 2
    assert loader.statistics().left_out == 17  # two came back with all that looked at them
    assert part.tolist() == [3.0] * 32  # the third is looked at still
    del after, loader
    assert part.tolist() == [3.0] * 32


def test_slots_become_larger_and_what_does_not_fit_takes_torchs_way() -> None:
    sizes = [[4, 4], [4, 4], [40, 40], [40, 40], [40, 40], [4]]
    loader = SharedDataLoader(Sized(), batch_sampler=sizes)
    for size, batch in zip(sizes, loader, strict=True):
        assert (len(batch), batch.unique().tolist()) == (len(size), [size[0]])
    told = loader.statistics()
    assert told.left_out == 2  # the first, and the first of the large ones
    assert told.slot_nbytes == 80 << 10
    del batch, loader
    gc.collect()
    assert not slots_mapped()


def test_ragged_samples_are_torchs_error() -> None:
    wrong = [[4, 4], [4, 5], [3, 3]]
    with pytest.raises(RuntimeError) as torchs:
        list(DataLoader(Sized(), batch_sampler=wrong))
    batches = iter(SharedDataLoader(Sized(), batch_sampler=wrong, slot_nbytes=1 << 16))
    assert next(batches).shape == (2, 4096)
    with pytest.raises(RuntimeError) as ours:
        next(batches)
    assert str(ours.value) == str(torchs.value)
    assert next(batches).shape == (2, 3072)  # in the slot that the wrong one had taken
    del ours, torchs


def test_samples_of_several_dtypes_become_what_torch_makes_of_them() -> None:
    mixed = [torch.tensor(1), torch.tensor(1.5), torch.ones((), requires_grad=True)]
    for pair in ([0, 1], [1, 2]):
        (torchs,) = DataLoader(mixed, batch_sampler=[pair])
        (ours,) = SharedDataLoader(mixed, batch_sampler=[pair], slot_nbytes=64)
        assert torch.equal(ours, torchs)
        assert (ours.dtype, ours.requires_grad) == (torchs.dtype, torchs.requires_grad)


class Box:
    """A class of the program's own."""

    def __init__(self, samples: list[torch.Tensor]) -> None:
        self.tensor = torch.stack(samples)


def of_all_kinds(samples: list[torch.Tensor]) -> dict[str, Any]:
    stacked = torch.stack(samples)
    return {
        "plain": stacked,
        "last": stacked.view(2, 4, 4, 64).to(memory_format=torch.channels_last),
        "gaps": stacked[:, ::2],
        "expanded": stacked[:, :1].expand(2, 9),
        "reduced": stacked.to(torch.bfloat16),
        "none": torch.empty(0, 5),
        "sparse": torch.eye(2).to_sparse(),
        "learns": torch.ones(3, requires_grad=True),
        "conjugated": torch.ones(2, dtype=torch.complex64).conj(),
        "scalar": torch.tensor(5.5),
        "box": Box(samples),
        "text": ["a", None],
    }


def test_a_collate_function_of_the_programs_own() -> None:
    loader = SharedDataLoader(
        Sized(), sampler=[1, 1], batch_size=2, collate_fn=of_all_kinds, slot_nbytes=1 << 16
    )
    assert loader.collate_fn is of_all_kinds
    (batch,) = loader
    expected = of_all_kinds([Sized()[1]] * 2)
    assert list(batch) == list(expected)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            assert torch.equal(batch[name], value), name
    for name in ("plain", "last", "gaps", "expanded", "reduced", "scalar"):
        assert slot_of(batch[name]).startswith("memfd:batch-"), name
    assert batch["last"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch["sparse"].to_dense(), torch.eye(2))
    assert batch["learns"].requires_grad
    assert batch["conjugated"].is_conj()
    assert torch.equal(batch["box"].tensor, expected["box"].tensor)
    assert batch["text"] == ["a", None]
    assert loader.statistics().copied_bytes == 2048 + 2048 + 1024 + 18 + 4096 + 4
    assert loader.statistics().left_out == 0


@pytest.mark.slow
def test_iterable_datasets_and_two_loaders_at_once() -> None:
    pairs = [SharedDataLoader(Numbers(), 4, num_workers=2, slot_nbytes=64) for _ in range(2)]
    for one, other in zip(*pairs, strict=True):
        assert one.tolist() == other.tolist()
    del one, other
    numbers = sorted(number for batch in pairs[0] for number in batch.tolist())
    assert numbers == [*range(10), *range(100, 110)]
    assert all(loader.statistics().left_out == 0 for loader in pairs)


def test_two_iterations_of_one_loader_at_once() -> None:
    loader = SharedDataLoader(Images(6), 2, slot_nbytes=1 << 16)
    for one in loader:
        first = check(one)
        assert [check(other) for other in loader] == [[0, 1], [2, 3], [4, 5]]
        assert check(one) == first
    assert loader.statistics().batches == 12


@pytest.mark.slow
def test_an_epoch_that_is_left_gives_its_slots_back() -> None:
    loader = SharedDataLoader(Images(200), 2, num_workers=2, slot_nbytes=1 << 16)
    for _ in range(2):
        for batch in loader:
            assert check(batch) == [0, 1]
            break
    del batch
    assert [number for batch in loader for number in check(batch)] == list(range(200))
    told = loader.statistics()
    assert (told.left_out, told.slots) == (0, 6)


@pytest.mark.slow
def test_an_exception_in_the_dataset_is_torchs() -> None:
    loader = SharedDataLoader(Failing(), 2, num_workers=1, slot_nbytes=1 << 16)
    batches = iter(loader)
    seen = [check(next(batches)) for _ in range(4)]
    with pytest.raises(KeyError) as caught:
        next(batches)
    assert "the ninth" in str(caught.value)
    assert seen == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [check(batch) for batch in batches][:1] == [[10, 11]]
    assert loader.statistics().left_out == 0
    del batches, caught


@pytest.mark.slow
def test_a_killed_worker_ends_the_epoch_and_leaves_nothing(tmp_path: Path) -> None:
    flag = tmp_path / "deadly"
    flag.touch()
    loader = SharedDataLoader(Deadly(flag), 2, num_workers=2, slot_nbytes=1 << 16)
    with pytest.raises(RuntimeError, match="DataLoader worker") as caught:
        for batch in loader:
            check(batch)
    del batch, caught
    flag.unlink()
    assert [number for batch in loader for number in check(batch)] == list(range(22))
    assert (loader.statistics().left_out, loader.statistics().slots) == (0, 6)
    del loader
    gc.collect()
    assert not slots_mapped()


def test_no_memory_for_a_slot_is_an_error_where_a_batch_is_asked_for() -> None:
    loader = SharedDataLoader(Images(8), 2)
    batches = iter(loader)
    assert check(next(batches)) == [0, 1]
    with failing("fallocate", errno.ENOSPC), pytest.raises(md.AllocationError):
        next(batches)
    assert check(next(batches)) == [2, 3]


def test_no_descriptor_left_for_a_slot_keeps_it() -> None:
    loader = SharedDataLoader(Images(8), 2, slot_nbytes=1 << 16, slots=1)
    with failing("map_memory", errno.ENOMEM, after=1), pytest.raises(md.MappingError):
        list(loader)
    assert [check(batch) for batch in loader][:1] == [[0, 1]]


def names_of(batches: list[dict[str, Any]]) -> set[str]:
    return {slot_of(batch["image"]) for batch in batches}


def test_a_fork_child_and_a_copy_have_slots_of_their_own() -> None:
    loader = SharedDataLoader(Images(4), 2, slot_nbytes=1 << 16)
    ours = names_of(list(loader))
    assert len(ours) == 2

    def in_the_child() -> set[str]:
        batches = list(loader)
        assert [check(batch) for batch in batches] == [[0, 1], [2, 3]]
        return names_of(batches)

    theirs = in_child(in_the_child)
    assert len(theirs) == 2
    assert not ours & theirs
    copy = pickle.loads(pickle.dumps(loader))
    assert [check(batch) for batch in copy] == [[0, 1], [2, 3]]
    assert loader.statistics().slots == copy.statistics().slots == 2


@pytest.mark.slow
def test_a_program_that_ends_in_the_middle_says_nothing() -> None:
    program = """
import torch
from memdesc.interop.torch import SharedDataLoader
loader = SharedDataLoader(torch.arange(1000), 4, num_workers=1, slot_nbytes=64)
batches = iter(loader)
held = [next(batches), next(batches)]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_what_it_does_not_take() -> None:
    for wrong in ({"pin_memory": True}, {"slots": 0}, {"slot_nbytes": -1}):
        with pytest.raises(md.InvalidArgument) as caught:
            SharedDataLoader(TensorDataset(torch.zeros(4)), **wrong)
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(ValueError, match="num_workers"):
        SharedDataLoader(TensorDataset(torch.zeros(4)), num_workers=-1)
