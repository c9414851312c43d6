"""``sb3-resnet pretrain``: train a ResNet on frames of an environment, without rewards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from sb3_resnet.cli import envs
from sb3_resnet.cli.loading import load_model, read_device
from sb3_resnet.cli.options import Device, EnvId, FrameChannels, FrameStack, ImageSize, Packages, Trust, Wrapper
from sb3_resnet.cli.pickles import read_pickle
from sb3_resnet.cli.show import gigabytes
from sb3_resnet.common.memory import available_bytes
from sb3_resnet.envs.atari_ram import ram_labels
from sb3_resnet.nn.cards import extractor_arguments
from sb3_resnet.nn.pretraining.checks import check_buffer
from sb3_resnet.nn.pretraining.run import Told
from sb3_resnet.nn.pretraining.settings import Settings
from sb3_resnet.pretraining import Result, pretrain

Minutes = Annotated[float | None, typer.Option(metavar="MINUTES", help="budget of time, playing included; default: 30")]
Adapter = Annotated[str | None, typer.Option(metavar="NAME", help="default: per_frame, and none for RGB images")]
Model = Annotated[Path | None, typer.Option(metavar="MODEL.zip", help="plays greedily; default: random actions")]
ReplayBuffer = Annotated[
    Path | None, typer.Option(metavar="FILE.pkl", help="frames of a finished run, instead of playing for them")
]
Labels = Annotated[
    str | None, typer.Option(metavar="PATH", help="function of the innermost environment: package.module.name")
]

_NO_LABELS = (
    "This is the score of the actions, which does not tell good weights from bad ones, so the last weights were kept. "
    "Labels of the state, --labels or --info-key, would choose the best ones"
)


def command(
    context: typer.Context,
    env: EnvId,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="WEIGHTS.safetensors", help="file to write")],
    minutes: Minutes = None,
    updates: Annotated[int | None, typer.Option(metavar="N", help="gradient updates")] = None,
    objective: Annotated[str, typer.Option(metavar="NAME", help="atc or barlow")] = "atc",
    backbone: Annotated[str, typer.Option(metavar="NAME", help="torchvision ResNet")] = "resnet18",
    last_stage: Annotated[str, typer.Option(metavar="STAGE", help="the highest stage that is trained")] = "layer2",
    adapter: Adapter = None,
    pooling: Annotated[str, typer.Option(metavar="NAME", help="of the last map")] = "spatial_softmax",
    frame_channels: FrameChannels = None,
    image_size: ImageSize = None,
    imagenet_norm: Annotated[bool, typer.Option(help="normalise with the ImageNet statistics")] = True,
    frames: Annotated[int, typer.Option(metavar="N", help="frames to train on, kept in memory")] = 50_000,
    held_out: Annotated[int, typer.Option(metavar="N", help="observations of other episodes, for the probe")] = 2400,
    n_envs: Annotated[int, typer.Option(metavar="N", help="environments side by side")] = 8,
    model: Model = None,
    epsilon: Annotated[float, typer.Option(metavar="SHARE", help="random actions beside the model's")] = 0.1,
    replay_buffer: ReplayBuffer = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="pairs per update; write 128 on a CPU")] = 512,
    neighbours: Annotated[int, typer.Option(metavar="N", help="pairs of a batch that follow each other in time")] = 1,
    shift_probability: Annotated[float, typer.Option(metavar="SHARE", help="of images shifted at random")] = 0.1,
    learning_rate: Annotated[float, typer.Option(metavar="RATE", help="of Adam")] = 1e-3,
    warmup: Annotated[int, typer.Option(metavar="N", help="updates in which the rate rises; 100 on a CPU")] = 1000,
    probe_every: Annotated[int, typer.Option(metavar="N", help="updates between two probes")] = 100,
    patience: Annotated[int, typer.Option(metavar="N", help="probes without a better score that end the run")] = 10,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="auto, float32 or bfloat16")] = "auto",
    labels: Labels = None,
    info_key: Annotated[list[str] | None, typer.Option(metavar="KEY", help="of info, as a label; repeat")] = None,
    tensorboard_log: Annotated[Path | None, typer.Option(metavar="FOLDER", help="for TensorBoard")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="of everything")] = 0,
    frame_stack: FrameStack = None,
    wrapper: Wrapper = None,
    gym_packages: Packages = None,
    device: Device = "auto",
    trust: Trust = False,
) -> None:
    """
    Train a ResNet on frames of an environment, without rewards, and write a file for weights=.

    Killed, it goes on where it was when it is started again with the same arguments.
    """
    given = {name: value for name, value in locals().items() if name in Settings.__dataclass_fields__}
    given |= {"device": read_device(device), "use_imagenet_norm": None if imagenet_norm else False}
    settings = Settings.read(given)
    envs.import_packages(gym_packages or [])
    sources: dict[str, Any] = {
        "model": None if model is None else load_model(model, device, trust, only_plays=True),
        "replay_buffer": None if replay_buffer is None else read_pickle(replay_buffer, trust),
        "labels": ram_labels if labels is None else envs.class_of("--labels", labels, "function"),
        "info_keys": info_key or (),
    }
    check_buffer(sources["replay_buffer"])
    player = sources["model"] if sources["replay_buffer"] is None else sources["replay_buffer"]
    with contextlib.closing(envs.make_played_env(env, n_envs, settings.seed, frame_stack, wrapper, player)) as game:
        _say_memory(context, settings, game.observation_space)
        with _told(context) as told:
            result = pretrain(game, output, tensorboard_log=tensorboard_log, told=told, **sources, **given)
    show(context, result)


@contextlib.contextmanager
def _told(context: typer.Context) -> Iterator[Told]:
    """A progress bar, as what ``pretrain`` tells."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, TimeElapsedColumn(), console=context.obj, transient=True) as bar:
        task = bar.add_task("Starting", total=1.0, figures="")
        yield lambda what, share, text: bar.update(task, description=what, completed=share, figures=text)


def show(context: typer.Context, result: Result) -> None:
    """
    Print what came out, and how to use it.

    :param context: has the console
    :param result: of :func:`~sb3_resnet.pretraining.pretrain`
    """
    table = Table(title=Text("Pretraining", style="bold"), title_justify="left", title_style="")
    for name in ("update", "loss", "score", "spread", "effective rank"):
        table.add_column(name, justify="right")
    best = result.card["update"]
    for entry in result.card["history"]:
        cells = (entry["loss"], entry["score"], entry["spread"], entry["effective_rank"])
        rounded = ("" if value is None else f"{value:.3g}" for value in cells)
        table.add_row(f"{entry['update']:,}", *rounded, style="bold" if entry["update"] == best else "")
    context.obj.print(table)
    told = f"Written to {result.path}: the weights of update {best:,}"
    if result.card["score"] is not None and result.card["random_score"] is not None:
        told += f", {_scores(result)}"
    arguments = {"weights": str(result.path), **extractor_arguments(result.card)}
    arguments["pooling"] = result.card["arguments"]["pooling"]  # what objective and score stood on
    used = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    context.obj.print(f"{told}.\nUse: features_extractor_kwargs=dict({used})", highlight=False)


def _scores(result: Result) -> str:
    scores = f"score {result.score:.3f}; random weights had {result.random_score:.3f}"
    if result.card.get("kept") == "last":
        return f"{scores}. {_NO_LABELS}"
    if result.score <= result.random_score:
        return f"{scores}. They show less than random weights do: train longer, or on other frames"
    return scores


def _say_memory(context: typer.Context, settings: Settings, space: Any) -> None:
    images = settings.images(space)
    needed, left = settings.frame_bytes(images), available_bytes()
    size = "x".join(map(str, images.observed_size))
    told = f"{settings.frames:,} frames of {size} and {settings.held_out:,} held-out observations take"
    rest = "" if left is None else f" of {gigabytes(left)} that are left"
    # The figure of docs/guides/pretraining.md.
    on_top = "The network's activations come on top: about 2 GB for a batch of 512 in bfloat16 at 84x84."
    context.obj.print(f"{told} {gigabytes(needed)}{rest}. {on_top}", highlight=False)
