"""Updates of a pretraining, and all of their state, so that a run goes on where another was stopped."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch as th

from sb3_resnet.nn.precision import resolve_dtype
from sb3_resnet.nn.pretraining.collapse import CollapseError
from sb3_resnet.nn.pretraining.frames import Frames, shifted
from sb3_resnet.nn.pretraining.network import PretrainedTrunk
from sb3_resnet.nn.pretraining.objective import Pairs
from sb3_resnet.nn.pretraining.settings import OBJECTIVES, Settings

_SHIFT = 4  # pixels, as in arXiv 2009.08319


class Trainer:
    """
    Trains a trunk. The same settings and frames give the same weights, bit for bit, on the same machine with the same
    number of threads.

    :param settings: what was chosen
    :param space: observation space
    :param frames: to train on
    :param n_actions: number of actions; ``None`` where an action is no choice
    :raises ValueError: for frames that hold no pair
    """

    def __init__(self, settings: Settings, space: Any, frames: Frames, n_actions: int | None) -> None:
        objective = OBJECTIVES[settings.objective]
        self.settings, self.frames = settings, frames
        self.images = settings.images(space)
        self._starts = frames.starts(objective.gap)
        if objective.needs_actions:
            self._starts = self._starts[frames.actions[self._starts] >= 0]
        if not len(self._starts):
            shorter = [name for name, other in OBJECTIVES.items() if other.gap < objective.gap and n_actions]
            instead = f", or objective={shorter[0]!r}, for which one step is enough" if shorter else ""
            raise ValueError(
                f"No two observations of an episode are {objective.gap} steps apart: write more frames (and more "
                f"minutes, if these left no time for them), or use an environment with longer episodes{instead}"
            )
        with th.random.fork_rng(devices=[]):
            th.manual_seed(settings.seed)
            pool, statistics = settings.pool(), settings.normalisation(self.images)
            self.trunk = PretrainedTrunk(self.images, settings.backbone, settings.last_stage, pool, *statistics)
            self.objective = objective(self.trunk, n_actions)
        self.trunk.to(settings.device).train()
        self.objective.to(settings.device).train()
        self._parameters = [
            parameter
            for part in (self.trunk, self.objective)
            for parameter in part.parameters()
            if parameter.requires_grad
        ]
        self._optimizer = th.optim.Adam(self._parameters, lr=settings.learning_rate)
        self._generator = th.Generator().manual_seed(settings.seed)
        #: Updates done so far.
        self.update = 0

    def step(self) -> float:
        """
        Make one update.

        :return: the loss before it
        :raises CollapseError: for a loss that is not finite
        """
        pairs = self._draw()
        with self._precision():
            loss = self.objective.loss(self.trunk, pairs)
        value = loss.item()
        if not math.isfinite(value):
            raise CollapseError(
                f"The loss is {value} at update {self.update}, so the features have collapsed. No weights are written. "
                "Write a smaller learning_rate, or a longer warmup."
            )
        self._optimizer.param_groups[0]["lr"] = self.learning_rate
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # PyTorch's
        th.nn.utils.clip_grad_norm_(self._parameters, self.settings.max_grad_norm)
        self._optimizer.step()
        self.objective.follow(self.trunk)
        self.update += 1
        return value

    @property
    def learning_rate(self) -> float:
        """That of the next update."""
        return self.settings.learning_rate * min(1.0, (self.update + 1) / max(self.settings.warmup, 1))

    def state(self) -> dict[str, Any]:
        """:return: tensors and numbers, all that further updates depend on"""
        return {
            "update": self.update,
            "trunk": self.trunk.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """:param state: of :meth:`state`"""
        self.trunk.load_state_dict(state["trunk"])
        self.objective.load_state_dict(state["objective"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])
        self.update = int(state["update"])

    def _draw(self) -> Pairs:
        rows = self._starts[self._chosen()]
        first, second = (
            shifted(
                self.frames.images(one, self.images.per_frame),
                _SHIFT,
                self.settings.shift_probability,
                self._generator,
            ).to(self.settings.device)
            for one in (rows, rows + self.objective.gap)
        )
        return Pairs(first, second, self.frames.actions[rows].to(self.settings.device))

    def _chosen(self) -> th.Tensor:
        """Which pairs: stretches of neighbouring ones, each from a random place."""
        batch, length = self.settings.batch_size, min(self.settings.neighbours, len(self._starts))
        places = th.randint(len(self._starts) - length + 1, (-(-batch // length), 1), generator=self._generator)
        return (places + th.arange(length)).flatten()[:batch]

    def _precision(self) -> AbstractContextManager[Any]:
        device = th.device(self.settings.device)
        dtype = resolve_dtype(self.settings.dtype, device)
        # float16, which "auto" takes on older GPUs, would need a loss scale.
        return th.autocast(device.type, th.bfloat16) if dtype == th.bfloat16 else nullcontext()
