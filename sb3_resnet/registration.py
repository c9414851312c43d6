"""Tell SB3's algorithms the names ``"ResNetCnnPolicy"`` and ``"ResNetMultiInputPolicy"``."""

from __future__ import annotations

import importlib
from typing import Any

import stable_baselines3
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_resnet.optim.policy import DICT_POLICY_NAME, POLICY_NAME
from sb3_resnet.policies import (
    ResNetActorCriticCnnPolicy,
    ResNetCnnPolicy,
    ResNetMultiInputActorCriticPolicy,
    ResNetMultiInputPolicy,
)

# Where there is no such policy: SB3's policies that take its place, and the features extractor to give to them.
_INSTEAD = {
    POLICY_NAME: (("CnnPolicy", "CnnLstmPolicy"), "ResNetExtractor"),
    DICT_POLICY_NAME: (("MultiInputPolicy", "MultiInputLstmPolicy"), "ResNetCombinedExtractor"),
}


def register_policies() -> None:
    """
    Register ``"ResNetCnnPolicy"`` and ``"ResNetMultiInputPolicy"`` with DQN, PPO and A2C; may run again.

    Where sb3-contrib is installed, QR-DQN and MaskablePPO have them too. With other algorithms the names say what to
    write instead.
    """
    _register(DQN, ResNetCnnPolicy, ResNetMultiInputPolicy)
    for actor_critic in (PPO, A2C):
        _register(actor_critic, ResNetActorCriticCnnPolicy, ResNetMultiInputActorCriticPolicy)
    contrib: Any = None
    try:
        contrib = importlib.import_module("sb3_contrib")
    except ImportError:
        pass
    else:
        from sb3_resnet import policies_contrib as ours

        _register(contrib.QRDQN, ours.ResNetQRDQNPolicy, ours.ResNetQRDQNMultiInputPolicy)
        _register(
            contrib.MaskablePPO, ours.ResNetMaskableActorCriticCnnPolicy, ours.ResNetMaskableMultiInputActorCriticPolicy
        )
    for package in (stable_baselines3, contrib):
        for algorithm in vars(package).values() if package is not None else ():
            if isinstance(algorithm, type) and issubclass(algorithm, BaseAlgorithm):
                for name in _INSTEAD:
                    _explain(algorithm, name)


def _register(algorithm: Any, of_one_image: type, of_a_dict: type) -> None:
    algorithm.policy_aliases.update({POLICY_NAME: of_one_image, DICT_POLICY_NAME: of_a_dict})


def _explain(algorithm: type[BaseAlgorithm], name: str) -> None:
    """Let a name raise an error that says what to write, where the algorithm has SB3's policy of the kind alone."""
    aliases: dict[str, Any] = algorithm.policy_aliases
    hosts, extractor = _INSTEAD[name]
    host = next((host for host in hosts if host in aliases), None)
    if host is None or name in aliases:
        return

    class NoResNetPolicy:
        """Stands for a policy that does not exist."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise ValueError(
                f"Only DQN, QRDQN, PPO, A2C and MaskablePPO have {name}. With this algorithm write "
                f"policy={host!r}, policy_kwargs=dict(features_extractor_class=sb3_resnet.{extractor}), and "
                "arguments of the extractor in features_extractor_kwargs"
            )

    aliases[name] = NoResNetPolicy
