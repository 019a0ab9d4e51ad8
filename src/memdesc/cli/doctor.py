"""What `memdesc doctor` tells, as one record: features, limits, thresholds. Changes no setting."""

from __future__ import annotations

import os
import platform
import resource
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memdesc import __version__
from memdesc.crossing import calibration
from memdesc.memory.page_kinds import huge_page_size, meminfo
from memdesc.vm.cgroups import memory_cgroups
from memdesc.vm.probe import probe

# What the library can not do its work without; all else has another way, or is extra.
MATTERS = frozenset(
    {
        "memfd_seals",
        "future_write_seal",
        "populate",
        "lock_memory",
        "copy_other_task",
    }
)
_MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")
_THP = Path("/sys/kernel/mm/transparent_hugepage")


def examine(calibration_failure: str = "") -> dict[str, Any]:
    """Try everything and read every limit; `failed` names what matters and is denied."""
    features = [asdict(one) | {"matters": one.name in MATTERS} for one in probe()]
    failed = [one["name"] for one in features if one["matters"] and not one["available"]]
    if calibration_failure:
        failed.append("calibration")
    return {
        "memdesc": __version__,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "user": os.geteuid(),
        "features": features,
        "limits": _limits(),
        "thresholds": _thresholds(),
        "calibration_failure": calibration_failure,
        "failed": failed,
    }


def _limits() -> list[dict[str, Any]]:
    """Read each limit: `value` and `in_use` are numbers, or None for none and for unknown."""
    info = meminfo()
    locked, locked_hard = _rlimit(resource.RLIMIT_MEMLOCK)
    files, files_hard = _rlimit(resource.RLIMIT_NOFILE)
    return [
        _limit("RLIMIT_MEMLOCK", locked, "bytes", _locked(), "wiring", hard=locked_hard),
        _limit(
            "RLIMIT_NOFILE",
            files,
            "file descriptors",
            len(os.listdir("/proc/self/fd")),
            "one for each buffer and each task",
            hard=files_hard,
        ),
        _limit(
            "vm.max_map_count",
            _number(_MAX_MAP_COUNT),
            "mappings",
            len(Path("/proc/self/maps").read_text().splitlines()),
            "one for each mapping",
        ),
        _limit(
            "vm.nr_hugepages",
            info.get("HugePages_Total", 0),
            f"pages of {huge_page_size():,} bytes",
            info.get("HugePages_Total", 0) - info.get("HugePages_Free", 0),
            "the pool of reserved huge pages",
        ),
        _limit("MemAvailable", info["MemAvailable"], "bytes", None, "the machine's memory"),
        _cgroup(),
        _setting("transparent huge pages", _THP / "enabled"),
        _setting("transparent huge pages, shmem", _THP / "shmem_enabled"),
    ]


def _limit(
    name: str, value: int | None, unit: str, in_use: int | None, about: str, **more: Any
) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "in_use": in_use, "about": about} | more


def _rlimit(which: int) -> tuple[int | None, int | None]:
    soft, hard = (
        None if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(which)
    )
    return soft, hard


def _locked() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmLck:")), 0)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except OSError:  # hidden in this container
        return None


def _cgroup() -> dict[str, Any]:
    limited = [group for group in memory_cgroups() if group.limit is not None]
    tightest = min(limited, key=lambda group: group.limit or 0, default=None)
    return _limit(
        "memory cgroup",
        tightest.limit if tightest else None,
        "bytes",
        tightest.used if tightest else None,
        str(tightest.folder) if tightest else "past it the kernel kills",
    )


def _setting(name: str, path: Path) -> dict[str, Any]:
    """Read a choice that the kernel shows as `always [madvise] never`."""
    try:
        text = path.read_text()
    except OSError:
        text = "[not shown here]"
    chosen = text.partition("[")[2].partition("]")[0]
    return _limit(name, None, "", None, str(path)) | {"setting": chosen}


def _thresholds() -> dict[str, Any]:
    found = calibration()
    return {
        "values": asdict(found.thresholds),
        "origin": found.origin.name.lower(),
        "where": found.where,
        "measured": found.measured,
        "figures": {
            way: {str(size): seconds for size, seconds in by_size.items()}
            for way, by_size in found.figures.items()
        },
    }
