"""One seed for all random generators, and algorithms that give the same result each time."""

from __future__ import annotations

import os
import random
import warnings

import numpy as np
import torch as th

from sb3_resnet.common.arguments import flag, integer, shown

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_LARGEST = 2**32 - 1  # NumPy's


def seed_everything(seed: int, deterministic: bool = True) -> int:
    """
    Seed Python, NumPy and PyTorch (all devices), and choose deterministic algorithms.

    Call it first in a script, and give the model its ``seed`` as well, which seeds environments and action space::

        sb3_resnet.seed_everything(0)
        model = DQN("ResNetCnnPolicy", env, seed=0)

    The same seed then gives the same result bit for bit on a CPU, for the same versions, machine and number of threads.
    On CUDA PyTorch promises the same for the same GPU and raises a ``RuntimeError`` in operations that have no
    deterministic algorithm.

    :param seed: 0 to 2**32 - 1
    :param deterministic: ``False`` for whatever algorithm is fastest
    :return: the seed
    :raises ValueError: for a seed that is out of range or not whole
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


def _fix_cublas() -> None:
    """Without a workspace of fixed size cuBLAS adds in an order of its own; it reads the variable once."""
    if os.environ.get(_CUBLAS) in (":4096:8", ":16:8"):
        return
    os.environ[_CUBLAS] = ":4096:8"
    if th.cuda.is_initialized():  # type: ignore[no-untyped-call]  # PyTorch's
        warnings.warn(
            f"CUDA is in use already and may not read {_CUBLAS} any more: call seed_everything first, or start Python "
            f"with {_CUBLAS}=:4096:8",
            stacklevel=3,
        )
