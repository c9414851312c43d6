"""Rates and weight decay of a model that is resumed: what its file says, and how to write something else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch as th
from torch.optim import Optimizer

from sb3_resnet.common.arguments import number
from sb3_resnet.optim.groups import GIVEN, set_lr_ratio


def warn_of_rise(schedule: Callable[[float], float], given: Mapping[str, float | None]) -> None:
    """
    Warn where rates are relative to a learning rate that is not at its largest when training starts.

    :param schedule: SB3's learning rate by the share of training that is left
    :param given: the rates that were asked for, by name
    """
    initial, largest = float(schedule(1)), max(float(schedule(left / 10)) for left in range(10))
    names = [name for name, rate in given.items() if rate is not None]
    if names and 0 < initial < 0.999 * largest:
        warnings.warn(
            f"{' and '.join(names)} hold at the start of training, where learning_rate is {initial:g}. It rises to "
            f"{largest:g}, and they rise as much. For a warmup write a constant learning_rate and "
            "LRScheduleCallback(warmup_steps=...).",
            stacklevel=4,
        )


def set_rates(optimizer: Optimizer, lr: Mapping[str, float | None], weight_decay: float | None = None) -> None:
    """
    Change learning rates and weight decay, from now on and in the checkpoint.

    :param optimizer: an optimizer of :func:`~sb3_resnet.optim.groups.build_optimizer`
    :param lr: rates of ``"head"`` and ``"backbone"`` at the start of training; ``None``: unchanged
    :param weight_decay: of the groups that decay; ``None``: unchanged
    :raises ValueError: for negative, infinite and NaN values, and for a rate if ``learning_rate`` begins at 0
    """
    rates = {part: number(f"lr_{part}", rate) for part, rate in lr.items() if rate is not None}
    decay = None if weight_decay is None else number("weight_decay", weight_decay)
    initial = float(optimizer.defaults["lr"])
    if initial == 0 and rates:
        raise ValueError(
            "Rates of head and backbone are relative to learning_rate at the start of training, which is 0: load the "
            "model with the learning_rate that it trains with"
        )
    if decay and "weight_decay" not in optimizer.defaults:
        raise ValueError(f"{type(optimizer).__name__} knows no weight decay: leave weight_decay out")
    for part, rate in rates.items():
        set_lr_ratio(optimizer, part, rate / initial)
    for group in optimizer.param_groups:
        if decay is not None and not group["name"].endswith("_no_decay"):
            group["weight_decay"] = decay


def install_loading(optimizer: Optimizer) -> None:
    """
    Warn when a state dict is loaded that was made with other rates or decay than the optimizer was.

    SB3 builds a loaded policy by its arguments, and then the file's settings replace what these say. Moments take
    their parameters' order in memory, whatever it is in the file.

    :param optimizer: an optimizer of :func:`~sb3_resnet.optim.groups.build_optimizer`
    """
    optimizer.register_load_state_dict_pre_hook(_compare)
    optimizer.register_load_state_dict_post_hook(_arrange_moments)


def _compare(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    groups = {group["name"]: group for group in optimizer.param_groups}
    loaded: list[dict[str, Any]] = []
    different: dict[str, None] = {}  # in order, each once
    for saved in state["param_groups"]:
        given = groups.get(saved.get("name"), {}).get(GIVEN, {})
        before = saved.get(GIVEN, {})
        for key in sorted(given.keys() & before.keys()):
            if given[key] != before[key]:
                different[_difference(key, given[key], saved, float(optimizer.defaults["lr"]))] = None
        # What the file was made with counts no more: a model is saved with the arguments that it is built with now.
        loaded.append({**saved, GIVEN: {**before, **given}})
    if different:
        warnings.warn(
            f"The loaded optimizer keeps the settings of its file: {'; '.join(different)}. To change them, call "
            "model.policy.set_learning_rates(lr_head=..., lr_backbone=..., weight_decay=...) after loading.",
            stacklevel=2,
        )
    return {**state, "param_groups": loaded}


def _difference(key: str, given: float, saved: Mapping[str, Any], base: float) -> str:
    if key == "weight_decay":
        return f"weight_decay={given:.6g} was asked for, {saved['weight_decay']:.6g} is used"
    part = str(saved["name"]).removesuffix("_no_decay").replace(".", " of ")
    return f"lr_{part}={base * given:.6g} was asked for, {base * saved['lr_ratio']:.6g} is used"


def _arrange_moments(optimizer: Optimizer) -> None:
    """Fused optimizers walk through memory, so a moment must lie there as its parameter does."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, th.Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = th.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
