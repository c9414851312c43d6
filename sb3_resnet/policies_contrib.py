"""The same policies for sb3-contrib's QR-DQN and MaskablePPO."""

from __future__ import annotations

from typing import Any

import torch as th
from sb3_contrib.common.maskable.policies import MaskableActorCriticCnnPolicy
from sb3_contrib.qrdqn.policies import QRDQNPolicy, QuantileNetwork

from sb3_resnet.cache.actor_critic import EncodedFeatures
from sb3_resnet.optim.policy import DictObservationsMixin
from sb3_resnet.policies import ResNetActorCriticMixin, ResNetNetworkMixin, ResNetQPolicyMixin


class ResNetQuantileNetwork(ResNetNetworkMixin, QuantileNetwork):
    """QR-DQN's network."""

    _head = "quantile_net"


class ResNetQRDQNPolicy(ResNetQPolicyMixin, QRDQNPolicy):
    """
    Policy of QR-DQN with a ResNet; :class:`~sb3_resnet.optim.policy.ResNetPolicyMixin` lists its
    arguments.

    Where ``policy_kwargs`` name no optimizer, QRDQN writes ``optimizer_class=torch.optim.Adam`` with ``eps`` alone into
    them, which is made AdamW here. The same written by hand looks no different, and becomes AdamW too: for Adam with
    an ``eps`` of your own write ``optimizer_class="Adam"``, the name instead of the class.
    """

    _network = "quantile_net"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # QRDQN writes its own default, Adam with eps = 0.01 / batch_size, into policy_kwargs where the user named no
        # optimizer. The eps is the paper's advice (arXiv 1710.10044); our default stays AdamW, for its weight decay.
        host_default = kwargs.get("optimizer_class") is th.optim.Adam and {*(kwargs.get("optimizer_kwargs") or {})} == {
            "eps"
        }
        if host_default:
            kwargs["optimizer_class"] = th.optim.AdamW
        super().__init__(*args, **kwargs)

    def make_quantile_net(self) -> QuantileNetwork:
        network: QuantileNetwork = self._make_network(ResNetQuantileNetwork)
        return network


class ResNetMaskableActorCriticCnnPolicy(ResNetActorCriticMixin, MaskableActorCriticCnnPolicy, EncodedFeatures):
    """
    Policy of MaskablePPO with a ResNet; :class:`~sb3_resnet.policies.ResNetActorCriticMixin` says what its arguments
    mean there.
    """


class ResNetQRDQNMultiInputPolicy(DictObservationsMixin, ResNetQRDQNPolicy):
    """The policy of QR-DQN with ResNets for the images of a Dict."""


class ResNetMaskableMultiInputActorCriticPolicy(DictObservationsMixin, ResNetMaskableActorCriticCnnPolicy):
    """The policy of MaskablePPO with ResNets for the images of a Dict."""
