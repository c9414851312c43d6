"""Measure a gradient update of SB3's ``train()`` from outside, without changing a bit of it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_resnet.diagnosis.measures import (
    batchnorm_drift,
    dead_features,
    dormant_units,
    joint_norm,
    norms_of,
    relative_distance,
)
from sb3_resnet.optim.groups import optimizer_of

#: Predictions and targets, as the host's ``train()`` names them: DQN and QR-DQN.
_TD_NAMES = (("current_q_values", "target_q_values"), ("current_quantiles", "target_quantiles"))
_TD_QUANTILES = {"monitor/td_p50": 0.5, "monitor/td_p90": 0.9, "monitor/td_max": 1.0}


class Probe:
    """
    Measures every so many gradient updates, on the very batch of the update.

    Nothing is sampled or computed again, so no random generator moves and no statistic changes. Its hooks are there
    during a measured update only; in all others it costs a comparison of two numbers.

    :param every: gradient updates between two measurements
    :param sink: gets the measured values by log key, after the update
    """

    def __init__(self, every: int, sink: Callable[[dict[str, float]], None]) -> None:
        self.every = every
        self._sink = sink
        self._next = 0
        self._armed: _Armed | None = None
        self._model: BaseAlgorithm | None = None
        self._handle: th.utils.hooks.RemovableHandle | None = None
        self._warned = False

    def start(self, model: BaseAlgorithm, n: int) -> None:
        """Measure the first update from now on, the one that follows ``n`` others."""
        self.end()
        self._model = model
        self._next = n
        # All the time, since torch calls its step hooks in a loop that allows no change of them.
        optimizer = optimizer_of(model)
        _forget_earlier(optimizer, self)
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def end(self) -> None:
        """Stop for good; may be called again."""
        self.pause()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def pause(self) -> None:
        """Take the hooks of a measured update away."""
        if self._armed is not None:
            self._armed.remove()
            self._armed = None

    def prepare(self, n: int) -> None:
        """Call before the forward pass of the update that follows ``n`` others."""
        if n >= self._next and self._armed is None and self._model is not None:
            self._armed = _Armed(self._model, n)

    def before_step(self, n: int) -> None:
        """Call before the optimizer step that follows ``n`` others."""
        if self._armed is not None and self._armed.stale:
            self.pause()  # a phase began after it was prepared: the next update will do
        if self._armed is None:
            self.prepare(n + 1)
        elif not self._armed.before_step() and not self._warned:
            self._warned = True
            warnings.warn(
                f"TD errors are not measured: train() of {type(self._model).__name__} has none of {_TD_NAMES}",
                stacklevel=2,
            )

    def _after_step(self, optimizer: th.optim.Optimizer, args: Any, kwargs: Any) -> None:
        armed = self._armed
        if armed is None or not armed.began:
            return  # none was measured, or the next one will be
        values = armed.after_step(optimizer)
        self.pause()
        self._next = armed.n + self.every
        self._sink(values)
        self.prepare(armed.n + 1)


def _forget_earlier(optimizer: th.optim.Optimizer, probe: Probe) -> None:
    """A ``learn()`` that was interrupted never reached its end: the hooks of its callback are still there."""
    owner = type(getattr(probe._sink, "__self__", None))
    for key, hook in [*optimizer._optimizer_step_post_hooks.items()]:
        other = getattr(hook, "__self__", None)
        if isinstance(other, Probe) and type(getattr(other._sink, "__self__", None)) is owner:
            other.pause()
            del optimizer._optimizer_step_post_hooks[key]


class _Armed:
    """The hooks of one measured update."""

    def __init__(self, model: BaseAlgorithm, n: int) -> None:
        self.n = n
        self.began = False
        self._model: Any = model
        self._trainable = trainable(model)
        self._values: dict[str, th.Tensor | float] = {}
        self._norms: dict[int, th.Tensor] = {}
        self._before: dict[int, th.Tensor] = {}
        self._drifts: list[th.Tensor] = []
        self._units: list[th.Tensor] = []
        self._handles = self._register()

    @property
    def stale(self) -> bool:
        """Whether other parameters train than those that are watched."""
        before, now = (
            [id(p) for _, some in groups for p in some] for groups in (self._trainable, trainable(self._model))
        )
        return before != now

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def before_step(self) -> bool:
        """:return: whether the host's ``train()`` showed its TD errors"""
        self.began = True
        policy = self._model.policy
        pairs = [
            (mine, other)
            for mine, other in zip(policy.online.parameters(), policy.target.parameters(), strict=True)
            if mine.requires_grad
        ]
        self._values["monitor/target_lag"] = relative_distance(pairs)
        for _, parameters in self._trainable:
            self._before.update({id(parameter): parameter.detach().clone() for parameter in parameters})
        return self._see_train(train_locals(self._model))

    def _register(self) -> list[th.utils.hooks.RemovableHandle]:
        online = self._model.policy.online
        head = getattr(online, online._head)
        activations = [module for module in head if isinstance(module, self._model.policy.activation_fn)]
        norms = online.features_extractor.boundary.live_norms
        return [
            online.register_forward_hook(self._see_values),
            head.register_forward_pre_hook(self._see_head),
            *(module.register_forward_hook(self._see_units) for module in activations),
            *(module.register_forward_pre_hook(self._see_norm) for module in norms),
            # After accumulation, not before: a loss scale is undone there, and micro-batches have been added up.
            *(
                parameter.register_post_accumulate_grad_hook(self._see_gradient)
                for _, parameters in self._trainable
                for parameter in parameters
            ),
        ]

    @th.no_grad()
    def _see_values(self, module: Any, args: Any, output: th.Tensor) -> None:
        if not output.requires_grad:
            return  # a pass for the targets
        values = output.detach().float()
        values = values.mean(dim=1) if values.ndim == 3 else values  # QR-DQN: (batch, quantiles, actions)
        greedy = values.max(dim=1).values
        self._values.update(
            {"monitor/q_mean": greedy.mean(), "monitor/q_max": greedy.max(), "monitor/q_min": values.min()}
        )
        if self._units:
            self._values["monitor/dormant_units"] = dormant_units(self._units)
        if self._drifts:
            self._values["monitor/batchnorm_drift"] = th.stack(self._drifts).max()

    def _see_head(self, module: Any, args: Any) -> None:
        if th.is_grad_enabled():
            self._values["monitor/dead_features"] = dead_features(args[0].detach())

    def _see_units(self, module: Any, args: Any, output: th.Tensor) -> None:
        if th.is_grad_enabled():
            self._units.append(output.detach())

    def _see_norm(self, module: Any, args: Any) -> None:
        """Before the layer runs: it then moves its running statistics towards the batch's."""
        if th.is_grad_enabled():
            self._drifts.append(batchnorm_drift(module, args[0].detach()))

    def _see_gradient(self, parameter: th.Tensor) -> None:
        if parameter.grad is not None:
            self._norms[id(parameter)] = th.linalg.vector_norm(parameter.grad.detach()).float()

    def _see_train(self, local: Mapping[str, Any]) -> bool:
        if local.get("losses"):
            self._values["monitor/loss"] = float(local["losses"][-1])
        for current, target in _TD_NAMES:
            if current in local and target in local:
                error = (local[target].detach() - local[current].detach()).float()
                error = error.reshape(len(error), -1).mean(dim=1)  # QR-DQN: of the means over the quantiles
                size = error.abs()
                self._values.update({key: th.quantile(size, share) for key, share in _TD_QUANTILES.items()})
                self._values["monitor/td_mean"] = error.mean()
                return True
        return False

    @th.no_grad()
    def after_step(self, optimizer: th.optim.Optimizer) -> dict[str, float]:
        """:return: all values"""
        everything: list[th.Tensor] = []
        for name, parameters in self._trainable:
            # Gradients are as the last clip left them: torch's optimizers do not write into them.
            updated = [parameter for parameter in parameters if parameter.grad is not None]
            if not updated:
                continue  # AMP skips an update by dropping the gradients
            everything += updated
            moved = joint_norm([parameter - self._before[id(parameter)] for parameter in updated])
            size = joint_norm([self._before[id(parameter)] for parameter in updated])
            self._values[f"param_norm/{name}"] = size
            self._values[f"update_ratio/{name}"] = moved / size.clamp_min(1e-12)
            self._values.update(self._gradient_norms(name, updated))
        if everything:
            self._values.update(self._gradient_norms("all", everything))
        values = norms_of(self._values)
        if "grad_norm/all" in values:
            values["monitor/clip_share"] = float(values["grad_norm_clipped/all"] < values["grad_norm/all"] * (1 - 1e-4))
        for group in optimizer.param_groups:
            values[f"train/lr_{group['name']}"] = float(group["lr"])
        return values

    def _gradient_norms(self, name: str, parameters: list[th.Tensor]) -> dict[str, th.Tensor]:
        before = [self._norms[id(parameter)] for parameter in parameters if id(parameter) in self._norms]
        after = joint_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        return {f"grad_norm/{name}": joint_norm(before) if before else after, f"grad_norm_clipped/{name}": after}


def trainable(model: BaseAlgorithm) -> list[tuple[str, list[Any]]]:
    """:return: the parameters that train, by the name of their optimizer group"""
    return [
        (str(group["name"]), [parameter for parameter in group["params"] if parameter.requires_grad])
        for group in optimizer_of(model).param_groups
    ]


def train_locals(model: BaseAlgorithm) -> Mapping[str, Any]:
    """
    Local variables of the model's ``train()``, to be called from within it; empty elsewhere.

    SB3 hands callbacks those of ``learn()`` and ``collect_rollouts()``, but not these, and they alone hold the batch's
    TD errors: computing them again would need the batch and, with dropout, the random generator.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "train" and frame.f_locals.get("self") is model:
            return dict(frame.f_locals)
    return {}
