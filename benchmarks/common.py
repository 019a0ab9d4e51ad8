"""What the benchmarks share: the machine's facts, medians with their spread, raw results kept."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The facts that figures depend on."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = Path("/proc/meminfo").read_text().split("\n", 1)[0].split()[1]
    thp = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    return {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "memory_gib": round(int(memory) / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "shmem_thp": thp.read_text().strip() if thp.exists() else None,
        "date": time.strftime("%Y-%m-%d"),
    }


def gpu_facts() -> str | None:
    """The GPU's driver and bus, as nvidia-smi tells them; None where there is none."""
    command = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,pcie.link.gen.current,pcie.link.width.current",
        "--format=csv,noheader",
    ]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None


def summary(samples: list[float]) -> dict[str, float]:
    """Median and spread; the samples themselves go into the raw results."""
    ordered = sorted(samples)
    return {
        "median": statistics.median(ordered),
        "p10": ordered[len(ordered) // 10],
        "p90": ordered[-1 - len(ordered) // 10],
        "n": len(ordered),
    }


def finish(name: str, question: str, results: dict[str, Any], checks: dict[str, bool]) -> None:
    """Print the checks, keep the raw results if asked (--save), exit 1 where a check fails."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--save", action="store_true", help="keep the results in the repository")
    arguments, _ = parser.parse_known_args()
    record = {"question": question, "machine": machine(), "results": results, "checks": checks}
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    for check, holds in checks.items():
        print(f"{'holds' if holds else 'FAILS'}: {check}")
    sys.exit(0 if all(checks.values()) else 1)
