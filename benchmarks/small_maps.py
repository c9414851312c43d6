"""
What training on small maps in bfloat16 gains by products of matrices instead of convolutions.

    python benchmarks/small_maps.py      # a minute on one CPU core; writes benchmarks/results/small_maps.json

First convolutions alone, forward and backward, batch 32, by channels and size of the output map. Then updates of
``ResNetCnnPolicy`` with its defaults on real Pong (84x84x4, batch 32). Arms are interleaved; a ratio is the median of
the rounds' own ratios: how many times as fast as ``nn.Conv2d``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch as th
from peers import at_work, dqn, encoded, filled, machine, pong, timed
from torch import nn

from sb3_resnet.callbacks import AMPCallback
from sb3_resnet.nn import small_maps

RESULT = Path(__file__).parent / "results" / "small_maps.json"
#: Input and output channels, size of the input map, stride.
CONVOLUTIONS = [
    (512, 512, 3, 1), (256, 512, 6, 2), (512, 512, 4, 1), (256, 512, 8, 2), (512, 512, 5, 1), (256, 256, 6, 1),
    (128, 256, 11, 2), (512, 512, 7, 1), (256, 512, 14, 2), (256, 256, 5, 1), (256, 256, 4, 1), (128, 128, 4, 1),
    (64, 64, 4, 1),
]  # fmt: skip
#: Boundary.
UPDATES = {"layer4": "layer4", "everything": "all"}


def both_ways(conv: nn.Module, x: th.Tensor) -> Callable[[], None]:
    """Forward and backward once."""
    x = x.clone().requires_grad_()

    def run() -> None:
        with th.autocast("cpu", th.bfloat16):
            out = conv(x)
        out.backward(th.ones_like(out))
        x.grad = None
        conv.zero_grad()

    return run


def compared(arms: dict[str, Callable[[], Any]], rounds: int, count: int) -> dict[str, Any]:
    """Milliseconds of each arm, and how many times as fast the second is as the first."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(rounds + 1):
        for name, run in arms.items():
            seconds = timed(lambda: [run() for _ in range(count)])  # noqa: B023  # called at once
            times[name] += [1000 * seconds / count] if round_ else []
    conv, ours = times.values()
    ratio = statistics.median(a / b for a, b in zip(conv, ours, strict=True))
    medians = {name: round(statistics.median(values), 2) for name, values in times.items()}
    return {"milliseconds": medians, "times as fast": round(ratio, 2)}


def convolution(shape: tuple[int, int, int, int], rounds: int) -> dict[str, Any]:
    inputs, outputs, size, stride = shape
    plain = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    x = th.randn(32, inputs, size, size).to(th.bfloat16, memory_format=th.channels_last)
    ours = small_maps.SmallMapConv2d(copy.deepcopy(plain))
    return compared({"Conv2d": both_ways(plain, x), "product": both_ways(ours, x)}, rounds, 4)


def update(stage: str, channels: float) -> Callable[[], Any]:
    """An update with products where there are so many channels per pixel."""
    model = filled(dqn("ResNetCnnPolicy", pong(1)))
    model.policy.set_freeze_boundary(stage)
    if stage != "all":
        encoded(model)
    at_work(AMPCallback("bfloat16"), model)

    def run() -> None:
        small_maps.CHANNELS_PER_PIXEL = channels
        model.train(1, 32)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    th.set_num_threads(1)
    result: dict[str, Any] = {"command": "python benchmarks/small_maps.py", "machine": machine(), "convolutions": {}}
    result["rounds"] = arguments.rounds
    chosen, small_maps.CHANNELS_PER_PIXEL = small_maps.CHANNELS_PER_PIXEL, 0  # always products
    for shape in CONVOLUTIONS:
        inputs, outputs, size, stride = shape
        side = (size - 1) // stride + 1
        name = f"{inputs} to {outputs} channels, {side}x{side}"
        result["convolutions"][name] = convolution(shape, arguments.rounds)
        print(name, result["convolutions"][name], flush=True)
    result["updates"] = {}
    for name, stage in UPDATES.items():
        arms = {"Conv2d": update(stage, math.inf), "product": update(stage, chosen)}
        result["updates"][name] = compared(arms, arguments.rounds, 2)
        print(name, result["updates"][name], flush=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
