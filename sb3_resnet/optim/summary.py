"""What each optimizer group trains, as a table."""

from __future__ import annotations

import warnings
from typing import Any

import torch as th
from torch import nn

from sb3_resnet.common.arguments import flag
from sb3_resnet.nn.freezing import FreezeBoundary


def param_group_summary(model: Any, show: bool = True) -> list[dict[str, Any]]:
    """
    What each optimizer group trains, and how fast.

    :param model: an SB3 model, a policy, or an optimizer
    :param show: also print it as a table
    :return: a row a group: ``name``, ``lr``, ``weight_decay``, ``parameters``, ``trainable_parameters`` (counts)

    Warns where ``requires_grad`` contradicts the freeze boundary, by which the counts would be wrong.
    """
    policy = getattr(model, "policy", model)
    optimizer = getattr(policy, "optimizer", policy)
    if not isinstance(optimizer, th.optim.Optimizer):
        raise TypeError(f"param_group_summary takes a model, a policy or an optimizer, got {type(model).__name__}")
    for module in policy.modules() if isinstance(policy, nn.Module) else ():
        if isinstance(module, FreezeBoundary):
            try:
                module.check()
            except ValueError as contradiction:
                warnings.warn(str(contradiction), stacklevel=2)
    rows = [
        {
            "name": group.get("name", f"group {index}"),
            "lr": float(group["lr"]),
            "weight_decay": float(group.get("weight_decay", 0.0)),
            "parameters": sum(parameter.numel() for parameter in group["params"]),
            "trainable_parameters": sum(parameter.numel() for parameter in group["params"] if parameter.requires_grad),
        }
        for index, group in enumerate(optimizer.param_groups)
    ]
    if flag("show", show):
        print(_table(rows))
    return rows


def _table(rows: list[dict[str, Any]]) -> str:
    head = f"{'group':<24}{'lr':>12}{'weight decay':>14}{'parameters':>14}{'trainable':>14}"
    lines = [
        f"{row['name']:<24}{row['lr']:>12.3g}{row['weight_decay']:>14.3g}"
        f"{row['parameters']:>14,}{row['trainable_parameters']:>14,}"
        for row in rows
    ]
    return "\n".join([head, *lines])
