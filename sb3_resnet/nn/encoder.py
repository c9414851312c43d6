"""The frozen stages as one fast function: what everybody gets from them, with or without a cache."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch as th
from torch import nn

from sb3_resnet.common import host
from sb3_resnet.nn.backbones import BLOCKS
from sb3_resnet.nn.graphs import GraphedFunction
from sb3_resnet.nn.inference import SixteenBitMaxPool2d, fold_norms, from_raw_input, is_native, pack
from sb3_resnet.nn.trunk import Trunk

_PASSED_OVER = ("preprocess", "scale_raw", "frozen_part", "run_stages")  # methods that it takes the place of
_JUDGED = 64  # images after each build that are searched for overflow
_SAMPLED = 16  # numbers of each tensor that are compared by value


class FrozenEncoder:
    """
    Encodes images with the stages below the freeze boundary, and pools them if all stages are frozen.

    BatchNorm is folded into the convolutions, memory is channels last, and weights and activations are in the model's
    ``frozen_dtype``; sums and pooling are float32. It is a copy: in no state dict, and built anew when the weights, the
    boundary, the precision or the device of the trunk have changed.

    :param trunk: of a :class:`~sb3_resnet.extractor.ResNetExtractor`
    """

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk
        #: Whether a GPU runs captured graphs; off until measured there.
        self.uses_graphs = False
        #: Images encoded so far.
        self.images = 0
        #: Changes whenever entries made before are of no use any more.
        self.version = 0
        self._forget()

    @property
    def can_gain(self) -> bool:
        """Whether a stage of the trunk is frozen; the adapter's output is larger than the pixels."""
        return any(name != "adapter" for name in self.trunk.frozen_stages)

    @property
    def can_replace_modules(self) -> bool:
        """Whether it gains, and no hook waits for a frozen module to be called."""
        layers = self._layers if self._frozen == self.trunk.frozen_stages else _layers(self.trunk)
        return self.can_gain and not any(map(host.has_forward_hooks, layers))

    @property
    def device(self) -> th.device:
        """Where it computes."""
        return self.trunk.device

    def __call__(self, images: th.Tensor) -> th.Tensor:
        """
        :param images: raw values of the space, any type, on :attr:`device`: whole observations ``(n, C, H, W)``, or
            single frames ``(n, 1 or 3, H, W)`` with ``adapter="per_frame"``; resized here if they are not
        :return: entries: pooled features ``(n, dim)`` in float32, or the map that the lowest trainable stage takes,
            ``(n, c, h, w)`` in the model's ``frozen_dtype``
        :raises ValueError: for NaN, infinity and values outside of the space
        """
        self.trunk.preprocessing.check_range(images)
        return self.encode_checked(images)

    def encode_checked(self, images: th.Tensor) -> th.Tensor:
        """
        :param images: as for a call, but of any values: what changes images at random may leave the space
        :return: entries, as of a call
        """
        self.refresh()
        with th.no_grad(), th.autocast(images.device.type, enabled=False):
            resized = self.trunk.preprocessing.resize(images)
            entries = self._run(resized) if self.uses_graphs else self._run_stages(resized)
        if self._judged < _JUDGED and self.trunk.frozen_dtype.dtype == th.float16:
            self._judged += len(images)
            _refuse_overflow(entries)
        self.images += len(images)
        return entries

    def refresh(self, by_value: bool = False) -> bool:
        """
        Build the copy anew where it is stale.

        :param by_value: notice also weights that were written through ``.data``, as SB3 does with a target network,
            which leaves no trace: some numbers of each tensor are compared
        :return: whether it was stale
        """
        if self._fingerprint == _fingerprint(self.trunk, self._holders) and not (by_value and self._has_drifted()):
            return False
        self._build()
        return True

    def _forget(self) -> None:
        self._fingerprint: tuple[Any, ...] | None = None
        self._frozen: tuple[str, ...] | None = None
        self._layers: list[nn.Module] = []
        self._holders: list[Any] = []
        self._probe: list[th.Tensor] = []
        self._probed: th.Tensor | None = None
        self._stages: list[nn.Module] = []
        self._run: Any = None
        self._judged = 0  # images of which it is known that float16 can hold what becomes of them

    def _build(self) -> None:
        trunk = self.trunk
        trunk.frozen_dtype.settle()
        self._frozen, self._layers = trunk.frozen_stages, _layers(trunk)
        self._holders = _holders(trunk, self._layers)
        self._fingerprint = _fingerprint(trunk, self._holders)
        # Views of the weights themselves, so that they show what is written there later.
        self._probe = [_some(tensor) for tensor in frozen_tensors(trunk) if tensor.is_floating_point()]
        self._probed = th.cat(self._probe) if self._probe else None
        if not is_native(trunk.frozen_dtype.dtype, self.device):
            _warn_that_it_is_slow(trunk.frozen_dtype.name)
        with th.no_grad():
            self._stages = _arranged(trunk) if self.can_gain else []
        self._run = GraphedFunction(self._run_stages)
        self._judged = 0
        self.version += 1

    def _has_drifted(self) -> bool:
        """A target network that follows slowly is rounded anew at each update, which is no change."""
        return self._probed is not None and not th.allclose(th.cat(self._probe), self._probed, rtol=1e-5, atol=1e-7)

    def _run_stages(self, x: th.Tensor) -> th.Tensor:
        for stage in self._stages:
            x = stage(x)
        return x if self.trunk.live_stages else self.trunk.pooling(x)

    def __getstate__(self) -> dict[str, Any]:
        # A copied or loaded extractor builds its own.
        bare = FrozenEncoder(self.trunk)
        return {**bare.__dict__, "uses_graphs": self.uses_graphs}


def rounding_error(encoder: FrozenEncoder, observations: th.Tensor) -> float:
    """
    How much the precision of the frozen stages blurs what distinguishes observations.

    :param encoder: of an extractor
    :param observations: raw, as different as those of the game, ``(batch, C, H, W)`` on the encoder's device
    :return: root mean square difference from the plain float32 modules, as a share of the distance of the typical
        observation from the median one
    """
    trunk = encoder.trunk
    images = trunk.preprocessing
    with th.no_grad():
        plain = trunk.run(images(images.scale_raw(observations)), trunk.frozen_stages)
        exact = (plain if trunk.live_stages else trunk.pooling(plain)).float()
    error = (encoder(images.as_images(observations)).float() - exact).square().mean().sqrt()
    # Of the typical observation: a few odd ones, as the empty stacks after a reset, would hide what errors hide.
    exact = exact.reshape(len(observations), -1)
    spread = (exact - exact.median(dim=0).values).square().mean(dim=1).sqrt().median()
    return float(error / spread.clamp(min=1e-12))


def overridden(extractor_class: type, base: type) -> list[str]:
    """
    :param extractor_class: class of an extractor
    :param base: ``ResNetExtractor``
    :return: methods of the class in whose place the encoder would compute something else
    """
    return [name for name in _PASSED_OVER if getattr(extractor_class, name) is not getattr(base, name)]


def refuse_overridden(cls: type, base: type, frozen_dtype: str) -> None:
    """:raises ValueError: if a class computes the frozen stages its own way, and not in float32"""
    methods = overridden(cls, base)
    if frozen_dtype != "float32" and methods:
        raise ValueError(
            f"{cls.__name__} overrides {', '.join(methods)}, which the encoder would pass over: write "
            "frozen_dtype='float32'"
        )


def frozen_tensors(trunk: Trunk) -> list[th.Tensor]:
    """:return: parameters and buffers below the freeze boundary"""
    modules = trunk.modules(trunk.frozen_stages)
    return [tensor.detach() for module in modules for tensor in (*module.parameters(), *module.buffers())]


def _arranged(trunk: Trunk) -> list[nn.Module]:
    """:return: copies of the frozen stages in the form in which they run fastest, the adapter inside of the stem"""
    stages = {name: nn.Sequential(*copy.deepcopy(trunk.stages[name])) for name in trunk.frozen_stages}
    for stage in stages.values():
        fold_norms(stage.eval())
    stages.pop("adapter", None)
    stem: Any = stages["stem"]
    stem[0] = from_raw_input(stem[0], *trunk.input_map())
    if isinstance(stem[1], nn.Identity):  # the norm is folded, so ReLU can move into the convolution
        stem[0].has_relu, stem[2] = True, nn.Identity()
    stem[3] = SixteenBitMaxPool2d()
    for stage in stages.values():
        pack(stage.requires_grad_(False), BLOCKS, trunk.frozen_dtype.dtype)
    return [*stages.values()]


def _fingerprint(trunk: Trunk, holders: Sequence[Any]) -> tuple[Any, ...]:
    """
    What an encoder and its entries depend on: boundary, precision, and identity and version of each frozen tensor.

    PyTorch counts in-place changes of a tensor, so this notices a loaded state dict or an optimizer step without
    reading a weight.
    """
    tensors = [tensor for holder in holders for tensor in holder.values() if tensor is not None]
    addresses, versions = map(th.Tensor.data_ptr, tensors), host.tensor_versions(tensors)
    return (trunk.boundary.stage, trunk.frozen_dtype.name, *addresses, *versions)


def _layers(trunk: Trunk) -> list[nn.Module]:
    """:return: the frozen modules and all inside of them; walking to them takes longer than looking at them"""
    return [layer for module in trunk.modules(trunk.frozen_stages) for layer in module.modules()]


def _holders(trunk: Trunk, layers: Sequence[nn.Module]) -> list[Any]:
    """Where modules keep the frozen tensors: looking there is faster than walking the modules (choices.json)."""
    holders = [trunk.statistics, *(holder for layer in layers for holder in host.tensor_holders(layer))]
    return [holder for holder in holders if holder]


def _some(tensor: th.Tensor) -> th.Tensor:
    """:return: some numbers of a tensor, in its own memory whatever their order there"""
    count = min(_SAMPLED, tensor.numel())
    return tensor.as_strided((count,), (tensor.numel() // count,))


def _refuse_overflow(entries: th.Tensor) -> None:
    if not entries.isfinite().all():
        raise ValueError(
            "Activations of the frozen stages exceed 65504, the largest number of float16: write "
            "frozen_dtype='bfloat16' or 'float32' in features_extractor_kwargs, or call policy.set_frozen_dtype"
        )


def _warn_that_it_is_slow(name: str) -> None:
    warnings.warn(
        f"This processor has no instructions for {name}: the frozen stages compute the same in float32 arithmetic, "
        "more slowly. To convert the model for good: model.policy.set_frozen_dtype('float32').",
        stacklevel=2,
    )
