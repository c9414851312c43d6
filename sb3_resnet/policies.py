"""Policies with a ResNet for eyes: ``DQN("ResNetCnnPolicy", env)``, ``PPO("ResNetMultiInputPolicy", env)``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.policies import ActorCriticCnnPolicy
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from torch import nn

from sb3_resnet.cache.actor_critic import EncodedFeatures, RolloutEncodingMixin
from sb3_resnet.cache.batch import EncodedBatch, Encoding
from sb3_resnet.common import host
from sb3_resnet.common.lending import lending_of
from sb3_resnet.nn.heads import ResNetMlpExtractor, make_head, widths_of
from sb3_resnet.nn.shared_state import store_shared_once
from sb3_resnet.nn.weights import about_to_be_overwritten
from sb3_resnet.optim.policy import DictObservationsMixin, ResNetPolicyMixin, WrongPolicyError
from sb3_resnet.optim.updates import install_update_counter

_BY_NAME = "write its name as a string, {name!r}"
_FOR_QRDQN = (
    f"The class {{cls}} is DQN's, without quantiles. For QRDQN {_BY_NAME}, or its class in sb3_resnet.policies_contrib"
)
_FOR_PPO = f"The class {{cls}} is DQN's, without a critic. For PPO and A2C {_BY_NAME}"
_FOR_DQN = f"This class is PPO's and A2C's, without Q-values. For DQN and QRDQN {_BY_NAME}"


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
        """Switch the online network between acting and training; the target only sees sampled observations then."""
        super().set_training_mode(mode)  # type: ignore[misc]  # SB3's policy is next in the MRO
        self.target.features_extractor.augments = mode

    def predict(self, observation: Any, *args: Any, **kwargs: Any) -> Any:
        """As SB3's. What callbacks have lent takes part where ``learn()`` asks for its next actions."""
        lending = lending_of(self.online.features_extractor)
        with nullcontext() if lending is None else lending.asked_about(observation):
            return super().predict(observation, *args, **kwargs)  # type: ignore[misc]  # of SB3's policy

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
    Policy of DQN with a ResNet; :class:`~sb3_resnet.optim.policy.ResNetPolicyMixin` lists its arguments.
    """

    _network = "q_net"
    _foreign: ClassVar[dict[str, str]] = {"n_quantiles": _FOR_QRDQN, "use_sde": _FOR_PPO}

    def make_q_net(self) -> QNetwork:
        network: QNetwork = self._make_network(ResNetQNetwork)
        return network

    def __getattr__(self, name: str) -> Any:
        """QR-DQN, given this class, takes the ``quantile_net`` of its policy at construction."""
        if name == "quantile_net":
            raise WrongPolicyError(self._explained(_FOR_QRDQN))
        return super().__getattr__(name)


class ResNetMultiInputPolicy(DictObservationsMixin, ResNetCnnPolicy):
    """
    Policy of DQN with ResNets for the images of a Dict; :class:`~sb3_resnet.optim.policy.ResNetPolicyMixin` lists its
    arguments.
    """


class ResNetActorCriticMixin(RolloutEncodingMixin, ResNetPolicyMixin):
    """
    What the ResNet policies of PPO, A2C and MaskablePPO share; goes before SB3's policy class.

    :class:`~sb3_resnet.optim.policy.ResNetPolicyMixin` lists the arguments. All that is not trunk or adapter is the
    head: the hidden layers of actor and critic, their outputs, and ``log_std``. ``net_arch`` may also be a dict, such
    as ``{"pi": [256], "vf": [512]}``. With ``share_features_extractor=False`` the critic's ResNet begins as a copy of
    the actor's, and both follow one freeze boundary.

    Without ``optimizer_kwargs``, AdamW has SB3's ``eps=1e-5`` for such policies. A2C writes its own default into
    ``policy_kwargs``, RMSprop without weight decay, and it stays; ``use_rms_prop=False`` gives AdamW.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        chosen = kwargs.get("optimizer_class", th.optim.AdamW)
        given: Any = kwargs.get("optimizer_kwargs") or {}
        if kwargs.get("optimizer_kwargs") is None and chosen in (th.optim.AdamW, "AdamW"):
            kwargs["optimizer_kwargs"] = {"eps": 1e-5}
        elif chosen is th.optim.RMSprop and {*given} == {"alpha", "eps", "weight_decay"}:
            # A2C's own default. An optimizer's arguments hold no weight decay here, since norms and biases have none.
            own_decay = {"weight_decay": given["weight_decay"]} if kwargs.get("weight_decay") is None else {}
            rest = {name: value for name, value in given.items() if name != "weight_decay"}
            kwargs.update(optimizer_kwargs=rest, **own_decay)
        super().__init__(*args, **kwargs)

    @property
    def heads(self) -> list[nn.Module]:
        """The hidden layers of the actor, and those of the critic."""
        policy: Any = self
        return [policy.mlp_extractor.policy_net, policy.mlp_extractor.value_net]

    def make_features_extractor(self) -> Any:
        """The second, for the critic, is a copy of the first and so reads no weights."""
        policy: Any = super()  # SB3's policy is next in the MRO
        first = getattr(self, "features_extractor", None)
        with nullcontext() if first is None else about_to_be_overwritten():
            extractor = policy.make_features_extractor()
        if first is not None:
            extractor.load_state_dict(first.state_dict())
        return extractor

    def _build_mlp_extractor(self) -> None:
        policy: Any = self
        shape = (policy.features_dim, policy.net_arch, policy.activation_fn, policy.device)
        policy.mlp_extractor = ResNetMlpExtractor(*shape, self.dropout, self.feature_norm)

    def _widths(self, net_arch: Any) -> Any:
        if not isinstance(net_arch, Mapping):
            return widths_of(net_arch)
        if not {*net_arch} <= {"pi", "vf"}:
            raise ValueError(f"net_arch must be a list, or a dict of 'pi' and 'vf', got the keys {[*net_arch]}")
        return {name: widths_of(widths) for name, widths in net_arch.items()}

    def install_hooks(self) -> None:
        super().install_hooks()
        install_update_counter(self.optimizer)

    def __getstate__(self) -> dict[str, Any]:
        # What was computed with a gradient last hangs on its graph, and PyTorch refuses to copy that.
        distribution = copy.copy(self.__dict__["action_dist"])
        for name, value in vars(distribution).items():
            if isinstance(value, th.Tensor):
                setattr(distribution, name, value.detach())
            elif name == "distribution" or isinstance(value, th.distributions.Distribution):
                setattr(distribution, name, None)  # as before the first observation
            elif name == "distributions":
                setattr(distribution, name, [])  # MaskablePPO's, of several discrete actions
        return {**self.__dict__, "action_dist": distribution, "encoding": None}

    def _get_constructor_parameters(self) -> dict[str, Any]:
        # SB3 leaves this one out, and so loads two features extractors into one.
        shares: bool = self.share_features_extractor  # type: ignore[attr-defined]  # SB3's policy has it
        return {**super()._get_constructor_parameters(), "share_features_extractor": shares}


class ResNetActorCriticCnnPolicy(ResNetActorCriticMixin, ActorCriticCnnPolicy, EncodedFeatures):
    """
    Policy of PPO and A2C with a ResNet; :class:`ResNetActorCriticMixin` says what its arguments mean there.
    """

    def __getattr__(self, name: str) -> Any:
        """DQN and QR-DQN, given this class, take the network of their policy at construction."""
        if name in ("q_net", "quantile_net"):
            raise WrongPolicyError(self._explained(_FOR_DQN))
        return super().__getattr__(name)


class ResNetMultiInputActorCriticPolicy(DictObservationsMixin, ResNetActorCriticCnnPolicy):
    """
    Policy of PPO and A2C with ResNets for the images of a Dict; :class:`ResNetActorCriticMixin` says what its arguments
    mean there.
    """
