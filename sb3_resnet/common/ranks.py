"""The processes that train one model together: how they find each other, and what they tell each other."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import distributed as dist

from sb3_resnet.common.launcher import backend_for, launched


class LostRankError(RuntimeError):
    """Another rank has ended, has raised an error, or did not come in time."""


class Place(IntEnum):
    """Where ranks meet; two that meet from different places are not in step."""

    ROLLOUT_END = 1
    EVALUATION = 2
    TRAINING_END = 3


class Ranks:
    """
    One process's view of all of them. By itself, as ``Ranks()``, a process is the only one.

    :param rank: number of this process
    :param size: how many there are
    :param control: PyTorch's group for short messages from CPU to CPU
    :param data: the group for tensors of the model's device
    :param timeout: seconds that a rank waits for the others
    """

    def __init__(self, rank: int = 0, size: int = 1, control: Any = None, data: Any = None, timeout: float = 0) -> None:
        self.rank = rank
        self.size = size
        self.timeout = timeout
        #: Bytes of tensors that this rank has given into sums so far.
        self.bytes_summed = 0
        #: Called after the gradients of a backward pass were averaged.
        self.after_average: list[Callable[[], None]] = []
        self._control = control
        self._data = data

    @property
    def is_first(self) -> bool:
        """Whether this rank logs, evaluates and saves."""
        return self.rank == 0

    def meet(self, place: Place, stop: bool = False, error: BaseException | None = None) -> bool:
        """
        Wait for all ranks.

        :param place: where this one is
        :param stop: whether this one wants to end training
        :param error: of this rank, which the others are told
        :return: whether any wants to end training
        :raises LostRankError: if another rank has an error or does not come, or if the ranks are not in step
        """
        if self.size == 1:
            return stop
        failed = 0 if error is None else self.rank + 1
        seen = th.tensor([int(place), -int(place), int(stop), failed])
        with explained(self.rank, self.timeout):
            dist.all_reduce(seen, dist.ReduceOp.MAX, group=self._control)
        most, least, stops, culprit = seen.tolist()
        if culprit:
            text = None if error is None else " ".join(f"{type(error).__name__}: {error}".split())
            text = self.tell(text, culprit - 1)
            if error is None:
                raise LostRankError(f"Rank {culprit - 1} ended training with {text}. So rank {self.rank} ends too.")
        elif most != -least:
            names = f"{Place(-least).name} and {Place(most).name}"
            raise LostRankError(
                f"The ranks are not in step: they wait for each other at {names}. Each rank must make the same calls "
                "of learn() with the same arguments and callbacks"
            )
        return bool(stops)

    def any(self, flag: bool) -> bool:
        """
        :param flag: of this rank
        :return: whether it is true on any rank; all ranks must ask
        """
        if self.size == 1:
            return flag
        seen = th.tensor([int(flag)])
        with explained(self.rank, self.timeout):
            dist.all_reduce(seen, dist.ReduceOp.MAX, group=self._control)
        return bool(seen.item())

    def gather(self, value: Any) -> list[Any]:
        """
        :param value: something small
        :return: the values of all ranks, in order
        """
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with explained(self.rank, self.timeout):
            dist.all_gather_object(found, value, group=self._control)
        return found

    def tell(self, value: Any, rank: int = 0) -> Any:
        """
        :param value: something small; only that of the rank that tells it counts
        :param rank: who tells it
        :return: its value, on all ranks
        """
        if self.size == 1:
            return value
        box = [value]
        with explained(self.rank, self.timeout):
            dist.broadcast_object_list(box, group_src=rank, group=self._control)
        return box[0]

    def sum_(self, tensor: th.Tensor) -> None:
        """
        Put the sum over all ranks into a tensor; all get the same bits.

        :param tensor: contiguous; those on a CPU go over the group for short messages
        """
        if self.size > 1:
            self.bytes_summed += tensor.nbytes
            with explained(self.rank, self.timeout):
                dist.all_reduce(tensor, group=self._group_of(tensor))

    def send_(self, tensor: th.Tensor) -> None:
        """
        Put the first rank's values into the tensors of all.

        :param tensor: contiguous
        """
        if self.size > 1:
            with explained(self.rank, self.timeout):
                dist.broadcast(tensor, group_src=0, group=self._group_of(tensor))

    @th.no_grad()
    def joint_moments(self, mean: th.Tensor, variance: th.Tensor, count: int) -> tuple[th.Tensor, th.Tensor, int]:
        """
        Moments of all ranks' batches together.

        :param mean: of this rank's batch, by feature
        :param variance: likewise, around this mean
        :param count: rows of the batch, as many on each rank
        :return: mean, variance and rows of all of them
        """
        # In float64: the square of a mean may be many times the variance.
        first = mean.double()
        moments = th.stack([first, variance.double() + first.square()])
        self.sum_(moments)
        joint, square = moments / self.size
        return joint.to(mean.dtype), (square - joint.square()).clamp(min=0.0).to(variance.dtype), count * self.size

    def close(self) -> None:
        """Give the groups back; the processes stay connected."""
        for group in {id(group): group for group in (self._control, self._data) if group is not None}.values():
            dist.destroy_process_group(group)
        self._control = self._data = None
        self.after_average.clear()

    def _group_of(self, tensor: th.Tensor) -> Any:
        return self._control if tensor.device.type == "cpu" else self._data


_joined: weakref.WeakKeyDictionary[BaseAlgorithm, Ranks] = weakref.WeakKeyDictionary()


def ranks_of(model: BaseAlgorithm) -> Ranks:
    """
    :param model: an SB3 model
    :return: the ranks that train it in the present ``learn()``; by itself outside of one and without a
        ``DataParallelCallback``
    """
    return _joined.get(model) or Ranks()


def join(model: BaseAlgorithm, timeout: float) -> Ranks:
    """
    Let this process be one of those that train a model.

    :param model: an SB3 model
    :param timeout: seconds to wait for the others, then and later
    :return: the ranks, also found by :func:`ranks_of`
    :raises ValueError: if the launcher's variables are incomplete
    :raises LostRankError: if the others do not come
    """
    leave(model)
    ranks = _joined[model] = connect(model.device, timeout)
    return ranks


def connect(device: th.device, timeout: float) -> Ranks:
    """
    Find the other processes. A process group that exists is used, else the launcher's variables tell where they are; a
    process without such variables is by itself.

    :param device: of the tensors
    :param timeout: seconds to wait for the others, then and later
    :return: this process among them
    :raises ValueError: if the launcher's variables are incomplete
    :raises LostRankError: if the others do not come
    """
    if not dist.is_available():
        return Ranks()
    patience = timedelta(seconds=timeout)
    if not dist.is_initialized():
        rank, size = launched()
        if size == 1:
            return Ranks()
        with explained(rank, timeout):
            dist.init_process_group(backend_for(device), rank=rank, world_size=size, timeout=patience)
        atexit.register(_disconnect)
    rank, size = dist.get_rank(), dist.get_world_size()
    if size == 1:
        return Ranks()
    with explained(rank, timeout):  # groups of our own: whoever made the first one may use that for other things
        control = dist.new_group(backend="gloo", timeout=patience)
        data = None if device.type == "cpu" else dist.new_group(backend="nccl", timeout=patience)
    return Ranks(rank, size, control, data, timeout)


def leave(model: BaseAlgorithm) -> None:
    """
    Undo :func:`join`, if that was done.

    :param model: an SB3 model
    """
    ranks = _joined.pop(model, None)
    if ranks is not None:
        ranks.close()


@contextmanager
def explained(rank: int, timeout: float | None = None) -> Iterator[None]:
    """
    Make one clear error of whatever PyTorch raises where another rank is gone.

    :param rank: this process
    :param timeout: seconds that it waits for others, if that is known
    :raises LostRankError: in the place of PyTorch's ``RuntimeError``
    """
    try:
        yield
    except RuntimeError as error:  # its traceback would say nothing more than its text
        reason = " ".join(str(error).split())
        patience = "in time" if timeout is None else f"within {timeout:g} seconds"
        raise LostRankError(
            f"Rank {rank} has lost another rank: that has ended, cannot be reached, or did not come {patience}. Read "
            "the first error in the logs of all ranks, then start all of them again from the newest checkpoint. If an "
            "evaluation or an environment takes that long, write a larger timeout in DataParallelCallback. PyTorch "
            f"says: {reason[:300]}"
        ) from None


def _disconnect() -> None:
    """Only at the end of the process: its launcher's store does not take the same processes in twice."""
    if dist.is_initialized():
        dist.destroy_process_group()
