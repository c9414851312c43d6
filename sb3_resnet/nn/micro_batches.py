"""A batch through the trunk in slices: the gradient of the whole batch in the memory of a slice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th
from torch.utils.checkpoint import checkpoint

from sb3_resnet.common.arguments import integer


def read_micro_batch_size(value: Any, norm: str) -> int | None:
    """
    :param value: observations a slice, or ``None`` for no slices
    :param norm: of the trunk, one of :data:`~sb3_resnet.nn.backbones.NORMS`
    :return: the size
    :raises ValueError: if it is too small, or the norm takes statistics over the batch
    """
    if value is None:
        return None
    if norm in ("batch", "sync"):
        raise ValueError(
            f"norm={norm!r} takes its statistics over the whole batch, and micro_batch_size would give it those of a "
            "slice: write norm='frozen' (or 'group' from scratch), or leave micro_batch_size out"
        )
    return integer("micro_batch_size", value, 1)


def in_slices(run: Callable[[th.Tensor], th.Tensor], x: th.Tensor, size: int | None) -> th.Tensor:
    """
    Where a gradient is wanted, the activations of a slice are dropped and computed again in the backward pass; autograd
    sums the slices' gradients, so they are those of the whole batch. Costs up to one more forward pass.

    :param run: computes each row by itself, without random numbers
    :param x: ``(batch, ...)``
    :param size: rows a slice; ``None``: all at once
    :return: ``run(x)``
    """
    if size is None or len(x) <= size:
        return run(x)
    *slices, last = th.split(x, size)
    if not th.is_grad_enabled():
        return th.cat([*map(run, slices), run(last)])
    done = [checkpoint(run, part, use_reentrant=False, preserve_rng_state=False) for part in slices]
    # The backward pass begins with the last slice: it may keep its activations.
    return th.cat([*done, run(last)])
