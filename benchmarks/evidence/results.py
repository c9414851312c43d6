"""Result files: one that is the same each time, and one with the times."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

import sb3_resnet
from sb3_resnet.common.files import written_whole

from .games import suite_of
from .recording import Log
from .spec import Run

#: Key of the columns of times.
SECONDS = "seconds of training (step, processor, clock), and with evaluations (clock)"


def _code() -> str:
    folders = (Path(sb3_resnet.__file__).parent, Path(__file__).parent)
    found = hashlib.sha256()
    for file in (file for folder in folders for file in sorted(folder.rglob("*.py"))):
        found.update(file.read_bytes())
    return found.hexdigest()[:12]


#: Checksum of the package and the suite, which may change between two runs and not change a version. It is taken when
#: a process starts: files may be edited while it trains.
CODE = _code()


def write_result(run: Run, path: Path, log: Log, settings: dict[str, Any]) -> None:
    """
    Write both files of a run. Times are in one of their own: they are never the same again.

    :param run: that has ended
    :param path: of the result
    :param log: of the run
    :param settings: what it trained with
    """
    returns = [np.mean(entry["returns"]) for entry in log.evaluations]
    result = {
        **{"command": run.command, "suite": run.suite, "budget": run.budget, "is_try": run.is_try},
        "game": suite_of(run.suite).env_id(run.game),
        **{name: getattr(run, name) for name in ("arm", "seed", "steps", "learning_rate")},
        "steps done": log.steps,
        "last evaluation": float(returns[-1]),
        "mean of all evaluations": float(np.mean(returns)),
        "evaluations": log.evaluations,
        "episodes of training (step, return)": log.episodes,
        "settings": {name: value for name, value in settings.items() if name not in ("command", "code")},
        "code": settings.get("code", [CODE]),
        "versions": _versions("ale-py" if run.suite == "atari" else "minigrid"),
    }
    times = {
        "cpu": cpu_name(),
        "gpu": th.cuda.get_device_name() if run.plan.device == "cuda" else None,
        "threads": run.plan.threads,
        SECONDS: log.seconds,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path.with_suffix(".times.json"), path) as (times_file, result_file):
        times_file.write_text(json.dumps(times) + "\n")
        result_file.write_text(json.dumps(result) + "\n")


def _versions(domain: str) -> dict[str, str]:
    """Of what decides the result: another package that happens to be installed is no difference."""
    found = {"python": platform.python_version(), "sb3_resnet": sb3_resnet.__version__}
    for package in ("stable-baselines3", "torch", "numpy", "gymnasium", domain):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def cpu_name() -> str:
    """:return: what the system calls its processor"""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
