"""Phase A at the speed of the encoder: every observation passes the frozen part once."""

from __future__ import annotations

from typing import Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import get_device

from sb3_resnet.acting import Actor
from sb3_resnet.buffers import with_columns
from sb3_resnet.cache import EntryCache
from sb3_resnet.callbacks._rewards import RewardCheck
from sb3_resnet.callbacks._updates import record
from sb3_resnet.checks import choice, integer, no_unknown
from sb3_resnet.encoder import FrozenEncoder
from sb3_resnet.precision import DTYPES
from sb3_resnet.target import FastTrunk


class FeatureCacheCallback(BaseCallback):
    """
    Encode each observation once, keep the result beside its pixels, and train on that.

    Stores in replay what the frozen part of the network makes of an observation, as SEER does (arXiv 2103.02886), and
    the pixels too, so that the boundary can move: then the entries are made anew from them, when they are sampled. It
    works for any boundary; with ``layer4`` trainable, ``layer3``'s output is kept. Acting uses the fast encoder as
    well. The replay buffer is replaced by one that also stores each frame once. Example::

        model.learn(1_000_000, callback=FeatureCacheCallback())

    Entries take two bytes a number, and four with ``dtype="float32"``. They are dropped on saving.

    :param dtype: precision of the encoder; ``"auto"``: bfloat16 where the hardware has it, float16 on older GPUs,
        float32 elsewhere. Falls back to float32, with a warning, where the error hides what distinguishes observations
    :param device: where entries live: ``"auto"`` (that of the model), ``"cpu"`` or ``"cuda"``
    :param max_bytes: limit of the entries' memory, beyond which the oldest go; ``None``: none
    :param verbose: 1 to print a summary at the end
    :raises ValueError: for values that cannot work, at the start of training where entries would not be exact, and in
        training for NaN or infinity in rewards
    :raises TypeError: for unknown arguments
    """

    def __init__(
        self, dtype: str = "auto", device: str = "auto", max_bytes: int | None = None, verbose: int = 0, **unknown: Any
    ) -> None:
        super().__init__(verbose)
        no_unknown("FeatureCacheCallback", unknown, ("dtype", "device", "max_bytes", "verbose"))
        self.dtype = choice("dtype", dtype, ["auto", *DTYPES])
        self.device = str(device)
        self.max_bytes = None if max_bytes is None else integer("max_bytes", max_bytes, 1)
        self._rewards = RewardCheck()

    def _on_training_start(self) -> None:
        extractor = self._extractor()
        self._refuse_what_is_not_exact(extractor)
        model: Any = self.model
        model.replay_buffer = buffer = with_columns(model.replay_buffer)
        device = model.device if self.device == "auto" else get_device(self.device)
        cache = buffer.shared.cache
        if cache is None or not cache.suits(extractor, self.dtype, device, self.max_bytes):
            cache = EntryCache(FrozenEncoder(extractor, self.dtype), device, self.max_bytes)
        buffer.shared.encode_with(cache)
        extractor.actor = Actor(cache.encoder, buffer.shared)
        target = model.policy.target.features_extractor
        target.fast_trunk = FastTrunk(target) if model.device.type == "cpu" else None

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._rewards(self.model)
        cache = self._cache
        if cache is not None:
            values = {"cache/hits": cache.hits, "cache/misses": cache.misses, "cache/megabytes": cache.nbytes / 1e6}
            record(self.model, values)

    def _on_training_end(self) -> None:
        """From here on the model computes as without this callback; a second ``learn()`` finds the entries again."""
        cache = self._cache
        if cache is not None and self.verbose:
            total = cache.hits + cache.misses
            print(f"FeatureCache: {cache.hits / max(1, total):.1%} of {total} sampled observations were encoded before")
        model: Any = self.model
        model.replay_buffer.shared.encodes = False
        self._extractor().actor = None
        model.policy.target.features_extractor.fast_trunk = None

    @property
    def _cache(self) -> EntryCache | None:
        model: Any = self.model
        cache: EntryCache | None = model.replay_buffer.shared.cache
        return cache

    def _extractor(self) -> Any:
        policy: Any = self.model.policy
        if not hasattr(policy, "set_freeze_boundary") or not isinstance(self.model, OffPolicyAlgorithm):
            raise ValueError(
                f"FeatureCacheCallback needs ResNetCnnPolicy and a replay buffer; {self.model} has not both"
            )
        return policy.online.features_extractor

    def _refuse_what_is_not_exact(self, extractor: Any) -> None:
        policy: Any = self.model.policy
        normalizer = self.model.get_vec_normalize_env()
        if normalizer is not None and normalizer.norm_obs:
            raise ValueError("VecNormalize changes old observations with its statistics: write norm_obs=False")
        if extractor.trains_adapter:
            raise ValueError(
                "train_adapter=True changes what every entry was made with, at each update: write train_adapter=False"
            )
        if extractor.norm_name in ("batch", "sync"):
            raise ValueError(
                f"norm={extractor.norm_name!r} makes an entry depend on the batch it was made in: write norm='frozen'"
            )
        if extractor.augmentation is not None:
            raise ValueError(
                "augment changes an observation each time it is sampled, so no entry would be exact: leave augment "
                "out, or train without FeatureCacheCallback"
            )
        same = zip(frozen_tensors(extractor), frozen_tensors(policy.target.features_extractor), strict=True)
        # Not equal bit for bit: with tau < 1 SB3 rounds the target anew at each update, frozen or not.
        if not all(th.allclose(mine, other, rtol=1e-4, atol=1e-5) for mine, other in same):
            raise ValueError("Online and target network differ below the freeze boundary: load both, or build anew")


def frozen_tensors(extractor: Any) -> list[th.Tensor]:
    """:return: parameters and buffers below the freeze boundary"""
    modules = [module for name in extractor.boundary.frozen_stages for module in extractor.stage_modules(name)]
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
