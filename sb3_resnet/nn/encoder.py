"""The frozen prefix of the trunk as a fast inference function."""

from __future__ import annotations

import copy
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import torch as th
from torch import nn

from sb3_resnet.common import host
from sb3_resnet.nn.backbones import BLOCKS
from sb3_resnet.nn.graphs import GraphedFunction
from sb3_resnet.nn.inference import fold_norms, from_raw_input, pack
from sb3_resnet.nn.precision import resolve_dtype
from sb3_resnet.nn.trunk import Trunk

#: Largest tolerated error of reduced precision, relative to the spread of the features over observations, which
#: Q-values inherit. ``benchmarks/results/precision.json`` has what it is on Pong.
MAX_ERROR = 0.02
_CHECKED = 64  # different observations that the check compares


class FrozenEncoder:
    """
    Encodes raw observations with the stages below the freeze boundary (and the pooling, if all are frozen).

    BatchNorm is folded into the convolutions, memory is channels last, precision reduced where the hardware gains by
    it; on a GPU it runs as captured graphs. It is a copy: in no state dict, and stale as soon as :attr:`fingerprint`
    differs from that of the trunk.

    From entries of two bytes a number the median of the first batch is subtracted, so that rounding is relative to what
    distinguishes observations. The first different observations are also encoded by the plain module: if the error
    exceeds :data:`MAX_ERROR`, it goes on in the next better precision, with a warning.

    :param trunk: of a :class:`~sb3_resnet.extractor.ResNetExtractor`
    :param dtype: as in :func:`~sb3_resnet.nn.precision.resolve_dtype`
    :param shared_by: trunks for which the entries are meant too, such as the target network's
    :raises ValueError: if these differ below the boundary, now or when weights or boundary have changed
    """

    def __init__(self, trunk: Trunk, dtype: str = "auto", shared_by: Sequence[Trunk] = ()) -> None:
        self.trunk = trunk
        self.device = trunk.device
        self.requested = dtype
        self._shared = shared_by
        #: Images encoded so far.
        self.images = 0
        #: Changes whenever entries made before are of no use any more.
        self.version = 0
        self._sample: dict[bytes, th.Tensor] = {}
        self._build()

    def refresh(self) -> bool:
        """:return: whether weights or boundary had changed, so that the encoder was built anew"""
        if self.fingerprint == _fingerprint(self.trunk, self._holders):
            return False
        self._build()
        return True

    def __call__(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: as the space describes them, ``(batch, C, H, W)``, on the trunk's device
        :return: entries: without :attr:`centre`, what the extractor's ``frozen_part`` returns, up to precision
        """
        with th.inference_mode():
            if not self._is_checked:
                self._check(observations)
            entries = self._encode(observations)
        self.images += len(observations)
        return entries

    @property
    def can_gain(self) -> bool:
        """Whether a stage of the trunk is frozen; the adapter's output is larger than the pixels."""
        return any(name != "adapter" for name in self.trunk.frozen_stages)

    def holds(self) -> bool:
        """:return: whether frozen weights are those of the last build by value; writes to ``.data`` leave no trace"""
        return self._digest == _digest(self.trunk)

    def _build(self) -> None:
        """For the extractor as it is now, in the precision that was asked for."""
        self.refuse_different_twins()
        self.dtype = resolve_dtype(self.requested, self.device)
        #: The type of the entries: two bytes, unless float32 was asked for.
        self.entry_dtype = th.float32 if self.requested == "float32" else th.float16
        #: What is subtracted from entries; ``None``: nothing.
        self.centre: th.Tensor | None = None
        self._is_checked = self.dtype == self.entry_dtype == th.float32
        self._holders = _holders(self.trunk)
        self.fingerprint = fingerprint(self.trunk)
        self._digest = _digest(self.trunk)
        self._arrange()

    def _arrange(self) -> None:
        trunk = self.trunk
        with th.no_grad():
            stages = folded_stages(trunk, trunk.frozen_stages)
            first: Any = None if trunk.preprocessing.resizes else stages.get("stem", [None])[0]
            stem = None if first is None else from_raw_input(first, *trunk.input_map())
            self._reads_raw = stem is not None
            if stem is not None:
                stages.pop("adapter", None)
                stages["stem"][0] = stem
            arrange_for_inference(stages, self.dtype)
        self._stages = stages
        self._run = GraphedFunction(self._run_stages)
        self.version += 1

    def refuse_different_twins(self) -> None:
        """
        :raises ValueError: if a trunk that shares the entries has other weights below the boundary
        """
        mine = frozen_tensors(self.trunk)
        for twin in self._shared:
            # Not equal bit for bit: with tau < 1 SB3 rounds the target anew at each update, frozen or not.
            if not all(map(_close, mine, frozen_tensors(twin))):
                raise ValueError(
                    "Online and target network differ below the freeze boundary, so one entry cannot serve both: load "
                    "both, or write model.q_net_target.load_state_dict(model.q_net.state_dict()) after freezing again"
                )

    def _encode(self, observations: th.Tensor) -> th.Tensor:
        images = self.trunk.preprocessing
        if not self._reads_raw:
            return self._run(images(images.scale_raw(observations)))
        images.check_range(observations)
        return self._run(images.as_images(observations))

    def _run_stages(self, x: th.Tensor) -> th.Tensor:
        for name, stage in self._stages.items():
            if not self._reads_raw:
                x = self.trunk.normalize(x) if name == "stem" else x
                x = x.to(self.dtype, memory_format=th.channels_last)
            x = stage(x)
        x = self.trunk.entries_of(x)
        if self.entry_dtype == th.float32:
            return x.float()
        if self.centre is None:
            self.centre = x.float().median(dim=0).values
        return (x.float() - self.centre).to(self.entry_dtype)

    def _check(self, observations: th.Tensor) -> None:
        """Choose the precision as soon as enough different observations came by; they also judge later weights."""
        for image in observations:
            if len(self._sample) < _CHECKED:
                self._sample.setdefault(image.cpu().numpy().tobytes(), image.clone())
        if len(self._sample) < _CHECKED:
            return
        sample = th.stack([*self._sample.values()])
        exact = self._plain(sample)
        # Of the typical observation: a few odd ones, as the empty stacks after a reset, would hide what errors hide.
        spread = float((exact - exact.median(dim=0).values).flatten(1).square().mean(dim=1).sqrt().median())
        while self.dtype != th.float32 or self.entry_dtype != th.float32:
            encoded = self._encode(sample).float()
            rounded = encoded if self.centre is None else encoded + self.centre
            error = float((rounded - exact).square().mean().sqrt())
            if error <= MAX_ERROR * spread:
                break
            self._step_up(error / max(spread, 1e-12))
        self._is_checked = True

    def _plain(self, observations: th.Tensor) -> th.Tensor:
        """:return: what the modules themselves compute, in float32"""
        images = self.trunk.preprocessing
        x = images(images.scale_raw(observations))
        return self.trunk.entries_of(self.trunk.run(x, self.trunk.frozen_stages)).float()

    def _step_up(self, error: float) -> None:
        """Go on in the next better precision."""
        if self.dtype == th.float32:
            what, self.entry_dtype = "Keeping entries in float16", th.float32
            then = "keeping them in float32, in twice the memory"
        else:
            what = f"Encoding in {str(self.dtype).removeprefix('torch.')}"
            # On a GPU float16 is as fast as bfloat16, with an eighth of its error.
            by_half = self.dtype == th.bfloat16 and self.device.type == "cuda"
            self.dtype = th.float16 if by_half else th.float32
            then = f"going on in {str(self.dtype).removeprefix('torch.')}"
        warnings.warn(
            f"{what} errs by {error:.2g} of the spread of the features over observations (limit {MAX_ERROR}): {then}.",
            stacklevel=5,
        )
        self.centre = None  # it was computed in the worse precision, perhaps as infinity
        self._arrange()


def folded_stages(trunk: Trunk, names: Sequence[str]) -> dict[str, nn.Sequential]:
    """:return: copies of stages, BatchNorm folded into their convolutions"""
    stages = {name: nn.Sequential(*copy.deepcopy(trunk.stages[name])) for name in names}
    for stage in stages.values():
        fold_norms(stage.eval())
    return stages


def arrange_for_inference(stages: dict[str, nn.Sequential], dtype: th.dtype) -> None:
    """Bring such copies into the type, the memory order and, on a CPU, the packing in which they run fastest."""
    for stage in stages.values():
        stage.requires_grad_(False).to(dtype=dtype, memory_format=th.channels_last)  # type: ignore[call-overload]  # PyTorch
        pack(stage, BLOCKS)


def fingerprint(trunk: Trunk) -> tuple[Any, ...]:
    """
    What an encoder and its entries depend on: the boundary, and the identity and version of each frozen tensor.

    PyTorch counts in-place changes of a tensor, so this notices a loaded state dict or an optimizer step without
    reading a weight.

    :param trunk: its frozen stages are encoded
    :return: a value that differs after any such change
    """
    return _fingerprint(trunk, _holders(trunk))


def _fingerprint(trunk: Trunk, holders: Sequence[Any]) -> tuple[Any, ...]:
    tensors = [tensor for holder in holders for tensor in holder.values() if tensor is not None]
    return (trunk.boundary.stage, *map(th.Tensor.data_ptr, tensors), *host.tensor_versions(tensors))


def _holders(trunk: Trunk) -> list[Any]:
    """Where modules keep the frozen tensors: looking there is faster than walking the modules (choices.json)."""
    layers = [layer for module in trunk.modules(trunk.frozen_stages) for layer in module.modules()]
    holders = [trunk.statistics, *(holder for layer in layers for holder in host.tensor_holders(layer))]
    return [holder for holder in holders if holder]


def frozen_tensors(trunk: Trunk) -> list[th.Tensor]:
    """:return: parameters and buffers below the freeze boundary"""
    modules = trunk.modules(trunk.frozen_stages)
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def _close(one: th.Tensor, other: th.Tensor) -> bool:
    return th.allclose(one, other, rtol=1e-4, atol=1e-5)


def _digest(trunk: Trunk) -> list[int]:
    return [zlib.crc32(tensor.detach().float().cpu().numpy().tobytes()) for tensor in frozen_tensors(trunk)]
