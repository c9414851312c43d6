"""Tell SB3's algorithms the name ``"ResNetCnnPolicy"``."""

from __future__ import annotations

import importlib
from typing import Any

import stable_baselines3
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_resnet.optim.policy import POLICY_NAME
from sb3_resnet.policies import ResNetActorCriticCnnPolicy, ResNetCnnPolicy


def register_policies() -> None:
    """
    Register ``"ResNetCnnPolicy"`` with DQN, PPO and A2C; may run again.

    Where sb3-contrib is installed, QR-DQN and MaskablePPO have it too. With other algorithms the name says what to
    write instead.
    """
    DQN.policy_aliases[POLICY_NAME] = ResNetCnnPolicy
    PPO.policy_aliases[POLICY_NAME] = A2C.policy_aliases[POLICY_NAME] = ResNetActorCriticCnnPolicy
    contrib: Any = None
    try:
        contrib = importlib.import_module("sb3_contrib")
    except ImportError:
        pass
    else:
        from sb3_resnet.policies_contrib import ResNetMaskableActorCriticCnnPolicy, ResNetQRDQNPolicy

        contrib.QRDQN.policy_aliases[POLICY_NAME] = ResNetQRDQNPolicy
        contrib.MaskablePPO.policy_aliases[POLICY_NAME] = ResNetMaskableActorCriticCnnPolicy
    for package in (stable_baselines3, contrib):
        for algorithm in vars(package).values() if package is not None else ():
            if isinstance(algorithm, type) and issubclass(algorithm, BaseAlgorithm):
                _explain(algorithm)


def _explain(algorithm: type[BaseAlgorithm]) -> None:
    """Let the name raise an error that says what to write, where the algorithm takes images and has no such policy."""
    aliases: dict[str, Any] = algorithm.policy_aliases
    host = next((name for name in ("CnnPolicy", "CnnLstmPolicy") if name in aliases), None)
    if host is None or POLICY_NAME in aliases:
        return

    class NoResNetCnnPolicy:
        """Stands for a policy that does not exist."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise ValueError(
                f"Only DQN, QRDQN, PPO, A2C and MaskablePPO have {POLICY_NAME}. With this algorithm write "
                f"policy={host!r}, policy_kwargs=dict(features_extractor_class=sb3_resnet.ResNetExtractor), and "
                "arguments of the extractor in features_extractor_kwargs"
            )

    aliases[POLICY_NAME] = NoResNetCnnPolicy
