"""A model as an ONNX file that takes raw observations, compared with torch in ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from torch import nn

from sb3_resnet.cache.frames import Array
from sb3_resnet.cli.extras import import_extra
from sb3_resnet.cli.network import ScoreNetwork

#: Largest tolerated difference between the scores of torch and ONNX Runtime, relative to the largest score above 1.
TOLERANCE = 1e-4
#: Names of the graph's input and output.
INPUT, OUTPUT = "observation", "scores"


@dataclass(frozen=True)
class Export:
    """
    What was written, and how close it is.

    :param path: the file
    :param shape: of the input, the batch first
    :param dtype: of the input
    :param difference: largest difference of a score over the compared observations
    :param compared: how many observations were compared
    """

    path: Path
    shape: tuple[Any, ...]
    dtype: str
    difference: float
    compared: int


def export(model: Any, path: str | Path, observations: Array, channels_last: bool = False) -> Export:
    """
    Write preprocessing and network as one graph, with any batch size, and compare it with torch.

    :param model: an SB3 model with a ResNet and discrete actions
    :param path: where to write
    :param observations: to compare with, as the model's space describes them, ``(n, C, H, W)``
    :param channels_last: let the input be ``(batch, H, W, C)``, as most environments give it, instead of the
        ``(batch, C, H, W)`` of the model's space
    :return: what was written
    :raises ValueError: if the two differ by more than :data:`TOLERANCE` says; then nothing is written
    """
    runtime = import_extra("onnxruntime")
    path = Path(path).expanduser()
    if path.suffix.lower() != ".onnx":
        raise ValueError(f"{path}: the name of the file must end with .onnx: write another --output")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder: make it first, or write another --output")
    network = ScoreNetwork(model).eval()
    wanted = _scores(network, th.as_tensor(observations, device=model.device))
    inputs = np.ascontiguousarray(np.moveaxis(observations, 1, -1)) if channels_last else observations
    program = _graph(_ChannelsLast(network) if channels_last else network, inputs[:2], model.device)
    program.model.metadata_props.update(_metadata(model, channels_last))
    content = program.model_proto.SerializeToString()
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    difference = float(np.abs(session.run([OUTPUT], {INPUT: inputs})[0] - wanted).max())
    # float32 has seven digits: with scores in the hundreds, the order of a sum alone makes more than TOLERANCE.
    limit = TOLERANCE * max(1.0, float(np.abs(wanted).max()))
    if not difference < limit:  # NaN is not, nor infinity
        raise ValueError(
            f"ONNX Runtime and torch differ by {difference:.2g} over {len(inputs)} observations, more than "
            f"{limit:.2g}: nothing was written"
        )
    path.write_bytes(content)
    shape = ("batch", *inputs.shape[1:])
    return Export(path, shape, str(inputs.dtype), difference, len(inputs))


def random_observations(model: Any, count: int) -> Array:
    """:return: noise of the model's space, ``(count, C, H, W)``"""
    space = model.observation_space
    random = np.random.default_rng(0)
    low, high = float(space.low.min()), float(space.high.max())
    if np.issubdtype(space.dtype, np.floating):
        return random.uniform(low, high, (count, *space.shape)).astype(space.dtype)
    return random.integers(int(low), int(high) + 1, (count, *space.shape), dtype=space.dtype)


class _ChannelsLast(nn.Module):
    """Takes ``(batch, H, W, C)``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, observations: th.Tensor) -> Any:
        return self.network(observations.permute(0, 3, 1, 2))


def _graph(network: nn.Module, example: Array, device: th.device) -> Any:
    """The exporter reports its progress on the terminal, and warns about what it does not use."""
    import_extra("onnx")
    import_extra("onnxscript")
    batch = th.export.Dim("batch")
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), th.no_grad():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            return th.onnx.export(
                network.eval(),
                (th.as_tensor(example, device=device),),
                dynamo=True,
                dynamic_shapes=({0: batch},),
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
        finally:
            logging.disable(disabled)


def _metadata(model: Any, channels_last: bool) -> dict[str, str]:
    return {
        "algorithm": type(model).__name__,
        "layout": "NHWC" if channels_last else "NCHW",
        "observation_space": str(model.observation_space),
        "action_space": str(model.action_space),
        "scores": "the greedy action has the highest",
    }


def _scores(network: nn.Module, observations: th.Tensor) -> Array:
    with th.no_grad():
        return np.concatenate([network(part).cpu().numpy() for part in th.split(observations, 32)])
