"""The optimizers that a policy may name, and how one is built."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch as th
from torch import nn

from sb3_resnet.common.arguments import choice, shown

#: Optimizers that YAML can name.
OPTIMIZERS: dict[str, type[th.optim.Optimizer]] = {
    "AdamW": th.optim.AdamW,
    "Adam": th.optim.Adam,
    "SGD": th.optim.SGD,
    "RMSprop": th.optim.RMSprop,
}
#: Weight decay where none is given, a usual start for fine-tuning.
WEIGHT_DECAY = 1e-4


def optimizer_class_of(
    value: str | type[th.optim.Optimizer], argument: str = "optimizer_class"
) -> type[th.optim.Optimizer]:
    """
    :param value: an optimizer class, or one of the names in :data:`OPTIMIZERS`
    :param argument: what the user calls it
    :return: the class
    :raises ValueError: for an unknown name
    """
    if isinstance(value, str):
        return OPTIMIZERS[choice(argument, value.removeprefix("torch.optim."), [*OPTIMIZERS])]
    if not (isinstance(value, type) and issubclass(value, th.optim.Optimizer)):
        known = ", ".join(OPTIMIZERS)
        raise TypeError(f"{argument} must be a torch optimizer or one of {known}, got {shown(value)}")
    return value


def optimizer_arguments_of(value: Any, argument: str) -> dict[str, Any]:
    """
    :param value: further arguments of an optimizer, or ``None``
    :param argument: what the user calls them
    :return: a copy
    :raises TypeError: if they are no dict
    :raises ValueError: for learning rate and weight decay, which have arguments of their own
    """
    if not isinstance(value, Mapping | None):
        raise TypeError(f"{argument} must be a dict such as {{'eps': 1e-5}}, got {shown(value)}")
    for name in {"lr", "weight_decay"} & {*(value or {})}:
        raise ValueError(f"{argument} must not hold {name!r}: write lr_head, lr_backbone or weight_decay")
    return {**(value or {})}


def backbone_optimizer_of(optimizer_class: Any, kwargs: Any) -> tuple[type[th.optim.Optimizer], dict[str, Any]] | None:
    """
    :param optimizer_class: ``backbone_optimizer_class`` of a policy
    :param kwargs: ``backbone_optimizer_kwargs``
    :return: both; ``None``: the backbone has no optimizer of its own
    """
    arguments = optimizer_arguments_of(kwargs, "backbone_optimizer_kwargs")
    if optimizer_class is not None:
        return optimizer_class_of(optimizer_class, "backbone_optimizer_class"), arguments
    if arguments:
        raise ValueError("backbone_optimizer_kwargs needs a backbone_optimizer_class beside it, such as 'SGD'")
    return None


def weight_decay_of(optimizer_class: type[th.optim.Optimizer], given: float | None) -> float:
    """
    :param optimizer_class: a torch optimizer
    :param given: a weight decay, or ``None``
    :return: what is given; without it 0 for Adam, which scales the decay along with the gradient (arXiv 1711.05101),
        and :data:`WEIGHT_DECAY` for all others, AdamW among them
    """
    if given is not None:
        return given
    # torch's AdamW is a subclass of Adam.
    is_adam = issubclass(optimizer_class, th.optim.Adam) and not issubclass(optimizer_class, th.optim.AdamW)
    return 0.0 if is_adam else WEIGHT_DECAY


def make_optimizer(
    optimizer_class: type[th.optim.Optimizer], groups: Sequence[dict[str, Any]], lr: float, **kwargs: Any
) -> th.optim.Optimizer:
    """
    Build an optimizer, fused where PyTorch can.

    :param optimizer_class: any torch optimizer
    :param groups: parameter groups, each with its ``weight_decay``
    :param lr: learning rate of groups that have none
    :param kwargs: further arguments of the optimizer; one that says how the step is computed is left as it is
    :return: the optimizer
    :raises ValueError: if groups decay and the optimizer knows no weight decay
    """
    if all(kwargs.get(name) is None for name in ("fused", "foreach", "differentiable")):
        kwargs = {**kwargs, **_fused(optimizer_class, groups)}
    optimizer = optimizer_class(groups, lr=lr, **kwargs)  # type: ignore[call-arg]  # every torch optimizer takes lr
    if any(group["weight_decay"] > 0 for group in groups) and "weight_decay" not in optimizer.defaults:
        raise ValueError(f"{optimizer_class.__name__} knows no weight decay: write weight_decay=0.0")
    return optimizer


def _fused(optimizer_class: type[th.optim.Optimizer], groups: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """One pass over a parameter instead of ten, where PyTorch has that: half of AdamW's time (choices.json)."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    if not devices <= {"cpu", "cuda"} or "fused" not in inspect.signature(optimizer_class).parameters:
        return {}
    try:
        optimizer_class([nn.Parameter(th.zeros(1))], lr=0.0, fused=True)  # type: ignore[call-arg]  # looked up above
    except RuntimeError:  # PyTorch before 2.4 has it on GPUs only
        return {"fused": True} if devices == {"cuda"} else {}
    return {"fused": True}
