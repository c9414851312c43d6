"""Notice features that have become the same for all observations."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_SAMPLED = 512  # observations
#: Smallest spread over observations, as a share of that of the random weights.
MIN_SPREAD = 0.01
#: Smallest spread of the random weights themselves; rounding alone makes less.
SMALLEST = 1e-6
#: Smallest effective rank; all features tell the same where it is 1.
MIN_RANK = 1.5


class CollapseError(ValueError):
    """Features do not tell observations apart any more."""


def spread_and_rank(features: NDArray[Any]) -> tuple[float, float]:
    """
    :param features: of observations all over, ``(n, d)``
    :return: spread, which is the root mean square of their standard deviations over observations; and effective rank,
        which is the exponential of the entropy of the normalised singular values (Roy and Vetterli 2007)
    """
    chosen = features[:: -(-len(features) // _SAMPLED)].astype(np.float64)
    if not np.isfinite(chosen).all():
        return 0.0, 0.0
    centred = chosen - chosen.mean(axis=0)
    spread = float(np.sqrt(np.square(centred).mean()))
    values = np.linalg.svd(centred, compute_uv=False)
    shares = values / max(float(values.sum()), 1e-300)
    shares = shares[shares > 0]
    return spread, float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def refuse_collapse(spread: float, rank: float, update: int, at_first: float) -> None:
    """
    :param spread: of :func:`spread_and_rank`
    :param rank: likewise
    :param update: updates done so far
    :param at_first: spread of the random weights
    :raises CollapseError: if the features have collapsed
    """
    smallest = max(SMALLEST, MIN_SPREAD * at_first) if update else SMALLEST
    if spread >= smallest and rank >= MIN_RANK:
        return
    advice = "write a smaller learning_rate, a larger batch_size, or another objective"
    if update == 0:
        advice = "the frames show next to nothing that changes: look at them, or play with model="
    raise CollapseError(
        f"The features have collapsed at update {update}: they are nearly the same for all held-out observations "
        f"(spread {spread:.2g}, at least {smallest:.2g}; effective rank {rank:.2f}, at least {MIN_RANK:g}). No weights "
        f"are written. What helps: {advice}."
    )
