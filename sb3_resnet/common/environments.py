"""What environments are in the midst of: taken out of them, and put into others that were made the same way."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
from gymnasium.utils import EzPickle
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, VecNormalize

from sb3_resnet.common import host, host_progress

#: Of a wrapper of SB3's: what its constructor has set.
_MADE = ("venv", "num_envs", "observation_space", "action_space", "class_attributes", "metadata", "render_mode")
#: Of VecNormalize: what it has learnt, beside what depends on the episode.
_STATISTICS = ("obs_rms", "ret_rms")


def environment_state(env: VecEnv) -> dict[str, Any]:
    """
    :param env: an SB3 environment
    :return: what its wrappers remember, by position from the outermost in, and the pickled state of its environments;
        ``None`` in its place where that cannot be had: other processes, C++, open files, lambdas, Gymnasium's
        ``EzPickle``
    """
    wrappers, base = _layers(env)
    kept = [{name: value for name, value in vars(one).items() if _can_keep(name, value)} for one in wrappers]
    return {"wrappers": kept, "envs": _pickled(base), "seeds": host.seeds_of(base)}


def put_back(env: VecEnv, state: dict[str, Any]) -> bool:
    """
    :param env: an SB3 environment, made as the other one was
    :param state: of :func:`environment_state`
    :return: whether the environments go on from where they were; else their episodes begin anew, and only what
        ``VecNormalize`` has learnt is put back
    :raises ValueError: if the environment has other wrappers, or other environments inside
    """
    wrappers, base = _layers(env)
    if len(wrappers) != len(state["wrappers"]):
        raise ValueError(
            f"The checkpoint is of an environment with {len(state['wrappers'])} of SB3's wrappers, and this one has "
            f"{len(wrappers)}: make it in the same way"
        )
    goes_on = state["envs"] is not None and isinstance(base, DummyVecEnv)
    for wrapper, kept in zip(wrappers, state["wrappers"], strict=True):
        names = kept if goes_on else _STATISTICS if isinstance(wrapper, VecNormalize) else ()
        vars(wrapper).update({name: kept[name] for name in names if name in kept})
    if goes_on:
        saved = pickle.loads(state["envs"])
        here = [type(one) for one in base.envs]  # type: ignore[attr-defined]  # a DummyVecEnv has them
        if [kind.__name__ for kind in here] != [kind for kind, _ in saved]:
            raise ValueError(f"The checkpoint is of {[kind for kind, _ in saved]}, and the environments are {here}")
        for one, (_, content) in zip(base.envs, saved, strict=True):  # type: ignore[attr-defined]  # likewise
            vars(one).update(content)
    if len(state["seeds"]) == base.num_envs:
        host_progress.set_seeds(base, state["seeds"])  # else the seeds of the start would be taken a second time
    return goes_on


def _layers(env: VecEnv) -> tuple[list[VecEnvWrapper], VecEnv]:
    wrappers = []
    while isinstance(env, VecEnvWrapper):
        wrappers.append(env)
        env = env.venv
    return wrappers, env


def _can_keep(name: str, value: Any) -> bool:
    """Not an open file, for example."""
    if name in _MADE:
        return False
    try:
        pickle.dumps(value)
    except Exception:  # whatever the value is, it says in its own way that it cannot be pickled
        return False
    return True


def _pickled(base: VecEnv) -> bytes | None:
    if not isinstance(base, DummyVecEnv):
        return None
    # EzPickle makes an environment anew where it is unpickled: its state would be lost in silence.
    if any(isinstance(inner, EzPickle) for env in base.envs for inner in _inside(env)):
        return None
    try:
        content: bytes = pickle.dumps([(type(env).__name__, vars(env)) for env in base.envs])
        pickle.loads(content)
    except Exception:  # likewise
        return None
    return content


def _inside(env: gym.Env[Any, Any]) -> Iterator[gym.Env[Any, Any]]:
    while isinstance(env, gym.Wrapper):
        yield env
        env = env.env
    yield env
