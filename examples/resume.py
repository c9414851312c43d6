"""Kill it at any time and start it again: it goes on from its newest checkpoint. ``python resume.py [STEPS]``."""

import sys
from pathlib import Path

from stable_baselines3 import DQN

import sb3_resnet
from sb3_resnet.callbacks import BestCheckpointCallback, FeatureCacheCallback, LRScheduleCallback
from sb3_resnet.envs import make_atari_vec_env

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
FOLDER = Path("logs", "resume")


def main() -> None:
    env = make_atari_vec_env("PongNoFrameskip-v4", n_envs=8, seed=0)
    # SB3 does not save callbacks, so they are built anew each time, with the same arguments.
    callbacks = [
        BestCheckpointCallback(max(STEPS // 20, 8), FOLDER, save_replay_buffer=True),
        FeatureCacheCallback(),
        LRScheduleCallback(warmup_steps=100, schedule="cosine", decay_steps=STEPS // 4),
    ]
    try:
        path = sb3_resnet.newest_checkpoint(FOLDER)
    except FileNotFoundError:
        path = None
    if path is not None:
        model = DQN.load(path, env=env)
        model.load_replay_buffer(path.with_name(f"{path.stem}_replay_buffer.pkl"))
        sb3_resnet.restore_random_states(path, model)  # last: loading seeds them anew
        print(f"Going on at step {model.num_timesteps} from {path}", flush=True)
    else:
        model = DQN(
            "ResNetCnnPolicy",
            env,
            buffer_size=min(STEPS, 20_000),
            learning_starts=STEPS // 20,
            train_freq=1,
            gradient_steps=2,
            policy_kwargs=dict(features_extractor_kwargs=dict(adapter="per_frame", last_stage="layer2")),
            seed=0,
        )
        print("Beginning", flush=True)
    model.learn(STEPS - model.num_timesteps, callback=callbacks, reset_num_timesteps=False)
    print(f"Done: {model.num_timesteps} steps", flush=True)


if __name__ == "__main__":
    main()
