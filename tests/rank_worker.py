"""
One rank in a process of its own, as a launcher starts it: trains the tiny game, and saves what it has become.

Prints a line for each rollout, so that a test knows when to kill it. Usage: rank_worker.py FOLDER TIMESTEPS [TIMEOUT]
"""

import os
import sys
from pathlib import Path

import torch as th
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback

import sb3_resnet
from sb3_resnet.callbacks import BestCheckpointCallback, DataParallelCallback, UnfreezeCallback
from sb3_resnet.common.in_step import weigh
from tests.helpers import TinyGame, make_model


class Tells(BaseCallback):
    def _on_step(self):
        return True

    def _on_rollout_end(self):
        print("rollout", self.num_timesteps, flush=True)


def main(folder, total, timeout=60.0):
    th.set_num_threads(1)
    folder, rank = Path(folder), os.environ.get("RANK", "0")
    try:
        path = sb3_resnet.newest_checkpoint(folder)
        model = DQN.load(path, env=TinyGame(), device="cpu")
        print("resumed", model.num_timesteps, model.policy.freeze_boundary, flush=True)
    except FileNotFoundError:
        model = make_model(extractor={"backbone": "resnet_mini"})
    callbacks = [
        DataParallelCallback(timeout=float(timeout)),
        UnfreezeCallback([{"at_timestep": 64, "unfreeze_from": "layer4"}], verbose=0),
        BestCheckpointCallback(save_freq=48, save_path=folder),
        Tells(),
    ]
    model.learn(int(total) - model.num_timesteps, callback=callbacks, reset_num_timesteps=False)
    print("weighs", weigh(model), flush=True)
    print("ended", model.num_timesteps, model.policy.freeze_boundary, rank, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
