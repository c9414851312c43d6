"""Tensors that travel between ranks in messages of bounded size: gradients in each update, a model at the start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn
from torch.optim import Optimizer

from sb3_resnet.common.host_ranks import after_backward
from sb3_resnet.common.ranks import Ranks

#: Bytes of a message at most, as in PyTorch's ``DistributedDataParallel``.
BUCKET_BYTES = 25 * 2**20
# These keep statistics of the batches of their own rank.
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class GradientAverage:
    """
    Averages gradients over all ranks as each backward pass ends, before anybody clips them.

    Only parameters that train travel. One that has a gradient on some ranks only counts as zero on the others; one
    that has none anywhere gets none. Statistics of live BatchNorm layers are averaged with them, so that these stay
    the same on all ranks.

    :param ranks: who trains the model
    :param optimizer: holds the parameters
    :param module: holds BatchNorm layers, perhaps
    :param bucket_bytes: size of a message at most
    """

    def __init__(self, ranks: Ranks, optimizer: Optimizer, module: nn.Module, bucket_bytes: int = BUCKET_BYTES) -> None:
        #: Whether backward passes are those of updates, which all ranks make.
        self.active = False
        #: Bytes that the latest update sent.
        self.latest_bytes = 0
        self._ranks = ranks
        self._optimizer = optimizer
        self._bucket_bytes = bucket_bytes
        self._norms = [layer for layer in module.modules() if isinstance(layer, _BATCH_NORMS)]
        self._watched: dict[int, Any] = {}
        self._waits = False

    def follow(self) -> None:
        """Watch all parameters that train at present."""
        self._waits = False
        for parameter in self._trained():
            if id(parameter) not in self._watched:
                watch: Any = parameter.register_post_accumulate_grad_hook
                self._watched[id(parameter)] = watch(self._accumulated)

    def release(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._watched.values():
            handle.remove()
        self._watched.clear()
        self.active = False

    def _trained(self) -> list[th.Tensor]:
        held = (parameter for group in self._optimizer.param_groups for parameter in group["params"])
        return [parameter for parameter in held if parameter.requires_grad]

    def _accumulated(self, parameter: th.Tensor) -> None:
        """The first gradient of a backward pass: the others may follow in any order, or not at all."""
        if self.active and not self._waits:
            self._waits = True
            after_backward(self._average)

    @th.no_grad()
    def _average(self) -> None:
        self._waits = False
        before = self._ranks.bytes_summed
        kinds: dict[Any, list[th.Tensor]] = {}
        for parameter in self._trained():
            kinds.setdefault((parameter.device, parameter.dtype), []).append(parameter)
        for (device, dtype), parameters in kinds.items():
            present = th.tensor([parameter.grad is not None for parameter in parameters], dtype=dtype, device=device)
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = th.zeros_like(parameter)
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            self._average_all([*gradients, present, *self._statistics(device, dtype)])
            for parameter, share in zip(parameters, present.tolist(), strict=True):
                if share == 0.0:
                    parameter.grad = None
        self.latest_bytes = self._ranks.bytes_summed - before
        for act in [*self._ranks.after_average]:
            act()

    def _statistics(self, device: th.device, dtype: th.dtype) -> list[th.Tensor]:
        """Those that the forward pass has moved."""
        live = [layer for layer in self._norms if layer.training]
        found = [value for layer in live for value in (layer.running_mean, layer.running_var) if value is not None]
        return [value for value in found if value.device == device and value.dtype == dtype]

    def _average_all(self, tensors: Sequence[th.Tensor]) -> None:
        # A view where that is possible, so that the message lands in the tensor itself.
        flats = [tensor.reshape(-1) for tensor in tensors]
        in_buckets(flats, self._bucket_bytes, lambda message: self._mean_(message))
        for tensor, flat in zip(tensors, flats, strict=True):
            if not tensor.is_contiguous():
                tensor.copy_(flat.view(tensor.shape))

    def _mean_(self, message: th.Tensor) -> None:
        self._ranks.sum_(message)
        message.div_(self._ranks.size)


def share_model(ranks: Ranks, model: BaseAlgorithm, bucket_bytes: int = BUCKET_BYTES) -> None:
    """
    Give all ranks the first one's parameters, buffers, moments and settings of the optimizer.

    :param ranks: who takes part
    :param model: an SB3 model whose policy has one optimizer
    :param bucket_bytes: size of a message at most
    """
    if ranks.size == 1:
        return
    policy: Any = model.policy
    mine = (policy.state_dict(), policy.optimizer.state_dict())
    weights, moments = share_from_first(ranks, mine, model.device, bucket_bytes)
    if not ranks.is_first:
        policy.load_state_dict(weights)
        policy.optimizer.load_state_dict(moments)


@dataclass(frozen=True)
class _Place:
    """Stands for a tensor in a tree of values."""

    index: int
    shape: tuple[int, ...]
    dtype: th.dtype
    device: str


def share_from_first(ranks: Ranks, tree: Any, device: th.device, bucket_bytes: int = BUCKET_BYTES) -> Any:
    """
    Give all ranks what the first one has. Tensors travel as they are, and only the rest is pickled.

    :param ranks: who takes part
    :param tree: dicts, lists and tuples of tensors and small values, such as a state dict; of the first rank
    :param device: where tensors of a GPU are to be
    :param bucket_bytes: size of a message at most
    :return: the same tree; its tensors are new ones, but for the first rank
    """
    tensors: list[th.Tensor] = []
    outline = ranks.tell(_outline(tree, tensors) if ranks.is_first else None)
    if not ranks.is_first:
        places = sorted(_places(outline), key=lambda place: place.index)
        tensors = [
            th.empty(place.shape, dtype=place.dtype, device="cpu" if place.device == "cpu" else device)
            for place in places
        ]
    by_device: dict[str, list[th.Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device.type, []).append(tensor.reshape(-1).view(th.uint8))
    for _, flats in sorted(by_device.items()):
        in_buckets(flats, bucket_bytes, ranks.send_)
    return _filled_in(outline, tensors)


def _outline(value: Any, tensors: list[th.Tensor]) -> Any:
    if isinstance(value, th.Tensor):
        tensors.append(value.detach().contiguous())
        return _Place(len(tensors) - 1, tuple(value.shape), value.dtype, value.device.type)
    if isinstance(value, dict):
        return {key: _outline(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_outline(item, tensors) for item in value)
    return value


def _places(value: Any) -> Iterator[_Place]:
    if isinstance(value, _Place):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from _places(item)


def _filled_in(value: Any, tensors: list[th.Tensor]) -> Any:
    if isinstance(value, _Place):
        return tensors[value.index]
    if isinstance(value, dict):
        return {key: _filled_in(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_filled_in(item, tensors) for item in value)
    return value


def in_buckets(flats: Iterable[th.Tensor], limit: int, act: Callable[[th.Tensor], None]) -> None:
    """
    Change tensors through messages of bounded size.

    :param flats: contiguous tensors of one axis, one type and one device
    :param limit: bytes of a message
    :param act: changes a message in place
    """
    for bucket in _filled(flats, limit):
        if len(bucket) == 1:
            act(bucket[0])
            continue
        message = th.cat([*bucket])
        lengths = [len(part) for part in bucket]
        act(message)
        for part, changed in zip(bucket, th.split(message, lengths), strict=True):
            part.copy_(changed)


def _filled(flats: Iterable[th.Tensor], limit: int) -> Iterator[Sequence[th.Tensor]]:
    """Tensors are cut where a bucket is full."""
    bucket: list[th.Tensor] = []
    room = limit
    for flat in flats:
        size = flat.element_size()
        while len(flat):
            part, flat = flat[: max(1, room // size)], flat[max(1, room // size) :]
            bucket.append(part)
            room -= part.nbytes
            if room < size:
                yield bucket
                bucket, room = [], limit
    if bucket:
        yield bucket
