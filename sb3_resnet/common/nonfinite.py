"""NaN and infinity get an error with a name before anything is trained on them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_resnet.common.step_hooks import before_step

FIND_THE_STEP = "SB3's VecCheckNan(env, raise_exception=True) around the environment names the step that makes them"
#: Key under which a policy lets its own optimizer be checked.
POLICYS_CHECK = "non-finite gradients"


def any_non_finite(tensors: Iterable[th.Tensor]) -> bool:
    """
    :param tensors: floating-point tensors
    :return: whether there is a NaN or an infinity among their values
    """
    kinds: dict[Any, list[th.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach())
    return any(_any_non_finite(same) for same in kinds.values())


def _any_non_finite(tensors: list[th.Tensor]) -> bool:
    """
    A norm is the fastest pass over a tensor that no NaN and no infinity gets through unseen: on a CPU it takes a tenth
    of the time of ``isfinite``. It may also overflow, so only a finite one decides.
    """
    total_norm = getattr(th.nn.utils, "get_total_norm", None)  # from PyTorch 2.6 on
    if total_norm is not None and tensors[0].device.type != "cpu":
        norm: th.Tensor = total_norm(tensors)  # one kernel for all tensors, one wait for the device
    else:
        norm = th.stack([th.linalg.vector_norm(tensor) for tensor in tensors]).sum()
    return not math.isfinite(norm.item()) and not all(bool(tensor.isfinite().all()) for tensor in tensors)


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


def install_gradient_check(optimizer: th.optim.Optimizer, key: Hashable = POLICYS_CHECK) -> None:
    """
    Run :func:`check_gradients` before each step. May be called again: ``deepcopy`` loses hooks.

    :param optimizer: of a policy
    :param key: whose check it is
    """
    before_step(optimizer).add(key, check_gradients)


def remove_gradient_check(optimizer: th.optim.Optimizer, key: Hashable = POLICYS_CHECK) -> None:
    """
    Undo :func:`install_gradient_check`; checks under other keys stay.

    :param optimizer: of a policy
    :param key: whose check it is
    """
    before_step(optimizer).remove(key)


def check_sampled_rewards(batch: Any) -> None:
    """
    The gradient shows a NaN but no infinite reward: Huber's loss makes a slope of 1 of it.

    :param batch: SB3's ``ReplayBufferSamples``
    :raises ValueError: if there is a NaN or an infinity among its rewards
    """
    # Of finite numbers the sum may overflow, so only a finite one decides; one operation instead of six.
    if not math.isfinite(batch.rewards.sum().item()) and not batch.rewards.isfinite().all():
        raise ValueError(f"The sampled rewards hold NaN or inf, so this update was not made. {FIND_THE_STEP}.")


class RewardCheck:
    """
    Looks at the rewards that a model's buffer has got since the last call.

    The gradient does not show an infinite reward: DQN's Huber loss turns it into a slope of 1.
    """

    def __init__(self) -> None:
        self._seen: tuple[Any, int] = (None, 0)

    def __call__(self, model: BaseAlgorithm) -> None:
        """
        :param model: an SB3 model, right before ``train()``; one without a buffer has nothing to check
        :raises ValueError: if there is a NaN or an infinity among its rewards
        """
        buffer: Any = getattr(model, "replay_buffer", getattr(model, "rollout_buffer", None))
        if not hasattr(buffer, "rewards"):
            return
        seen, start = self._seen
        self._seen = (buffer, buffer.pos)
        rows = np.arange(len(buffer.rewards) if buffer.full else buffer.pos)
        new = (buffer.pos - start) % len(buffer.rewards)
        if seen is buffer and new > 0:  # 0: after one whole turn, as PPO's after each rollout
            rows = np.arange(start, start + new) % len(buffer.rewards)
        finite = np.isfinite(buffer.rewards[rows])
        bad = rows[~finite.all(axis=tuple(range(1, finite.ndim)))]
        if len(bad):
            raise ValueError(
                f"The rewards hold NaN or inf: {buffer.rewards[bad[0]].tolist()} in row {bad[0]} of the buffer. "
                f"{FIND_THE_STEP}."
            )
