"""
How large is the error of reduced precision next to what distinguishes observations?

    python benchmarks/precision.py    # some minutes on two CPU cores; writes benchmarks/results/precision.json

Random play on Pong, a random ResNet-18, the frozen stages in each ``frozen_dtype`` against the plain float32 modules.
The error of the features is relative to the distance of the typical observation from the median one, as
`sb3-resnet check` has it; that of the Q-values of a new head relative to their standard deviation over them.
"""

from __future__ import annotations

import argparse
import json
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
from sb3_resnet.nn.encoder import rounding_error

RESULT = Path(__file__).parent / "results" / "precision.json"
SEEDS = (0, 1, 2)
PRECISIONS = ("float32", "float16", "bfloat16")


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
    model.policy.set_frozen_dtype(dtype)
    with th.no_grad():
        images = [extractor.scale_raw(part) for part in observations.split(64)]
        exact = th.cat([network.q_net(extractor.plain_features(part)) for part in images])
        rounded = th.cat([network.q_net(extractor(part)) for part in images])
    return {
        "features": round(rounding_error(extractor.encoder, observations[:256]), 4),
        "Q-values": round(float(rms(rounded - exact) / rms(exact - exact.mean(dim=0))), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--observations", type=int, default=512)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for seed in SEEDS:
        env = pong(seed)
        observations = played(env, arguments.observations)
        model = DQN("ResNetCnnPolicy", env, buffer_size=8, device="cpu", seed=seed)
        for boundary in (None, "layer4"):
            model.policy.set_freeze_boundary(boundary)
            for dtype in PRECISIONS:
                found = errors(model, observations, dtype)
                row = {"seed": seed, "trains from": boundary, "frozen_dtype": dtype, **found}
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
