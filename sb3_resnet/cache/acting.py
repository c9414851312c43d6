"""Acting with the fast encoder, so that what is acted upon is encoded once."""

from __future__ import annotations

from typing import Any

import torch as th

from sb3_resnet.cache.encoder import FrozenEncoder, decode
from sb3_resnet.cache.observations import Acted, Observations


class Actor:
    """
    Encodes the observations that are acted upon, and shares the entries with the replay buffer.

    :param encoder: encodes them
    :param shared: the observations of the buffer, which stored them as the last ones, or is about to
    """

    def __init__(self, encoder: FrozenEncoder, shared: Observations) -> None:
        self.encoder = encoder
        self._shared = shared

    def act(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: raw, one an environment, ``(n_envs, C, H, W)``
        :return: what the frozen part makes of them, from the buffer's entries where it has them: a sampled batch may
            have needed them before
        """
        self.encoder.refresh()
        version = self.encoder.version
        pixels = observations.cpu().numpy().copy()
        numbers = [self._shared.store.last(env, image) for env, image in enumerate(pixels)]
        found = [self._shared.entry(number) for number in numbers]
        missing = [env for env, entry in enumerate(found) if entry is None]
        fresh = self.encoder(observations[missing]) if missing else th.empty(0)
        if self.encoder.version != version:
            return self.act(observations)  # its precision fell back: the others are of the wrong one
        for env, entry in zip(missing, fresh, strict=True):
            found[env] = entry
        # Copied before any is kept, which may take the place of another where memory is limited.
        entries = th.stack([entry.to(observations.device) for entry in found if entry is not None])
        for env in missing:
            self._shared.keep(numbers[env], entries[env])
        self._shared.acted = Acted(pixels, entries, version)
        return decode(entries, self.encoder.centre)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copied policy encodes for itself

    def __reduce__(self) -> Any:
        return (_nothing, ())


def _nothing() -> None:
    """What a pickled actor comes back as."""
