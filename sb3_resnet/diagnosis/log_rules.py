"""What the log of a run says about its health: pure functions of the logged numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sb3_resnet.diagnosis.columns import Columns, enough, is_actor_critic, keys_with, last_third, logged, median, recent
from sb3_resnet.diagnosis.findings import THRESHOLDS, Finding
from sb3_resnet.diagnosis.reward_rules import overfitting, q_overestimation, slow_curve
from sb3_resnet.diagnosis.setup_rules import value_network_of


def history_findings(
    columns: Columns, finished: bool = False, slow_after: int | None = None, model: Any = None
) -> list[Finding]:
    """
    Find what is wrong with a run from its log.

    :param columns: the log of ``MonitorCallback`` and SB3, as ``sb3_resnet.diagnosis.read_log`` reads it; a rule whose
        columns are missing finds nothing
    :param finished: whether the run has ended, so that epsilon must have reached its final value
    :param slow_after: environment steps after which the reward must have risen; ``None``: as in :data:`THRESHOLDS`
    :param model: the SB3 model of the run, if it is at hand: advice then fits its trunk and algorithm
    :return: the findings
    """
    limit = THRESHOLDS["slow_after"].value if slow_after is None else slow_after
    found = [
        _loss_explodes(columns),
        _q_explodes(columns),
        _loss_oscillates(columns),
        slow_curve(columns, limit, model),
        overfitting(columns),
        q_overestimation(columns, model),
        _dead(columns, "dead_features", "features of the backbone do not vary over a batch"),
        _dead(columns, "dormant_units", "hidden units of the head are dormant (nearly no activation)"),
        _gradients_vanish(columns),
        _gradients_explode(columns, model),
        _lr_zero(columns),
        _batchnorm_drift(columns),
        _epsilon(columns) if finished else None,
        _amp_skips(columns),
    ]
    return [finding for finding in found if finding is not None]


def _loss_explodes(columns: Columns) -> Finding | None:
    loss = _loss(columns)
    change = "Write a smaller learning_rate (a third), and clip: GradientClipCallback(max_norm=2.0)."
    if len(loss) and not np.isfinite(loss[-1]):
        change = "Write a smaller learning_rate (a third)." if is_actor_critic(columns) else change
        seen = f"The loss is {loss[-1]:g} after {len(loss)} logged values."
        return Finding("loss_explodes", seen, "The weights are lost.", change, "error")
    if len(loss) < enough() or is_actor_critic(columns):
        return None
    first, middle, last = (float(np.median(part)) for part in np.array_split(loss, 3))
    # Below 1, where Huber's loss is a square, errors are smaller than one clipped reward.
    if last <= 1.0 or not (first < middle < last and last > THRESHOLDS["loss_growth"].value * first):
        return None
    seen = f"The loss grew from {first:.3g} to {middle:.3g} and {last:.3g} (medians of the thirds of the log)."
    return Finding("loss_explodes", seen, "Q-learning diverges: targets chase values that run away.", change, "error")


def _q_explodes(columns: Columns) -> Finding | None:
    bound = logged(columns, "monitor/q_bound")
    extremes = [np.abs(recent(columns, key)) for key in ("monitor/q_max", "monitor/q_min")]
    largest = max((float(np.median(values)) for values in extremes if len(values) >= enough()), default=0.0)
    if not len(bound) or not largest > THRESHOLDS["q_bound"].value * bound[-1]:
        return None
    return Finding(
        "q_explodes",
        f"Q-values of {largest:.3g} exceed {bound[-1]:.3g}, the largest reward seen / (1 - gamma).",
        "No policy can earn that much: Q-learning has diverged.",
        "Write a smaller learning_rate (a third) and target_update_interval=10000, and clip with GradientClipCallback.",
        "error",
    )


def _loss_oscillates(columns: Columns) -> Finding | None:
    loss = _loss(columns)[-3 * int(enough()) :]
    loss = loss[np.isfinite(loss) & (loss > 0)]
    if len(loss) < enough() or is_actor_critic(columns):
        return None
    swing = float(np.exp(np.median(np.abs(np.diff(np.log(loss))))))
    error, reward = median(columns, "monitor/td_p50"), logged(columns, "monitor/reward_max")
    if not math.isnan(error) and len(reward):
        ratio = error / reward[-1]
        sick = ratio > THRESHOLDS["td_size"].value and swing > THRESHOLDS["loss_swing"].value
        size = f", and the typical TD error is {ratio:.3g} times the largest reward"
    else:  # without the monitor's numbers: with rare rewards, a healthy loss swings too
        sick, size = swing > THRESHOLDS["loss_swing_alone"].value, ""
    if not sick:
        return None
    return Finding(
        "loss_oscillates",
        f"The loss typically changes by a factor of {swing:.3g} from one logged value to the next{size}.",
        "Steps are too large: what one update learns, the next one destroys.",
        "Write a smaller learning_rate (a third), and clip: GradientClipCallback(max_norm=2.0).",
    )


def _dead(columns: Columns, name: str, what: str) -> Finding | None:
    share = median(columns, f"monitor/{name}")
    if not share > THRESHOLDS[name].value:
        return None
    change = {
        "dead_features": "Check image_size and use_imagenet_norm, or write pooling='flatten', or other weights.",
        "dormant_units": "Write a smaller learning_rate, or activation_fn='LeakyReLU'.",
    }
    seen = f"{share:.0%} of the {what}."
    return Finding(name, seen, "They carry nothing from the image to the Q-values, and get no gradient.", change[name])


def _gradients_vanish(columns: Columns) -> Finding | None:
    for key in keys_with(columns, "grad_norm/"):
        norm = median(columns, key)
        if norm < THRESHOLDS["vanishing"].value:
            return Finding(
                "gradients_vanish",
                f"The gradient norm of {key.partition('/')[2]} is {norm:.2e}.",
                "This is too small to change a weight: either the loss is zero, or its gradient does not arrive there.",
                "Check that the env gives rewards, and the head's feature_norm='standardize'; for a backbone, "
                "norm='frozen' with pretrained weights or norm='group'.",
            )
    return None


def _gradients_explode(columns: Columns, model: Any) -> Finding | None:
    before, after = (recent(columns, key) for key in ("grad_norm/all", "grad_norm_clipped/all"))
    if min(len(before), len(after)) < enough():
        return None
    norm, clip = float(np.median(before)), float(np.median(after))
    change = (
        "Write a smaller learning_rate (a third) and weight_decay=1e-3, so that the weights grow more slowly, or scale "
        "the rewards: VecNormalize(norm_obs=False)."
    )
    limit = THRESHOLDS["exploding"].value
    if np.isfinite(before).all() and (
        norm <= limit * clip or (_has_large_loss(columns, model) and not _grows(columns))
    ):
        return None
    thirds = ", ".join(f"{value:.3g}" for value in _thirds(columns))
    return Finding(
        "gradients_explode",
        f"The gradient norm is {norm:.3g} before clipping and {clip:.3g} after (medians of the thirds of the log: "
        f"{thirds}).",
        "Clipping hides how large the steps would be: little of the gradient is left.",
        change,
    )


def _has_large_loss(columns: Columns, model: Any) -> bool:
    """:return: whether healthy runs have large gradients too: QR-DQN adds up quantiles, PPO's critic has no bound"""
    return is_actor_critic(columns) or (model is not None and value_network_of(model.policy) != "q_net")


def _grows(columns: Columns) -> bool:
    first, middle, last = _thirds(columns)
    growth = THRESHOLDS["norm_growth"].value
    return last > growth * first and last > math.sqrt(growth) * middle > math.sqrt(growth) * first


def _thirds(columns: Columns) -> list[float]:
    return [float(np.median(part)) for part in np.array_split(logged(columns, "grad_norm/all"), 3)]


def _lr_zero(columns: Columns) -> Finding | None:
    keys = [*keys_with(columns, "train/lr_"), *keys_with(columns, "train/learning_rate")]
    # Over a third of the log, since a schedule may well end at zero.
    rates = [last_third(columns, key) for key in keys]
    rates = [rate for rate in rates if len(rate) >= enough()]
    highest = max((float(rate.max()) for rate in rates), default=math.inf)
    ratios = [last_third(columns, key) for key in keys_with(columns, "update_ratio/")]
    ratios = [ratio for ratio in ratios if len(ratio) >= enough()]
    moved = max((float(np.median(ratio)) for ratio in ratios), default=math.inf)
    if highest < THRESHOLDS["lr_zero"].value:
        seen = f"No learning rate exceeded {highest:.1e} in the last {max(map(len, rates))} logged updates."
    elif moved < THRESHOLDS["update_ratio"].value:
        seen = f"An update changes the weights by {moved:.1e} of their size, at a learning rate of {highest:.1e}."
    else:
        return None
    change = "Write learning_rate=1e-4, or a longer decay_steps or min_factor=0.1 in LRScheduleCallback."
    return Finding("lr_zero", seen, "The run costs time and learns nothing.", change, "error")


def _batchnorm_drift(columns: Columns) -> Finding | None:
    drift = recent(columns, "monitor/batchnorm_drift")
    # The smallest one, since running means begin at 0 and need about ten updates to adapt.
    if len(drift) < enough() or not drift.min() > THRESHOLDS["batchnorm_drift"].value:
        return None
    return Finding(
        "batchnorm_drift",
        f"The means of a batch are {np.median(drift):.2g} standard deviations from BatchNorm's running means.",
        "The network that acts (running statistics) is not the one that trains (the batch's).",
        "Write norm='frozen' (or norm='group' from scratch), or a larger batch_size.",
    )


def _epsilon(columns: Columns) -> Finding | None:
    rate = logged(columns, "rollout/exploration_rate")
    if not len(rate) or rate[-1] <= THRESHOLDS["final_epsilon"].value:
        return None
    return Finding(
        "epsilon_never_ends",
        f"Epsilon was still {rate[-1]:.2g} at the end.",
        "The agent seldom acted by what it had learned.",
        "Write exploration_final_eps=0.05 and exploration_fraction=0.1, or train on.",
    )


def _amp_skips(columns: Columns) -> Finding | None:
    rows = zip(columns.get("train/amp_skipped", ()), columns.get("train/n_updates", ()), strict=False)
    known = [(skipped, updates) for skipped, updates in rows if skipped is not None and updates is not None]
    # Only the latest updates, since GradScaler's first scale is too large by design.
    start = next((row for row in reversed(known) if known[-1][1] - row[1] >= THRESHOLDS["amp_updates"].value), None)
    if start is None:
        return None
    skipped, updates = (last - first for last, first in zip(known[-1], start, strict=True))
    if not skipped > THRESHOLDS["amp_skips"].value * updates:
        return None
    scale = logged(columns, "train/amp_scale")
    return Finding(
        "amp_skips",
        f"{skipped:.0f} of the last {updates:.0f} updates were skipped"
        f"{f', at a loss scale of {scale[-1]:g}' if len(scale) else ''}.",
        "float16 overflows: these batches are lost.",
        "Write AMPCallback(dtype='bfloat16'), or dtype='float32'.",
    )


def _loss(columns: Columns) -> np.ndarray:
    """The monitor's mean over several updates, or else SB3's mean over the last ``train()``."""
    measured = logged(columns, "monitor/loss")
    return measured if len(measured) else logged(columns, "train/loss")
