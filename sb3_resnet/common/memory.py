"""How much memory this process takes, and how much is left for it: from Linux itself, elsewhere from psutil."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch as th

_STATM = Path("/proc/self/statm")
_MEMINFO = Path("/proc/meminfo")
#: Files with limit and use of a container, in versions 2 and 1 of cgroups.
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def process_bytes() -> int | None:
    """:return: resident memory of this process in bytes; ``None`` if it is not known"""
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    psutil = _psutil()
    return None if psutil is None else int(psutil.Process().memory_info().rss)


def device_bytes(device: th.device | str) -> int | None:
    """
    :param device: device of a model
    :return: memory of the tensors on this GPU in bytes; ``None`` for a CPU, where they are part of the process's memory
    """
    if th.device(device).type != "cuda":
        return None
    return int(th.cuda.memory_allocated(device))


def available_bytes() -> int | None:
    """:return: memory in bytes that can still be taken, within the limit of a container; ``None`` if it is not known"""
    known = [value for value in (_system_available(), _container_available()) if value is not None]
    return min(known, default=None)


def largest_array_bytes() -> int | None:
    """:return: size in bytes beyond which Linux refuses a single array, used or not; ``None`` if it is not known"""
    sizes = _meminfo()
    return sizes["MemTotal"] + sizes.get("SwapTotal", 0) if "MemTotal" in sizes else None


def _meminfo() -> dict[str, int]:
    if not _MEMINFO.exists():
        return {}
    lines = (line.split(":") for line in _MEMINFO.read_text().splitlines() if line.endswith("kB"))
    return {name: int(rest.split()[0]) * 1024 for name, rest in lines}


def _system_available() -> int | None:
    available = _meminfo().get("MemAvailable")
    if available is not None:
        return available
    psutil = _psutil()
    return None if psutil is None else int(psutil.virtual_memory().available)


def _container_available() -> int | None:
    for limit, used in _CGROUPS:
        if limit.exists() and used.exists():
            text = limit.read_text().strip()
            taken = int(used.read_text()) - _page_cache(limit.with_name("memory.stat"))
            return max(0, int(text) - taken) if text.isdigit() else None
    return None


def _page_cache(stat: Path) -> int:
    """Memory of cached files that were not used lately. It counts as used, but Linux frees it when it is needed."""
    values = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))  # cgroup version 1 and 2


def _psutil() -> Any:
    try:
        import psutil
    except ImportError:
        return None
    return psutil
