"""What keeps ranks in step: the same settings on each, seeds apart, and counters and statistics of all together."""

from __future__ import annotations

import hashlib
import inspect
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import TrainFrequencyUnit

from sb3_resnet.common import host
from sb3_resnet.common.arguments import shown
from sb3_resnet.common.host_ranks import restart_environments, steps_of_environments
from sb3_resnet.common.launcher import address_of
from sb3_resnet.common.ranks import Ranks
from sb3_resnet.common.seeding import random_states

#: Constructor arguments that may differ, since they are about one process, or are sent at the start.
_OWN = {"self", "args", "kwargs", "env", "seed", "device", "tensorboard_log", "verbose", "stats_window_size"}
_OF_FILES = ("weights", "pretrained")  # in policy_kwargs: the first rank's weights are sent to all


class IntervalOfAll(int):
    """
    An interval in timesteps of all ranks, which SB3 divides by the environments of one of them.

    In a checkpoint it is a plain number.

    :param steps: timesteps
    :param ranks: number of ranks, each with as many environments
    """

    def __new__(cls, steps: int, ranks: int) -> IntervalOfAll:
        return super().__new__(cls, steps)

    def __init__(self, steps: int, ranks: int) -> None:
        self.ranks = ranks

    def __floordiv__(self, n_envs: int) -> int:
        return int(self) // (n_envs * self.ranks)

    def __reduce__(self) -> Any:
        return int, (int(self),)


class JointNormalizer:
    """
    The statistics of a ``VecNormalize``, of what the environments of all ranks gave.

    :param ranks: who trains the model
    :param model: an SB3 model; one without a ``VecNormalize`` has nothing to merge
    """

    def __init__(self, ranks: Ranks, model: BaseAlgorithm) -> None:
        self._ranks = ranks
        self._statistics: list[RunningMeanStd] = []
        normalizer = model.get_vec_normalize_env()
        if normalizer is not None:
            observed = getattr(normalizer, "obs_rms", None)
            self._statistics = [normalizer.ret_rms]
            self._statistics += [*observed.values()] if isinstance(observed, dict) else [observed] if observed else []
        for mine, first in zip(self._statistics, ranks.tell(self._statistics), strict=True):
            mine.mean, mine.var, mine.count = first.mean, first.var, first.count
        self._before = [_sums(statistics) for statistics in self._statistics]

    def merge(self) -> None:
        """Add to the statistics what the other ranks have seen since the last call; all ranks must call."""
        for index, statistics in enumerate(self._statistics):
            before = self._before[index]
            new = _sums(statistics) - before
            self._ranks.sum_(new)
            _set_sums(statistics, before + new)
            self._before[index] = _sums(statistics)


def _sums(statistics: RunningMeanStd) -> th.Tensor:
    """Number of values, their sum and that of their squares: of two sets of values together these are added."""
    mean, variance = (np.atleast_1d(value).ravel() for value in (statistics.mean, statistics.var))
    return th.from_numpy(statistics.count * np.concatenate([np.ones(1), mean, variance + mean**2]))


def _set_sums(statistics: RunningMeanStd, sums: th.Tensor) -> None:
    count = float(sums[0])
    mean, square = (sums[1:].numpy() / count).reshape(2, *np.shape(statistics.mean))
    statistics.count, statistics.mean = count, mean
    statistics.var = np.maximum(square - mean**2, 0.0)


def refuse_differences(ranks: Ranks, model: BaseAlgorithm) -> None:
    """
    Ranks that collect or update in another rhythm would wait for each other for ever.

    :param ranks: who trains the model
    :param model: an SB3 model in ``learn()``
    :raises ValueError: on all ranks, if an argument or a counter of any differs from the first rank's
    """
    first, *others = ranks.gather(_settings(model))
    different = [
        f"{name} ({first.get(name, 'none')} on rank 0, {other.get(name, 'none')} on rank {rank})"
        for rank, other in enumerate(others, 1)
        for name in {**first, **other}
        if first.get(name) != other.get(name)
    ]
    if different:
        more = f" and {len(different) - 4} more" if len(different) > 4 else ""
        raise ValueError(
            f"All ranks must train the same model, but they differ in {', '.join(different[:4])}{more}: give them the "
            "same arguments, and to resume let each load the same checkpoint"
        )


def _settings(model: BaseAlgorithm) -> dict[str, str]:
    names = [name for cls in type(model).__mro__ for name in inspect.signature(cls).parameters]
    values = {name: getattr(model, name) for name in names if name not in _OWN and hasattr(model, name)}
    found = {key: text for name, value in values.items() for key, text in _texts(name, value)}
    normalizer = model.get_vec_normalize_env()
    return {
        **found,
        "algorithm": type(model).__name__,
        "policy": type(model.policy).__name__,
        "device": model.device.type,
        "environments": str(model.n_envs),
        "VecNormalize": str(normalizer is not None and (normalizer.norm_obs, normalizer.norm_reward)),
        "num_timesteps": str(model.num_timesteps),
        "total_timesteps": str(host.planned_timesteps(model)),
        "updates": str(host.updates_done(model)),
        "calls of env.step()": str(steps_of_environments(model)),
    }


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in _OF_FILES:
                yield from _texts(f"{name}.{key}", inner)
    elif isinstance(value, type):
        yield name, value.__name__
    else:  # the text of functions and schedules may contain an address, which says nothing
        yield name, type(value).__name__ if " at 0x" in repr(value) else shown(value)


def refuse_what_ranks_cannot_share(ranks: Ranks, model: BaseAlgorithm) -> None:
    """
    :param ranks: who trains the model
    :param model: an SB3 model in ``learn()``
    :raises ValueError: on all ranks, for updates of which each rank would make another number, for algorithms that do
        not learn by steps of an optimizer alone, and for a GPU or a file that two ranks use
    """
    settings: Any = model
    if getattr(getattr(settings, "train_freq", None), "unit", None) == TrainFrequencyUnit.EPISODE:
        raise ValueError(
            "train_freq counts episodes, which have other lengths on each rank, so the ranks would not be in step: "
            "write a number of steps, such as train_freq=4"
        )
    if getattr(settings, "target_kl", None) is not None:
        raise ValueError("target_kl ends the updates of each rank at another point: write target_kl=None")
    if hasattr(settings, "cg_max_steps"):
        raise ValueError("TRPO changes its policy without an optimizer, so nothing can be averaged: write PPO")
    _refuse_shared(
        ranks,
        [address_of(model.device)],
        "give each its own: device=f\"cuda:{os.environ['LOCAL_RANK']}\" for the "
        "model, or CUDA_VISIBLE_DEVICES=$LOCAL_RANK before Python starts",
    )
    _refuse_shared(
        ranks, [*_monitor_files(model)], "write --uuid for rl_zoo3.train, and in a script another monitor_dir per rank"
    )


def _refuse_shared(ranks: Ranks, mine: list[str | None], advice: str) -> None:
    owners: dict[str, int] = {}
    for rank, used in enumerate(ranks.gather(mine)):
        for one in filter(None, used):
            if owners.setdefault(one, rank) != rank:
                raise ValueError(f"Ranks {owners[one]} and {rank} use the same {one}: {advice}")


def _monitor_files(model: BaseAlgorithm) -> Iterator[str]:
    """Logs of episodes; those of environments in processes of their own are not seen."""
    for env in getattr(getattr(model.env, "unwrapped", None), "envs", ()):
        while isinstance(env, gym.Wrapper):
            if isinstance(env, Monitor) and env.results_writer is not None:
                yield f"file {env.results_writer.file_handler.name} of {socket.gethostname()}"
            env = env.env


def seed_apart(ranks: Ranks, model: BaseAlgorithm) -> None:
    """
    Give each rank random numbers of its own, where two have the same: from one seed, from one checkpoint, or from a
    process that both were copied from.

    A new model's environments have seeds then as those of one process with as many: ``seed`` to ``seed + ranks *
    n_envs - 1``.

    :param ranks: who trains the model
    :param model: an SB3 model in ``learn()``
    """
    states = ranks.gather(_digests(model))
    mine = states[ranks.rank]
    if not any(mine[name] == other[name] != "" for other in states[: ranks.rank] for name in mine):
        return
    base = int(states[0]["numpy"][:8], 16) if model.seed is None else model.seed
    if model.num_timesteps == 0:
        seed = base + ranks.rank * model.n_envs
    else:  # of a resumed run: not those with which it began
        seed = int(np.random.SeedSequence([base, ranks.rank, model.num_timesteps]).generate_state(1)[0])
    model.set_random_seed(seed % 2**31)
    restart_environments(model)


def _digests(model: BaseAlgorithm) -> dict[str, str]:
    states = random_states(model)
    used = {name: states[name] for name in ("numpy", "torch", "action_space", "envs")}
    return {name: hashlib.sha256(repr(state).encode()).hexdigest() if state else "" for name, state in used.items()}


def weigh(model: BaseAlgorithm) -> str:
    """
    :param model: an SB3 model whose policy has one optimizer
    :return: a text that two models have in common only if parameters, buffers and moments are equal bit for bit
    """
    policy: Any = model.policy
    state = policy.optimizer.state_dict()["state"]
    moments = [state[index][name] for index in sorted(state) for name in sorted(state[index])]
    digest = hashlib.sha256()
    for tensor in [*policy.state_dict().values(), *moments]:
        if isinstance(tensor, th.Tensor):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(th.uint8).numpy().tobytes())
    return digest.hexdigest()
