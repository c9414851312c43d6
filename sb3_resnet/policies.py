"""Policies with a ResNet for eyes: ``DQN("ResNetCnnPolicy", env)``, ``PPO("ResNetCnnPolicy", env)``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from torch import nn

from sb3_resnet.cache.batch import EncodedBatch, Encoding
from sb3_resnet.common import host
from sb3_resnet.nn.heads import make_head
from sb3_resnet.nn.shared_state import store_shared_once
from sb3_resnet.nn.weights import about_to_be_overwritten
from sb3_resnet.policies_common import POLICY_NAME, ResNetPolicyMixin, WrongPolicyError

_BY_NAME = f"write its name as a string, {POLICY_NAME!r}"
_FOR_QRDQN = (
    f"The class ResNetCnnPolicy is DQN's, without quantiles. For QRDQN {_BY_NAME}, "
    "or the class sb3_resnet.policies_contrib.ResNetQRDQNPolicy"
)
_FOR_PPO = f"The class ResNetCnnPolicy is DQN's, without a critic of its own. For PPO and A2C {_BY_NAME}"


class ResNetQPolicyMixin(ResNetPolicyMixin):
    """What DQN's and QR-DQN's ResNet policies share: an online and a target network. Goes before SB3's policy class."""

    #: Name of the online network, as SB3 and sb3-contrib call it.
    _network: ClassVar[str]

    #: Encodes what is acted upon; ``None``: the network itself does. In no copy and no pickle of the policy.
    encoding: Encoding | None = None

    @property
    def online(self) -> Any:
        """The network that acts and learns: ``q_net``, or ``quantile_net`` for QR-DQN."""
        return getattr(self, self._network)

    @property
    def target(self) -> Any:
        """The target network."""
        return getattr(self, f"{self._network}_target")

    @property
    def trained(self) -> Any:
        """The online network, whose parameters the optimizer holds."""
        return self.online

    @property
    def heads(self) -> list[nn.Module]:
        """The online network's, alone."""
        return [self.online.head]

    def set_training_mode(self, mode: bool) -> None:
        """
        Switch the online network between acting and training.

        The target network stays in eval mode, but what it sees meanwhile are sampled observations.
        """
        super().set_training_mode(mode)  # type: ignore[misc]  # SB3's policy is next in the MRO
        self.target.features_extractor.augments = mode

    def _predict(self, obs: Any, deterministic: bool = True) -> th.Tensor:
        """Choose actions, as ``predict()`` asks: the one place where observations are acted upon."""
        encoded = None if self.encoding is None else self.encoding.encode(obs)
        given = obs if encoded is None else encoded
        actions: th.Tensor = super()._predict(given, deterministic)  # type: ignore[misc]  # of SB3's policy
        return actions

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        store_shared_once(self, self._network)  # type: ignore[arg-type]  # a module, by SB3's policy

    def _make_network(self, network_class: Callable[..., Any]) -> Any:
        """Build a network; the second is the target, which copies the first and so reads no weights."""
        with about_to_be_overwritten() if hasattr(self, self._network) else nullcontext():
            policy: Any = self  # SB3's policy is next in the MRO
            net_args = host.network_arguments(policy)
        return network_class(**net_args, dropout=self.dropout, feature_norm=self.feature_norm).to(policy.device)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "encoding": None}


class ResNetNetworkMixin:
    """
    What DQN's and QR-DQN's networks share; goes before SB3's network class.

    :param dropout: dropout probability in the head
    :param feature_norm: how features are normalised before the head
    :param kwargs: SB3's own arguments
    """

    _head: ClassVar[str]

    def __init__(self, *, dropout: float, feature_norm: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        network: Any = self
        outputs = getattr(self, self._head)[-1].out_features
        shape = (network.features_dim, outputs, network.net_arch, network.activation_fn)
        self.dropout, self.feature_norm = dropout, feature_norm
        setattr(self, self._head, make_head(*shape, dropout, feature_norm))
        network.set_training_mode(False)  # as predict() leaves it

    @property
    def head(self) -> Any:
        """What follows the features extractor: an ``nn.Sequential``."""
        return getattr(self, self._head)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data: dict[str, Any] = super()._get_constructor_parameters()  # type: ignore[misc]  # of SB3's policy
        return {**data, "dropout": self.dropout, "feature_norm": self.feature_norm}

    def extract_features(self, obs: Any, features_extractor: Any) -> th.Tensor:
        """Features of pixels, or of what the frozen prefix has already made of them."""
        if isinstance(obs, EncodedBatch):
            features: th.Tensor = features_extractor.live_part(obs.entries)
            return features
        features = super().extract_features(obs, features_extractor)  # type: ignore[misc]  # of SB3's policy
        return features


class ResNetQNetwork(ResNetNetworkMixin, QNetwork):
    """DQN's network."""

    _head = "q_net"


class ResNetCnnPolicy(ResNetQPolicyMixin, DQNPolicy):
    """
    Policy of DQN with a ResNet; :class:`~sb3_resnet.policies_common.ResNetPolicyMixin` lists its arguments.
    """

    _network = "q_net"
    _foreign: ClassVar[dict[str, str]] = {"n_quantiles": _FOR_QRDQN, "use_sde": _FOR_PPO}

    def make_q_net(self) -> QNetwork:
        network: QNetwork = self._make_network(ResNetQNetwork)
        return network

    def __getattr__(self, name: str) -> Any:
        """QR-DQN, given this class, takes the ``quantile_net`` of its policy at construction."""
        if name == "quantile_net":
            raise WrongPolicyError(_FOR_QRDQN)
        return super().__getattr__(name)
