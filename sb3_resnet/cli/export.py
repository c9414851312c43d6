"""``sb3-resnet export``: a model as an ONNX file that takes raw observations, compared with torch."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch as th
import typer
from torch import nn
from torchvision.ops import Permute

from sb3_resnet.cache.frames import Array
from sb3_resnet.cli import envs, trial
from sb3_resnet.cli.extras import import_extra
from sb3_resnet.cli.loading import extractor_of, load_model, model_file
from sb3_resnet.cli.network import ScoreNetwork
from sb3_resnet.cli.options import Model, Packages, Trust, Wrapper
from sb3_resnet.common.arguments import integer

#: Largest tolerated difference between the scores of torch and ONNX Runtime, relative to the largest score above 1.
TOLERANCE = 1e-4
#: Names of the graph's input and output.
INPUT, OUTPUT = "observation", "scores"


@dataclass(frozen=True)
class Export:
    """
    The file that was written, and how far its scores are from torch's.

    :param path: the file
    :param shape: shape of the input, the batch first
    :param dtype: dtype of the input
    :param difference: largest difference between two scores over the compared observations
    :param compared: number of observations that were compared
    :param frozen_dtype: precision of the model's frozen stages; those of the file compute in float32
    :param rounding: largest difference between torch's float32 scores and those that the model acts by; 0 in float32
    """

    path: Path
    shape: tuple[Any, ...]
    dtype: str
    difference: float
    compared: int
    frozen_dtype: str
    rounding: float


def command(
    context: typer.Context,
    model: Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.onnx", help="default: beside the model")
    ] = None,
    env: Annotated[
        str | None, typer.Option(metavar="ID", help="compare over frames of this environment; default: over noise")
    ] = None,
    frames: Annotated[int, typer.Option(metavar="N", help="observations to compare over")] = 100,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="input (batch, H, W, C) instead of (batch, C, H, W)")
    ] = False,
    wrapper: Wrapper = None,
    gym_packages: Packages = None,
    trust: Trust = False,
) -> None:
    """
    Write preprocessing and network as ONNX that takes raw observations (uint8), and compare it with torch.

    Without --channels-last the input is as in the model's observation space: channels first, frames stacked, the newest
    last. The output is one score per action: Q-values (QR-DQN: their mean over quantiles), or logits for PPO and A2C.
    """
    frames = integer("--frames", frames, 2)
    envs.import_packages(gym_packages or [])
    agent = load_model(model, trust=trust)
    if env is None:
        observations = random_observations(agent, frames)
    else:
        with contextlib.closing(envs.env_for(agent, env, 0, wrapper)) as game:
            observations = trial.random_play(game, frames)
    done = export(agent, output or model_file(model).with_suffix(".onnx"), observations, channels_last)
    exact = "" if done.frozen_dtype == "float32" else f", from the model in {done.frozen_dtype} by {done.rounding:.1e}"
    context.obj.print(
        f"{done.path}: {done.dtype} {done.shape} to scores; differs from torch by at most {done.difference:.1e}{exact} "
        f"over {done.compared} {'random observations' if env is None else 'frames of ' + env}",
        highlight=False,
        soft_wrap=True,
    )


def export(model: Any, path: str | Path, observations: Array, channels_last: bool = False) -> Export:
    """
    Write preprocessing and network as one graph, with any batch size, and compare it with torch.

    :param model: an SB3 model with a ResNet and discrete actions
    :param path: file to write
    :param observations: observations of the model's space to compare the scores of, ``(n, C, H, W)``
    :param channels_last: let the input be ``(batch, H, W, C)``, as most environments give it, instead of the
        ``(batch, C, H, W)`` of the model's space
    :return: what was written
    :raises FileNotFoundError: if the folder of the file does not exist
    :raises ValueError: if scores differ by more than :data:`TOLERANCE` allows; then nothing is written
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
    program = _graph(
        nn.Sequential(Permute([0, 3, 1, 2]), network) if channels_last else network, inputs[:2], model.device
    )
    program.model.metadata_props.update(_metadata(model, channels_last))
    content = program.model_proto.SerializeToString()
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    difference = float(np.abs(session.run([OUTPUT], {INPUT: inputs})[0] - wanted).max())
    # float32 has seven digits: with scores in the hundreds, another order of summation alone exceeds TOLERANCE.
    limit = TOLERANCE * max(1.0, float(np.abs(wanted).max()))
    if not difference < limit:  # also for NaN
        raise ValueError(
            f"ONNX Runtime and torch differ by {difference:.2g} over {len(inputs)} observations, more than "
            f"{limit:.2g}: nothing was written"
        )
    path.write_bytes(content)
    shape = ("batch", *inputs.shape[1:])
    frozen_dtype = extractor_of(model).frozen_dtype
    rounding = 0.0 if frozen_dtype == "float32" else network.difference(observations)
    return Export(path, shape, str(inputs.dtype), difference, len(inputs), frozen_dtype, rounding)


def random_observations(model: Any, count: int) -> Array:
    """
    :param model: an SB3 model of images
    :param count: number of observations
    :return: random observations of the model's space, ``(count, C, H, W)``
    """
    space = model.observation_space
    random = np.random.default_rng(0)
    low, high = float(space.low.min()), float(space.high.max())
    if np.issubdtype(space.dtype, np.floating):
        if not np.isfinite((low, high)).all():
            return random.normal(size=(count, *space.shape)).astype(space.dtype)
        return random.uniform(low, high, (count, *space.shape)).astype(space.dtype)
    return random.integers(int(low), int(high) + 1, (count, *space.shape), dtype=space.dtype)


def _graph(network: nn.Module, example: Array, device: th.device) -> Any:
    """Export quietly: the exporter reports its progress on the terminal, and warns about parts that it does not use."""
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
