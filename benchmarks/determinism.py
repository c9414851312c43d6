"""
What do deterministic algorithms cost?

One process, arms interleaved: updates of DQN with a ResNet-18 on 84x84 frames, with and without
``seed_everything(deterministic=True)``. CPU seconds of one thread; the result is the median of the rounds'
ratios. CUDA is not measured here: there the price is that of cuDNN's and cuBLAS's deterministic algorithms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch as th
from filled import filled_dqn
from stable_baselines3 import DQN

import sb3_resnet

BATCH = 16
RESULT = Path(__file__).parent / "results" / "determinism.json"


def seconds(model: DQN, deterministic: bool, updates: int) -> float:
    sb3_resnet.seed_everything(0, deterministic)
    start = time.process_time()
    model.train(updates, BATCH)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=2)
    arguments = parser.parse_args()
    th.set_num_threads(1)
    trunks = {}
    for trunk in ("frozen", "unfrozen"):
        model = filled_dqn(BATCH, freeze_backbone=trunk == "frozen")
        seconds(model, False, 1)  # warm up
        rounds = []
        for index in range(arguments.rounds):
            arms = (True, False) if index % 2 else (False, True)
            rounds.append({str(arm).lower(): round(seconds(model, arm, arguments.updates), 3) for arm in arms})
        ratio = statistics.median(one["true"] / one["false"] for one in rounds)
        trunks[trunk] = {"ratio": round(ratio, 3), "cpu_seconds_by_deterministic": rounds}
        print(trunk, trunks[trunk])
    result = {
        "question": "time of DQN updates with seed_everything(deterministic=True), relative to deterministic=False",
        "backbone": "resnet18",
        "batch": BATCH,
        "observation": [4, 84, 84],
        "updates_a_round": arguments.updates,
        "device": "cpu, one thread; CUDA was not measured",
        "torch": version("torch"),
        "trunks": trunks,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
