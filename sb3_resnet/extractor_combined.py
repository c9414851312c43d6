"""Features of a Dict of observations: images through ResNets, vectors through an MLP, the rest as it is."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_resnet.common.arguments import flag, no_unknown, shown
from sb3_resnet.extractor import ResNetExtractor
from sb3_resnet.nn.backbones import smallest_size
from sb3_resnet.nn.freezing import FreezeBoundary, set_boundaries, stages_of
from sb3_resnet.nn.heads import make_head, widths_of
from sb3_resnet.nn.image_spaces import has_image_bounds, scale_of
from sb3_resnet.nn.weights import checkpoint_follows

_OF_ONE_IMAGE = tuple(ResNetExtractor.__init__.__kwdefaults__ or ())
_FOR_ALL = ("freeze_backbone", "frozen_dtype")  # one value for all images, since the policy has one
_SMALLEST = smallest_size("layer4", needs_map=False)  # pixels


class ResNetCombinedExtractor(BaseFeaturesExtractor):
    """
    Features of a Dict: images through ResNets, all other observations beside them, ``(batch, features_dim)``.

    * Images are the keys with three axes and bounds 0..255 (uint8 or float) or 0..1 (float). Each has a
      :class:`~sb3_resnet.extractor.ResNetExtractor` of its own, or all share one. All follow one freeze boundary.
    * Vectors are all other ``Box`` keys, flattened and put side by side. They are standardised by their mean and
      variance over the observations that were trained on. These statistics are saved with the model and move in updates
      only: acting and evaluation use them as they are.
    * Everything else comes as in SB3's ``CombinedExtractor``: ``Discrete`` and ``MultiDiscrete`` as one-hot vectors,
      ``MultiBinary`` as numbers.

    The result has the features of the images in the order of the keys, then those of the vectors, then the rest.
    Further arguments are those of :class:`~sb3_resnet.extractor.ResNetExtractor` and go to each image;
    ``features_dim`` is the size of one image's features. Example::

        features_extractor_kwargs=dict(pretrained=True, by_key={"depth": {"pretrained": False}})

    :param observation_space: a Dict with at least one image
    :param image_keys: which keys are images; ``None``: all that look like one. A key that is left out is flattened
    :param shared: one ResNet for all images, which must agree in shape, type and bounds
    :param by_key: arguments of :class:`~sb3_resnet.extractor.ResNetExtractor` for single images: a dict of dicts by
        key. They go before those that are given for all. ``freeze_backbone`` and ``frozen_dtype`` are for all images
    :param vector_arch: widths of an MLP with ReLU over the vectors; ``[]``: the vectors themselves
    :param standardize_vectors: standardise the vectors; ``False``: as they are
    :param cnn_output_dim: SB3's name for ``features_dim``
    :param kwargs: arguments of :class:`~sb3_resnet.extractor.ResNetExtractor` for all images
    :raises ValueError: for values that cannot work, with what to write instead, and for a Dict without an image
    :raises TypeError: for wrong types and unknown arguments
    :raises FileNotFoundError: if a weights file is not there
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        *,
        image_keys: Sequence[str] | None = None,
        shared: bool = False,
        by_key: Mapping[str, Mapping[str, Any]] | None = None,
        vector_arch: Sequence[int] = (),
        standardize_vectors: bool = True,
        cnn_output_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        no_unknown("ResNetCombinedExtractor", kwargs, combined_arguments())
        keys = _image_keys(observation_space, image_keys)
        arguments = _arguments(keys, flag("shared", shared), by_key, cnn_output_dim, kwargs)
        parts = observation_space.spaces
        names = dict.fromkeys(keys, "shared") if shared else _module_names(keys)
        if shared:
            _refuse_different({key: parts[key] for key in keys})
        # Of images that share one module the first stands for all.
        first = {name: key for key, name in reversed(names.items())}
        hint = image_keys is None
        images = {
            names[key]: _resnet(key, parts[key], arguments[key], hint) for key in keys if first[names[key]] == key
        }
        vectors = [key for key, space in parts.items() if isinstance(space, spaces.Box) and key not in keys]
        others = [key for key in parts if key not in (*keys, *vectors)]
        dim, widths = _flat_dim(parts, vectors), widths_of(vector_arch, "vector_arch")
        if widths and not vectors:
            raise ValueError(f"vector_arch={widths} has no effect, since the Dict has no vectors: leave it out")
        of_images = sum(images[names[key]].features_dim for key in keys)
        super().__init__(observation_space, of_images + [dim, *widths][-1] + _flat_dim(parts, others))

        #: The ResNet of each image, by the name of its module; :attr:`resnets` has them by key.
        self.extractors = nn.ModuleDict(images)
        scale = "standardize" if flag("standardize_vectors", standardize_vectors) and vectors else "none"
        #: Standardisation and MLP of the vectors.
        self.vectors = make_head(dim, 0, widths, nn.ReLU, 0.0, scale)
        self.shared = bool(shared)
        self.vector_keys, self.other_keys = tuple(vectors), tuple(others)
        self._names = names

    @property
    def resnets(self) -> dict[str, ResNetExtractor]:
        """The features extractor of each image, by its key; the same one for all that share it."""
        extractors: Any = self.extractors
        return {key: extractors[name] for key, name in self._names.items()}

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that any of the ResNets has, from the input up."""
        return stages_of(self.resnets.values())

    @property
    def boundary(self) -> FreezeBoundary:
        """That of the ResNet that trains from the lowest stage; their stages may differ, as only some have adapters."""
        return min((extractor.boundary for extractor in self.resnets.values()), key=lambda one: one.position)

    @property
    def freeze_boundary(self) -> str | None:
        """The lowest stage that trains in any ResNet, or ``None``."""
        return self.boundary.stage

    def set_freeze_boundary(self, stage: str | None, at_update: int = 0) -> None:
        """
        Train ``stage`` and everything above it in each ResNet; freeze what is below.

        :param stage: a stage of at least one of them, ``"all"`` for the lowest, ``None`` to freeze all
        :param at_update: gradient updates done so far, saved with the model
        :raises ValueError: for an unknown stage
        """
        set_boundaries([*self.resnets.values()], stage, at_update)

    @property
    def frozen_dtype(self) -> str:
        """Precision of the frozen stages: ``"float32"``, ``"bfloat16"`` or ``"float16"``."""
        return next(iter(self.resnets.values())).frozen_dtype

    def set_frozen_dtype(self, name: str) -> None:
        """
        Convert the model: its frozen stages compute in another precision from here on. The weights stay float32.

        :param name: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"`` for what this hardware is fast in
        :raises ValueError: for another name
        """
        for extractor in self.resnets.values():
            extractor.set_frozen_dtype(name)

    @property
    def augments(self) -> bool:
        """Whether images are changed at random: those sampled for training, never those that are acted upon."""
        return any(extractor.augments for extractor in self.resnets.values())

    @augments.setter
    def augments(self, value: bool) -> None:
        for extractor in self.resnets.values():
            extractor.augments = value

    def forward(self, observations: Mapping[str, th.Tensor]) -> th.Tensor:
        """
        :param observations: by key, as SB3 hands them over: uint8 images divided by 255, ``Discrete`` as one-hot
        :return: float32 features ``(batch, features_dim)``
        """
        parts = self._features_of_images(observations)
        if self.vector_keys:
            parts.append(self.vectors(_side_by_side(observations, self.vector_keys)))
        if self.other_keys:
            parts.append(_side_by_side(observations, self.other_keys))
        return th.cat(parts, dim=1)

    def _features_of_images(self, observations: Mapping[str, th.Tensor]) -> list[th.Tensor]:
        resnets = self.resnets
        if not self.shared:
            return [extractor(observations[key]) for key, extractor in resnets.items()]
        images = th.cat([observations[key] for key in resnets])
        features: th.Tensor = next(iter(resnets.values()))(images)
        return [*features.chunk(len(resnets))]


def combined_arguments() -> tuple[str, ...]:
    """:return: names of all arguments of :class:`ResNetCombinedExtractor`, those of each ResNet among them"""
    return (*(ResNetCombinedExtractor.__init__.__kwdefaults__ or ()), *_OF_ONE_IMAGE)


def images_in(space: spaces.Dict) -> list[str]:
    """:return: the keys of a Dict that look like images"""
    return [key for key, part in space.spaces.items() if has_image_bounds(part)]


def _image_keys(space: Any, given: Any) -> list[str]:
    """The keys that are images, in the order of the Dict."""
    if not isinstance(space, spaces.Dict):
        raise ValueError(
            f"ResNetCombinedExtractor needs a Dict, got {space}: for a single image write ResNetExtractor, or "
            "policy='ResNetCnnPolicy'"
        )
    if given is None:
        found, odd = images_in(space), _unlike_images(space)
    else:
        if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
            raise TypeError(f"image_keys must be a list of keys, got {shown(given)}")
        named = [*given]
        no_unknown("image_keys", named, space.spaces)
        found, odd = [key for key in space.spaces if key in named], []
    if not found:
        what = f"The Dict has no image, its keys are {', '.join(map(repr, space.spaces))}"
        instead = "policy='MultiInputPolicy', SB3's policy with its own features extractor."
        raise ValueError(f"{what}: write {' '.join([instead, *odd])}")
    for text in [] if checkpoint_follows() else odd:
        warnings.warn(f"{text} It is flattened, as SB3 does; write image_keys={found} if so it is to be.", stacklevel=4)
    return found


def _unlike_images(space: spaces.Dict) -> list[str]:
    """Say why keys with the shape of an image are none."""
    texts = []
    for key, part in space.spaces.items():
        if isinstance(part, spaces.Box) and len(part.shape) == 3 and not has_image_bounds(part):
            try:
                scale_of(part)
            except ValueError as error:
                texts.append(f"{key!r} has the shape of an image, and is none. {error}")
    return texts


def _arguments(
    keys: Sequence[str], shared: bool, by_key: Any, cnn_output_dim: Any, common: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Arguments of each image's extractor."""
    if cnn_output_dim is not None:
        if "features_dim" in common:
            raise ValueError("cnn_output_dim and features_dim are two names of one number: leave one of them out")
        common = {**common, "features_dim": cnn_output_dim}
    given = {} if by_key is None else by_key
    if not isinstance(given, Mapping) or not all(isinstance(own, Mapping) for own in given.values()):
        raise TypeError(
            f"by_key must be a dict of dicts, such as {{{keys[0]!r}: {{'pooling': 'flatten'}}}}, got {shown(by_key)}"
        )
    if shared and given:
        raise ValueError(
            "by_key has no effect with shared=True, where one ResNet sees all images: leave one of them out"
        )
    no_unknown("by_key", given, keys)
    for key, own in given.items():
        name = f"by_key[{key!r}]"
        for_all = [argument for argument in _FOR_ALL if argument in own]
        if for_all:
            raise ValueError(f"{name}: {for_all[0]} is one value for all images: write it beside by_key")
        no_unknown(name, own, [argument for argument in _OF_ONE_IMAGE if argument not in _FOR_ALL])
    return {key: {**common, **given.get(key, {})} for key in keys}


def _resnet(key: str, space: Any, arguments: dict[str, Any], hint: bool) -> ResNetExtractor:
    """Build the extractor of one image; its errors name the key."""
    try:
        return ResNetExtractor(space, **arguments)
    except (TypeError, ValueError) as error:
        text = f"Image {key!r}: {error}"
        if hint and min(space.shape[-2:]) < _SMALLEST:
            text += f" If it is no image, write image_keys=[...] without {key!r}: it is flattened then, as SB3 does."
        raise (TypeError if isinstance(error, TypeError) else ValueError)(text) from error


def _refuse_different(images: Mapping[str, Any]) -> None:
    """Images that share a ResNet must be of one kind."""
    kinds = {
        key: f"{space.dtype} {space.shape} {space.low.min():g}..{space.high.max():g}" for key, space in images.items()
    }
    if len({*kinds.values()}) > 1:
        listed = ", ".join(f"{key!r} ({kind})" for key, kind in kinds.items())
        raise ValueError(
            f"shared=True needs images of one shape, type and bounds, got {listed}: write shared=False, or "
            "bring them to one shape in a wrapper"
        )


def module_name(key: str) -> str:
    """:return: the key of an image as a name that PyTorch takes for a module"""
    name = str(key).replace(".", "_") or "_"
    return f"{name}_" if hasattr(nn.ModuleDict(), name) else name


def _module_names(keys: Sequence[str]) -> dict[str, str]:
    names = {key: module_name(key) for key in keys}
    twins = [key for key in keys if [*names.values()].count(names[key]) > 1]
    if twins:
        raise ValueError(f"The keys {' and '.join(map(repr, twins))} differ by a dot alone: give one another name")
    return names


def _flat_dim(parts: Mapping[str, Any], keys: Iterable[str]) -> int:
    return sum(int(get_flattened_obs_dim(parts[key])) for key in keys)


def _side_by_side(observations: Mapping[str, th.Tensor], keys: Iterable[str]) -> th.Tensor:
    """Numbers without axes come as ``(batch,)``."""
    return th.cat([observations[key].float().reshape(len(observations[key]), -1) for key in keys], dim=1)
