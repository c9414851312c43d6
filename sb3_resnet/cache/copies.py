"""A fixed number of augmented versions of each observation, which are the same whenever they are made again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch as th

from sb3_resnet.cache.frames import Array, ObservationStore
from sb3_resnet.nn.augment import Augmentation
from sb3_resnet.nn.preprocessing import Preprocessing


@dataclass(frozen=True)
class AugmentedCopies:
    """
    What is encoded where images are augmented: copies of observations instead of their pixels, as in SEER.

    With ``adapter="per_frame"`` the frames of a copy are encoded one by one. They are of this copy alone, since the
    same frame is changed in another way in another observation.

    :param augmentation: the extractor's
    :param preprocessing: the extractor's
    :param count: copies of each observation
    :param seed: of the run
    """

    augmentation: Augmentation
    preprocessing: Preprocessing
    count: int
    seed: int

    @property
    def images(self) -> int:
        """Images that are encoded for one observation: the frames of all its copies."""
        return self.count * self.preprocessing.n_frames

    def sample(self, obs_ids: Array) -> Array:
        """
        Choose one copy of each observation, by NumPy's global generator, as SB3 chooses the observations themselves.

        :param obs_ids: ``(batch,)``
        :return: ids of the images of the chosen copies, ``(batch, frames)``
        """
        chosen = np.random.randint(self.count, size=obs_ids.shape)  # noqa: NPY002  # checkpoints keep its state
        frames = self.preprocessing.n_frames
        ids: Array = ((obs_ids * self.count + chosen) * frames)[..., None] + np.arange(frames)
        return ids

    def image_ids(self, obs_ids: Array) -> Array:
        """:return: ids of all images of some observations, ``(n * images,)``"""
        ids: Array = (obs_ids[:, None] * self.images + np.arange(self.images)).ravel()
        return ids

    def pixels(self, image_ids: Array, store: ObservationStore, device: th.device) -> th.Tensor:
        """
        :param image_ids: ``(n,)``
        :param store: has the pixels of the observations
        :param device: where they are augmented
        :return: images as the encoder takes them, ``(n, c, H, W)``
        """
        frames = self.preprocessing.n_frames
        copies, places = np.unique(image_ids // frames, return_inverse=True)
        obs_ids = copies // self.count
        seeds = self.seeds(copies, store)

        def augment(observations: th.Tensor) -> th.Tensor:
            return th.stack([self.augmentation.repeat(x, seed) for x, seed in zip(observations, seeds, strict=True)])

        pixels = th.as_tensor(store.pixels(obs_ids), device=device)
        images = self.preprocessing.to_raw(self.preprocessing.scale_raw(pixels), augment)
        return images[th.as_tensor(places * frames + image_ids % frames, device=device)]

    def seeds(self, copies: Array, store: ObservationStore) -> list[int]:
        """
        :param copies: id of an observation times :attr:`count`, plus the number of a copy, ``(n,)``
        :param store: has the observations
        :return: a number for each copy that decides its draw, ``(n,)``; of a later observation that is stored under
            the same id it is another one
        """
        obs_ids = copies // self.count
        keys = np.stack([obs_ids, store.uses(obs_ids), copies % self.count], axis=-1).tolist()
        return [int(np.random.SeedSequence([self.seed, *key]).generate_state(1, np.uint64)[0]) for key in keys]
