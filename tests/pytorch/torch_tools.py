"""Datasets for the loader's tests. At the top of a module: workers that are spawned import them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

torch.set_num_threads(1)  # tests run beside others


class Images(Dataset):
    """Samples that tell their number in every element, in the structures that programs use."""

    def __init__(self, count: int = 22, side: int = 32) -> None:
        self.count = count
        self.side = side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.full((3, self.side, self.side), index, dtype=torch.float32)
        return {"image": image, "pair": (index, image[0].numpy().astype("u1")), "name": f"n{index}"}


def check(batch: dict[str, Any]) -> list[int]:
    """The numbers of a batch's samples, if all of its parts say so."""
    numbers: list[int] = batch["pair"][0].tolist()
    assert batch["image"].dtype == torch.float32
    for part in (batch["image"], batch["pair"][1]):
        assert part.flatten(1).amin(1).tolist() == part.flatten(1).amax(1).tolist() == numbers
    assert batch["name"] == [f"n{number}" for number in numbers]
    return numbers


class Numbers(IterableDataset):
    """Each worker gives numbers of its own."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        first = 100 * worker.id if worker else 0
        return iter(torch.arange(first, first + 10))


class Failing(Images):
    """One sample can not be had."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 9:
            raise KeyError("the ninth")
        return super().__getitem__(index)


class Deadly(Images):
    """A worker is killed at one sample, as long as a file is there."""

    def __init__(self, flag: Path) -> None:
        super().__init__()
        self.flag = flag

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 13 and self.flag.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Sized(Dataset):
    """The sample's number is its size in KiB."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((index * 1024,), index, dtype=torch.uint8)
