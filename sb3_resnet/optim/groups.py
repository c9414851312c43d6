"""Optimizer groups with their own learning rates, which survive Stable-Baselines3's single one."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn

from sb3_resnet.common.arguments import number
from sb3_resnet.common.step_hooks import before_step
from sb3_resnet.optim.classes import make_optimizer, weight_decay_of
from sb3_resnet.optim.combined import CombinedOptimizer

#: Ratio of the backbone's learning rate to the head's; the field uses 0.01 to 0.1 (SGI, VRL3, fastai).
BACKBONE_RATIO = 0.1

_RATES = "learning rates"  # key of our hook
#: Key of what a group was built with: ratio and weight decay, which a callback or a user may have changed since.
GIVEN = "given"
_warned: weakref.WeakSet[th.optim.Optimizer] = weakref.WeakSet()  # that no rate is above 0
_told: weakref.WeakSet[th.optim.Optimizer] = weakref.WeakSet()  # that factors were left behind
#: Whose each factor of the learning rates is, and which callback sets it to 1.
_OWNERS = {"schedule": "LRScheduleCallback", "ramp": "UnfreezeCallback"}
_RESETS = {"schedule": "LRScheduleCallback()", "ramp": "an UnfreezeCallback whose phases have ramp=0"}

Group = dict[str, Any]


class EffectiveRate(float):
    """
    A learning rate that :func:`install_effective_lr` has put into a group: any other number there is the host's.

    The value alone cannot tell: where all groups have one ratio and a step schedule's factor equals it, the host
    writes the very number that stands there. State dicts hold plain numbers, which ``weights_only=True`` can load.
    """


def lr_ratios(initial_lr: float, lr_head: Any = None, lr_backbone: Any = None) -> dict[str, float]:
    """
    Learning rates of head and backbone relative to SB3's own, which may follow a schedule.

    :param initial_lr: SB3's learning rate at the start of training
    :param lr_head: the head's at the start; ``None``: SB3's
    :param lr_backbone: the backbone's at the start; ``None``: a tenth of the head's
    :return: ratio by part
    :raises ValueError: for a negative, infinite or NaN rate, or one given beside a schedule that starts at 0
    """
    head = None if lr_head is None else number("lr_head", lr_head)
    backbone = None if lr_backbone is None else number("lr_backbone", lr_backbone)
    if not math.isfinite(initial_lr) or initial_lr < 0:
        raise ValueError(f"learning_rate must be finite and >= 0, got {initial_lr}")
    if initial_lr == 0 and (head or backbone):
        raise ValueError(
            "lr_head and lr_backbone are read relative to learning_rate at the start of training, which is 0: "
            "write a learning_rate schedule that starts above 0 and warm up with LRScheduleCallback(warmup_steps=...)"
        )
    head_ratio = 1.0 if head is None or initial_lr == 0 else head / initial_lr
    backbone_ratio = head_ratio * BACKBONE_RATIO if backbone is None or initial_lr == 0 else backbone / initial_lr
    return {"head": head_ratio, "backbone": backbone_ratio}


def build_optimizer(
    optimizer_class: type[th.optim.Optimizer],
    parts: Mapping[str, Iterable[nn.Parameter]],
    lr: float,
    ratios: Mapping[str, float],
    weight_decay: float | None,
    scales: Mapping[str, float] | None = None,
    backbone: tuple[type[th.optim.Optimizer], Mapping[str, Any]] | None = None,
    follows: bool = False,
    **kwargs: Any,
) -> th.optim.Optimizer:
    """
    An optimizer with two groups a part: ``name`` and ``name_no_decay`` for norm weights and biases.

    :param optimizer_class: any torch optimizer
    :param parts: all parameters by part, frozen ones included (a gradient of ``None`` costs nothing); what follows a
        dot, as in ``backbone.layer4``, divides a part
    :param lr: SB3's learning rate at the start
    :param ratios: learning rate of each part relative to it
    :param weight_decay: of the groups that decay; ``None``: as :func:`~sb3_resnet.optim.classes.weight_decay_of` says
    :param scales: further factor of the rate by full name, such as ``{"backbone.layer3": 0.5}``
    :param backbone: an optimizer of its own for the backbone, and its further arguments; the result is one
        :class:`~sb3_resnet.optim.combined.CombinedOptimizer` then
    :param follows: whether the true ratios follow with a state dict, since nothing here tells them
    :param kwargs: further arguments of the optimizer
    :return: the optimizer, its groups' learning rates kept as :func:`install_effective_lr` says
    :raises ValueError: if the optimizer knows no weight decay
    """
    groups = [group for name, parameters in parts.items() for group in _split(name, parameters)]
    for group in groups:
        cls = optimizer_class if backbone is None or not is_part(group, "backbone") else backbone[0]
        group["weight_decay"] = 0.0 if group["name"].endswith("_no_decay") else weight_decay_of(cls, weight_decay)
        group["lr_scale"] = (scales or {}).get(group["name"].removesuffix("_no_decay"), 1.0)
        group["lr_ratio"] = next(ratio for part, ratio in ratios.items() if is_part(group, part)) * group["lr_scale"]
        group["lr"] = lr * group["lr_ratio"]
        group[GIVEN] = {"weight_decay": group["weight_decay"], **({} if follows else {"lr": group["lr_ratio"]})}
    if backbone is None:
        optimizer = make_optimizer(optimizer_class, groups, lr, **kwargs)
    else:
        head, rest = ([group for group in groups if is_part(group, "backbone") is inside] for inside in (False, True))
        own = make_optimizer(backbone[0], rest, lr, **backbone[1])
        optimizer = CombinedOptimizer([make_optimizer(optimizer_class, head, lr, **kwargs), own])
    for group in optimizer.param_groups:
        group["base_lr"] = lr
        group["effective_lr"] = group["lr"]
    install_effective_lr(optimizer)
    return optimizer


def audit(module: nn.Module, optimizer: th.optim.Optimizer) -> None:
    """
    Check that the optimizer has every parameter of the module exactly once.

    :raises ValueError: with what is missing, foreign or there twice
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    problems = {
        "missing": [name for key, name in names.items() if key not in held],
        "twice": [names[key] for key in {*held} if key in names and held.count(key) > 1],
        "foreign": [str(key) for key in held if key not in names],
    }
    if any(problems.values()):
        raise ValueError(f"The optimizer does not hold each parameter once: {problems}")


def install_effective_lr(optimizer: th.optim.Optimizer) -> None:
    """
    Keep each group's learning rate at host rate x group ratio x schedule factors.

    SB3 writes one rate into all groups at the start of each ``train()``; before the step, a hook puts the right ones
    back, so that after any update ``group["lr"]`` is the rate that was used. Works for any optimizer, also one that
    :func:`build_optimizer` did not make, and may be called again: hooks are in no state dict and lost by ``deepcopy``.

    :param optimizer: the optimizer of a policy
    """
    _recognise(optimizer)
    hooks = before_step(optimizer)
    if hooks.get(_RATES) is None:
        hooks.add(_RATES, _put_back_rates)
        optimizer.register_load_state_dict_post_hook(_recognise)
        optimizer.register_state_dict_post_hook(_save_plain_numbers)


def set_lr_factor(
    optimizer: th.optim.Optimizer, key: str, factor: float, where: Callable[[Group], bool] = lambda group: True
) -> None:
    """
    Set one factor of the learning rate; it stays, and is saved, until it is set again.

    :param optimizer: an optimizer with :func:`install_effective_lr`
    :param key: whose factor it is, such as ``"schedule"``
    :param factor: multiplies the rate
    :param where: which groups
    """
    for group in filter(where, optimizer.param_groups):
        group["lr_factors"] = {**group["lr_factors"], key: float(factor)}
        _refresh(group)


def set_lr_ratio(optimizer: th.optim.Optimizer, part: str, ratio: float) -> None:
    """
    Change the learning rate of a part relative to the host's, from now on and in the checkpoint.

    :param optimizer: an optimizer of :func:`build_optimizer`
    :param part: ``"head"`` or ``"backbone"``
    :param ratio: the new ratio; the groups' scales stay
    """
    for group in optimizer.param_groups:
        if is_part(group, part):
            group["lr_ratio"] = ratio * group["lr_scale"]
            _refresh(group)


def warn_that_nothing_is_learnt(optimizer: th.optim.Optimizer) -> None:
    """Warn that a schedule has ended at 0; :func:`install_effective_lr` does so too, at the first such update."""
    _warned.add(optimizer)
    warnings.warn(
        "The schedule of the learning rates has ended at 0, so nothing is learnt. To train on, write a larger "
        "decay_steps, or min_factor=0.1, or schedule='constant' in LRScheduleCallback.",
        stacklevel=3,
    )


def is_part(group: Group, part: str) -> bool:
    """:return: whether the group belongs to ``"head"`` or ``"backbone"``, whatever its stage"""
    return str(group.get("name", "")).removesuffix("_no_decay").split(".")[0] == part


def recall(optimizer: th.optim.Optimizer, key: str) -> dict[str, Any]:
    """
    Read what :func:`remember` kept.

    :param optimizer: the optimizer of a policy
    :param key: whose state it is
    :return: a copy of the state; empty if there is none
    """
    return next((dict(group[key]) for group in optimizer.param_groups if key in group), {})


def remember(optimizer: th.optim.Optimizer, key: str, state: Mapping[str, Any]) -> None:
    """
    Keep a callback's state in the optimizer's groups: SB3 saves them with the model, but not the callbacks.

    :param optimizer: the optimizer of a policy
    :param key: whose state it is
    :param state: plain numbers, strings and dicts of them, which ``weights_only=True`` can load
    """
    for group in optimizer.param_groups:
        group[key] = dict(state)


def optimizer_of(model: BaseAlgorithm) -> th.optim.Optimizer:
    """
    :param model: an SB3 model
    :return: the one optimizer of its policy
    :raises ValueError: if it has several, as SAC
    """
    optimizer = getattr(model.policy, "optimizer", None)
    if not isinstance(optimizer, th.optim.Optimizer):
        raise ValueError(f"This callback needs a policy with one optimizer; {type(model).__name__} has not")
    return optimizer


def _split(name: str, parameters: Iterable[nn.Parameter]) -> list[Group]:
    """Norm weights and biases are the parameters with one axis; they do not decay (arXiv 1706.05350, timm)."""
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for parameter in parameters:
        (decay if parameter.ndim > 1 else no_decay).append(parameter)
    groups = [
        {"params": decay, "name": name, "lr_factors": {}},
        {"params": no_decay, "name": f"{name}_no_decay", "lr_factors": {}},
    ]
    return [group for group in groups if group["params"]]


def _put_back_rates(optimizer: th.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], EffectiveRate):
            _refresh(group)
    _warn_of_factors_left(optimizer)
    if optimizer not in _warned and all(group["lr_factors"].get("schedule") == 0.0 for group in optimizer.param_groups):
        warn_that_nothing_is_learnt(optimizer)


def _warn_of_factors_left(optimizer: th.optim.Optimizer) -> None:
    """Of a warmup or ramp that was cut off: nobody moves its factor any more."""
    factors = {key: factor for group in optimizer.param_groups for key, factor in group["lr_factors"].items()}
    # Of a schedule that has ended at 0 there is a warning of its own.
    left = {key: factor for key, factor in factors.items() if factor != 1.0 and (key, factor) != ("schedule", 0.0)}
    if not left or optimizer in _told:
        return
    present = {getattr(key, "__name__", None) for key in before_step(optimizer).keys}
    for key, factor in left.items():
        if _OWNERS.get(key, "") not in {"", *present}:
            _told.add(optimizer)
            warnings.warn(
                f"Learning rates stay at {factor:.3g} of what was asked for: that is where {_OWNERS[key]} left them, "
                "and this learn() has no such callback. To go on, give learn() the same one again. For the full rates "
                f"from now on give it {_RESETS[key]}.",
                stacklevel=3,
            )


def _refresh(group: Group) -> None:
    if not isinstance(group["lr"], EffectiveRate):
        group["base_lr"] = float(group["lr"])
    rate = math.prod([group["base_lr"], group["lr_ratio"], *group["lr_factors"].values()])
    group["lr"] = group["effective_lr"] = EffectiveRate(rate)


def _save_plain_numbers(optimizer: th.optim.Optimizer, state: dict[str, Any]) -> None:
    """In a state dict, whose groups are copies."""
    for group in state["param_groups"]:
        group.update({key: float(value) for key, value in group.items() if isinstance(value, EffectiveRate)})


def _recognise(optimizer: th.optim.Optimizer) -> None:
    """Complete the groups, and take a rate that equals ours for ours: a state dict holds plain numbers."""
    for group in optimizer.param_groups:
        group.setdefault("lr_ratio", 1.0)
        group.setdefault("lr_factors", {})
        group.setdefault("base_lr", float(group["lr"]))
        group.setdefault("effective_lr", group["lr"])
        if group["lr"] == group["effective_lr"]:
            group["lr"] = group["effective_lr"] = EffectiveRate(group["lr"])
