"""NaN and infinity get an error with a name before anything is trained on them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch as th

FIND_THE_STEP = "SB3's VecCheckNan(env, raise_exception=True) around the environment names the step that makes them"


def any_non_finite(tensors: Iterable[th.Tensor]) -> bool:
    """
    :param tensors: floating-point tensors, of one device each type
    :return: whether there is a NaN or an infinity among their values; a norm could overflow and say so wrongly
    """
    kinds: dict[Any, list[th.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for (device, _), same in kinds.items():
        found, one = th.zeros((), device=device), th.ones((), device=device)
        # What torch.amp.GradScaler asks, here with a scale of 1: one pass for all tensors, one wait for the device.
        th._amp_foreach_non_finite_check_and_unscale_(same, found, one)
        if found.item():
            return True
    return False


def gradients(optimizer: th.optim.Optimizer) -> list[th.Tensor]:
    """
    :param optimizer: an optimizer
    :return: the gradients that its next step would use
    """
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def check_observations(observations: th.Tensor) -> None:
    """
    :param observations: images of a float space; those of a uint8 space cannot hold such values
    :raises ValueError: if there is a NaN or an infinity in them
    """
    if th.compiler.is_compiling():  # an exported graph has no such branch
        return
    if not observations.isfinite().all():
        raise ValueError(f"The observations hold NaN or inf. {FIND_THE_STEP}.")


def check_gradients(optimizer: th.optim.Optimizer) -> None:
    """
    Costs a fifth of AdamW's own step where that is fused (``benchmarks/results/choices.json``).

    :param optimizer: about to step
    :raises ValueError: if there is a NaN or an infinity in a gradient
    """
    if any_non_finite(gradients(optimizer)):
        raise ValueError(
            "The gradient holds NaN or inf, so this update was not made. Either rewards hold such values "
            f"({FIND_THE_STEP}), or training diverges: lower learning_rate."
        )


def check_sampled_rewards() -> None:
    """
    To be called from within SB3's off-policy ``train()``; does nothing elsewhere.

    The gradient shows a NaN but no infinite reward: Huber's loss makes a slope of 1 of it. SB3 hands the batch to
    nobody, so it is read from the local variables of ``train()``.

    :raises ValueError: if there is a NaN or an infinity among the rewards of the batch
    """
    frame = sys._getframe().f_back
    while frame is not None and not (frame.f_code.co_name == "train" and "replay_data" in frame.f_code.co_varnames):
        frame = frame.f_back
    rewards = None if frame is None else getattr(frame.f_locals.get("replay_data"), "rewards", None)
    if isinstance(rewards, th.Tensor) and not rewards.isfinite().all():
        raise ValueError(f"The sampled rewards hold NaN or inf, so this update was not made. {FIND_THE_STEP}.")
