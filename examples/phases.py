"""The head first, then layer4, then everything: each phase with its own learning rate. ``python phases.py [STEPS]``."""

import sys

from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import EvalCallback

import sb3_resnet
from sb3_resnet.callbacks import (
    BestCheckpointCallback,
    FeatureCacheCallback,
    GradientClipCallback,
    LRScheduleCallback,
    UnfreezeCallback,
)
from sb3_resnet.envs import make_atari_vec_env

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 300_000
GAME = "PongNoFrameskip-v4"


def main() -> None:
    env = make_atari_vec_env(GAME, n_envs=8, seed=0)
    eval_env = make_atari_vec_env(GAME, seed=1, max_episode_steps=STEPS)
    model = DQN(
        "ResNetCnnPolicy",
        env,
        learning_rate=1e-4,  # the head's
        buffer_size=min(STEPS, 50_000),
        learning_starts=STEPS // 20,
        train_freq=1,
        gradient_steps=2,
        policy_kwargs=dict(
            lr_backbone=1e-5,
            features_extractor_kwargs=dict(pooling="spatial_softmax"),
        ),
        seed=0,
    )
    phases = [
        dict(at_timestep=STEPS // 2, unfreeze_from="layer4", ramp=200),
        # When the evaluations stop rising, and at the latest near the end.
        dict(
            on_plateau=dict(patience=3, latest_timestep=STEPS * 4 // 5),
            unfreeze_from="stem",
            lr_backbone=1e-6,
            restore_best=True,
        ),
    ]
    callbacks = [
        FeatureCacheCallback(),  # ends by itself when everything is unfrozen
        LRScheduleCallback(warmup_steps=200),
        UnfreezeCallback(phases, verbose=1),
        GradientClipCallback(1.0),
        BestCheckpointCallback(max(STEPS // 10, 8), "logs/phases"),
        EvalCallback(eval_env, eval_freq=max(STEPS // 240, 8), n_eval_episodes=1, verbose=0),  # in steps of all 8 games
    ]
    model.learn(STEPS, callback=callbacks)
    print("Lowest stage that trains:", model.policy.freeze_boundary)
    sb3_resnet.param_group_summary(model)


if __name__ == "__main__":
    main()
