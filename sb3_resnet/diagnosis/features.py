"""Features of many observations at several depths in one pass, each image once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray

from sb3_resnet.common.unique_rows import unique_rows
from sb3_resnet.extractor import ResNetExtractor
from sb3_resnet.nn.pooling import Pooling

Array = NDArray[Any]

_BATCH = 64


@th.inference_mode()
def features_at(
    extractor: ResNetExtractor,
    observations: Array,
    ends: Sequence[tuple[str, str]],
    report: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[str, str, Array, float]]:
    """
    :param extractor: in eval mode, without a projection
    :param observations: ``(rows, C, H, W)``
    :param ends: stages, and how to pool their maps
    :param report: called with the observations done
    :return: of each end: stage, pooling, features ``(rows, n)``, and images per second up to there
    """
    images = np.ascontiguousarray(extractor.preprocessing.as_images(th.as_tensor(observations)).numpy())
    # Stacks share frames, and each is encoded once.
    first, which = unique_rows(images.reshape(len(images), -1))
    device = extractor.input_mean.device
    found: dict[tuple[str, str], list[Array]] = {end: [] for end in ends}
    seconds = {stage: 0.0 for stage, _ in ends}
    for start in range(0, len(first), _BATCH):
        batch = th.as_tensor(images[first[start : start + _BATCH]], device=device)
        began, spent = _now(device), 0.0
        x = extractor.preprocessing.unit_images(batch)
        for stage in extractor.stages:
            x = extractor.run_stages(x, [stage])
            spent += _now(device) - began
            if stage in seconds:
                seconds[stage] += spent
                for pooling in (pooling for name, pooling in ends if name == stage):
                    found[stage, pooling].append(Pooling(pooling)(x).cpu().numpy())
            began = _now(device)
        report((start + len(batch)) * len(observations) // len(first))
    for (stage, pooling), parts in found.items():
        features = np.concatenate(parts)[which].reshape(len(observations), -1)
        yield stage, pooling, features, len(first) / seconds[stage]


def _now(device: th.device) -> float:
    """The clock, when the device is done with all it was given: a GPU only takes notes of it."""
    if device.type == "cuda":
        th.cuda.synchronize(device)
    return time.perf_counter()
