"""Phase A at the speed of the encoder: every observation passes the frozen part once."""

from __future__ import annotations

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_resnet.buffers import give_rollout_buffer_back, lend_rollout_buffer, with_columns
from sb3_resnet.cache.acting import CachedEncoding, RolloutEncoding
from sb3_resnet.cache.copies import AugmentedCopies
from sb3_resnet.cache.entries import EntryCache, refuse_different_twins
from sb3_resnet.cache.observations import Observations
from sb3_resnet.callbacks._evaluations import refusals_end_the_search
from sb3_resnet.callbacks._updates import LendingCallback, record
from sb3_resnet.common import host
from sb3_resnet.common.arguments import integer, read_device
from sb3_resnet.common.nonfinite import RewardCheck
from sb3_resnet.common.vec_normalize import check_vec_normalize
from sb3_resnet.extractor import ResNetExtractor, extractors_in
from sb3_resnet.nn.encoder import overridden

_SLACK = 1.25  # entries per transition for which memory is reserved: episodes have one observation more than steps
_REPAIR = "so one entry cannot serve both: load both, or write model."
_DIFFER = {
    True: f"Actor's and critic's ResNet differ below the freeze boundary, {_REPAIR}policy.vf_features_extractor."
    "load_state_dict(model.policy.pi_features_extractor.state_dict()) after freezing again",
    False: f"Online and target network differ below the freeze boundary, {_REPAIR}q_net_target."
    "load_state_dict(model.q_net.state_dict()) after freezing again",
}


class FeatureCacheCallback(LendingCallback):
    """
    Encode each observation once, keep the result beside its pixels, and train on that.

    Stores in replay what the frozen part of the network makes of an observation, as SEER does (arXiv 2103.02886),
    and the pixels too, so that the boundary can move: then the entries are made anew from them, when they are
    sampled. It works for any boundary; with ``layer4`` trainable, ``layer3``'s output is kept. Acting uses the same
    entries. With ``adapter="per_frame"`` an entry belongs to one frame, so a step of an environment encodes one
    frame, not a stack. The replay buffer is replaced by one that also stores each frame once. Example::

        model.learn(1_000_000, callback=FeatureCacheCallback())

    With PPO, A2C and MaskablePPO acting encodes each observation of a rollout, and all epochs train on the entries. The
    rollout buffer is lent such columns during ``learn()``, and afterwards it is SB3's own again.

    Entries are what the network computes without this callback, in the model's own ``frozen_dtype``. Pooled features
    take four bytes per number, maps as many as a number of ``frozen_dtype``. Entries are dropped on saving.

    With ``augment`` each observation has ``augment_copies`` augmented copies, and a sampled observation is one of them,
    chosen at random for each network. How a copy is augmented depends on the model's ``seed`` (0 if it has none) and
    on the observation, so it is the same whenever it is encoded again, also after a resume with the saved buffer. SB3
    saves no rollout buffer.

    :param device: where entries live: ``"auto"`` (that of the model), ``"cpu"`` or ``"cuda"``
    :param max_bytes: limit of the entries' memory, beyond which the oldest go; ``None``: none
    :param augment_copies: augmented copies of each observation, 1 or more; each has an entry of its own, and with
        ``adapter="per_frame"`` one per frame. ``None``: a model with ``augment`` is refused
    :param verbose: 1 to print a summary at the end
    :raises ValueError: for values that cannot work, at the start of training where entries would not be exact, and in
        training for NaN or infinity in rewards
    :raises TypeError: for wrong types
    """

    def __init__(
        self,
        device: str = "auto",
        max_bytes: int | None = None,
        verbose: int = 0,
        augment_copies: int | None = None,
    ) -> None:
        super().__init__(verbose)
        self.device = read_device(device)
        self.max_bytes = None if max_bytes is None else integer("max_bytes", max_bytes, 1)
        self.augment_copies = None if augment_copies is None else integer("augment_copies", augment_copies, 1)
        self._rewards = RewardCheck()
        self._shared: Observations | None = None

    def _init_callback(self) -> None:
        """Refuse before any other callback has begun to change the model."""
        self._refuse_what_is_not_exact()
        self._replace_buffer()

    @refusals_end_the_search
    def _on_training_start(self) -> None:
        self._attach()

    def _attach(self) -> None:
        """Let buffer and acting of the model use one cache."""
        model: Any = self.model
        extractor, *twins = self._extractors()
        buffer = self._replace_buffer()
        extractor.encoder.refresh(by_value=True)
        device = model.device if self.device == "auto" else th.device(self.device)
        cache, copies = buffer.shared.cache, self._copies(extractor)
        if cache is None or not cache.suits(extractor.encoder, device, self.max_bytes, copies):
            images = 1 if copies is None else copies.images
            expected = int(_SLACK * buffer.buffer_size * buffer.n_envs) * images
            trunks = [twin.trunk for twin in twins]
            differ = _DIFFER[self._is_on_policy]
            cache = EntryCache(extractor.encoder, device, self.max_bytes, expected, trunks, copies, differ)
        buffer.shared.encode_with(cache, self.lending)
        model.policy.encoding = RolloutEncoding(buffer) if self._is_on_policy else CachedEncoding(buffer.shared)
        self._shared = buffer.shared

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if getattr(self._buffer, "shared", None) is not self._shared:
            self._attach()  # another buffer was loaded
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
            images = "frames" if cache.per_frame else "observations"
            print(f"FeatureCache: {cache.hits / max(1, total):.1%} of {total} sampled {images} were encoded before")
        model: Any = self.model
        if self._shared is not None:
            self._shared.encodes = False
        self._shared = None  # RL-Zoo ends training twice, and one summary is enough
        model.policy.encoding = None
        give_rollout_buffer_back(self._buffer)

    @property
    def _cache(self) -> EntryCache | None:
        return None if self._shared is None else self._shared.cache

    def _copies(self, extractor: Any) -> AugmentedCopies | None:
        if self.augment_copies is None:
            return None
        seed = self.model.seed or 0
        return AugmentedCopies(extractor.augmentation, extractor.preprocessing, self.augment_copies, seed)

    @property
    def _is_on_policy(self) -> bool:
        return isinstance(self.model, OnPolicyAlgorithm)

    @property
    def _buffer(self) -> Any:
        model: Any = self.model
        return model.rollout_buffer if self._is_on_policy else model.replay_buffer

    def _extractors(self) -> list[ResNetExtractor]:
        """:return: that of the online network or the actor, then those that share its entries"""
        policy: Any = self.model.policy
        if isinstance(self.model.observation_space, spaces.Dict):
            raise ValueError(
                "FeatureCacheCallback keeps the entries of one image, and the observation space is a Dict: leave it out"
            )
        has_buffer = isinstance(self.model, (OffPolicyAlgorithm, OnPolicyAlgorithm))
        if not hasattr(policy, "set_freeze_boundary") or not has_buffer:
            raise ValueError(
                "FeatureCacheCallback needs ResNetCnnPolicy and a replay buffer or rollout buffer; "
                f"{type(self.model).__name__} with {type(policy).__name__} has not both: leave it out"
            )
        return extractors_in(policy)

    def _replace_buffer(self) -> Any:
        model: Any = self.model
        images = self._extractors()[0].preprocessing
        frame_channels = images.frame_channels if images.per_frame else 1
        if self._is_on_policy:
            return lend_rollout_buffer(self._buffer, frame_channels)
        model.replay_buffer = with_columns(self._buffer, frame_channels)
        return model.replay_buffer

    def _refuse_what_is_not_exact(self) -> None:
        extractor, *twins = self._extractors()
        cls = type(extractor)
        changed = overridden(cls, ResNetExtractor) + ["forward"] * (cls.forward is not ResNetExtractor.forward)
        if changed:
            raise ValueError(
                f"{cls.__name__} overrides {', '.join(changed)}, which the encoder would pass over: train without "
                "FeatureCacheCallback"
            )
        for twin in (extractor, *twins):
            twin.boundary.check()
            hooked = _hooked(twin)
            if hooked:
                raise ValueError(
                    f"Forward hooks are registered on {', '.join(hooked)}, which the encoder would pass over: register "
                    "them on stages that train, or train without FeatureCacheCallback"
                )
        check_vec_normalize(self.model)
        refuse_different_twins(extractor.trunk, [twin.trunk for twin in twins], _DIFFER[self._is_on_policy])
        if extractor.trains_adapter:
            raise ValueError(
                "train_adapter=True changes what every entry was made with, at each update: write train_adapter=False"
            )
        if extractor.norm_name in ("batch", "sync"):
            raise ValueError(
                f"norm={extractor.norm_name!r} makes an entry depend on the batch it was made in: write norm='frozen'"
            )
        self._check_augmentation(extractor)

    def _check_augmentation(self, extractor: Any) -> None:
        augmentation = extractor.augmentation
        if self.augment_copies is None and augmentation is not None:
            raise ValueError(
                "augment changes an observation each time it is sampled, so no entry would be exact: write "
                "FeatureCacheCallback(augment_copies=4) to choose among four fixed copies of each observation (augment "
                "must be a list of names then), leave augment out, or train without FeatureCacheCallback"
            )
        if self.augment_copies is not None and augmentation is None:
            raise ValueError(
                f"augment_copies={self.augment_copies} has no effect, since the extractor has no augment: write "
                "augment=['random_shift'] in features_extractor_kwargs, or leave augment_copies out"
            )
        if augmentation is not None and not augmentation.can_repeat:
            raise ValueError(
                "augment_copies needs draws that can be made again, and where a callable takes its random numbers from "
                "is not known: write augment as a list of names, or train without FeatureCacheCallback"
            )


def _hooked(extractor: ResNetExtractor) -> list[str]:
    """:return: names of the modules with hooks in whose place the encoder computes"""
    frozen = [module for stage in extractor.boundary.frozen_stages for module in extractor.stage_modules(stage)]
    passed_over = {extractor, extractor.backbone, *(layer for module in frozen for layer in module.modules())}
    found = [name for name, module in extractor.named_modules() if module in passed_over]
    return [name or "the extractor" for name in found if host.has_forward_hooks(extractor.get_submodule(name))]
