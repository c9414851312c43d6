"""What a log says of the rewards: whether they rise, were memorised, or were expected to be higher."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sb3_resnet.diagnosis.columns import Columns, enough, is_actor_critic, logged, median
from sb3_resnet.diagnosis.findings import THRESHOLDS, Finding
from sb3_resnet.diagnosis.rolling import WINDOW, episodes_at, standard_error
from sb3_resnet.diagnosis.setup_rules import eyes_of, value_network_of

_ALL_FROZEN = 6.0  # of monitor/freeze_boundary


def slow_curve(columns: Columns, slow_after: float, model: Any = None) -> Finding | None:
    """Find rewards that do not rise."""
    keys = [key for key in ("eval/mean_reward", "rollout/ep_rew_mean") if len(logged(columns, key)) >= enough()]
    steps = logged(columns, "time/total_timesteps")
    # A second learn() may count from 0 again.
    made = float(np.maximum(np.diff(steps), 0).sum()) if len(steps) else 0.0
    if not keys or not len(steps) or made < slow_after:
        return None
    reward = logged(columns, keys[0])
    first, _, last = np.array_split(reward, 3)
    if keys[0] == "eval/mean_reward":
        error = math.sqrt(first.var(ddof=1) / len(first) + last.var(ddof=1) / len(last))
    else:
        window = getattr(getattr(model, "ep_info_buffer", None), "maxlen", None) or WINDOW
        error = standard_error(reward, episodes_at(columns), window)
    gain = float(last.mean() - first.mean())
    if not gain <= THRESHOLDS["slow_curve"].value * error:  # also for NaN
        return None
    return Finding(
        "slow_curve",
        f"{keys[0]} was {first.mean():.4g} in the first third of {made:.0f} steps and {last.mean():.4g} in the last.",
        "The agent does not get better (ignore this if it is already as good as can be).",
        f"Try {_unfreeze(model) if _is_frozen(columns) else ''}a learning_rate three times as high for the head.",
    )


def _is_frozen(columns: Columns) -> bool:
    return bool((logged(columns, "monitor/freeze_boundary")[-1:] == _ALL_FROZEN).any())


def _unfreeze(model: Any) -> str:
    """:return: the advice to train the trunk's last stage, by its name where the model is known"""
    stages = [] if model is None else getattr(eyes_of(model), "stages", [])
    stage, which = (repr(stages[-1]), "") if stages else ("STAGE", " (STAGE: the last stage of your trunk)")
    text = f"UnfreezeCallback([dict(at_timestep=..., unfreeze_from={stage})]){which}"
    return f"{text}, since the whole backbone is frozen, or "


def overfitting(columns: Columns) -> Finding | None:
    """Find evaluations far below training."""
    rewards, evaluations = columns.get("rollout/ep_rew_mean", ()), columns.get("eval/mean_reward", ())
    pairs: list[tuple[float, float]] = []
    train: float | None = None
    for reward, evaluation in zip(rewards, evaluations, strict=False):
        train = reward if reward is not None else train
        if evaluation is not None and train is not None:
            pairs.append((train, evaluation))
    if len(pairs) < 5:
        return None
    table = np.array(pairs)
    span = float(table.max() - table.min())
    gaps = table[-3:, 0] - table[-3:, 1]
    if span == 0 or not gaps.min() > THRESHOLDS["overfitting"].value * span:
        return None
    fewer = ", or train fewer stages: a higher unfreeze_from, or freeze_backbone=True"
    train_mean, evaluation_mean = table[-3:].mean(axis=0)
    return Finding(
        "overfitting",
        f"In the last three evaluations the mean reward was {evaluation_mean:.4g}, in training {train_mean:.4g}.",
        "The agent has memorised its training episodes.",
        "Try dropout=0.1, weight_decay=1e-3, augment=['random_shift'] in features_extractor_kwargs (with the feature "
        f"cache, FeatureCacheCallback(augment_copies=4)){'' if _is_frozen(columns) else fewer}.",
    )


def q_overestimation(columns: Columns, model: Any = None) -> Finding | None:
    """Find expectations far above what follows."""
    expected, got = median(columns, "monitor/q_start"), median(columns, "monitor/return_start")
    returns, rewards = np.abs(logged(columns, "monitor/return_start")), logged(columns, "monitor/reward_max")
    # No bound of what is possible: nobody earns the largest reward at each step. Losses are no reason to expect little.
    if not len(rewards) or not len(returns):
        return None
    largest = max(float(returns.max()), float(rewards[-1]))
    if not expected - max(got, 0.0) > THRESHOLDS["q_overestimation"].value * largest:
        return None
    why, change = _too_high(columns, model)
    return Finding(
        "q_overestimation",
        f"At the start of episodes the agent expects {expected:.3g} and gets {got:.3g} (discounted).",
        why,
        change,
    )


def _too_high(columns: Columns, model: Any) -> tuple[str, str]:
    """:return: why values are too high, and the arguments of this algorithm that help"""
    network = None if model is None else value_network_of(model.policy)
    if is_actor_critic(columns) or (model is not None and network is None):
        steps = "a larger n_steps (twice)" if model is None else f"n_steps={2 * model.n_steps}"
        return (
            "The critic believes its own errors, so advantages are wrong by as much.",
            f"Write {steps} and a smaller learning_rate (a third).",
        )
    interval = max(10_000, 2 * getattr(model, "target_update_interval", 0))
    other = "" if network == "quantile_net" else ", or train QRDQN instead of DQN"
    return (
        "The maximum in the target picks errors that are too high; a policy that believes them stops improving.",
        f"Write target_update_interval={interval} and a smaller learning_rate (a third){other}.",
    )
