"""The recommended callbacks for fine-tuning, in one call."""

from __future__ import annotations

from pathlib import Path

from stable_baselines3.common.callbacks import CallbackList

from sb3_resnet.callbacks import (
    BestCheckpointCallback,
    GradientClipCallback,
    LRScheduleCallback,
    MonitorCallback,
    UnfreezeCallback,
)
from sb3_resnet.common.arguments import choice, integer
from sb3_resnet.nn.backbones import STAGES


def fine_tuning_callbacks(
    total_timesteps: int = 1_000_000,
    warmup_steps: int = 1000,
    ramp: int = 1000,
    max_norm: float = 2.0,
    save_freq: int = 10_000,
    save_path: str | Path | None = None,
    restore_best: bool = False,
    monitor_every: int | None = 100,
    last_stage: str = "layer4",
) -> CallbackList:
    """
    Make the callbacks that train the head first and then unfreeze the upper stages.

    The backbone stays frozen for the first 40 % of training. Then its highest stage trains, and from 70 % on the one
    below too; the stages below those detect edges and colours, and stay frozen. The backbone learns at a tenth of the
    head's rate, which is the policy's default. Gradients are clipped, checkpoints and the best models are saved, and
    loss, learning rates, gradient norms and memory are logged; the evaluation reward is logged by an ``EvalCallback``
    beside them. Example::

        recipe = sb3_resnet.fine_tuning_callbacks(1_000_000, save_path="logs")
        model.learn(1_000_000, callback=[recipe, EvalCallback(eval_env)])

    In RL-Zoo's YAML::

        callback:
          - sb3_resnet.fine_tuning_callbacks:
              total_timesteps: 1000000

    :param total_timesteps: environment steps of the whole training
    :param warmup_steps: gradient updates of the head's warmup (500 to 2000 is usual)
    :param ramp: gradient updates in which the backbone's rate rises after each unfreezing
    :param max_norm: largest gradient norm of the head, and of the backbone (1 to 5 is usual)
    :param save_freq: environment steps between two checkpoints
    :param save_path: folder of checkpoints and best models; ``None``: that of the ``EvalCallback``, which RL-Zoo sets
    :param restore_best: whether to begin each phase with the best model of the phase before it
    :param monitor_every: gradient updates between two measurements of the :class:`MonitorCallback`; ``None``: without
        one, such as beside a ``MonitorCallback`` of your own
    :param last_stage: the highest stage, as in the model's ``features_extractor_kwargs``; with ``"layer2"`` the phases
        begin at ``layer2`` and ``layer1``, and with ``"stem"`` there is one
    :return: a list of callbacks, to pass to ``learn()``
    :raises ValueError: for values that cannot work
    """
    total = integer("total_timesteps", total_timesteps, 10)
    phases = [
        {"at_timestep": int(share * total), "unfreeze_from": stage, "ramp": ramp, "restore_best": restore_best}
        for share, stage in zip((0.4, 0.7), _upper_two(last_stage), strict=False)
    ]
    monitor = [] if monitor_every is None else [MonitorCallback(every=monitor_every)]
    return CallbackList(
        [
            LRScheduleCallback(warmup_steps=warmup_steps),
            UnfreezeCallback(phases),
            GradientClipCallback(max_norm=max_norm),
            *monitor,
            BestCheckpointCallback(save_freq=save_freq, save_path=save_path),
        ]
    )


def _upper_two(last_stage: str) -> list[str]:
    """:return: this stage and the one below, which ``"stem"`` has not"""
    top = STAGES.index(choice("last_stage", last_stage, STAGES))
    return [*STAGES[max(0, top - 1) : top + 1]][::-1]
