"""How much of a label a linear readout finds in features: R² of numbers, F1 of classes, on episodes it has not seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

#: Penalties of the ridge regression that are tried, relative to the number of training rows.
PENALTIES = np.logspace(-5, 3, 17)
#: Largest magnitude of a standardised feature, as in ``FeatureStandardizer``. Without it a few images unlike all others
#: would decide over R².
CLIP = 10.0
#: Shares of the rows in the three splits: to fit, to choose the penalty, to score.
SHARES = (0.6, 0.2, 0.2)


@dataclass(frozen=True)
class Score:
    """
    How well a label can be read.

    :param value: R² or F1 on the third split; ``None`` where the label has one value only
    :param kind: ``"R2"`` for numbers, ``"F1"`` (mean over the classes) for classes
    """

    value: float | None
    kind: str

    @property
    def is_constant(self) -> bool:
        """Whether the label has only one value, so that nothing can be said."""
        return self.value is None


def split_episodes(episodes: Array, seed: int = 0) -> tuple[Array, Array, Array]:
    """
    Divide rows into three splits, whole episodes each.

    :param episodes: episode of each row, ``(rows,)``
    :param seed: of the order in which episodes are dealt out
    :return: three masks, ``(rows,)``: to fit, to choose the penalty, to score
    :raises ValueError: for fewer than three episodes
    """
    names, counts = np.unique(episodes, return_counts=True)
    if len(names) < len(SHARES):
        raise ValueError(
            f"A probe needs at least {len(SHARES)} episodes, one per split, and there are {len(names)}: "
            "play more steps, or in more environments"
        )
    order = np.random.default_rng(seed).permutation(len(names))
    rows = np.zeros(len(SHARES))
    chosen: list[list[Any]] = [[] for _ in SHARES]
    # The longest first, each to the split that lacks most of its share; none stays empty, as each begins with 0 rows.
    for index in sorted(order, key=lambda i: -counts[i]):
        lack = np.array([len(some) == 0 for some in chosen]) * 1e9 + SHARES - rows / max(rows.sum(), 1)
        split = int(lack.argmax())
        chosen[split].append(names[index])
        rows[split] += counts[index]
    fit, choose, score = (np.isin(episodes, some) for some in chosen)
    return fit, choose, score


def read_out(features: Array, labels: Mapping[str, Array], splits: tuple[Array, Array, Array]) -> dict[str, Score]:
    """
    Fit a ridge regression of every label on standardised features, and score it.

    Classes (labels of an integer type) are read by a regression on indicators, the largest wins.

    :param features: ``(rows, features)``
    :param labels: by name, ``(rows,)``: numbers as floats, classes as integers
    :param splits: of :func:`split_episodes`
    :return: the score of each label
    """
    fit, choose, score = splits
    mean, spread = features[fit].mean(axis=0), features[fit].std(axis=0)
    varies = spread > 1e-6 * max(float(spread.max(initial=0.0)), 1e-12)
    scaled = ((features[:, varies] - mean[varies]) / spread[varies]).clip(-CLIP, CLIP).astype(np.float32)
    solver = _Ridge(scaled[fit], (scaled[choose], scaled[score]))
    return {name: _score(solver, values, splits) for name, values in labels.items()}


class _Ridge:
    """Ridge regressions of many targets on the same rows: one decomposition serves all targets and penalties."""

    def __init__(self, rows: Array, others: tuple[Array, Array]) -> None:
        self._wide = rows.shape[1] > rows.shape[0]
        self._rows = rows
        gram = rows @ rows.T if self._wide else rows.T @ rows
        self._values, self._vectors = np.linalg.eigh(gram.astype(np.float64))
        # In this order nothing is larger than the rows themselves, however many features there are.
        self._others = [(other @ rows.T if self._wide else other) @ self._vectors for other in others]

    def predict(self, targets: Array) -> list[list[Array]]:
        """:return: by penalty, predictions for the two other splits, ``(rows, targets)``"""
        right = self._vectors.T @ (targets if self._wide else self._rows.T @ targets)
        found = []
        for penalty in PENALTIES * len(self._rows):
            weights = right / (np.maximum(self._values, 0.0) + penalty)[:, None]
            found.append([other @ weights for other in self._others])
        return found


def _score(solver: _Ridge, values: Array, splits: tuple[Array, Array, Array]) -> Score:
    fit, choose, score = splits
    is_class = np.issubdtype(values.dtype, np.integer) or values.dtype == bool
    kind = "F1" if is_class else "R2"
    if any(len(np.unique(values[split])) < 2 for split in splits):
        return Score(None, kind)
    if is_class:
        classes = np.unique(values[fit])
        targets = (values[fit][:, None] == classes).astype(np.float64)
    else:
        # By a power of two, which changes no score, so that no square is infinite or 0.
        values = np.ldexp(values, -np.frexp(np.abs(values).max())[1])
        targets = values[fit].astype(np.float64)[:, None]
    centre = targets.mean(axis=0)
    marks = []
    for predictions in solver.predict(targets - centre):
        pairs = zip((choose, score), predictions, strict=True)
        if is_class:
            marks.append([_macro_f1(values[split], classes[(found + centre).argmax(axis=1)]) for split, found in pairs])
        else:
            marks.append([_r2(values[split], (found + centre)[:, 0]) for split, found in pairs])
    return Score(max(marks, key=lambda mark: mark[0])[1], kind)


def _r2(truth: Array, found: Array) -> float:
    return float(1.0 - np.square(truth - found).sum() / np.square(truth - truth.mean()).sum())


def _macro_f1(truth: Array, found: Array) -> float:
    """Mean over the classes that occur of 2 hits / (predicted + present), as scikit-learn's ``f1_score`` defines it."""
    marks = []
    for name in np.union1d(truth, found):
        hits = np.sum((truth == name) & (found == name))
        marks.append(2 * hits / (np.sum(truth == name) + np.sum(found == name)))
    return float(np.mean(marks))
