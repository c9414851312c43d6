"""
How much memory does ``micro_batch_size`` save?

One process an arm: build DQN with an unfrozen trunk, make one update with a batch of one to warm up, then measure the
peak of resident memory above what the process held before the next update (``VmHWM`` after ``clear_refs``, Linux).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch as th
from filled import filled_dqn

BATCH = 64
RESULT = Path(__file__).parent / "results" / "micro_batches.json"


def status(field: str) -> int:
    """:return: a field of ``/proc/self/status`` in bytes"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(backbone: str, size: int | None, updates: int) -> float:
    """What one process does."""
    th.set_num_threads(1)
    model = filled_dqn(BATCH, backbone=backbone, freeze_backbone=False, micro_batch_size=size)
    model.train(1, 1)  # moments and gradients exist, and so do the buffers of the kernels
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    model.train(updates, BATCH)
    return (status("VmHWM") - before) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--updates", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="processes an arm")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm is not None:
        size = int(arguments.arm) or None
        print(json.dumps(measure(arguments.backbone, size, arguments.updates)))
        return
    runs: dict[int, list[float]] = {size: [] for size in (0, BATCH // 2, BATCH // 4, BATCH // 8)}
    for _ in range(arguments.repeats):
        for size, done in runs.items():
            options = ["--backbone", arguments.backbone, "--updates", str(arguments.updates), "--arm", str(size)]
            output = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True, check=True)
            done.append(json.loads(output.stdout))
    whole = statistics.median(runs[0])
    arms = []
    for size, done in runs.items():
        peak = statistics.median(done)
        row = {"micro_batch_size": size or None, "peak_megabytes": round(peak, 1), "of_whole": round(peak / whole, 3)}
        arms.append({**row, "runs": [round(value, 1) for value in done]})
        print(row)
    result = {
        "question": "peak resident memory, above the resting one, of DQN updates of an unfrozen trunk",
        "backbone": arguments.backbone,
        "batch": BATCH,
        "observation": [4, 84, 84],
        "device": "cpu, one thread",
        "torch": version("torch"),
        "arms": arms,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
