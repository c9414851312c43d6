"""
How large is the error of reduced precision next to what distinguishes observations?

    python benchmarks/precision.py    # some minutes on two CPU cores; writes benchmarks/results/precision.json

Random play on Pong, a random ResNet-18, the feature cache's encoder in each precision against the plain module. The
error of the features is relative to the distance of the typical observation from the median one, as the encoder's own
check has it; that of the Q-values of a new head relative to their standard deviation over the observations.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack, VecTransposeImage

import sb3_resnet  # noqa: F401  # registers "ResNetCnnPolicy"
from sb3_resnet.cache.batch import EncodedBatch
from sb3_resnet.nn import encoder as encoders

RESULT = Path(__file__).parent / "results" / "precision.json"
SEEDS = (0, 1, 2)
PRECISIONS = {"float32, entries in float16": "auto", "float16": "float16", "bfloat16": "bfloat16"}


def pong(seed: int) -> VecTransposeImage:
    gym.register_envs(ale_py)
    return VecTransposeImage(VecFrameStack(make_atari_env("PongNoFrameskip-v4", n_envs=8, seed=seed), 4))


def played(env: Any, count: int) -> th.Tensor:
    """Observations of random play, after the first steps, in which the ball is not there."""
    env.reset()
    seen = []
    for step in range(50 + count // 8):
        observations, *_ = env.step(np.array([env.action_space.sample() for _ in range(8)]))
        seen += [observations] if step >= 50 else []
    return th.as_tensor(np.concatenate(seen))


def rms(values: th.Tensor) -> th.Tensor:
    return values.square().mean().sqrt()


def errors(model: DQN, observations: th.Tensor, dtype: str) -> dict[str, float]:
    network = model.policy.q_net
    extractor = network.features_extractor
    encoder = encoders.FrozenEncoder(extractor.trunk, dtype)
    if dtype == "auto" and encoder.dtype != th.float32:
        sys.exit('run it where "auto" is float32: on a CPU without bfloat16')
    parts = observations.split(64)
    with th.inference_mode():
        exact = th.cat([extractor.frozen_part(extractor.preprocess(extractor.scale_raw(part))) for part in parts])
        encoder(parts[0])  # chooses what is subtracted from entries
        fast = th.cat([EncodedBatch(encoder(part), encoder.centre).features for part in parts])
        head = [network.q_net(extractor.live_part(entries)) for entries in (exact, fast)]
    exact, fast = exact.flatten(1), fast.flatten(1)
    spread = (exact - exact.median(dim=0).values).square().mean(dim=1).sqrt().median()
    return {
        "features": round(float(rms(fast - exact) / spread), 4),
        "Q-values": round(float(rms(head[1] - head[0]) / rms(head[0] - head[0].mean(dim=0))), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--observations", type=int, default=512)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    encoders.MAX_ERROR = float("inf")  # measured here, not acted upon
    for seed in SEEDS:
        env = pong(seed)
        observations = played(env, arguments.observations)
        model = DQN("ResNetCnnPolicy", env, buffer_size=8, device="cpu", seed=seed)
        for boundary in (None, "layer4"):
            model.policy.set_freeze_boundary(boundary)
            for name, dtype in PRECISIONS.items():
                found = errors(model, observations, dtype)
                row = {"seed": seed, "trains from": boundary, "computing in": name, **found}
                rows.append(row)
                print(row, flush=True)
    result = {
        "command": "python benchmarks/precision.py",
        "question": "error of reduced precision relative to the spread over observations",
        "observations": arguments.observations,
        "torch": th.__version__,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
