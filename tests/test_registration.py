"""The policy's name: with which algorithms it is a policy, and what it says with the others."""

import pytest
import sb3_contrib
import stable_baselines3
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_resnet import (
    ResNetActorCriticCnnPolicy,
    ResNetCnnPolicy,
    ResNetMultiInputActorCriticPolicy,
    ResNetMultiInputPolicy,
    register_policies,
)
from sb3_resnet.policies_contrib import (
    ResNetMaskableActorCriticCnnPolicy,
    ResNetMaskableMultiInputActorCriticPolicy,
    ResNetQRDQNMultiInputPolicy,
    ResNetQRDQNPolicy,
)
from tests.helpers import DictGame, TinyGame

ALGORITHMS = {
    name: value
    for package in (stable_baselines3, sb3_contrib)
    for name, value in vars(package).items()
    if isinstance(value, type)
    and issubclass(value, BaseAlgorithm)
    and name not in ("DQN", "QRDQN", "PPO", "A2C", "MaskablePPO")
}


class Steering(TinyGame):
    def __init__(self):
        super().__init__((3, 36, 36))
        self.action_space = spaces.Box(-1, 1, (2,))


class SteeredDict(DictGame):
    def __init__(self):
        super().__init__()
        self.action_space = spaces.Box(-1, 1, (2,))


POLICIES = {
    stable_baselines3.DQN: (ResNetCnnPolicy, ResNetMultiInputPolicy),
    stable_baselines3.PPO: (ResNetActorCriticCnnPolicy, ResNetMultiInputActorCriticPolicy),
    stable_baselines3.A2C: (ResNetActorCriticCnnPolicy, ResNetMultiInputActorCriticPolicy),
    sb3_contrib.QRDQN: (ResNetQRDQNPolicy, ResNetQRDQNMultiInputPolicy),
    sb3_contrib.MaskablePPO: (ResNetMaskableActorCriticCnnPolicy, ResNetMaskableMultiInputActorCriticPolicy),
}


def test_the_names_are_policies_of_those_that_have_them():
    register_policies()
    register_policies()
    for algorithm, policies in POLICIES.items():
        aliases = algorithm.policy_aliases
        assert (aliases["ResNetCnnPolicy"], aliases["ResNetMultiInputPolicy"]) == policies


@pytest.mark.parametrize("policy", ["ResNetCnnPolicy", "ResNetMultiInputPolicy"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_other_algorithms_say_what_to_write(name, policy):
    algorithm = ALGORITHMS[name]
    discrete = name in ("RecurrentPPO", "TRPO")
    memory = {} if discrete or name == "ARS" else {"buffer_size": 10}
    is_dict = policy == "ResNetMultiInputPolicy"
    env = (DictGame() if discrete else SteeredDict()) if is_dict else TinyGame((3, 36, 36)) if discrete else Steering()
    host = policy.removeprefix("ResNet").replace("Policy", "LstmPolicy" if name == "RecurrentPPO" else "Policy")
    if host not in algorithm.policy_aliases:
        with pytest.raises(ValueError, match="unknown"):  # SB3's own: it takes no such observations
            algorithm(policy, env, **memory)
        return
    with pytest.raises(ValueError, match=rf"^Only DQN, QRDQN, PPO, A2C and MaskablePPO have {policy}") as caught:
        algorithm(policy, env, device="cpu", **memory)
    extractor = "ResNetCombinedExtractor" if is_dict else "ResNetExtractor"
    assert f"policy='{host}', policy_kwargs=dict(features_extractor_class=sb3_resnet.{extractor})" in str(caught.value)


def test_the_advice_works():
    from sb3_resnet import ResNetExtractor

    policy_kwargs = {
        "features_extractor_class": ResNetExtractor,
        "features_extractor_kwargs": {"backbone": "resnet_tiny", "freeze_backbone": False},
    }
    env = TinyGame((3, 36, 36))
    model = sb3_contrib.TRPO("CnnPolicy", env, n_steps=4, batch_size=4, policy_kwargs=policy_kwargs, device="cpu")
    assert isinstance(model.policy.features_extractor, ResNetExtractor)
