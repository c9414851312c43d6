"""The frozen prefix of the trunk as a fast inference function."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch as th
from torch import nn

from sb3_resnet.backbones import BLOCKS
from sb3_resnet.convolutions import fold_norms, from_raw_input, pack
from sb3_resnet.finite import check_observations
from sb3_resnet.graphs import GraphedFunction
from sb3_resnet.precision import resolve_dtype

if TYPE_CHECKING:
    from sb3_resnet.extractor import ResNetExtractor

#: Largest tolerated error of reduced precision, relative to the spread of the features over observations. Measured on
#: Pong with a random ResNet-18: bfloat16 1/35, float16 1/275.
MAX_ERROR = 0.1
_CHECKED = 16  # observations that the check compares
_VERSION = attrgetter("_version")


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
    it; on a GPU it runs as captured graphs. It is a copy: in no state dict, and stale as soon as :attr:`fingerprint`
    differs from that of the extractor.

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
        #: Images encoded so far.
        self.images = 0
        #: Changes whenever entries made before are of no use any more.
        self.version = 0
        self._checked: list[tuple[th.Tensor, th.Tensor]] = []
        self._to_check = 0 if self.dtype == th.float32 else _CHECKED
        self._build()

    def refresh(self) -> bool:
        """:return: whether weights or boundary had changed, so that the encoder was built anew"""
        if self.fingerprint == _fingerprint(self.extractor, self._holders):
            return False
        self._build()
        return True

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
            stages = folded_stages(extractor, extractor.boundary.frozen_stages)
            first: Any = None if extractor.resizes else stages.get("stem", [None])[0]
            stem = None if first is None else from_raw_input(first, *extractor.input_map())
            self._reads_raw = stem is not None
            if stem is not None:
                stages.pop("adapter", None)
                stages["stem"][0] = stem
            arrange_for_inference(stages, self.dtype)
        self._stages = stages
        self._run = GraphedFunction(self._run_stages)
        self.version += 1
        self._holders = _holders(extractor)
        self.fingerprint = fingerprint(extractor)

    def _encode(self, observations: th.Tensor) -> th.Tensor:
        extractor = self.extractor
        if self._reads_raw:
            if observations.is_floating_point():
                check_observations(observations)
            x = extractor.as_images(observations)
        else:
            x = extractor.preprocess(extractor.scale_raw(observations))
            x = x.to(self.dtype, memory_format=th.channels_last)
        return self._run(x)

    def _run_stages(self, x: th.Tensor) -> th.Tensor:
        for name, stage in self._stages.items():
            x = stage(self.extractor.normalize(x) if name == "stem" and not self._reads_raw else x)
        return self.extractor.entries_of(x).to(self.entry_dtype)

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


def folded_stages(extractor: ResNetExtractor, names: Sequence[str]) -> dict[str, nn.Sequential]:
    """:return: copies of stages, BatchNorm folded into their convolutions"""
    stages = {name: nn.Sequential(*copy.deepcopy(extractor.stage_modules(name))) for name in names}
    for stage in stages.values():
        fold_norms(stage)
    return stages


def arrange_for_inference(stages: dict[str, nn.Sequential], dtype: th.dtype) -> None:
    """Bring such copies into the type, the memory order and, on a CPU, the packing in which they run fastest."""
    for stage in stages.values():
        stage.requires_grad_(False).to(dtype=dtype, memory_format=th.channels_last)  # type: ignore[call-overload]  # PyTorch
        pack(stage, BLOCKS)


def fingerprint(extractor: ResNetExtractor, where: list[dict[str, Any]] | None = None) -> tuple[Any, ...]:
    """
    What an encoder and its entries depend on: the boundary, and the identity and version of each frozen tensor.

    PyTorch counts in-place changes of a tensor, so this notices a loaded state dict or an optimizer step without
    reading a weight.

    :param extractor: the extractor whose prefix is encoded
    :return: a value that differs after any such change
    """
    return _fingerprint(extractor, _holders(extractor))


def _fingerprint(extractor: ResNetExtractor, holders: list[dict[str, Any]]) -> tuple[Any, ...]:
    tensors = [tensor for holder in holders for tensor in holder.values() if tensor is not None]
    return (extractor.boundary.stage, *map(th.Tensor.data_ptr, tensors), *map(_VERSION, tensors))


def _holders(extractor: ResNetExtractor) -> list[dict[str, Any]]:
    """Where modules keep the frozen tensors: looking there is ten times as fast as walking the modules."""
    frozen = [module for name in extractor.boundary.frozen_stages for module in extractor.stage_modules(name)]
    holders = [holder for top in frozen for module in top.modules() for holder in (module._parameters, module._buffers)]
    return [holder for holder in (extractor._buffers, *holders) if holder]
