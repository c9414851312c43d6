"""
The one place that touches parts of PyTorch and Stable-Baselines3 which their documentation does not promise.

Each function looks for such a part when it is called, never at import. If a release has renamed or removed the part,
the function falls back to something slower or simpler where that is right, and raises :class:`HostPartMissingError`
with the installed version where nothing else would be.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from typing import Any

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

#: What PyTorch writes when memory runs out, on a GPU and on a CPU; a CPU's error has no class of its own.
_NO_MEMORY = ("out of memory", "can't allocate memory")
_VERSION = attrgetter("_version")
Geometry = tuple[Any, ...]  # padding, stride, dilation and groups of a convolution
_INSTALL = "install a version that the dependencies of sb3_resnet allow"


class HostPartMissingError(RuntimeError):
    """
    An installed package lacks a part that has no substitute.

    :param package: name of the package, as pip knows it
    :param part: what is missing
    :param advice: what to do about it
    """

    def __init__(self, package: str, part: str, advice: str = _INSTALL) -> None:
        try:
            installed = version(package)
        except PackageNotFoundError:
            installed = "(unknown version)"
        super().__init__(f"{package} {installed} has no {part}, which sb3_resnet needs: {advice}")


def updates_done(model: BaseAlgorithm) -> int:
    """
    :param model: an SB3 model
    :return: its own counter, saved with the model: gradient updates for off-policy algorithms, epochs for PPO
    :raises HostPartMissingError: if it has none
    """
    try:
        return int(model._n_updates)
    except AttributeError:
        raise HostPartMissingError("stable-baselines3", "_n_updates in its models") from None


def planned_timesteps(model: BaseAlgorithm) -> int | None:
    """
    :param model: an SB3 model
    :return: timesteps at which the current ``learn()`` ends; ``None`` before the first one, or if nothing tells
    """
    return getattr(model, "_total_timesteps", None) or None


def has_observation(model: BaseAlgorithm) -> bool:
    """
    :param model: an SB3 model
    :return: whether ``learn()`` would go on from its last observation, instead of a reset
    """
    return getattr(model, "_last_obs", None) is not None


def seeds_of(env: VecEnv) -> list[int | None]:
    """
    :param env: an SB3 environment
    :return: the seeds that its next reset will take, one per environment
    """
    return list(getattr(env, "_seeds", [None] * env.num_envs))


def frames_skipped(env: VecEnv) -> int:
    """
    :param env: environments with SB3's ``MaxAndSkipEnv``
    :return: frames for which each action is repeated
    """
    return int(env.get_attr("_skip", 0)[0])


def logger_of(model: BaseAlgorithm) -> Logger | None:
    """
    :param model: an SB3 model
    :return: its logger, which it has only from its first ``learn()`` on
    """
    return getattr(model, "logger", None)


def is_loading() -> bool:
    """
    Whether this is called from within SB3's ``load`` class methods; ``False`` where SB3 has no such methods.

    They rebuild an object and load its state dict next, but tell neither policy nor extractor so: the stack must tell.
    """
    loaders = [getattr(getattr(owner, "load", None), "__func__", None) for owner in (BaseAlgorithm, BaseModel)]
    codes = {getattr(loader, "__code__", None) for loader in loaders} - {None}
    frame = sys._getframe().f_back if codes and hasattr(sys, "_getframe") else None
    while frame is not None:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False


def is_initializer(function: Callable[..., Any]) -> bool:
    """
    Whether SB3 applies this function to the modules of a new policy in order to initialise them.

    It applies nothing else to modules, so where the function comes from tells, whatever it is called.

    :param function: what ``nn.Module.apply`` was given
    """
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__module__", "")).partition(".")[0] in ("stable_baselines3", "sb3_contrib")


def network_arguments(policy: Any) -> dict[str, Any]:
    """
    :param policy: an SB3 policy under construction
    :return: what it passes to the constructor of one of its networks, with a new features extractor
    :raises HostPartMissingError: if it keeps no such arguments
    """
    if not hasattr(policy, "net_args"):
        raise HostPartMissingError("stable-baselines3", f"net_args in {type(policy).__name__}")
    extractor = policy.make_features_extractor()
    return {**policy.net_args, "features_extractor": extractor, "features_dim": extractor.features_dim}


def root_callback(callback: BaseCallback) -> BaseCallback | None:
    """
    :param callback: one of the callbacks that ``learn()`` runs, from its ``on_training_start`` on
    :return: the callback that ``learn()`` was given, which holds all of them; ``None`` if nothing tells
    """
    found = callback.locals.get("callback")
    if isinstance(found, BaseCallback):
        return found
    # Whatever the variable is called: learn() has one callback, and SB3 puts several into a list.
    others = [value for value in callback.locals.values() if isinstance(value, BaseCallback)]
    return next((other for other in others if isinstance(other, CallbackList)), others[0] if others else None)


def evaluations_done(callback: EvalCallback) -> int:
    """
    How often an ``EvalCallback`` has evaluated so far. It keeps no such count, but evaluates at each ``eval_freq``-th
    call.

    :param callback: the callback
    :raises HostPartMissingError: if it counts no calls
    """
    try:
        calls, every = callback.n_calls, callback.eval_freq
    except AttributeError as error:
        raise HostPartMissingError("stable-baselines3", f"{error.name} in EvalCallback") from None
    return int(calls // every) if every > 0 else 0


def tensor_holders(module: nn.Module) -> list[Any]:
    """
    :param module: any module
    :return: the dictionaries in which it keeps its own parameters and buffers, without those of its children
    :raises HostPartMissingError: if it has no such dictionaries
    """
    holders = [vars(module).get(name) for name in ("_parameters", "_buffers")]
    if not all(isinstance(holder, dict) for holder in holders):
        raise HostPartMissingError("torch", "_parameters and _buffers in its modules")
    return [holder for holder in holders if holder]


def torch_function_of_plain_results() -> Any:
    """:return: the ``__torch_function__`` of tensor classes whose results are plain tensors, as ``nn.Parameter`` is"""
    return getattr(th._C, "_disabled_torch_function_impl", th.Tensor.__torch_function__)


def has_forward_hooks(module: nn.Module) -> bool:
    """
    :param module: any module
    :return: whether somebody waits for it to be called; ``False`` where nothing tells
    """
    return any(getattr(module, name, None) for name in ("_forward_hooks", "_forward_pre_hooks"))


def tensor_versions(tensors: Iterable[th.Tensor]) -> tuple[int, ...]:
    """
    PyTorch's own counters of in-place changes, one per tensor.

    :param tensors: any tensors
    :raises HostPartMissingError: if it has none; nothing else tells of a change without reading the weights
    """
    try:
        return tuple(map(_VERSION, tensors))
    except AttributeError:
        raise HostPartMissingError("torch", "Tensor._version", "train without FeatureCacheCallback") from None


def is_out_of_memory(error: BaseException) -> bool:
    """
    :param error: any error
    :return: whether memory ran out, on any device; PyTorch's CPU allocator raises a plain ``RuntimeError``
    """
    if isinstance(error, (MemoryError, getattr(th, "OutOfMemoryError", th.cuda.OutOfMemoryError))):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16, without which it is several times slower than float32."""
    checks = [getattr(th.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    if any(checks):
        return any(check() for check in checks if check is not None)
    capabilities: dict[str, Any] = getattr(th.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_tile"))


def can_pack_convolutions(dtype: th.dtype) -> bool:
    """
    Whether :func:`pack_convolution` and :func:`packed_convolution` work here, found by calling them on small tensors.

    :param dtype: of the weights
    """
    try:
        parts = (th._C._nn.mkldnn_reorder_conv2d_weight, th.ops.mkldnn._convolution_pointwise)
    except AttributeError:
        return False
    has_bfloat16 = getattr(th.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if dtype == th.bfloat16 and has_bfloat16 is not None and not has_bfloat16():
        return False
    return _packing_works(dtype, parts)


@cache
def _packing_works(dtype: th.dtype, parts: tuple[Any, ...]) -> bool:
    """Once for each type and for these parts of PyTorch."""
    # No random numbers: they would be taken from a training that is to be reproducible.
    weight = th.linspace(-0.1, 0.1, 2304).reshape(16, 16, 3, 3).to(dtype, memory_format=th.channels_last)
    bias, geometry = th.linspace(-1, 1, 16).to(dtype), ((1, 1), (1, 1), (1, 1), 1)
    x = th.linspace(-1, 1, 1152).reshape(2, 16, 6, 6).to(dtype, memory_format=th.channels_last)
    try:
        packed, expected = pack_convolution(weight, geometry, x.shape), nn.functional.conv2d(x, weight, bias, padding=1)
        plain = packed_convolution(x, packed, bias, geometry, relu=True)
        added = packed_convolution(x, packed, bias, geometry, relu=True, added=x)
        pairs = ((plain, expected.relu()), (added, (expected + x).relu()))
        # To the precision of bfloat16; a wrong result is off by more.
        return all(th.allclose(one, other, rtol=0.05, atol=0.05) for one, other in pairs)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False


def pack_convolution(weight: th.Tensor, geometry: Geometry, shape: Sequence[int]) -> th.Tensor:
    """
    :param weight: of a convolution on the CPU, where :func:`can_pack_convolutions`
    :param geometry: its padding, stride, dilation and groups
    :param shape: of the inputs for which the order of the weights is chosen; others work too
    :return: its weights in oneDNN's own order
    """
    arrange: Any = th._C._nn.mkldnn_reorder_conv2d_weight
    packed: th.Tensor = arrange(weight.to_mkldnn(), *geometry, [*shape])
    return packed


def packed_convolution(
    x: th.Tensor,
    packed: th.Tensor,
    bias: th.Tensor | None,
    geometry: Geometry,
    relu: bool = False,
    added: th.Tensor | None = None,
) -> th.Tensor:
    """
    :param x: the input, channels last
    :param packed: weights of :func:`pack_convolution`
    :param bias: of the convolution; with ``added`` in the type of the input
    :param geometry: as in :func:`pack_convolution`
    :param relu: apply ReLU to the result
    :param added: added to the result before that
    :return: the result, channels last
    """
    convolve: Any = th.ops.mkldnn._convolution_pointwise
    weights = (packed, bias, *geometry)
    if added is None:
        out: th.Tensor = convolve(x, *weights, "relu" if relu else "none", [], "")
    elif x.shape[-2:] == added.shape[-2:] == (1, 1):  # refused by PyTorch 2.6 to 2.8: zeros make the maps larger
        x, added = (nn.functional.pad(one, (0, 1, 0, 1)) for one in (x, added))
        out = convolve.binary(x, added, *weights, "add", 1.0, "relu" if relu else None, [], "")[:, :, :1, :1]
    else:
        out = convolve.binary(x, added, *weights, "add", 1.0, "relu" if relu else None, [], "")
    return out
