"""What RL-Zoo would run of a configuration: it evaluates texts and calls what is named."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnvWrapper

from sb3_resnet.cli.pickles import UntrustedError, class_in
from sb3_resnet.common.arguments import shown

_TRUST = "write --trust if you know who wrote the configuration"
# RL-Zoo gives these to eval() where they are texts.
_EVALUATED = ("policy_kwargs", "replay_buffer_class", "replay_buffer_kwargs", "monitor_kwargs", "normalize")
_KNOWN = ("gymnasium", "minigrid", "rl_zoo3", "sb3_contrib", "sb3_resnet", "stable_baselines3")
# How a class outside of RL-Zoo's own names is written as a text.
_IMPORTED = re.compile(r"importlib\.import_module\(['\"]([\w.]+)['\"]\)\.(\w+)")
# RL-Zoo imports and calls what these name.
_CALLED: dict[str, tuple[type, ...]] = {
    "policy": (BasePolicy,),
    "env_wrapper": (gym.Wrapper,),
    "vec_env_wrapper": (VecEnvWrapper,),
    "callback": (BaseCallback,),
}
_FUNCTIONS = {
    "sb3_resnet.callbacks.recipes.fine_tuning_callbacks",
    "sb3_resnet.envs.to_atari_vec_env",
    "sb3_resnet.envs.zoo.to_atari_vec_env",
    "sb3_resnet.fine_tuning_callbacks",
}


def refuse_code(hyperparams: Mapping[str, Any], source: object) -> None:
    """
    Refuse a section of RL-Zoo's YAML whose reading would run code that it holds or names.

    Only classes of SB3, sb3-contrib, RL-Zoo, gymnasium, minigrid and this package may be named and called.

    :param hyperparams: the section
    :param source: the file, for the error
    :raises UntrustedError: with what would be run
    """
    for key in _EVALUATED:
        value = hyperparams.get(key)
        if not isinstance(value, str) or _is_name(value):
            continue
        advice = "" if key == "replay_buffer_class" else "write it as a dict of YAML, or "
        raise UntrustedError(
            f"{source}: {key} is a text, {shown(value)}, which RL-Zoo evaluates as Python code: {advice}{_TRUST}"
        )
    for key, bases in _CALLED.items():
        for name in _names(hyperparams.get(key)):
            module, dot, attribute = str(name).rpartition(".")
            if key == "policy" and not dot:
                continue
            if str(name) in _FUNCTIONS or class_in(dict.fromkeys(_KNOWN, bases), module, attribute) is not None:
                continue
            raise UntrustedError(
                f"{source}: {key} names {shown(name)}, which RL-Zoo imports and calls, and which is no such class of "
                f"{', '.join(_KNOWN)}: {_TRUST}"
            )


def _is_name(text: str) -> bool:
    """Whether it evaluates to what has this name, and calls nothing but the import of a known module."""
    imported = _IMPORTED.fullmatch(text.strip())
    if imported is not None:
        return class_in(dict.fromkeys(_KNOWN, (BaseBuffer,)), *imported.groups()) is not None
    return text.strip().isidentifier()


def _names(value: Any) -> list[Any]:
    """One name or several, each alone or as the key of its arguments."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [name for item in values for name in (item if isinstance(item, Mapping) else [item])]
