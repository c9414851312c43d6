"""
A doctor beside a healthy run: 20,000 steps of phase A on Pong, in which it must raise no false alarm.

python benchmarks/doctor_pong.py [--weights resnet18.pth]    # writes benchmarks/results/doctor_pong.json

Without ``--weights`` the frozen trunk is random, and then ``frozen_random_backbone`` is no false alarm.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import ale_py
import gymnasium as gym
import torch as th
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecFrameStack

from sb3_resnet.callbacks import DoctorCallback, FeatureCacheCallback, MonitorCallback
from sb3_resnet.diagnosis import history_findings, read_log

RESULTS = Path(__file__).parent / "results" / "doctor_pong.json"
MEDIANS = (
    "monitor/loss",
    "monitor/td_p50",
    "monitor/q_max",
    "monitor/dead_features",
    "monitor/dormant_units",
    "grad_norm/all",
    "update_ratio/head",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="file or torchvision name of the trunk's weights")
    parser.add_argument("--steps", type=int, default=20_000)
    arguments = parser.parse_args()
    th.set_num_threads(1)
    gym.register_envs(ale_py)
    env = VecFrameStack(make_atari_env("PongNoFrameskip-v4", seed=0), 4)
    extractor = {"backbone": "resnet18", "freeze_backbone": True, "weights": arguments.weights}
    model = DQN(
        "ResNetCnnPolicy",
        env,
        buffer_size=20_000,
        learning_starts=1000,
        target_update_interval=1000,
        seed=0,
        device="cpu",
        policy_kwargs={"features_extractor_kwargs": extractor},
    )
    doctor = DoctorCallback(every=20)  # five times as often as by default, to give it every opportunity
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model.set_logger(configure(folder, ["csv"]))
        callbacks = [FeatureCacheCallback(), MonitorCallback(every=20), doctor]
        model.learn(arguments.steps, callback=callbacks, log_interval=1)
        log = read_log(Path(folder) / "progress.csv")
    true = {"frozen_random_backbone"} if arguments.weights is None else set()
    afterwards = history_findings(log, finished=True)
    codes = [finding.code for finding in (*doctor.findings, *afterwards)]
    result = {
        "setting": "PongNoFrameskip-v4, 1 environment, frozen ResNet-18, FeatureCacheCallback, batch 32, train_freq 4",
        "weights": arguments.weights or "random",
        "steps": model.num_timesteps,
        "updates": model._n_updates,
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "measured_updates": doctor._rows,
        "findings": [str(finding) for finding in doctor.findings],
        "findings_from_the_log": [str(finding) for finding in afterwards],
        "false_alarms": sorted({*codes} - true),
        "missed": sorted(true - {*codes}),
        "medians_of_the_log": {key: _median(log.get(key, [])) for key in MEDIANS},
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _median(values: list[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None


if __name__ == "__main__":
    main()
