"""What ``VecNormalize`` has learnt, kept in the file of a model."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

_MEMBER = "vec_normalize.json"  # a further member of SB3's archive, which SB3 does not read
_NAMES = ("obs_rms", "ret_rms")


def add_statistics(path: Path, env: VecEnv | None) -> None:
    """
    :param path: file of a model, which gets one member more
    :param env: the model's environment; without ``VecNormalize`` nothing is added
    """
    normalizer = None if env is None else unwrap_vec_normalize(env)
    if normalizer is None:
        return
    learnt = {name: _numbers(getattr(normalizer, name)) for name in _NAMES if hasattr(normalizer, name)}
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(_MEMBER, json.dumps(learnt))


def has_statistics(path: Path) -> bool:
    """
    :param path: file of a model
    :return: whether it holds what ``VecNormalize`` had learnt
    """
    with zipfile.ZipFile(path) as archive:
        return _MEMBER in archive.namelist()


def restore_vec_normalize(path: str | Path, env: VecEnv) -> None:
    """
    Give a ``VecNormalize`` the means and variances with which a model was saved.

    SB3 saves them apart from the model. Checkpoints and best models of this package hold them. Example::

        env = VecNormalize(make_vec_env(...), norm_obs_keys=["speed"], training=False, norm_reward=False)
        sb3_resnet.restore_vec_normalize("logs/best.zip", env)
        model = DQN.load("logs/best.zip", env=env)

    :param path: a checkpoint or best model of :class:`~sb3_resnet.callbacks.BestCheckpointCallback`
    :param env: an environment with ``VecNormalize``, made as that of training was
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if the file holds no statistics, those of other observations, or the environment has no
        ``VecNormalize``
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{str(path)!r} is no file: newest_checkpoint(FOLDER) finds one")
    normalizer = unwrap_vec_normalize(env)
    if normalizer is None:
        raise ValueError("The environment has no VecNormalize: make it as for training, VecNormalize(env, ...)")
    if not has_statistics(file):
        raise ValueError(
            f"{str(path)!r} holds no statistics of VecNormalize. BestCheckpointCallback keeps them where training has "
            "a VecNormalize; those that SB3 or RL-Zoo saved are read by VecNormalize.load(FILE, env)"
        )
    with zipfile.ZipFile(file) as archive:
        learnt = json.loads(archive.read(_MEMBER))
    here = {name: _numbers(getattr(normalizer, name)) for name in _NAMES if hasattr(normalizer, name)}
    if _shapes(here) != _shapes(learnt):
        raise ValueError(
            f"{str(path)!r} was saved with another VecNormalize: it holds {_shapes(learnt)}, and the environment has "
            f"{_shapes(here)}. Make it as for training"
        )
    for name, numbers in learnt.items():
        setattr(normalizer, name, _statistics(numbers))


def _numbers(statistics: Any) -> dict[str, Any]:
    """A number of JSON is the same number when it is read again."""
    if isinstance(statistics, Mapping):
        return {"keys": {key: _numbers(part) for key, part in statistics.items()}}
    return {
        "mean": np.asarray(statistics.mean).tolist(),
        "var": np.asarray(statistics.var).tolist(),
        "count": float(statistics.count),
    }


def _statistics(numbers: Mapping[str, Any]) -> Any:
    if "keys" in numbers:
        return {key: _statistics(part) for key, part in numbers["keys"].items()}
    mean, var = np.array(numbers["mean"], np.float64), np.array(numbers["var"], np.float64)
    statistics = RunningMeanStd(shape=mean.shape)
    statistics.mean, statistics.var, statistics.count = mean, var, numbers["count"]
    return statistics


def _shapes(learnt: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, numbers in learnt.items():
        parts = numbers.get("keys")
        shapes = None if parts is None else {key: np.shape(part["mean"]) for key, part in parts.items()}
        found[name] = np.shape(numbers["mean"]) if shapes is None else shapes
    return found
