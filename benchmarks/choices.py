"""
Small choices of the code, each next to what it replaces.

    python benchmarks/choices.py    # two minutes on two CPU cores; writes benchmarks/results/choices.json

The two sides of a pair take turns; the figure is the median over the rounds of the plain side's time relative to the
chosen one's. Comments in the code that give such a ratio mean these, on a machine as the file describes it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch as th
from filled import filled_dqn

from sb3_resnet.common.nonfinite import check_gradients
from sb3_resnet.nn import inference as convolutions
from sb3_resnet.nn.encoder import FrozenEncoder

RESULT = Path(__file__).parent / "results" / "choices.json"
Pair = tuple[Callable[[], Any], Callable[[], Any]]


def pairs() -> dict[str, Pair]:
    """The plain side and the chosen one, by name."""
    return {**encoding(), **gathering(), **standardizing(), **stepping()}


def encoding() -> dict[str, Pair]:
    extractor = filled_dqn(32).policy.q_net.features_extractor
    images = th.randint(0, 256, (32, 4, 84, 84), dtype=th.uint8)
    packed, unpacked = extractor.encoder, FrozenEncoder(extractor.trunk)
    with patch.object(convolutions, "can_pack", return_value=False):
        unpacked.refresh()
    return {
        "weights packed once, 1 image": (lambda: unpacked(images[:1]), lambda: packed(images[:1])),
        "16 images encoded together": (
            lambda: [packed(image[None]) for image in images[:16]],
            lambda: packed(images[:16]),
        ),
        "fingerprint, holders kept": (lambda: FrozenEncoder(extractor.trunk).can_replace_modules, packed.refresh),
    }


def gathering() -> dict[str, Pair]:
    table = th.rand(20_000, 512).half()
    rows = np.random.default_rng(0).integers(0, len(table), 32)
    return {
        "32 rows in one gather": (
            lambda: th.stack([table[row] for row in rows.tolist()]),
            lambda: table.index_select(0, th.as_tensor(rows)),
        )
    }


def standardizing() -> dict[str, Pair]:
    features = th.rand(32, 512)

    def moments() -> Any:
        mean = features.mean(dim=0)
        return mean, (features - mean).square().mean(dim=0)

    return {"moments in two passes": (lambda: th.var_mean(features, dim=0, correction=0), moments)}


def stepping() -> dict[str, Pair]:
    def adamw(**options: Any) -> th.optim.Optimizer:
        extractor = filled_dqn(1).policy.q_net.features_extractor
        parameters = [*th.nn.ModuleList(extractor.stage_modules("layer4")).parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True).grad = th.randn_like(parameter)
        return th.optim.AdamW(parameters, **options)

    plain, fused = adamw(), adamw(fused=True)

    def checked() -> None:
        check_gradients(fused)
        fused.step()

    return {
        "AdamW fused, layer4": (plain.step, fused.step),
        "AdamW fused, layer4, with the check of gradients": (checked, fused.step),
    }


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "command": "python benchmarks/choices.py",
        "machine": {
            "cpu capability": th.backends.cpu.get_cpu_capability(),
            "torch threads": th.get_num_threads(),
            "torch": th.__version__,
        },
        "rounds": arguments.rounds,
        "plain to chosen": {},
    }
    for name, (plain, chosen) in pairs().items():
        ratios = [seconds(plain) / seconds(chosen) for _ in range(arguments.rounds + 3)][3:]  # the first warm up
        result["plain to chosen"][name] = round(statistics.median(ratios), 2)
        print(f"{name}: {result['plain to chosen'][name]}", flush=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
