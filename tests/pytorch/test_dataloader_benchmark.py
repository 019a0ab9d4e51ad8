"""The loader's benchmark as it runs where there is a GPU; the copies are the processor's here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed in this environment")

import torch
from torch.utils import _pytree as pytree

import memdesc as md
from memdesc.dma.cuda import CudaDevice
from memdesc.interop.torch import loader as loader_module

sys.path.append(str(Path(__file__).parents[1] / "cuda"))

from fake_driver import FakeDriver

ROOT = Path(__file__).resolve().parents[2]


class Over:
    """The event behind a copy that was over at once."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class AtOnce:
    """A stream on which copies are over when they are started."""

    def __init__(self, device: CudaDevice) -> None:
        assert device.name == "Fake 0"

    def copy(self, batch: Any) -> tuple[Any, Over]:
        return pytree.tree_map(torch.clone, batch), Over()

    def hand_over(self, moved: Any, event: Over) -> None:
        pass


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import common
    import dataloader

    fake = FakeDriver()
    made = CudaDevice(driver=fake)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(dataloader, "GPU", "cpu")
    monkeypatch.setattr(dataloader, "empty_caches", lambda gpu: None)
    monkeypatch.setattr(loader_module, "CudaStream", AtOnce)
    monkeypatch.setattr(md.dma, "CudaDevice", lambda index: made)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: made.name)
    yield dataloader
    assert (fake.violations, fake.registrations) == ([], {})


@pytest.mark.slow
@pytest.mark.leaves("fd", "mapping", "thread", "shm", reason="CUDA keeps what pinning opens")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_all_of_it_as_on_a_gpu(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(sys, "argv", ["dataloader.py", "--short", "--save"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    saved = json.loads((tmp_path / "dataloader-gpu.json").read_text())
    assert (ended.value.code, set(saved["checks"].values())) == (0, {True})
    results = saved["results"]
    assert results["gpu"]["name"] == "Fake 0"
    told = capsys.readouterr().out
    for way in ("torch", "memdesc", "torch, pinned", "memdesc, on the device"):
        assert results[way]["samples"]["n"] == 1
        assert results[way]["memory"]["most"] >= results[way]["memory"]["taken"]
        assert f"{way:24}" in told
    assert results["memdesc, on the device"]["of torch, pinned"] > 0
    assert results["memdesc, on the device"]["statistics"]["batches"] == 8


def test_what_it_says_of_speed_and_memory(script: ModuleType) -> None:
    statistics = {"left_out": 5, "copied_bytes": 512, "batches": 1}
    results: dict[str, Any] = {
        "torch, pinned": {"memory": {"most": 300.0}},
        "memdesc, on the device": {
            "memory": {"most": 250.0},
            "statistics": statistics,
            "of torch, pinned": 1.2,
        },
    }
    assert set(script.checked(results, on_gpu=True).values()) == {True}
    assert len(script.checked(results, on_gpu=False)) == 3
    statistics.update(left_out=6, copied_bytes=513)
    results["torch, pinned"]["memory"]["most"] = 250.0
    results["memdesc, on the device"]["of torch, pinned"] = 1.19
    checks = script.checked(results, on_gpu=True)
    assert [check for check, holds in checks.items() if holds] == [
        "every sample arrived, with its bytes"
    ]
