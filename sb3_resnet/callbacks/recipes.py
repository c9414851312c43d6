"""The recommended fine-tuning schedule as one call."""

from __future__ import annotations

from pathlib import Path

from stable_baselines3.common.callbacks import CallbackList

from sb3_resnet.callbacks import (
    BestCheckpointCallback,
    GradientClipCallback,
    LRScheduleCallback,
    UnfreezeCallback,
)
from sb3_resnet.common.arguments import integer


def fine_tuning_callbacks(
    total_timesteps: int = 1_000_000,
    warmup_steps: int = 1000,
    ramp: int = 1000,
    max_norm: float = 2.0,
    save_freq: int = 10_000,
    save_path: str | Path | None = None,
    restore_best: bool = False,
) -> CallbackList:
    """
    Head first with warmup, then the upper stages at a tenth of the learning rate, clipped, the best model kept.

    The backbone stays frozen for the first 40 % of training, then ``layer4`` trains, and from 70 % on ``layer3`` too;
    what lies below sees edges and colours and is left alone. The tenth is the policy's default ``lr_backbone``.
    Example::

        recipe = sb3_resnet.fine_tuning_callbacks(1_000_000, save_path="logs")
        model.learn(1_000_000, callback=[recipe, EvalCallback(eval_env)])

    In RL-Zoo's YAML::

        callback:
          - sb3_resnet.fine_tuning_callbacks:
              total_timesteps: 1000000

    :param total_timesteps: environment steps of the whole training
    :param warmup_steps: gradient updates of the head's warmup (500 to 2000 is usual)
    :param ramp: gradient updates in which the backbone's rate rises at each unfreezing
    :param max_norm: largest gradient norm of head and of backbone (1 to 5 is usual)
    :param save_freq: environment steps between two checkpoints
    :param save_path: folder of checkpoints and best models; ``None``: that of the ``EvalCallback``,
        which has one in RL-Zoo
    :param restore_best: start each phase from the best model of the one before
    :return: the callbacks, as one
    :raises ValueError: for values that cannot work
    """
    total = integer("total_timesteps", total_timesteps, 10)
    common = {"ramp": ramp, "restore_best": restore_best}
    return CallbackList(
        [
            LRScheduleCallback(warmup_steps=warmup_steps),
            UnfreezeCallback(
                phases=[
                    {"at_timestep": int(0.4 * total), "unfreeze_from": "layer4", **common},
                    {"at_timestep": int(0.7 * total), "unfreeze_from": "layer3", **common},
                ]
            ),
            GradientClipCallback(max_norm=max_norm),
            BestCheckpointCallback(save_freq=save_freq, save_path=save_path),
        ]
    )
