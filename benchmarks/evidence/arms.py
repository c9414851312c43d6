"""The arms: one DQN, and what sees for it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.dqn.policies import CnnPolicy, QNetwork
from torch import nn

import sb3_resnet  # noqa: F401  # registers "ResNetCnnPolicy"
from sb3_resnet.buffers import FrameNStepReplayBuffer
from sb3_resnet.callbacks import AMPCallback, FeatureCacheCallback, UnfreezeCallback
from sb3_resnet.nn.cards import read_card
from sb3_resnet.nn.heads import make_head
from sb3_resnet.nn.precision import resolve_dtype

from .budgets import Budget
from .games import N_ENVS, suite_of

#: Of an arm that was not tuned: RL-Zoo's for DQN on Atari.
LEARNING_RATE = 1e-4
#: What :mod:`tuning` tries for each arm.
LEARNING_RATES = (3e-5, 1e-4, 3e-4)
GAMMA, N_STEPS = 0.99, 3
EPSILON = 0.01  # at the end of exploration, and in evaluations
HEAD = {"net_arch": [256]}
#: As in zoo_configs: each frame alone up to layer2, positions kept.
TRUNK = {
    "backbone": "resnet18",
    "adapter": "per_frame",
    "last_stage": "layer2",
    "pooling": "spatial_softmax",
    "frozen_dtype": "auto",
}
#: Shares of the steps at which a stage and all above it begin to train; late, since such updates are slow on a CPU.
PHASES = ((0.6, "layer2"), (0.9, "layer1"))
#: In what the stages compute that train: bfloat16 where the hardware has it, which is faster.
TRAINED_DTYPE = "auto"


class StandardizedQNetwork(QNetwork):
    """SB3's Q-network with the head of ``ResNetCnnPolicy``: standardised features, then the same layers."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        outputs = int(self.action_space.n)
        self.q_net = make_head(self.features_dim, outputs, self.net_arch, self.activation_fn, 0.0, "standardize")


class NatureHeadPolicy(CnnPolicy):
    """SB3's ``CnnPolicy``: NatureCNN sees, but the head is that of ``ResNetCnnPolicy``."""

    def make_q_net(self) -> QNetwork:
        """:return: online or target network"""
        arguments = self._update_features_extractor(self.net_args, features_extractor=None)
        return StandardizedQNetwork(**arguments).to(self.device)


@dataclass(frozen=True)
class Arm:
    """
    What sees.

    :param words: what a table says of it
    :param policy: a policy class or its name
    :param extractor: arguments of the ResNet
    :param weights: ``"game"`` for a file of the game's own frames, ``"imagenet"``, or ``None``
    :param phases: whether the trunk is unfrozen in phases
    :param lr_share: learning rate of the trunk, as a share of the head's
    """

    words: str
    policy: Any = "ResNetCnnPolicy"
    extractor: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    phases: bool = False
    lr_share: float = 0.1

    @property
    def is_resnet(self) -> bool:
        """Whether a ResNet sees."""
        return self.policy == "ResNetCnnPolicy"

    @property
    def caches(self) -> bool:
        """Whether some stages are frozen, so that their results can be kept."""
        return self.is_resnet and self.extractor.get("freeze_backbone", True)

    @property
    def trains_trunk(self) -> bool:
        """Whether stages of a ResNet train, at least in the end."""
        return self.is_resnet and (self.phases or not self.caches)


def _choice(words: str, **other: str) -> Arm:
    """Differs from ``random_frozen`` in one choice. Defaults are chosen so, on the games for tuning."""
    return Arm(f"ResNet-18, random and frozen, {words}", extractor=other)


_SCRATCH = {"freeze_backbone": False, "norm": "group"}
ARMS = {
    "nature": Arm("NatureCNN, as SB3 has it", "CnnPolicy"),
    "nature_head": Arm("NatureCNN with our head and standardised features", NatureHeadPolicy),
    "random_frozen": Arm("ResNet-18 up to layer2, random and frozen"),
    "pretrained_frozen": Arm("ResNet-18 up to layer2, pretrained on the game's frames, frozen", weights="game"),
    "pretrained_phases": Arm("the same, then unfrozen in phases", weights="game", phases=True),
    "scratch": Arm("ResNet-18 up to layer2, all of it trained from scratch", extractor=_SCRATCH, lr_share=1.0),
    "imagenet_frozen": Arm("ResNet-18 up to layer2, ImageNet weights, frozen", weights="imagenet"),
    "imagenet_phases": Arm("the same, then unfrozen in phases", weights="imagenet", phases=True),
    "random_grid": _choice("up to layer2, pooled by a grid", pooling="grid"),
    "random_avg": _choice("up to layer2, averaged over positions", pooling="avg"),
    "random_layer1": _choice("up to layer1", last_stage="layer1"),
    "random_layer3": _choice("up to layer3", last_stage="layer3"),
    "random_adapter": _choice("up to layer2, all frames at once through an adapter", adapter="conv1x1"),
}


def weights_for(arm: str, game: str, weights: dict[str, str], imagenet: str | None) -> str | None:
    """
    :param arm: name of an arm
    :param game: name of a game
    :param weights: files by game, as in ``--weights``
    :param imagenet: file with ImageNet weights
    :return: the file that the arm needs in this game; ``None`` where it needs none
    :raises LookupError: if it needs one and there is none, with the option to write
    :raises FileNotFoundError: if the file is not there
    """
    kind = ARMS[arm].weights
    file = {None: None, "game": weights.get(game), "imagenet": imagenet}[kind]
    if kind is not None and file is None:
        option = "--imagenet FILE" if kind == "imagenet" else f"--weights {game}=FILE (sb3-resnet pretrain makes one)"
        raise LookupError(f"{arm} on {game} needs {option}")
    if file is not None and not Path(file).is_file():
        raise FileNotFoundError(f"{file} is no file: the weights of {arm} on {game}")
    return file


def build(arm: str, env: VecEnv, budget: Budget, seed: int, learning_rate: float, weights: str | None) -> DQN:
    """
    :param arm: name of an arm
    :param env: environments for training
    :param budget: steps, buffer and updates
    :param seed: of the model
    :param learning_rate: of the head, and of a trunk that trains from scratch
    :param weights: file of the trunk's weights, where the arm has one
    :return: the untrained model
    """
    return DQN(
        ARMS[arm].policy,
        env,
        learning_rate=learning_rate,
        buffer_size=budget.buffer_size,
        learning_starts=budget.learning_starts,
        batch_size=32,
        tau=1.0,
        gamma=GAMMA,
        train_freq=1,
        gradient_steps=budget.updates_per_rollout,
        # Each frame once: SB3's own buffer would take seven times the memory. It computes the 3-step returns itself.
        replay_buffer_class=FrameNStepReplayBuffer,
        replay_buffer_kwargs={"n_steps": N_STEPS, "gamma": GAMMA},
        target_update_interval=budget.target_update_interval,
        exploration_fraction=budget.exploration_fraction,
        exploration_final_eps=EPSILON,
        max_grad_norm=10,
        policy_kwargs=_policy_kwargs(arm, env.observation_space, learning_rate, weights),
        seed=seed,
        device=budget.device,
    )


def _policy_kwargs(arm: str, space: Any, learning_rate: float, weights: str | None) -> dict[str, Any]:
    chosen = ARMS[arm]
    if chosen.weights is not None and weights is None:
        raise ValueError(f"{arm} needs a weights file: it would train with random weights")
    # Plain Adam without weight decay is SB3's default for NatureCNN. Fused, as ResNetCnnPolicy makes it, it takes less
    # time, and none of the arms is to wait for it.
    common: dict[str, Any] = {"optimizer_class": th.optim.Adam, "optimizer_kwargs": {"fused": True}}
    if arm == "nature":
        return common
    if not chosen.is_resnet:
        return {**common, **HEAD}
    extractor = {**TRUNK, **chosen.extractor, **({} if weights is None else {"weights": weights})}
    if space.shape[0] == 3:  # one RGB image, which needs no adapter
        del extractor["adapter"]
    rates = {"lr_backbone": chosen.lr_share * learning_rate}
    return {**common, **HEAD, **rates, "weight_decay": 0.0, "features_extractor_kwargs": extractor}


def callbacks_of(arm: str, budget: Budget) -> list[BaseCallback]:
    """:return: what the arm trains with"""
    chosen = ARMS[arm]
    phases = [{"at_timestep": int(share * budget.steps), "unfreeze_from": stage} for share, stage in PHASES]
    return [
        *([UnfreezeCallback(phases, verbose=0)] if chosen.phases else []),
        *([AMPCallback(TRAINED_DTYPE, verbose=0)] if chosen.trains_trunk else []),
        *([FeatureCacheCallback()] if chosen.caches else []),
    ]


def resolved(
    model: DQN, arm: str, suite: str, budget: Budget, learning_rate: float, weights: str | None
) -> dict[str, Any]:
    """
    Read from a model what it trains with.

    :param model: of :func:`build`
    :param arm: name of the arm
    :param suite: name of the suite
    :param budget: that of the run
    :param learning_rate: that of the run
    :param weights: file of the trunk's weights
    :return: ``"shared"``: what all arms must have in common; ``"head"``; ``"trunk"``; ``"learning_rate"``
    """
    optimizer = model.policy.optimizer
    # The rates are compared on their own, and phases and names belong to the trunk.
    options = ("betas", "eps", "amsgrad", "maximize", "fused")
    groups = [
        {"weight_decay": group["weight_decay"], **{name: group[name] for name in options if name in group}}
        for group in optimizer.param_groups
    ]
    if any(group != groups[0] for group in groups):
        raise ValueError(f"The optimizer's groups of {arm} differ: {groups}")
    shared = {
        "algorithm": type(model).__name__,
        "optimizer": {"class": type(optimizer).__name__, **groups[0]},
        "loss": "smooth L1, SB3's",
        "gamma": model.gamma,
        "n_steps": model.replay_buffer.n_steps,
        "replay buffer": type(model.replay_buffer).__name__,
        "buffer_size": model.buffer_size,
        "learning_starts": model.learning_starts,
        "batch_size": model.batch_size,
        "train_freq": model.train_freq.frequency if hasattr(model.train_freq, "frequency") else model.train_freq,
        "gradient_steps": model.gradient_steps,
        "updates per environment step": model.gradient_steps / N_ENVS,
        "target_update_interval": model.target_update_interval,
        "tau": model.tau,
        "exploration": [model.exploration_initial_eps, model.exploration_final_eps, model.exploration_fraction],
        "max_grad_norm": model.max_grad_norm,
        "environments": N_ENVS,
        "first environment": f"{N_ENVS} times the seed",
        "environment": suite_of(suite).description,
        "observation": [*model.observation_space.shape],
        "steps": budget.steps,
        "evaluation": {"every": budget.eval_every, "episodes": budget.episodes, "epsilon": EPSILON, "rewards": "raw"},
    }
    chosen = ARMS[arm]
    trunk = {
        "class": model.policy.features_extractor_class.__name__,
        "arguments": {name: value for name, value in _extractor_arguments(model).items() if name != "weights"},
        "features": model.q_net.features_dim,
        "weights": None if weights is None else provenance(weights),
        "phases": [list(phase) for phase in PHASES] if chosen.phases else [],
        "share of the learning rate": chosen.lr_share if chosen.is_resnet else 1.0,
        **({"trains in": str(resolve_dtype(TRAINED_DTYPE, model.device))} if chosen.trains_trunk else {}),
    }
    return {"shared": shared, "head": _head(model), "trunk": trunk, "learning_rate": learning_rate}


def _extractor_arguments(model: DQN) -> dict[str, Any]:
    given: dict[str, Any] = (model.policy_kwargs or {}).get("features_extractor_kwargs") or {}
    extractor = model.q_net.features_extractor
    # "auto" is decided by the hardware: the result must say what it has become.
    return {**given, **({"frozen_dtype": extractor.frozen_dtype} if "frozen_dtype" in given else {})}


def _head(model: DQN) -> list[str]:
    """Its layers; the number of features is the trunk's."""
    layers: list[nn.Module] = [*model.q_net.q_net]
    linear = {layer: f"Linear({layer.out_features})" for layer in layers if isinstance(layer, nn.Linear)}
    return [linear.get(layer, type(layer).__name__) for layer in layers]


def provenance(file: str) -> dict[str, Any]:
    """
    :param file: of weights
    :return: which file it is, and how it was pretrained if its card tells
    """
    card = read_card(file) or {}
    told = {name: card[name] for name in ("env", "objective", "frames", "update", "updates", "seed") if name in card}
    arguments = card.get("arguments", {})
    told |= {name: arguments[name] for name in ("minutes", "held_out", "labels", "batch_size") if name in arguments}
    return {"file": Path(file).name, "sha256": sha256(file), "pretraining": told or None}


def sha256(file: str) -> str:
    """:return: which file it is, whatever its name"""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
