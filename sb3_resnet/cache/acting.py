"""Acting with the fast encoder, so that what is acted upon is encoded once."""

from __future__ import annotations

import torch as th

from sb3_resnet.cache.batch import EncodedBatch
from sb3_resnet.cache.observations import Acted, Observations
from sb3_resnet.nn.encoder import FrozenEncoder


class CachedEncoding:
    """
    Encodes the observations that are acted upon, and shares the entries with the replay buffer.

    :param encoder: encodes them
    :param shared: the observations of the buffer, which stored them as the last ones, or is about to
    """

    def __init__(self, encoder: FrozenEncoder, shared: Observations) -> None:
        self._encoder = encoder
        self._shared = shared

    def encode(self, observations: th.Tensor) -> EncodedBatch | None:
        """
        :param observations: raw, one per environment, ``(n_envs, C, H, W)``
        :return: what the frozen stages make of them, from the buffer's entries where it has them: a sampled batch may
            have needed them before; ``None`` where no stage of the trunk is frozen
        """
        if not self._encoder.can_gain:
            return None
        self._encoder.refresh()
        version = self._encoder.version
        pixels = observations.cpu().numpy().copy()
        obs_ids = [self._shared.store.last(env, image) for env, image in enumerate(pixels)]
        found = [self._shared.entry(obs_id) for obs_id in obs_ids]
        missing = [env for env, entry in enumerate(found) if entry is None]
        fresh = self._encoder(observations[missing]) if missing else th.empty(0)
        if self._encoder.version != version:
            return self.encode(observations)  # its precision fell back: the others are of the wrong one
        for env, entry in zip(missing, fresh, strict=True):
            found[env] = entry
        # Copied before any is kept, which may take the place of another where memory is limited.
        entries = th.stack([entry.to(observations.device) for entry in found if entry is not None])
        for env in missing:
            self._shared.keep(obs_ids[env], entries[env])
        self._shared.acted = Acted(pixels, entries, version)
        return EncodedBatch(entries, self._encoder.centre)
