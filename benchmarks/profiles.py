"""
Where the time of an update goes, by operations of PyTorch.

    python benchmarks/profiles.py      # a minute; writes benchmarks/results/profiles.json

ResNet-18 on Pong, 84x84x4, batch 32, one thread. Shares are of the time on the CPU, as PyTorch's profiler has it. What
a convolution could be is beside it: the arithmetic of those of ``layer4`` with 512 channels, and how fast it was done.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch as th
from peers import LEAN, at_work, dqn, encoded, filled, machine, pong
from torch.profiler import ProfilerActivity, profile

from sb3_resnet.callbacks import AMPCallback

RESULT = Path(__file__).parent / "results" / "profiles.json"
UPDATES = 10
BATCH, CHANNELS, SIDE = 32, 512, 3  # of the maps that the largest convolutions of layer4 see
#: Boundary, arguments of the extractor, and whether the trunk computes in bfloat16.
ARMS: dict[str, tuple[str | None, dict[str, Any], bool]] = {
    "head, frame by frame up to layer2": (None, LEAN, False),
    "layer4": ("layer4", {}, False),
    "layer4, bfloat16": ("layer4", {}, True),
    "everything": ("all", {}, False),
    "everything, bfloat16": ("all", {}, True),
}


def one(stage: str | None, options: dict[str, Any], reduced: bool) -> dict[str, Any]:
    model = filled(dqn("ResNetCnnPolicy", pong(1), features_extractor_kwargs=options))
    model.policy.set_freeze_boundary(stage)
    if stage != "all":
        encoded(model)
    if reduced:
        at_work(AMPCallback("bfloat16", verbose=0), model)
    model.train(3, BATCH)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        model.train(UPDATES, BATCH)
    events = recorded.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    longest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:8]
    found = {
        "milliseconds per update": round(total / 1000 / UPDATES, 2),
        "operations per update": round(sum(event.count for event in events) / UPDATES),
        "shares": {event.key: round(event.self_cpu_time_total / total, 3) for event in longest},
    }
    weight = [CHANNELS, CHANNELS, 3, 3]
    for event in recorded.key_averages(group_by_input_shape=True):
        if event.key == "aten::mkldnn_convolution" and event.input_shapes[1] == weight:
            each = event.self_cpu_time_total / event.count / 1e6
            operations = 2 * BATCH * SIDE**2 * CHANNELS**2 * 9
            found["largest convolution, forward"] = {
                "milliseconds": round(1000 * each, 2),
                "GFLOP per second": round(operations / each / 1e9),
            }
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    th.set_num_threads(1)
    result: dict[str, Any] = {"command": "python benchmarks/profiles.py", "machine": machine()}
    for name, arguments in ARMS.items():
        result[name] = one(*arguments)
        print(name, result[name], flush=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
