"""How many samples a second reach a training process whose data loader has workers?

Samples like images (3 x 224 x 224, float32, 588 KiB) that cost their workers nothing but the
copy into a batch of 64 (38 MB), two workers, and a program that touches every page of a batch:

* torch: `torch.utils.data.DataLoader`. A worker stacks a batch in shared memory that is made for
  it, and goes when the batch was used;
* memdesc: `SharedDataLoader`. A worker stacks it in a slot, which is there already;
* where there is a GPU, the same onto it: torch with `pin_memory=True`, which copies each batch
  once more, in a thread; memdesc with `device=`, straight from the slot.

Rounds of all of them alternate. What holds: every sample arrives, with its bytes; and where there
is a GPU, so that the transfer is what bounds it, at least 1.2 times as many samples a second as
with `pin_memory=True`, without that copy, and in less memory at its most. Without one that can not
be measured. The memory is that of all processes together, less what it was before, in the middle of
an epoch when the program computes and the workers have fetched ahead what they may; with a GPU,
whose driver pins memory that no process's list shows, what the machine has in use, at that moment
and at its most. Faults are page faults of all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import finish, gpu_facts, summary

try:
    import torch
    from torch.utils.data import DataLoader, Dataset
except ModuleNotFoundError:
    print("PyTorch is not installed: nothing is measured (pip install 'memdesc[torch]')")
    sys.exit(0)

import memdesc as md
from memdesc.interop.torch import SharedDataLoader
from memdesc.memory.recycler import trim

SHAPE = (3, 224, 224)
BATCH = 64
WORKERS = 2
MIB = 1 << 20
SHARED = ("/dev/shm/", "/memfd:")
GPU = "cuda" if torch.cuda.is_available() else ""


class Samples(Dataset):
    """Views of a bank of samples; each begins with its number."""

    def __init__(self, count: int, side: int) -> None:
        self.count = count
        self.bank = torch.rand(min(count, 256), 3, side, side)
        self.bank.view(len(self.bank), -1)[:, 0] = torch.arange(len(self.bank))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.bank[index % len(self.bank)], index


def memory_of(pids: list[str]) -> float:
    """MiB that processes have together: their own, and all shared memory once.

    Shared memory on its way through a queue is open somewhere, and mapped nowhere. NaN where the
    kernel does not tell what is a process's own (gVisor).
    """
    own, shared = 0, {}
    for pid in pids:
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except FileNotFoundError:
            return math.nan
        own += int(rollup.partition("Pss_Anon:")[2].split()[0]) << 10
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            bounds, _, _, _, inode, *name = line.split(maxsplit=5)
            if name and name[0].startswith(SHARED):
                start, end = (int(bound, 16) for bound in bounds.split("-"))
                shared.setdefault(int(inode), end - start)
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
                path = f"/proc/{pid}/fd/{entry}"
                if os.readlink(path).startswith(SHARED):
                    status = os.stat(path)
                    shared[status.st_ino] = status.st_blocks * 512
    return (own + sum(shared.values())) / MIB


def everybody() -> list[str]:
    """This process and its workers."""
    return ["self", *(str(child.pid) for child in multiprocessing.active_children())]


def faults() -> int:
    return sum(
        resource.getrusage(who).ru_minflt
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


def used(loader: Any, gpu: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches, as a program uses them: each page is looked at, on the GPU if there is one."""
    for images, numbers in loader:
        if gpu:
            images = images.to(GPU, non_blocking=True)  # is there already, if we brought it
            numbers = numbers.to(GPU, non_blocking=True)
        images.view(len(images), -1)[:, ::1024].sum()
        yield images, numbers


def epoch(loader: Any, samples: Samples, gpu: bool) -> dict[str, float]:
    """One epoch: samples a second from the first batch on, and page faults a batch."""
    length = len(loader)
    before, start, seen = faults(), 0.0, 0
    for images, numbers in used(loader, gpu):
        if not start:
            start = time.perf_counter()  # the workers have started
        else:
            seen += len(images)
        first = images.view(len(images), -1)[:, 0]
        assert torch.equal(first.long(), numbers % len(samples.bank))
    del images, numbers, first
    if gpu:
        torch.cuda.synchronize()
    took = time.perf_counter() - start
    gc.collect()  # the workers are waited for: their faults are counted
    return {"samples": seen / took, "faults": (faults() - before) / length}


def in_use() -> float:
    """MiB of this machine that are in use: what a GPU's driver pinned is in no process's list.

    Not what is available: a virtual machine may be given more meanwhile.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    facts = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
    return (facts["MemTotal"] - facts["MemAvailable"]) / 1024


def empty_caches(gpu: bool) -> None:
    """Give back what is kept for the next one: by torch, pinned memory too, and by the recycler."""
    gc.collect()
    trim()
    if gpu:
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()


def memory(loader: Any, gpu: bool, looks: int) -> dict[str, float]:
    """MiB in the middle of an epoch, less what there was before, while the program computes."""
    empty_caches(gpu)
    before, taken_before = memory_of(["self"]), in_use()
    batches, most = used(loader, gpu), 0.0
    for _ in range(len(loader) // 2):
        images, _numbers = next(batches)
        most = max(most, in_use() - taken_before)
    found = memory_of(everybody())
    for _ in range(looks):  # until the workers have fetched what they may
        time.sleep(0.3)
        found = max(found, memory_of(everybody()))
    taken = in_use() - taken_before
    del images, _numbers, batches
    gc.collect()
    return {"processes": found - before, "taken": taken, "most": max(most, taken)}


def loaders(samples: Samples, gpu: bool) -> dict[str, Any]:
    options = {"batch_size": BATCH, "num_workers": WORKERS}
    found: dict[str, Any] = {
        "torch": DataLoader(samples, **options),
        "memdesc": SharedDataLoader(samples, **options),
    }
    if gpu:
        found["torch, pinned"] = DataLoader(samples, pin_memory=True, **options)
        device = md.dma.CudaDevice(0)
        found["memdesc, on the device"] = SharedDataLoader(samples, device=device, **options)
    return found


def measure(samples: Samples, rounds: int, gpu: bool, looks: int) -> dict[str, Any]:
    rows: dict[str, list[dict[str, float]]] = {}
    ways = loaders(samples, gpu)
    for _ in range(rounds):
        for way, loader in ways.items():
            rows.setdefault(way, []).append(epoch(loader, samples, gpu))
    results: dict[str, Any] = {}
    for way, samples_of in rows.items():
        results[way] = {
            "samples": summary([row["samples"] for row in samples_of]),
            "faults": summary([row["faults"] for row in samples_of])["median"],
        }
        if way.startswith("memdesc"):
            told = ways[way].statistics()
            results[way]["statistics"] = {
                name: getattr(told, name) for name in told.__dataclass_fields__
            }
    ways.clear()
    del loader
    gc.collect()
    for way in rows:
        results[way]["memory"] = memory(loaders(samples, gpu)[way], gpu, looks)
    for ours, theirs in (("memdesc", "torch"), ("memdesc, on the device", "torch, pinned")):
        if ours in rows:
            pairs = zip(rows[ours], rows[theirs], strict=True)
            ratios = [one["samples"] / other["samples"] for one, other in pairs]
            results[ours][f"of {theirs}"] = summary(ratios)["median"]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="few small ones, to see that it runs")
    arguments, _ = parser.parse_known_args()
    gpu = bool(GPU)
    samples = Samples(*((8 * BATCH, 32) if arguments.short else (60 * BATCH, SHAPE[1])))
    rounds, looks = (1, 1) if arguments.short else (arguments.rounds, 10)
    results = measure(samples, rounds, gpu, looks)
    for way, row in results.items():
        ratio = "".join(f", {row[key]:.2f} {key}" for key in row if key.startswith("of "))
        print(
            f"{way:24} {row['samples']['median']:8.0f} samples/s, {row['faults']:7.0f} faults a "
            f"batch, {row['memory']['most' if gpu else 'processes']:6.0f} MiB{ratio}"
        )
    if not gpu:
        print("no GPU: against pin_memory=True, where the transfer bounds it, nothing is measured")
    checks = checked(results, gpu and not arguments.short)
    if gpu:
        results["gpu"] = {"name": torch.cuda.get_device_name(), "driver": gpu_facts()}
    results["torch version"] = torch.__version__
    # What was measured without a GPU stays.
    finish("dataloader-gpu" if gpu else "dataloader", __doc__ or "", results, checks)


def checked(results: dict[str, Any], on_gpu: bool) -> dict[str, bool]:
    """What holds: of speed and memory where a GPU was measured at length."""
    outstanding = 2 * WORKERS
    checks = {"every sample arrived, with its bytes": True}
    for way in results:
        if way.startswith("memdesc"):
            told = results[way]["statistics"]
            checks[f"{way}: all but the first batches lay in slots"] = (
                told["left_out"] <= outstanding + 1
            )
            checks[f"{way}: no processor copied images out of a batch"] = (
                told["copied_bytes"] <= told["batches"] * BATCH * 8  # their numbers
            )
    if on_gpu:
        ours, theirs = results["memdesc, on the device"], results["torch, pinned"]
        checks["at least 1.2 of pin_memory=True"] = ours["of torch, pinned"] >= 1.2
        checks["less memory than pin_memory=True"] = (
            ours["memory"]["most"] < theirs["memory"]["most"]
        )
    return checks


if __name__ == "__main__":
    main()
