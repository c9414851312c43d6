"""Measure a gradient update of SB3's ``train()`` from outside, without changing a bit of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_resnet.common.ranks import ranks_of
from sb3_resnet.common.sampling import unwatch_samples, watch_samples
from sb3_resnet.common.step_hooks import StepHooks, after_step
from sb3_resnet.diagnosis.measures import (
    batchnorm_drift,
    dead_features,
    dormant_units,
    joint_norm,
    norms_of,
    relative_distance,
)
from sb3_resnet.diagnosis.td_errors import loss_of, predictions_and_targets, train_rule
from sb3_resnet.extractor import extractors_in
from sb3_resnet.optim.groups import optimizer_of

_TD_QUANTILES = {"p50": 0.5, "p90": 0.9, "max": 1.0}


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
        self._hooks: StepHooks | None = None
        self._warned = False

    def start(self, model: BaseAlgorithm, n: int) -> None:
        """Measure the first update from now on, the one that follows ``n`` others."""
        self.end()
        self._model = model
        self._next = n
        self._hooks = after_step(optimizer_of(model))
        # A learn() that was interrupted never reached its end: its hooks are still there.
        earlier = getattr(self._hooks.get(self._key), "__self__", None)
        if isinstance(earlier, Probe):
            earlier.end()
        self._hooks.add(self._key, self._after_step)

    def end(self) -> None:
        """Stop for good; may be called again."""
        self.pause()
        if self._hooks is not None:
            self._hooks.remove(self._key, self._after_step)
            self._hooks = None

    @property
    def _key(self) -> Any:
        """One probe for each class of callbacks."""
        owner = getattr(self._sink, "__self__", None)
        return self if owner is None else type(owner)

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
                f"TD errors are not measured: train() of {type(self._model).__name__} is not that of DQN or QRDQN, "
                "so its targets are not known",
                stacklevel=2,
            )

    def _after_step(self, optimizer: th.optim.Optimizer) -> None:
        armed = self._armed
        if armed is None or not armed.began:
            return  # none was measured, or the next one will be
        values = armed.after_step(optimizer)
        self.pause()
        self._next = armed.n + self.every
        self._sink(values)
        self.prepare(armed.n + 1)


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
        self._output: th.Tensor | None = None  # of the online network
        self._following: th.Tensor | None = None  # of the target network
        self._batch: Any = None
        self._buffer: Any = getattr(model, "replay_buffer", None)
        eyes = model.policy.trained.features_extractor  # type: ignore[union-attr]  # a ResNet policy
        self._widths = [one.features_dim for one in getattr(eyes, "resnets", {"": eyes}).values()]
        self._handles = self._register()
        # Of several ranks: what is clipped is the mean of their gradients.
        self._averages = ranks_of(model).after_average
        self._averages.append(self._see_gradients)

    @property
    def stale(self) -> bool:
        """Whether other parameters train than those that are watched, or batches come from another buffer."""
        before, now = (
            [id(p) for _, some in groups for p in some] for groups in (self._trainable, trainable(self._model))
        )
        return before != now or self._buffer is not getattr(self._model, "replay_buffer", None)

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        if self._see_gradients in self._averages:
            self._averages.remove(self._see_gradients)
        unwatch_samples(self._buffer, self)

    def before_step(self) -> bool:
        """:return: whether it is known what ``train()`` computed, so that its TD errors can be"""
        self.began = True
        for _, parameters in self._trainable:
            self._before.update({id(parameter): parameter.detach().clone() for parameter in parameters})
        policy = self._model.policy
        if not hasattr(policy, "target"):
            self._measure_layers()
            return True  # there are no TD errors
        pairs = [
            (mine, other)
            for mine, other in zip(policy.online.parameters(), policy.target.parameters(), strict=True)
            if mine.requires_grad
        ]
        self._values["monitor/target_lag"] = relative_distance(pairs)
        return self._measure_td_errors()

    def _register(self) -> list[th.utils.hooks.RemovableHandle]:
        policy = self._model.policy
        activations = [module for head in policy.heads for module in head if isinstance(module, policy.activation_fn)]
        norms = [norm for extractor in extractors_in(policy.trained) for norm in extractor.boundary.live_norms]
        if hasattr(self._buffer, "sample"):
            watch_samples(self._buffer, self, self._see_batch)
        networks = []
        if hasattr(policy, "target"):
            networks = [(policy.online, self._see_values), (policy.target, self._see_target)]
        return [
            *(network.register_forward_hook(see) for network, see in networks),
            *(head.register_forward_pre_hook(self._see_head) for head in policy.heads),
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
        self._output = output.detach()
        values = self._output.float()
        values = values.mean(dim=1) if values.ndim == 3 else values  # QR-DQN: (batch, quantiles, actions)
        greedy = values.max(dim=1).values
        self._values.update(
            {"monitor/q_mean": greedy.mean(), "monitor/q_max": greedy.max(), "monitor/q_min": values.min()}
        )
        self._measure_layers()

    def _measure_layers(self) -> None:
        if self._units:
            self._values["monitor/dormant_units"] = dormant_units(self._units)
        if self._drifts:
            self._values["monitor/batchnorm_drift"] = th.stack(self._drifts).max()

    def _see_target(self, module: Any, args: Any, output: th.Tensor) -> None:
        self._following = output.detach()

    def _see_batch(self, batch: Any) -> None:
        self._batch = batch

    def _see_head(self, module: Any, args: Any) -> None:
        if th.is_grad_enabled():
            # Those of images come first. The rest, such as the one-hot of a Discrete, is none of the backbone's.
            images = args[0].detach()[:, : sum(self._widths)].split(self._widths, dim=1)
            self._values["monitor/dead_features"] = dead_features(images)

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

    def _see_gradients(self) -> None:
        for _, parameters in self._trainable:
            for parameter in parameters:
                self._see_gradient(parameter)

    @th.no_grad()
    def _measure_td_errors(self) -> bool:
        rule = train_rule(self._model)
        if self._output is None or self._following is None or self._batch is None:
            return rule is not None
        pair = predictions_and_targets(self._output, self._following, self._batch, self._model.gamma)
        if rule is not None:
            self._values["monitor/loss"] = loss_of(rule, *pair)
        error = (pair[1] - pair[0]).float()
        error = error.reshape(len(error), -1).mean(dim=1)  # QR-DQN: of the means over the quantiles
        size, name = error.abs(), "monitor/td" if rule is not None else "monitor/greedy_td"
        self._values.update({f"{name}_{key}": th.quantile(size, share) for key, share in _TD_QUANTILES.items()})
        self._values[f"{name}_mean"] = error.mean()
        return rule is not None

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
