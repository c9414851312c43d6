"""The network of a model as one differentiable function from observations to scores."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import preprocess_obs
from torch import nn
from torch.nn import functional as F

from sb3_resnet.cache.frames import Array
from sb3_resnet.cli.loading import extractor_of, extractors_of
from sb3_resnet.diagnosis.setup_rules import eyes_of, value_network_of

_BATCH = 32


class ScoreNetwork(nn.Module):
    """
    Preprocessing, trunk and head: from raw observations to one score per action.

    Scores are Q-values for DQN, their mean over quantiles for QR-DQN, and logits for PPO and A2C. The greedy action has
    the highest score. Unlike in the policy's own forward pass, gradients flow through frozen stages, and these
    compute in float32 whatever the model's ``frozen_dtype`` is.

    Of a Dict it is a function of one image; the features of all other inputs are given.

    :param model: an SB3 model with a ResNet
    :param key: key of the image in the Dict; ``""`` for a model of one image
    :raises ValueError: if its actions are not discrete, or if it sees a Dict and has no such image
    """

    def __init__(self, model: Any, key: str = "") -> None:
        super().__init__()
        if not isinstance(model.action_space, spaces.Discrete):
            raise ValueError(f"This needs one score per action, so discrete actions, not {model.action_space}")
        extractors = extractors_of(model)
        self.extractor = extractors[key] if key in extractors else extractor_of(model)
        # The features of images come first, in the order of their keys.
        self._start = sum(extractors[name].features_dim for name in takewhile(lambda name: name != key, extractors))
        self._space = model.observation_space
        self._eyes = [eyes_of(model)]  # in a list, so that nothing is a part of this module twice
        self.n_actions = int(model.action_space.n)
        model.policy.set_training_mode(False)
        self.head = _head_of(model.policy)
        self.resize = _Resize(self.extractor.preprocessing.observed_size, self.extractor.image_size)
        self.to(model.device)

    def forward(self, observations: th.Tensor, features: th.Tensor | None = None) -> th.Tensor:
        """
        :param observations: the image, ``(batch, C, H, W)``, raw values of the space; floats may require a gradient
        :param features: those of the whole Dict, of :meth:`features`, whose part of this image is replaced; ``None``
            for a model of one image
        :return: scores ``(batch, actions)``
        """
        extractor = self.extractor
        x = extractor.preprocess(self.resize(extractor.scale_raw(observations)))
        pooled = extractor.trunk.pool(extractor.run_stages(x, extractor.stages), observations.shape[0])
        own = extractor.projection(pooled)
        if features is not None:
            own = th.cat([features[:, : self._start], own, features[:, self._start + own.shape[1] :]], dim=1)
        return self.scores(own)

    def features(self, observations: Any) -> th.Tensor:
        """
        Compute what the head of the policy itself gets: frozen stages compute in the model's ``frozen_dtype``.

        :param observations: of the whole space, raw values: ``(batch, C, H, W)``, or tensors by key
        :return: features ``(batch, n)``
        """
        seen = preprocess_obs(observations, self._space)
        with th.no_grad():
            features: th.Tensor = self._eyes[0](seen)
        return features

    def of_policy(self, observations: Any) -> th.Tensor:
        """
        :param observations: as for :meth:`features`
        :return: the scores that the policy itself acts by, ``(batch, actions)``
        """
        with th.no_grad():
            return self.scores(self.features(observations))

    def difference(self, observations: Array, features: Array | None = None) -> float:
        """
        :param observations: the image, raw values of its space, ``(n, C, H, W)``
        :param features: those of the whole Dict that the policy acted by, ``(n, m)``; ``None`` for a model of one image
        :return: largest difference between the scores of this network and those that the policy acts by
        """
        device, found = self.extractor.input_mean.device, []
        for start in range(0, len(observations), _BATCH):
            part = slice(start, start + _BATCH)
            images = th.as_tensor(observations[part], device=device)
            acted_by = self.features(images) if features is None else th.as_tensor(features[part], device=device)
            with th.no_grad():
                found.append(float((self(images, acted_by) - self.scores(acted_by)).abs().max()))
        return max(found)

    def scores(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: what the head gets, ``(batch, n)``
        :return: scores ``(batch, actions)``
        """
        # QR-DQN's outputs are (quantiles, actions); all others' have a single row.
        found: th.Tensor = self.head(features).reshape(features.shape[0], -1, self.n_actions).mean(dim=1)
        return found


class _Resize(nn.Module):
    """
    The extractor's antialiased resize as two matrix products, which every ONNX runtime supports.

    The resize is linear, and rows and columns are resized independently. So resizing a unit matrix yields the matrix
    that resizes the rows of any image, and another one that resizes its columns.
    """

    rows: th.Tensor
    columns: th.Tensor

    def __init__(self, size: tuple[int, int], wanted: tuple[int, int] | None) -> None:
        super().__init__()
        self.needed = wanted is not None and wanted != tuple(size)
        for name, old, new in zip(("rows", "columns"), size, wanted or size, strict=True):
            unit = th.eye(old).reshape(1, 1, old, old)
            matrix = F.interpolate(unit, (new, old), mode="bilinear", antialias=True, align_corners=False)[0, 0]
            self.register_buffer(name, matrix)

    def forward(self, images: th.Tensor) -> th.Tensor:
        return self.rows @ images @ self.columns.T if self.needed else images


def _head_of(policy: Any) -> nn.Module:
    name = value_network_of(policy)
    if name is not None:  # SB3 and sb3-contrib call the head within the network as they call the network
        head: nn.Module = getattr(getattr(policy, name), name)
        return head
    return nn.Sequential(policy.mlp_extractor.policy_net, policy.action_net)
