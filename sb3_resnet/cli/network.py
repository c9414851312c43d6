"""The network of a model as one differentiable function from observations to scores."""

from __future__ import annotations

from typing import Any

import torch as th
from gymnasium import spaces
from torch import nn
from torch.nn import functional as F

from sb3_resnet.cache.frames import Array
from sb3_resnet.cli.loading import extractor_of

_BATCH = 32


class ScoreNetwork(nn.Module):
    """
    Preprocessing, trunk and head: from raw observations to one score per action.

    Scores are Q-values for DQN, their mean over quantiles for QR-DQN, and logits for PPO and A2C. The greedy action has
    the highest score. Unlike in the policy's own forward pass, gradients flow through frozen stages, and these
    compute in float32 whatever the model's ``frozen_dtype`` is.

    :param model: an SB3 model with a ResNet
    :raises ValueError: if its actions are not discrete
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        if not isinstance(model.action_space, spaces.Discrete):
            raise ValueError(f"This needs one score per action, so discrete actions, not {model.action_space}")
        self.extractor = extractor_of(model)
        self.n_actions = int(model.action_space.n)
        model.policy.set_training_mode(False)
        self.head = _head_of(model.policy)
        self.resize = _Resize(model.observation_space.shape[1:], self.extractor.image_size)
        self.to(model.device)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: ``(batch, C, H, W)``, raw values of the space; floats may require a gradient
        :return: scores ``(batch, actions)``
        """
        extractor = self.extractor
        x = extractor.preprocess(self.resize(extractor.scale_raw(observations)))
        pooled = extractor.trunk.pool(extractor.run_stages(x, extractor.stages), observations.shape[0])
        return self._scores(extractor.projection(pooled))

    def of_policy(self, observations: th.Tensor) -> th.Tensor:
        """
        Compute the scores that the policy itself acts by: its frozen stages compute in the model's ``frozen_dtype``.

        :param observations: as for :meth:`forward`
        :return: scores ``(batch, actions)``
        """
        with th.no_grad():
            return self._scores(self.extractor(self.extractor.scale_raw(observations)))

    def difference(self, observations: Array) -> float:
        """
        :param observations: raw values of the space, ``(n, C, H, W)``
        :return: largest difference between the scores of this network and those that the policy acts by
        """
        found = []
        for start in range(0, len(observations), _BATCH):
            part = th.as_tensor(observations[start : start + _BATCH], device=self.extractor.input_mean.device)
            with th.no_grad():
                found.append(float((self(part) - self.of_policy(part)).abs().max()))
        return max(found)

    def _scores(self, features: th.Tensor) -> th.Tensor:
        # QR-DQN's outputs are (quantiles, actions); all others' have a single row.
        scores: th.Tensor = self.head(features).reshape(features.shape[0], -1, self.n_actions).mean(dim=1)
        return scores


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
    if hasattr(policy, "online"):
        head: nn.Module = policy.online.head
        return head
    return nn.Sequential(policy.mlp_extractor.policy_net, policy.action_net)
