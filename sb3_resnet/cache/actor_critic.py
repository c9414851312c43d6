"""Actor-critic policies that act on, and learn from, what the frozen stages have already made of observations."""

from __future__ import annotations

from typing import Any

import torch as th
from stable_baselines3.common.policies import BasePolicy

from sb3_resnet.cache.acting import RolloutEncoding
from sb3_resnet.cache.batch import EncodedBatch


class RolloutEncodingMixin:
    """What asks for entries while a rollout is collected; goes before SB3's policy class."""

    #: Encodes what is acted upon; ``None``: the network itself does. In no copy and no pickle of the policy.
    encoding: RolloutEncoding | None = None

    def forward(self, obs: Any, *args: Any, **kwargs: Any) -> Any:
        """Act, as the algorithm asks while it collects a rollout; an evaluation asks ``predict()``."""
        policy: Any = super()  # SB3's policy is next in the MRO
        encoded = self.encoding.encode(obs) if self.encoding is not None and isinstance(obs, th.Tensor) else None
        return policy.forward(obs if encoded is None else encoded, *args, **kwargs)

    def predict_values(self, obs: Any) -> Any:
        """Values, as the algorithm asks for those after a rollout and after an episode that was cut off."""
        policy: Any = super()  # likewise
        encoded = self.encoding.encode_valued(obs) if self.encoding is not None and isinstance(obs, th.Tensor) else None
        return policy.predict_values(obs if encoded is None else encoded)


class EncodedFeatures(BasePolicy):
    """
    Features of pixels, or of what the frozen stages have already made of them.

    It goes after SB3's actor-critic policy, whose methods all ask the next class for the features of one extractor.
    """

    def extract_features(self, obs: Any, features_extractor: Any) -> Any:
        if isinstance(obs, EncodedBatch):
            return features_extractor.live_part(obs.entries)
        return super().extract_features(obs, features_extractor)
