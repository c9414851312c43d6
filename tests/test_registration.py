"""The policy's name: with which algorithms it is a policy, and what it says with the others."""

import pytest
import sb3_contrib
import stable_baselines3
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_resnet import ResNetActorCriticCnnPolicy, ResNetCnnPolicy, register_policies
from sb3_resnet.policies_contrib import ResNetMaskableActorCriticCnnPolicy, ResNetQRDQNPolicy
from tests.helpers import TinyGame

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


def test_the_name_is_a_policy_of_those_that_have_one():
    register_policies()
    register_policies()
    assert stable_baselines3.DQN.policy_aliases["ResNetCnnPolicy"] is ResNetCnnPolicy
    assert stable_baselines3.PPO.policy_aliases["ResNetCnnPolicy"] is ResNetActorCriticCnnPolicy
    assert stable_baselines3.A2C.policy_aliases["ResNetCnnPolicy"] is ResNetActorCriticCnnPolicy
    assert sb3_contrib.QRDQN.policy_aliases["ResNetCnnPolicy"] is ResNetQRDQNPolicy
    assert sb3_contrib.MaskablePPO.policy_aliases["ResNetCnnPolicy"] is ResNetMaskableActorCriticCnnPolicy


@pytest.mark.parametrize("name", ALGORITHMS)
def test_other_algorithms_say_what_to_write(name):
    algorithm = ALGORITHMS[name]
    discrete = name in ("RecurrentPPO", "TRPO")
    memory = {} if discrete or name == "ARS" else {"buffer_size": 10}
    if "CnnPolicy" not in algorithm.policy_aliases and "CnnLstmPolicy" not in algorithm.policy_aliases:
        with pytest.raises(ValueError, match="unknown"):  # SB3's own: it takes no images
            algorithm("ResNetCnnPolicy", Steering(), **memory)
        return
    with pytest.raises(ValueError, match=r"^Only DQN, QRDQN, PPO, A2C and MaskablePPO have ResNetCnnPolicy") as caught:
        algorithm("ResNetCnnPolicy", TinyGame((3, 36, 36)) if discrete else Steering(), device="cpu", **memory)
    host = "CnnLstmPolicy" if name == "RecurrentPPO" else "CnnPolicy"
    assert f"policy='{host}', policy_kwargs=dict(features_extractor_class=sb3_resnet.Res" in str(caught.value)


def test_the_advice_works():
    from sb3_resnet import ResNetExtractor

    policy_kwargs = {
        "features_extractor_class": ResNetExtractor,
        "features_extractor_kwargs": {"backbone": "resnet_tiny", "freeze_backbone": False},
    }
    env = TinyGame((3, 36, 36))
    model = sb3_contrib.TRPO("CnnPolicy", env, n_steps=4, batch_size=4, policy_kwargs=policy_kwargs, device="cpu")
    assert isinstance(model.policy.features_extractor, ResNetExtractor)
