"""The frozen prefix of the trunk as a fast inference function."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sb3_resnet.precision import resolve_dtype

if TYPE_CHECKING:
    from sb3_resnet.extractor import ResNetExtractor

#: Largest tolerated error of reduced precision, relative to the spread of the features over observations. Measured on
#: Pong with a random ResNet-18: bfloat16 1/35, float16 1/275.
MAX_ERROR = 0.1
_CHECKED = 16  # observations that the check compares


@dataclass(frozen=True)
class EncodedBatch:
    """
    A batch of observations as the frozen prefix sees them; takes the place of pixels in SB3's ``train()``.

    :param features: ``(batch, ...)``: pooled features, or the activations below the freeze boundary
    """

    features: th.Tensor

    def __len__(self) -> int:
        return len(self.features)

    def __deepcopy__(self, memo: dict[int, Any]) -> EncodedBatch:
        return self  # VecNormalize copies what it is given before it leaves it alone


class FrozenEncoder:
    """
    Encodes raw observations with the stages below the freeze boundary (and the pooling, if all are frozen).

    BatchNorm is folded into the convolutions, memory is channels last, precision reduced where the hardware gains by
    it. It is a copy: in no state dict, and stale as soon as :attr:`fingerprint` differs from that of the extractor.

    :param extractor: a :class:`~sb3_resnet.extractor.ResNetExtractor`
    :param dtype: as in :func:`~sb3_resnet.precision.resolve_dtype`
    """

    def __init__(self, extractor: ResNetExtractor, dtype: str = "auto") -> None:
        self.extractor = extractor
        self.device = extractor.input_mean.device
        self.requested = dtype
        self.dtype = resolve_dtype(dtype, self.device)
        #: The type of the entries: two bytes, unless float32 was asked for.
        self.entry_dtype = th.float32 if dtype == "float32" else th.float16
        self.images = 0
        self._checked: list[tuple[th.Tensor, th.Tensor]] = []
        self._acted: tuple[np.ndarray[Any, Any], th.Tensor] | None = None
        self._to_check = 0 if self.dtype == th.float32 else _CHECKED
        self._build()

    def refresh(self) -> bool:
        """:return: whether weights or boundary had changed, so that the encoder was built anew"""
        if self.fingerprint == fingerprint(self.extractor):
            return False
        self._build()
        return True

    def act(self, observations: th.Tensor) -> th.Tensor:
        """Encode observations to act upon, and remember them: the replay buffer is about to get them."""
        self.refresh()
        entries = self(observations)
        self._acted = (observations.cpu().numpy().copy(), entries)
        return entries

    def recall(self, env: int, pixels: np.ndarray[Any, Any]) -> th.Tensor | None:
        """:return: the entry of an observation, if it was the last one acted upon in its environment"""
        if self._acted is None or env >= len(self._acted[0]) or not np.array_equal(self._acted[0][env], pixels):
            return None
        return self._acted[1][env]

    def __call__(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: as the space describes them, ``(batch, C, H, W)``, on the extractor's device
        :return: what the extractor's ``frozen_part`` returns, up to precision
        """
        with th.inference_mode():
            entries = self._encode(observations)
            if self._to_check > 0:
                entries = self._check(observations, entries)
        self.images += len(observations)
        return entries

    def _build(self) -> None:
        extractor = self.extractor
        with th.no_grad():
            stages = {
                name: nn.Sequential(*copy.deepcopy(extractor.stage_modules(name)))
                for name in extractor.boundary.frozen_stages
            }
            for stage in stages.values():
                _fold(stage)
                stage.requires_grad_(False).to(dtype=self.dtype, memory_format=th.channels_last)  # type: ignore[call-overload]
        self._stages = stages
        self._acted = None
        self.fingerprint = fingerprint(extractor)

    def _encode(self, observations: th.Tensor) -> th.Tensor:
        extractor = self.extractor
        x = extractor.preprocess(extractor.scale_raw(observations))
        x = x.to(self.dtype, memory_format=th.channels_last)
        for name, stage in self._stages.items():
            x = stage(extractor.normalize(x) if name == "stem" else x)
        return extractor.entries_of(x).to(self.entry_dtype)

    def _check(self, observations: th.Tensor, entries: th.Tensor) -> th.Tensor:
        """Compare with the plain module; an error that hides what distinguishes observations ends in float32."""
        exact = self.extractor.frozen_part(self.extractor.preprocess(self.extractor.scale_raw(observations)))
        self._checked.append((exact.float(), entries.float()))
        self._to_check -= len(observations)
        if self._to_check > 0:
            return entries
        exact, fast = (th.cat(parts) for parts in zip(*self._checked, strict=True))
        self._checked.clear()
        spread = exact.std(dim=0).square().mean().sqrt()
        error = (fast - exact).square().mean().sqrt()
        if error <= MAX_ERROR * spread:
            return entries
        warnings.warn(
            f"Encoding in {self.dtype} errs by {float(error / spread.clamp_min(1e-12)):.2f} of the spread of the "
            f"features over observations (limit {MAX_ERROR}): going on in float32.",
            stacklevel=3,
        )
        self.dtype = th.float32
        self._build()
        return self._encode(observations)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copied policy encodes for itself

    def __reduce__(self) -> Any:
        return (_nothing, ())


def _nothing() -> None:
    """What a pickled encoder comes back as."""


def fingerprint(extractor: ResNetExtractor) -> tuple[Any, ...]:
    """
    What an encoder and its entries depend on: the boundary, and the identity and version of each frozen tensor.

    PyTorch counts in-place changes of a tensor, so this notices a loaded state dict or an optimizer step without
    reading a weight.

    :param extractor: the extractor whose prefix is encoded
    :return: a value that differs after any such change
    """
    tensors = [extractor.input_mean, extractor.input_std]
    for name in extractor.boundary.frozen_stages:
        for module in extractor.stage_modules(name):
            tensors += [*module.parameters(), *module.buffers()]
    return (extractor.boundary.stage, *((tensor.data_ptr(), tensor._version) for tensor in tensors))


def _fold(module: nn.Module) -> None:
    """Fold each BatchNorm into the convolution before it; other norms stay."""
    for child in module.children():
        _fold(child)
    for name, following in pairwise([*module._modules]):
        conv, norm = module._modules[name], module._modules[following]
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.modules.batchnorm._BatchNorm):
            module._modules[name] = fuse_conv_bn_eval(conv, norm)
            module._modules[following] = nn.Identity()
