"""What all policies with a ResNet have in common, whatever the algorithm learns: arguments, optimizer, phases."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_resnet.common.arguments import choice, no_unknown, number, shown
from sb3_resnet.common.nonfinite import install_gradient_check
from sb3_resnet.extractor import ResNetExtractor, extractors_in
from sb3_resnet.extractor_combined import ResNetCombinedExtractor, combined_arguments, images_in
from sb3_resnet.nn.freezing import set_boundaries
from sb3_resnet.nn.heads import FEATURE_NORMS, activation_of, widths_of
from sb3_resnet.nn.image_spaces import take_as_they_are
from sb3_resnet.nn.weights import checkpoint_follows
from sb3_resnet.optim import classes
from sb3_resnet.optim.groups import audit, build_optimizer, install_effective_lr, lr_ratios
from sb3_resnet.optim.parts import parts_of
from sb3_resnet.optim.settings import install_loading, set_rates, warn_of_rise

POLICY_NAME = "ResNetCnnPolicy"
DICT_POLICY_NAME = "ResNetMultiInputPolicy"
# In signatures of policies, but nothing that a user writes in policy_kwargs.
_NOT_WRITTEN = {"self", "args", "kwargs", "unknown", "observation_space", "action_space", "lr_schedule"}


class WrongPolicyError(TypeError, AttributeError):
    """A policy that the algorithm cannot train; an ``AttributeError``, so that ``hasattr`` says no."""


class ResNetPolicyMixin:
    """
    What all ResNet policies share; goes before SB3's policy class.

    :param observation_space: image space, or a Dict with images
    :param action_space: actions of a kind that the algorithm takes
    :param lr_schedule: SB3's learning rate, the head's
    :param net_arch: widths of the head's hidden layers; ``[]`` for a linear head
    :param dropout: dropout probability in the head
    :param feature_norm: how features are normalised before the head: ``"standardize"``, ``"layer"`` or ``"none"``
    :param lr_head: the head's learning rate at the start; ``None``: SB3's ``learning_rate``
    :param lr_backbone: the backbone's and adapter's at the start; ``None``: a tenth of the head's
    :param lr_decay_per_stage: each stage below the last learns by this factor more slowly than the one above it
    :param weight_decay: of weights; norm layers and biases do not decay. ``None``: 0 with Adam, 1e-4 with AdamW and
        all other optimizers. Read from the policy, it is the head's number
    :param optimizer_class: a torch optimizer, or its name: AdamW, Adam, SGD, RMSprop
    :param backbone_optimizer_class: another one for the backbone and adapter, whose ``optimizer_kwargs`` are the next
        argument; ``None``: the head's
    :param backbone_optimizer_kwargs: further arguments of that one, such as ``{"momentum": 0.9}``
    :param activation_fn: activation of the head, or its name in ``torch.nn``
    :param features_extractor_class: a subclass of :class:`~sb3_resnet.extractor.ResNetExtractor`, or with a Dict of
        :class:`~sb3_resnet.extractor_combined.ResNetCombinedExtractor`; ``None``: these classes themselves
    :param kwargs: SB3's own arguments, such as ``features_extractor_kwargs`` and ``optimizer_kwargs``
    :raises ValueError: for values that cannot work
    :raises TypeError: for unknown arguments
    """

    #: What users write for the policy.
    _name: ClassVar[str] = POLICY_NAME
    #: What to write instead, by arguments that only another algorithm passes.
    _foreign: ClassVar[Mapping[str, str]] = {}
    #: The features extractor, and the arguments that it takes.
    _extractor_class: ClassVar[type[Any]] = ResNetExtractor
    _extractor_arguments: ClassVar[Sequence[str]] = tuple(ResNetExtractor.__init__.__kwdefaults__ or ())

    optimizer: th.optim.Optimizer

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *,
        net_arch: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        dropout: float = 0.0,
        feature_norm: str = "standardize",
        lr_head: float | None = None,
        lr_backbone: float | None = None,
        lr_decay_per_stage: float = 1.0,
        weight_decay: float | None = None,
        optimizer_class: str | type[th.optim.Optimizer] = th.optim.AdamW,
        backbone_optimizer_class: str | type[th.optim.Optimizer] | None = None,
        backbone_optimizer_kwargs: dict[str, Any] | None = None,
        activation_fn: str | type[nn.Module] = nn.ReLU,
        features_extractor_class: type[ResNetExtractor] | type[ResNetCombinedExtractor] | None = None,
        **kwargs: Any,
    ) -> None:
        self._check_space(observation_space)
        extractor_class = self._extractor_class if features_extractor_class is None else features_extractor_class
        self._check_names(extractor_class, kwargs)
        if not kwargs.get("normalize_images", True) and any(map(is_image_space, _parts(observation_space))):
            raise ValueError("normalize_images=False would leave uint8 images at 0..255: leave the argument out")
        if not kwargs.get("normalize_images", True):
            take_as_they_are(observation_space, extractor_class, kwargs)
        classes.optimizer_arguments_of(kwargs.get("optimizer_kwargs"), "optimizer_kwargs")
        self.dropout = number("dropout", dropout, 0.0, 0.99)
        self.feature_norm = choice("feature_norm", feature_norm, FEATURE_NORMS)
        self.lr_head = lr_head
        self.lr_backbone = lr_backbone
        self.lr_decay_per_stage = number("lr_decay_per_stage", lr_decay_per_stage, 0.0, 1.0, above=True)
        chosen = classes.optimizer_class_of(optimizer_class)
        self.backbone_optimizer = classes.backbone_optimizer_of(backbone_optimizer_class, backbone_optimizer_kwargs)
        self._given_weight_decay = None if weight_decay is None else number("weight_decay", weight_decay)
        self.weight_decay = classes.weight_decay_of(chosen, self._given_weight_decay)
        super().__init__(
            observation_space,  # type: ignore[call-arg]  # SB3's policy is next in the MRO
            action_space,
            lr_schedule,
            net_arch=[256] if net_arch is None else self._widths(net_arch),
            optimizer_class=chosen,
            activation_fn=activation_of(activation_fn),
            features_extractor_class=extractor_class,
            **kwargs,
        )

    @property
    def trained(self) -> Any:
        """The module whose parameters the optimizer holds: the online network, or the whole actor-critic policy."""
        return self

    @property
    def heads(self) -> list[nn.Module]:
        """What follows the features extractors: each an ``nn.Sequential``."""
        raise NotImplementedError

    @property
    def freeze_boundary(self) -> str | None:
        """The lowest stage that trains, or ``None`` where the whole backbone is frozen."""
        boundary: str | None = self.trained.features_extractor.freeze_boundary
        return boundary

    def set_freeze_boundary(self, stage: str | None, at_update: int = 0) -> None:
        """
        Train ``stage`` and everything above it, freeze what is below; the optimizer stays as it is.

        :param stage: ``"adapter"`` (where there is one), ``"stem"``, ``"layer1"`` to ``"layer4"``, ``"all"`` for the
            lowest, or ``None`` to freeze the whole backbone
        :param at_update: gradient updates done so far, saved with the model
        :raises ValueError: for an unknown stage
        """
        set_boundaries(self._extractors, stage, at_update)

    def set_frozen_dtype(self, name: str) -> None:
        """
        Convert the model: from here on its frozen stages compute in another precision, also after saving and loading.

        :param name: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"`` for what this hardware is fast in
        :raises ValueError: for another name
        """
        for extractor in self._extractors:
            extractor.set_frozen_dtype(name)

    def set_learning_rates(
        self, lr_head: float | None = None, lr_backbone: float | None = None, weight_decay: float | None = None
    ) -> None:
        """
        Change rates and weight decay; schedules go on, and the values are saved with the model.

        ``policy_kwargs`` in ``load(path, custom_objects=...)`` do not change them, since the optimizer's state is
        loaded after these: a warning says so.

        :param lr_head: the head's learning rate at the start of SB3's schedule; ``None``: unchanged
        :param lr_backbone: the backbone's and adapter's, likewise
        :param weight_decay: of weights; ``None``: unchanged
        :raises ValueError: for values that cannot work
        """
        set_rates(self.optimizer, {"head": lr_head, "backbone": lr_backbone}, weight_decay)
        given = {"lr_head": lr_head, "lr_backbone": lr_backbone, "weight_decay": weight_decay}
        self.__dict__.update({name: value for name, value in given.items() if value is not None})

    @property
    def _extractors(self) -> list[ResNetExtractor]:
        """Those of the target network too: all follow one freeze boundary."""
        policy: Any = self
        return extractors_in(policy)

    def _check_space(self, space: Any) -> None:
        """:raises ValueError: for a Dict"""
        if isinstance(space, spaces.Dict):
            instead = f"policy={DICT_POLICY_NAME!r}" if images_in(space) else "policy='MultiInputPolicy' of SB3"
            what = "a Dict" if images_in(space) else "a Dict without an image"
            raise ValueError(f"{self._name} sees one image, and the observation space is {what}: write {instead}")

    def _check_names(self, extractor_class: Any, kwargs: Mapping[str, Any]) -> None:
        """:raises TypeError: for another features extractor, and for arguments that nothing takes"""
        base = self._extractor_class
        hosts = [name for cls in type(self).__mro__ for name in inspect.signature(cls).parameters]
        own = {*hosts} - _NOT_WRITTEN
        for name in ({*kwargs} - own) & {*self._foreign}:
            raise TypeError(self._explained(self._foreign[name]))
        no_unknown(self._name, kwargs, own, self._extractor_arguments, "features_extractor_kwargs")
        if not (isinstance(extractor_class, type) and issubclass(extractor_class, base)):
            raise TypeError(
                f"features_extractor_class must be {base.__name__} or a subclass, got {shown(extractor_class)}"
            )
        if extractor_class is base:  # a subclass may take what it likes
            given = kwargs.get("features_extractor_kwargs") or {}
            no_unknown(base.__name__, given, self._extractor_arguments, own, "policy_kwargs")

    @classmethod
    def _explained(cls, text: str) -> str:
        """:return: a text about the class of the policy, with its names filled in"""
        return text.format(cls=cls.__name__, name=cls._name)

    def _widths(self, net_arch: Any) -> Any:
        """Check the widths of the head's hidden layers."""
        return widths_of(net_arch)

    def _build(self, lr_schedule: Schedule) -> None:
        lr = float(lr_schedule(1))
        # rl_zoo3.enjoy loads with a schedule that is always 0; the true ratios come with the optimizer's state.
        relative_to_nothing = lr == 0 and checkpoint_follows()
        ratios = lr_ratios(lr) if relative_to_nothing else lr_ratios(lr, self.lr_head, self.lr_backbone)
        warn_of_rise(lr_schedule, {"lr_head": self.lr_head, "lr_backbone": self.lr_backbone})
        super()._build(lr_schedule)  # type: ignore[misc]  # SB3's policy is next in the MRO
        backbone, scales = parts_of(extractors_in(self.trained), self.lr_decay_per_stage)
        known = {id(parameter) for parameters in backbone.values() for parameter in parameters}
        head = [parameter for parameter in self.trained.parameters() if id(parameter) not in known]
        self.optimizer = build_optimizer(
            self.optimizer_class,  # type: ignore[attr-defined]  # SB3's policy has it
            {"head": head, **backbone},
            lr,
            ratios,
            self._given_weight_decay,
            scales,
            self.backbone_optimizer,
            relative_to_nothing,
            **self.optimizer_kwargs,  # type: ignore[attr-defined]  # likewise
        )
        self.install_hooks()
        audit(self.trained, self.optimizer)
        self._all_parameters = [*super().parameters()]  # type: ignore[misc]  # SB3's policy is next in the MRO
        policy: Any = self
        policy.set_training_mode(False)  # as predict() leaves it: only updates need the other mode

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As ``nn.Module``'s; SB3 clips them at each update, and the walk to them takes 4 to 7 % of a head's update."""
        known: list[nn.Parameter] | None = getattr(self, "_all_parameters", None)
        if known is not None and recurse:
            return iter(known)
        found: Iterator[nn.Parameter] = super().parameters(recurse)  # type: ignore[misc]  # of SB3's policy
        return found

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data: dict[str, Any] = super()._get_constructor_parameters()  # type: ignore[misc]  # of SB3's policy
        own = {name: getattr(self, name) for name in ("dropout", "feature_norm", "lr_decay_per_stage")}
        kind, arguments = self.backbone_optimizer or (None, None)
        own |= {"backbone_optimizer_class": kind, "backbone_optimizer_kwargs": arguments}
        # A policy alone has no learning rate: SB3 loads it with a schedule that is always 0.
        return {**data, **own, "weight_decay": self._given_weight_decay}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]  # deepcopy and pickle of nn.Module
        install_effective_lr(self.optimizer)
        self.install_hooks()

    def install_hooks(self) -> None:
        """What the optimizer does beside its step: hooks are in no pickle and no copy."""
        install_gradient_check(self.optimizer)
        install_loading(self.optimizer)


class DictObservationsMixin:
    """
    Makes a policy that sees one image one that sees a Dict with images; goes before that policy.

    Its features extractor is :class:`~sb3_resnet.extractor_combined.ResNetCombinedExtractor`. The head is everything
    that is not trunk or adapter of a ResNet, so also the MLP of the vectors.
    """

    _name: ClassVar[str] = DICT_POLICY_NAME
    _extractor_class: ClassVar[type[Any]] = ResNetCombinedExtractor
    _extractor_arguments: ClassVar[Sequence[str]] = combined_arguments()

    def _check_space(self, space: Any) -> None:
        """:raises ValueError: for anything but a Dict; its extractor refuses one without images"""
        if not isinstance(space, spaces.Dict):
            instead = "MlpPolicy" if len(space.shape or ()) < 3 else POLICY_NAME
            raise ValueError(
                f"{self._name} sees a Dict, and the observation space is {space}: write policy={instead!r}"
            )


def _parts(space: Any) -> Sequence[Any]:
    return [*space.spaces.values()] if isinstance(space, spaces.Dict) else [space]
