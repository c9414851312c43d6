"""``sb3-resnet probe``: which depth, pooling, weights and adapter show the state of an environment."""

from __future__ import annotations

import contextlib
import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from sb3_resnet.cli import envs
from sb3_resnet.cli.loading import load_model, read_device
from sb3_resnet.cli.options import Device, EnvId, FrameChannels, FrameStack, ImageSize, Packages, Trust, Wrapper
from sb3_resnet.cli.plot import refuse_bad_picture
from sb3_resnet.cli.probe_plot import draw, means_of
from sb3_resnet.common.arguments import integer, number
from sb3_resnet.envs.atari_ram import ram_labels
from sb3_resnet.probing import Row, check_probe, probe, record

Weights = Annotated[
    list[str] | None, typer.Option(metavar="NAME|FILE", help="random, pretrained, or a weights file; repeat")
]
LastStage = Annotated[list[str] | None, typer.Option(metavar="STAGE", help="where the trunk is cut; repeat")]
Model = Annotated[Path | None, typer.Option(metavar="MODEL.zip", help="plays greedily; default: random actions")]
Labels = Annotated[
    str | None, typer.Option(metavar="PATH", help="function of the innermost environment: package.module.name")
]

_WORST = 3  # labels that the table names


def command(
    context: typer.Context,
    env: EnvId,
    weights: Weights = None,
    last_stage: LastStage = None,
    pooling: Annotated[list[str] | None, typer.Option(metavar="NAME", help="of the last map; repeat")] = None,
    adapter: Annotated[list[str] | None, typer.Option(metavar="NAME", help="how frames are put in; repeat")] = None,
    frame_channels: FrameChannels = None,
    image_size: ImageSize = None,
    backbone: Annotated[str, typer.Option(metavar="NAME", help="torchvision ResNet")] = "resnet18",
    steps: Annotated[int, typer.Option(metavar="N", help="observations")] = 2400,
    n_envs: Annotated[int, typer.Option(metavar="N", help="environments; each begins an episode of its own")] = 8,
    model: Model = None,
    epsilon: Annotated[float, typer.Option(metavar="SHARE", help="random actions beside the model's")] = 0.1,
    labels: Labels = None,
    info_key: Annotated[list[str] | None, typer.Option(metavar="KEY", help="of info, as a label; repeat")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE.csv", help="all scores")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="picture of all scores: .png, .svg or .pdf")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="of environment, actions, weights and splits")] = 0,
    frame_stack: FrameStack = None,
    wrapper: Wrapper = None,
    gym_packages: Packages = None,
    device: Device = "cpu",
    trust: Trust = False,
) -> None:
    """
    Play an environment, and read what is known about its state from the features of each combination.

    The state of an Atari game is its annotated memory. Scores are of episodes that the readout has not seen.
    """
    device = read_device(device)
    steps = integer("--steps", steps, 1)
    epsilon = number("--epsilon", epsilon, 0.0, 1.0)
    if output is not None:
        prepare_table(output)
    if plot is not None:
        refuse_bad_picture(plot, "--plot")
    envs.import_packages(gym_packages or [])
    agent = None if model is None else load_model(model, device, trust, only_plays=True)
    reads = ram_labels if labels is None else envs.class_of("--labels", labels, "function")
    given = {"weights": weights, "last_stage": last_stage, "pooling": pooling, "adapter": adapter}
    chosen: dict[str, Any] = {name: values for name, values in given.items() if values}
    chosen |= {"backbone": backbone, "frame_channels": frame_channels, "image_size": image_size}
    with Progress(console=context.obj, transient=True) as bar:
        with contextlib.closing(envs.make_played_env(env, n_envs, seed, frame_stack, wrapper, agent)) as game:
            check_probe(game, **chosen)
            recording = record(game, steps, seed, agent, epsilon, reads, info_key or (), progress=_told(bar, "Playing"))
        rows = probe(recording, **chosen, seed=seed, device=device, progress=_told(bar, "Encoding"))
    show(context, rows)
    if output is not None:
        write(output, rows)
    if plot is not None:
        draw(plot, rows)


def _told(bar: Progress, what: str) -> Callable[[int, int], None]:
    """:return: moves a line of its own of a progress bar"""
    task = bar.add_task(what)
    return lambda done, total: bar.update(task, completed=done, total=total)


def show(context: typer.Context, rows: Sequence[Row]) -> None:
    """
    Print a table, the best combination first.

    :param context: has the console
    :param rows: of :func:`~sb3_resnet.probing.probe`
    """
    table = Table(title=Text("Readout", style="bold"), title_justify="left", title_style="")
    for name in ("weights", "last_stage", "pooling", "adapter"):
        table.add_column(name, overflow="fold")
    means = means_of(rows)
    kind = rows[0].scores["action"].kind if "action" in rows[0].scores else "F1"
    for name in ("features", "images/s", *means, f"action {kind}"):
        table.add_column(name, justify="right")
    table.add_column("hardest labels", overflow="fold")
    for line, row in enumerate(rows):
        scores = {name: score.value for name, score in row.scores.items() if score.value is not None}
        rare = {"action", *(["reward"] if "reward" in row.scores and row.scores["reward"].kind == "F1" else [])}
        own = sorted((value, name) for name, value in scores.items() if name not in rare)
        hardest = ", ".join(f"{name} {value:.2f}" for value, name in own[:_WORST])
        cells = [row.weights, row.last_stage, row.pooling, row.adapter, f"{row.features:,}"]
        rounded = [_text(values[line]) for values in means.values()]
        cells += [f"{row.images_per_second:,.0f}", *rounded, _text(scores.get("action"))]
        table.add_row(*map(Text, (*cells, hardest)))
    context.obj.print(table)
    constant = sorted(name for name, score in rows[0].scores.items() if score.is_constant)
    if constant:
        context.obj.print(f"Not scored, since they have one value in a split: {', '.join(constant)}", highlight=False)


def prepare_table(path: Path) -> None:
    """
    Find before anything is played whether a table can be written, and make its folder.

    :param path: of the file to be written
    :raises ValueError: for another ending, and for a folder
    :raises OSError: if it cannot be written there
    """
    if path.suffix != ".csv":
        raise ValueError(f"-o {path}: the name must end with .csv")
    if path.is_dir():
        raise ValueError(f"-o {path} is a folder: write the name of a file, such as {path / 'probe.csv'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    existed = path.exists()
    path.open("a").close()
    if not existed:
        path.unlink()


def write(path: Path, rows: Sequence[Row]) -> None:
    """
    Write all scores as CSV.

    :param path: the file
    :param rows: of :func:`~sb3_resnet.probing.probe`
    """
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        names = [*rows[0].scores]
        kinds = [rows[0].scores[name].kind for name in names]
        head = ["weights", "last_stage", "pooling", "adapter", "features", "images_per_second", "mean_R2", "mean_F1"]
        writer.writerow([*head, *(f"{name} {kind}" for name, kind in zip(names, kinds, strict=True))])
        for row in rows:
            values = [row.scores[name].value for name in names]
            cells = (row.weights, row.last_stage, row.pooling, row.adapter, row.features)
            means = ("" if math.isnan(mean) else f"{mean:.4f}" for mean in (row.mean, row.mean_f1))
            rounded = (f"{row.images_per_second:.1f}", *means)
            writer.writerow([*cells, *rounded, *("" if value is None else f"{value:.4f}" for value in values)])


def _text(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3f}"
