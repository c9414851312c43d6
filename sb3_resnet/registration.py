"""Tell SB3's algorithms the name ``"ResNetCnnPolicy"``."""

from __future__ import annotations

from stable_baselines3 import DQN

from sb3_resnet.policies import POLICY_NAME, ResNetCnnPolicy


def register_policies() -> None:
    """Register ``"ResNetCnnPolicy"`` with DQN, and with QR-DQN where sb3-contrib is installed; may run again."""
    DQN.policy_aliases[POLICY_NAME] = ResNetCnnPolicy
    try:
        from sb3_contrib import QRDQN
    except ImportError:
        return
    from sb3_resnet.policies_contrib import ResNetQRDQNPolicy

    QRDQN.policy_aliases[POLICY_NAME] = ResNetQRDQNPolicy
