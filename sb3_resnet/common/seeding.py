"""One seed for all random generators, algorithms that give the same result each time, and states to go on from."""

from __future__ import annotations

import os
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import unwrap_vec_normalize

from sb3_resnet.common import host
from sb3_resnet.common.arguments import flag, integer, shown
from sb3_resnet.common.checkpoints import random_states_of
from sb3_resnet.common.normalizer_state import has_statistics, restore_vec_normalize

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_LARGEST = 2**32 - 1  # NumPy's


def seed_everything(seed: int, deterministic: bool = True) -> int:
    """
    Seed Python, NumPy and PyTorch (all devices), and choose deterministic algorithms.

    Call it first in a script. Also pass ``seed`` to the model, which seeds environments and action space::

        sb3_resnet.seed_everything(0)
        model = DQN("ResNetCnnPolicy", env, seed=0)

    On a CPU the same seed then gives the same result bit for bit, for the same versions, machine and number of threads.
    On CUDA PyTorch promises the same for the same GPU, and raises a ``RuntimeError`` in operations without a
    deterministic algorithm.

    :param seed: 0 to 2**32 - 1
    :param deterministic: ``False`` to let PyTorch choose the fastest algorithms
    :return: the seed
    :raises ValueError: if the seed is out of range or no whole number
    :raises TypeError: for wrong types
    """
    value = integer("seed", seed)
    if value > _LARGEST:
        raise ValueError(f"seed must be at most {_LARGEST}, NumPy's largest, got {shown(seed)}")
    deterministic = flag("deterministic", deterministic)
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002  # SB3 samples from the global generator
    th.manual_seed(value)  # all devices
    th.use_deterministic_algorithms(deterministic)
    th.backends.cudnn.deterministic = deterministic
    th.backends.cudnn.benchmark = False  # its choice of an algorithm depends on how busy the machine is
    if deterministic:
        _fix_cublas()
    return value


def random_states(model: Any) -> dict[str, Any]:
    """
    The states of all random generators that training uses.

    :param model: an SB3 model
    :return: those of Python, NumPy, PyTorch (CPU and GPUs), the model's action space, and the environments where they
        have the ``np_random`` of Gymnasium; numbers, strings and lists only
    """
    cuda = th.cuda.get_rng_state_all() if th.cuda.is_available() else []
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002  # SB3 samples from the global generator
        "torch": th.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in cuda],
        "action_space": model.action_space.np_random.bit_generator.state,
        "envs": [generator.bit_generator.state for generator in _generators(model.env)],
    }
    plain: dict[str, Any] = _plain(states)
    return plain


def restore_random_states(path: str | Path, model: Any, with_statistics: bool = True) -> None:
    """
    Put all random generators back into the state in which a checkpoint found them, and what ``VecNormalize`` had
    learnt.

    Call it right before ``learn()``. Loading alone cannot do it: SB3's ``load`` seeds all generators anew where the
    model has a ``seed``. What an environment is in the midst of is in no checkpoint: its episode begins anew, unless
    you bring the environment back yourself and write ``load(..., force_reset=False)``.

    :param path: a checkpoint of :class:`~sb3_resnet.callbacks.BestCheckpointCallback`
    :param model: the model that was loaded from it, with its environment
    :param with_statistics: ``False`` to leave ``VecNormalize`` alone
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if the file holds no random states, as those of other callbacks, or those of another number of
        environments, or the statistics of another ``VecNormalize``
    """
    states = random_states_of(Path(path).expanduser())
    env = model.env
    if env is not None and not host.has_observation(model):
        env.reset()  # takes up the seeds that load() has set, which would undo what is restored below
    generators = _generators(env)
    if generators and len(generators) != len(states["envs"]):
        raise ValueError(
            f"The checkpoint has the random states of {len(states['envs'])} environments, the model has "
            f"{len(generators)} environments: load it with as many"
        )
    for index, (generator, state) in enumerate(zip(generators, states["envs"], strict=False)):
        generator.bit_generator.state = state
        env.set_attr("np_random", generator, indices=index)
    model.action_space.np_random.bit_generator.state = states["action_space"]
    if with_statistics and env is not None and unwrap_vec_normalize(env) is not None:
        _restore_statistics(Path(path).expanduser(), env)
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(states["numpy"])  # noqa: NPY002  # likewise
    th.set_rng_state(th.tensor(states["torch"], dtype=th.uint8))
    if th.cuda.is_available():
        for device, state in zip(range(th.cuda.device_count()), states["cuda"], strict=False):
            th.cuda.set_rng_state(th.tensor(state, dtype=th.uint8), device)


def _restore_statistics(path: Path, env: Any) -> None:
    if has_statistics(path):
        restore_vec_normalize(path, env)
    else:
        warnings.warn(f"{path} does not hold what VecNormalize had learnt, so that begins anew", stacklevel=3)


def _generators(env: Any) -> list[np.random.Generator]:
    """The environments' own generators; copies of them where environments are processes."""
    try:
        found = [] if env is None else env.get_attr("np_random")
    except AttributeError:  # not Gymnasium's, such as environments in C++
        return []
    return found if all(isinstance(generator, np.random.Generator) for generator in found) else []


def _plain(value: Any) -> Any:
    """Arrays and tuples as lists, for JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _fix_cublas() -> None:
    """Give cuBLAS a workspace of fixed size, without which its sums vary. It reads the variable only once."""
    if os.environ.get(_CUBLAS) in (":4096:8", ":16:8"):
        return
    os.environ[_CUBLAS] = ":4096:8"
    if th.cuda.is_initialized():  # type: ignore[no-untyped-call]  # PyTorch's
        warnings.warn(
            f"CUDA is in use already and may not read {_CUBLAS} any more: call seed_everything first, or start Python "
            f"with {_CUBLAS}=:4096:8",
            stacklevel=3,
        )
