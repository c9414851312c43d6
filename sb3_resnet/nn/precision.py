"""Reduced precision: which type a device computes fast in, autocast for a trunk, and the scale of its gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch as th

from sb3_resnet.common import host
from sb3_resnet.common.arguments import choice, integer, number
from sb3_resnet.common.lending import Lending
from sb3_resnet.common.nonfinite import FIND_THE_STEP, any_non_finite, gradients

DTYPES = {"float32": th.float32, "float16": th.float16, "bfloat16": th.bfloat16}
#: Smallest scale: 32 halvings below GradScaler's first. What is still not finite there is not so because of the scale.
MIN_SCALE = 2.0**-16
#: Largest scale: the scale is a float32, whose largest power of two this is.
MAX_SCALE = 2.0**127


def resolve_dtype(name: str, device: th.device | str) -> th.dtype:
    """
    :param name: ``"float32"``, ``"float16"``, ``"bfloat16"``, or ``"auto"``: bfloat16 where the device has it in
        hardware, float16 on older GPUs, float32 elsewhere
    :param device: where the computation runs
    :return: the type
    :raises ValueError: for an unknown name
    """
    choice("dtype", name, ["auto", *DTYPES])
    if name != "auto":
        return DTYPES[name]
    if th.device(device).type == "cuda":
        return th.bfloat16 if th.cuda.get_device_capability(device) >= (8, 0) else th.float16
    return th.bfloat16 if host.cpu_has_bfloat16() else th.float32


class LossScaler:
    """
    ``torch.amp.GradScaler`` for a loop that cannot call it: the trunk's gradients are scaled, the step is watched.

    The gradient is multiplied where features leave the trunk and divided again at each parameter of the trunk, so that
    whoever clips sees true gradients. The head computes in float32 and needs no scale. Scales are powers of two by
    default, so that scaling rounds nothing. Arguments and defaults are GradScaler's.

    :param init_scale: the first scale
    :param growth_factor: factor of the scale after ``growth_interval`` updates without an overflow
    :param backoff_factor: factor of the scale after an update with one
    :param growth_interval: see ``growth_factor``
    :raises ValueError: for values that cannot work
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        self.scale = number("init_scale", init_scale, MIN_SCALE, MAX_SCALE)
        self.growth_tracker = 0
        self.skipped = 0
        #: Whether a gradient was scaled since the last step.
        self.is_used = False
        #: What the scale is divided by on its way through the trunk.
        self.divisor = 1
        self._growth_factor = number("growth_factor", growth_factor, 1.0, above=True)
        self._backoff_factor = number("backoff_factor", backoff_factor, 0.0, 0.999, above=True)
        self._growth_interval = integer("growth_interval", growth_interval, 1)

    @property
    def state(self) -> dict[str, Any]:
        """What must be saved to go on."""
        return {"scale": self.scale, "growth_tracker": self.growth_tracker, "skipped": self.skipped}

    @state.setter
    def state(self, saved: dict[str, Any]) -> None:
        self.scale = float(saved["scale"])
        self.growth_tracker = int(saved["growth_tracker"])
        self.skipped = int(saved["skipped"])

    @property
    def applied(self) -> float:
        """What gradients are multiplied by on their way through the trunk."""
        return self.scale / self.divisor

    def share(self, ranks: int) -> None:
        """
        Let the scale mean the same as in one process: the loss of a rank is a mean over its own part of the batch, so
        that its gradients are as many times larger as there are ranks.

        :param ranks: number of processes that train the model together
        """
        self.divisor = 1 << (ranks - 1).bit_length()  # a power of two, so that scaling rounds nothing

    def before_step(self, optimizer: th.optim.Optimizer) -> bool:
        """
        Make the optimizer's step do nothing if a gradient is not finite, and move the scale. An update in which no
        gradient was scaled, as while all stages are frozen, is no proof that a larger scale works.

        A gradient of ``None`` leaves weight decay, momentum and step counter of a parameter alone.

        :param optimizer: about to step
        :return: whether it will
        :raises ValueError: if no scale helps any more
        """
        overflow = any_non_finite(gradients(optimizer))
        if overflow or self.is_used:
            self._update(overflow)
        self.is_used = False
        if not overflow:
            return True
        optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        if self.scale < MIN_SCALE:
            raise ValueError(
                f"float16 found NaN or inf in the gradient again and again, down to a loss scale of {self.scale:g}, so "
                f"the scale is not the cause. Either rewards hold such values ({FIND_THE_STEP}), or activations exceed "
                "float16's largest number: write dtype='bfloat16' or 'float32'."
            )
        return False

    def _update(self, overflow: bool) -> None:
        """The rule of GradScaler, whose scale is a float32."""
        self.growth_tracker = 0 if overflow else self.growth_tracker + 1
        if overflow:
            self.scale = _float32(self.scale * self._backoff_factor)
        elif self.growth_tracker == self._growth_interval:
            grown = _float32(self.scale * self._growth_factor)
            self.scale = grown if math.isfinite(grown) else self.scale
            self.growth_tracker = 0


class MixedPrecision:
    """
    What a callback lends to extractors: autocast around the trunk, float32 features, scaled gradients for float16.

    In no state dict; a copied or pickled extractor comes back without it.

    :param dtype: what the trunk computes in
    :param scaler: scales the trunk's gradients; ``None``: they are not scaled
    :param lending: says when it may act; ``None``: always
    """

    def __init__(self, dtype: th.dtype, scaler: LossScaler | None = None, lending: Lending | None = None) -> None:
        self.dtype = dtype
        self.scaler = scaler
        self._lending = lending
        self._watched: dict[int, tuple[Any, list[Any]]] = {}

    @property
    def may_act(self) -> bool:
        """Whether ``learn()`` acts or updates, and not somebody else."""
        return self._lending is None or self._lending.updating or self._lending.acting

    def leave_trunk(self, features: th.Tensor, trunk: Any) -> th.Tensor:
        """
        :param features: of the trunk, in any precision
        :param trunk: the extractor whose live stages made them
        :return: the features in float32; in training their gradient is scaled on its way into the trunk
        """
        features = features.float()
        if self.scaler is None or not (trunk.training and features.requires_grad and self.may_act):
            return features
        self._unscale_at_parameters(trunk)
        scaled: th.Tensor = _ScaleGradient.apply(features, self.scaler)
        return scaled

    def release(self) -> None:
        """Take the hooks off the parameters."""
        for _, handles in self._watched.values():
            _remove(handles)
        self._watched.clear()

    def _unscale_at_parameters(self, trunk: Any) -> None:
        """In forward, and not once at the start: the boundary moves, and a parameter that is frozen takes no hook."""
        stage = trunk.boundary.stage
        if id(trunk) in self._watched:
            before, handles = self._watched[id(trunk)]
            if before == stage:
                return
            _remove(handles)
        modules = [module for name in trunk.stages for module in trunk.stage_modules(name)]
        live = [p for module in modules for p in module.parameters() if p.requires_grad]
        # Before the gradient is accumulated: a hook after it would divide what earlier passes have left there again.
        self._watched[id(trunk)] = (stage, [parameter.register_hook(self._unscale) for parameter in live])

    def _unscale(self, gradient: th.Tensor) -> th.Tensor:
        assert self.scaler is not None
        return gradient * (1.0 / self.scaler.applied) if self.may_act else gradient

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> Any:
        return (_nothing, ())


def autocast(precision: MixedPrecision | None, device: th.device) -> AbstractContextManager[Any]:
    """:return: the context in which a trunk computes"""
    return nullcontext() if precision is None or not precision.may_act else th.autocast(device.type, precision.dtype)


class _ScaleGradient(th.autograd.Function):
    """Identity whose gradient is multiplied by the scale."""

    @staticmethod
    def forward(ctx: Any, features: th.Tensor, scaler: LossScaler) -> th.Tensor:
        ctx.scaler = scaler
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor) -> tuple[th.Tensor, None]:
        ctx.scaler.is_used = True
        return gradient * ctx.scaler.applied, None


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()


def _nothing() -> None:
    """What a pickled one comes back as."""


def _float32(value: float) -> float:
    return float(th.tensor(value, dtype=th.float32))
