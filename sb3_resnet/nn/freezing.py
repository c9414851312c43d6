"""The freeze boundary: one value that says which stages train, saved with the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch as th
from torch import nn

from sb3_resnet.common.arguments import choice
from sb3_resnet.nn.backbones import STAGES as TRUNK_STAGES
from sb3_resnet.nn.backbones import FreezableNorm

#: All stages from the input up; ``adapter`` exists only where the observation has not three channels.
STAGES = ("adapter", *TRUNK_STAGES)
_ALL_FROZEN = len(STAGES)


class FreezeBoundary(nn.Module):
    """
    Keeps the stages below the boundary frozen and the others trainable.

    The boundary and the update at which it moved are buffers, so they are saved with the weights; loading a state
    dict applies them, with or without a callback. ``requires_grad`` itself is in no state dict.

    :param stages: the modules of each stage, in order; not owned by this module
    :param unfreeze_from: the lowest stage that trains, ``"all"`` for the lowest there is, ``None`` for none
    :param train_adapter: whether the adapter trains wherever the boundary is
    :param live_norm: whether BatchNorm above the boundary follows ``train()`` (``norm="batch"`` and ``"sync"``)
    """

    index: th.Tensor
    moved_at: th.Tensor

    def __init__(
        self,
        stages: Mapping[str, Sequence[nn.Module]],
        unfreeze_from: str | None,
        train_adapter: bool = False,
        live_norm: bool = False,
    ) -> None:
        super().__init__()
        self._stages = {name: tuple(modules) for name, modules in stages.items()}
        self._train_adapter = train_adapter
        self._live_norm = live_norm
        # Floats, as everything in a state dict of SB3's own policies: its users (and its tests) call rand_like on each.
        self.register_buffer("index", th.tensor(float(self._index_of(unfreeze_from))))
        self.register_buffer("moved_at", th.tensor(0.0))
        self._enforce()

    @property
    def stage(self) -> str | None:
        """The lowest stage that trains, or ``None``."""
        return None if self._position == _ALL_FROZEN else STAGES[self._position]

    @property
    def position(self) -> int:
        """The place of :attr:`stage` in :data:`STAGES`, and their number where nothing trains."""
        return self._position

    @property
    def moved_at_update(self) -> int:
        """Gradient updates done when the boundary last moved."""
        return self._moved_at

    @property
    def frozen_stages(self) -> tuple[str, ...]:
        """Stages that need no gradient: those below the boundary, and none if the adapter under them trains."""
        return self._frozen_names

    @property
    def live_norms(self) -> list[nn.Module]:
        """The norm layers that follow ``train()``."""
        return self._live

    def move(self, unfreeze_from: str | None, at_update: int = 0) -> None:
        """
        Move the boundary.

        :param unfreeze_from: as at construction
        :param at_update: gradient updates done so far
        :raises ValueError: for an unknown stage
        """
        self.index.fill_(self._index_of(unfreeze_from))
        self.moved_at.fill_(at_update)
        self._enforce()

    def nearest(self, unfreeze_from: str | None) -> str | None:
        """
        :param unfreeze_from: the lowest stage that is to train, perhaps one that only another trunk has
        :return: the same for this trunk: its own stages from there up train, ``None`` if it has none
        """
        if unfreeze_from is None or unfreeze_from == "all":
            return unfreeze_from
        above = STAGES[STAGES.index(unfreeze_from) :]
        return next((name for name in self._stages if name in above), None)

    def check(self) -> None:
        """
        :raises ValueError: if the ``requires_grad`` of a parameter contradicts the boundary, since stages below it
            compute without gradients whatever their parameters say
        """
        if all(parameter.requires_grad for parameter in self._training) and not any(
            parameter.requires_grad for parameter in self._resting
        ):
            return
        wrong = {
            trains: [name for name in self._stages if self._trains(name) == trains and self._differs(name)]
            for trains in (True, False)
        }
        says = {
            True: "are to train, but have parameters with requires_grad=False",
            False: "are frozen, but have some with requires_grad=True, which will not train",
        }
        seen = "; ".join(f"{', '.join(names)} {says[trains]}" for trains, names in wrong.items() if names)
        lowest = next((name for name in self._stages if self._wants_gradients(name)), None)
        raise ValueError(
            f"requires_grad contradicts the freeze boundary, which is {self.stage!r}: {seen}. Do not write "
            f"requires_grad of a ResNetExtractor's stages, but call set_freeze_boundary({lowest!r}) of the policy "
            "(ResNetCnnPolicy) or of its features_extractor: this stage and all above it train then."
        )

    def _wants_gradients(self, name: str) -> bool:
        return all(parameter.requires_grad for module in self._stages[name] for parameter in module.parameters())

    def _differs(self, name: str) -> bool:
        trains = self._trains(name)
        return any(p.requires_grad != trains for module in self._stages[name] for p in module.parameters())

    def _index_of(self, unfreeze_from: str | None) -> int:
        if unfreeze_from is None:
            return _ALL_FROZEN
        names = [*self._stages]
        choice("unfreeze_from", unfreeze_from, [*names, "all"])
        return STAGES.index(names[0] if unfreeze_from == "all" else unfreeze_from)

    def _trains(self, name: str) -> bool:
        return STAGES.index(name) >= self._position or (name == "adapter" and self._train_adapter)

    def _enforce(self) -> None:
        """Make the modules obey the buffer: the only code that writes ``requires_grad``."""
        # A copy on the Python side: reading the buffer on a GPU would wait for the device in each forward pass.
        self._position = int(self.index)
        self._moved_at = int(self.moved_at)
        frozen = [] if self._train_adapter else [name for name in self._stages if not self._trains(name)]
        self._frozen_names = tuple(frozen)
        self._live: list[nn.Module] = []
        # At hand, since each update asks for them: the walk to them takes ten times as long.
        self._training: list[nn.Parameter] = []
        self._resting: list[nn.Parameter] = []
        for name, modules in self._stages.items():
            trains = self._trains(name)
            for layer in (layer for module in modules for layer in module.modules()):
                for parameter in layer.parameters(recurse=False):
                    parameter.requires_grad_(trains)
                    (self._training if trains else self._resting).append(parameter)
                    if not trains:
                        parameter.grad = None
                if isinstance(layer, FreezableNorm):
                    layer.live = trains and self._live_norm
                    layer.train(layer.training)
                    if layer.live:
                        self._live.append(layer)

    def _load_from_state_dict(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]  # nn.Module's own hook
        super()._load_from_state_dict(*args, **kwargs)
        self._enforce()


def stages_of(extractors: Iterable[Any]) -> tuple[str, ...]:
    """
    :param extractors: some :class:`~sb3_resnet.extractor.ResNetExtractor`, whose stages may differ
    :return: the stages that any of them has, from the input up
    """
    there = {name for extractor in extractors for name in extractor.stages}
    return tuple(name for name in STAGES if name in there)


def set_boundaries(extractors: Sequence[Any], unfreeze_from: str | None, at_update: int = 0) -> None:
    """
    Move the boundary of several trunks at once.

    :param extractors: as in :func:`stages_of`
    :param unfreeze_from: a stage that at least one of them has, ``"all"`` or ``None``
    :param at_update: gradient updates done so far
    :raises ValueError: for a stage that none of them has
    """
    if unfreeze_from is not None:
        choice("unfreeze_from", unfreeze_from, [*stages_of(extractors), "all"])
    for extractor in extractors:
        extractor.set_freeze_boundary(extractor.boundary.nearest(unfreeze_from), at_update)


def refuse_absent(stage: str, stages: Sequence[str]) -> None:
    """
    :param stage: from which a phase is to train
    :param stages: those of the model, from the input up
    :raises ValueError: if it is none of them and not ``"all"``
    """
    if stage in STAGES and STAGES.index(stage) > STAGES.index(stages[-1]):
        raise ValueError(
            f"unfreeze_from must be one of {', '.join(map(repr, [*stages, 'all']))}, got {stage!r}: the trunk ends at "
            f"{stages[-1]}. Name lower stages; with fine_tuning_callbacks write last_stage={stages[-1]!r}"
        )
    choice("unfreeze_from", stage, [*stages, "all"])


def warn_that_it_learns_little(is_so: bool) -> None:
    """
    Say how to get a trunk that has learnt something, or does.

    :param is_so: whether all of it is frozen with random weights
    """
    if not is_so:
        return
    warnings.warn(
        "The backbone is frozen with random weights and learns little. Write pretrained=True (or weights=PATH), or "
        "unfreeze it: freeze_backbone=False, or with ResNetCnnPolicy an UnfreezeCallback.",
        stacklevel=3,
    )
