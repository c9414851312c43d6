"""
For which batch should oneDNN order the weights of the frozen stages, and how many images should be encoded at once?

    python benchmarks/packing.py    # two minutes on two quiet CPU cores; writes benchmarks/results/packing.json

Milliseconds of the encoder for batches of several sizes, by the batch for which its weights were ordered: each trunk
and order in turns, the median of the rounds. Images are 84x84, of one frame up to layer2 and of a stack up to layer4.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch as th
from peers import LEAN, machine, timed

from sb3_resnet import ResNetExtractor
from sb3_resnet.nn import inference
from sb3_resnet.nn.encoder import FrozenEncoder

RESULT = Path(__file__).parent / "results" / "packing.json"
TRUNKS: dict[str, dict[str, Any]] = {
    "one frame, layer2, bfloat16": {**LEAN, "frozen_dtype": "bfloat16"},
    "one frame, layer2, float32": {**LEAN, "frozen_dtype": "float32"},
    "stack, layer4, bfloat16": {"frozen_dtype": "bfloat16"},
    "stack, layer4, float32": {},
}
ORDERS = (1, 8, 32)
BATCHES = (1, 4, 8, 16, 32, 64)


def encoder(options: dict[str, Any], order: int) -> FrozenEncoder:
    """:return: an encoder whose weights are ordered for a batch"""
    import gymnasium as gym

    space = gym.spaces.Box(0, 255, (4, 84, 84), "uint8")
    th.manual_seed(0)
    made = ResNetExtractor(space, **options).encoder
    before, inference._PACKED_FOR = inference._PACKED_FOR, order
    try:
        made(images(made, 1))
    finally:
        inference._PACKED_FOR = before
    return made


def images(made: FrozenEncoder, count: int) -> th.Tensor:
    channels = made.trunk.preprocessing.frame_channels if made.trunk.preprocessing.per_frame else 4
    return th.randint(0, 256, (count, channels, 84, 84), dtype=th.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    result: dict[str, Any] = {"command": "python benchmarks/packing.py", "machine": machine(), "rounds": rounds}
    for trunk, options in TRUNKS.items():
        encoders = {order: encoder(options, order) for order in ORDERS}
        times: dict[tuple[int, int], list[float]] = {}
        for round_ in range(rounds + 1):
            for batch in BATCHES:
                for order, made in encoders.items():
                    some = images(made, batch)
                    seconds = timed(lambda: [made(some) for _ in range(5)]) / 5  # noqa: B023  # called at once
                    times.setdefault((order, batch), []).extend([1000 * seconds] if round_ else [])
        result[trunk] = {
            f"ordered for {order}": {
                f"{batch} images, ms": round(statistics.median(times[order, batch]), 2) for batch in BATCHES
            }
            for order in ORDERS
        }
        print(trunk, json.dumps(result[trunk], indent=1), flush=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
