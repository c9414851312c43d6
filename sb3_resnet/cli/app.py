"""The subcommands of ``sb3-resnet``: arguments, one-line errors and exit statuses; the work is in ``tools``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sb3_resnet.cli.extras import import_extra
from sb3_resnet.cli.texts import at_home, check_picture, console_for, one_line
from sb3_resnet.common.arguments import shown

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut option names off where the terminal is narrow
    help="Look at sb3_resnet's runs: before, while and after they train. Exit status 1 means that something is wrong.",
)

Model = Annotated[Path, typer.Argument(metavar="MODEL.zip", help="a model saved by DQN, QRDQN, PPO or A2C")]
EnvId = Annotated[str, typer.Option("--env", metavar="ID", help="environment of gymnasium's registry")]
Packages = Annotated[
    list[str] | None, typer.Option("--gym-packages", metavar="NAME", help="package that registers environments; repeat")
]
Wrapper = Annotated[
    str | None, typer.Option(metavar="PATH", help="class that wraps the environment: package.module.Class")
]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or cuda")]
Trust = Annotated[bool, typer.Option("--trust", help="also run code that the file holds: only if you know who made it")]
Strict = Annotated[bool, typer.Option("--strict", help="exit status 1 for warnings too")]

_PICTURE = "sb3_resnet.picture"  # key of the file in what the contexts of a command line share


@app.callback()
def options(
    context: typer.Context,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="also save what is printed as a picture")] = None,
) -> None:
    """Options of all commands."""
    context.obj = console_for(svg)
    if svg is not None:
        svg = at_home(svg)
        try:
            check_picture(svg)
        except (ValueError, OSError) as error:
            typer.echo(f"Error: {one_line(error)}", err=True)
            raise typer.Exit(1) from None
        context.meta[_PICTURE] = svg


def one_line_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """End a command with its error in one line, and exit status 1; save what it printed only where it did its work."""

    @functools.wraps(command)
    def run(context: typer.Context, **kwargs: Any) -> None:
        ended: typer.Exit | None = None
        try:
            try:
                command(context, **{key: at_home(value) for key, value in kwargs.items()})
            except typer.Exit as error:  # findings are what a command is for
                ended = error
            if _PICTURE in context.meta:
                context.obj.save_svg(str(context.meta[_PICTURE]), title=f"sb3-resnet {context.info_name}")
        except (ValueError, TypeError, OSError, ImportError) as error:
            message = one_line(error)
        except Exception as error:  # of torch, SB3 or an environment
            message = f"{type(error).__name__}: {one_line(error)}"
        else:
            if ended is not None:
                raise ended
            return
        typer.echo(f"Error: {message}", err=True)
        raise typer.Exit(1)

    return run


@app.command(short_help="Before a run: what is set up wrong, memory, time.")
@one_line_errors
def check(
    context: typer.Context,
    env: EnvId,
    conf_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="RL-Zoo's YAML; without one, the options below and defaults")
    ] = None,
    algo: Annotated[str, typer.Option(metavar="NAME", help="name of the algorithm, as for RL-Zoo")] = "dqn",
    n_timesteps: Annotated[
        int, typer.Option("--n-timesteps", "-n", metavar="N", help="steps of the run; 0: the YAML's, else a million")
    ] = 0,
    backbone: Annotated[str | None, typer.Option(metavar="NAME", help="torchvision ResNet, such as resnet50")] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="observations of an update")] = None,
    buffer_size: Annotated[int | None, typer.Option(metavar="N", help="transitions in replay memory")] = None,
    learning_rate: Annotated[float | None, typer.Option(metavar="RATE", help="of the head")] = None,
    param: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="argument of the algorithm; repeat")
    ] = None,
    policy_kwarg: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="argument of the policy; repeat")
    ] = None,
    extractor_kwarg: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="argument of ResNetExtractor; repeat")
    ] = None,
    n_envs: Annotated[int, typer.Option(metavar="N", help="environments side by side (without a YAML)")] = 1,
    wrapper: Wrapper = None,
    gym_packages: Packages = None,
    memory: Annotated[
        float | None, typer.Option(metavar="GB", help="memory that the run may take; default: what is free now")
    ] = None,
    device: Device = "auto",
    strict: Strict = False,
    trust: Trust = False,
) -> None:
    """Before a run: build it small, try an update, and compute memory, time and what is set up wrong."""
    from sb3_resnet.cli import envs, setups
    from sb3_resnet.cli.check import check as run_check
    from sb3_resnet.cli.show import show_report
    from sb3_resnet.common.arguments import integer, number

    n_timesteps, n_envs = integer("-n", n_timesteps), integer("--n-envs", n_envs, 1)
    available = None if memory is None else int(1e9 * number("--memory", memory, above=True))

    given = {"batch_size": batch_size, "buffer_size": buffer_size, "learning_rate": learning_rate}
    arguments = setups.Arguments(
        {**_pairs("--param", param), **{key: value for key, value in given.items() if value is not None}},
        _pairs("--policy-kwarg", policy_kwarg),
        {**_pairs("--extractor-kwarg", extractor_kwarg), **({} if backbone is None else {"backbone": backbone})},
    )
    envs.import_packages(gym_packages or [])
    if conf_file is not None:
        setups.read_sections(conf_file)  # a wrong file is no finding about a run

    def build() -> setups.Setup:
        if conf_file is None:
            return setups.from_arguments(env, algo, arguments, n_timesteps, device, n_envs, wrapper)
        return setups.from_zoo(conf_file, env, algo, arguments, n_timesteps, device, trust)

    report = run_check(build, available)
    show_report(context.obj, report)
    if report.failed or (strict and report.findings):
        raise typer.Exit(1)


@app.command(short_help="Parameter groups of a saved model.")
@one_line_errors
def groups(context: typer.Context, model: Model) -> None:
    """What each optimizer group of a saved model trains, and how fast; read from its tensors alone."""
    from sb3_resnet.cli.saved_groups import saved_groups
    from sb3_resnet.cli.show import show_groups

    show_groups(context.obj, saved_groups(model))


@app.command(short_help="After a run: what its logs say went wrong.")
@one_line_errors
def doctor(
    context: typer.Context,
    run_folder: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="such as logs/dqn/PongNoFrameskip-v4_1")],
    strict: Strict = False,
    trust: Trust = False,
) -> None:
    """
    What the logs of a run say went wrong, what it means, and what to change.

    Reads progress.csv (written where SB3's logger has "csv"; with MonitorCallback it tells more), monitor.csv and
    evaluations.npz, and looks at the model.
    """
    from sb3_resnet.cli.doctor import examine
    from sb3_resnet.cli.show import show_findings, show_pairs

    found = examine(run_folder, trust)
    show_pairs(context.obj, "Run", found.facts)
    show_findings(context.obj, found.findings)
    if any(finding.severity == "error" for finding in found.findings) or (strict and found.findings):
        raise typer.Exit(1)


@app.command(short_help="What the agent looks at: heat maps over an episode.")
@one_line_errors
def explain(
    context: typer.Context,
    model: Model,
    env: EnvId,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="where sheet.png and episode.mp4 go")
    ] = Path("explain"),
    method: Annotated[
        str, typer.Option(metavar="NAME", help="gradcam: places that raise the score; saliency: pixels that change it")
    ] = "gradcam",
    layer: Annotated[
        str | None,
        typer.Option(metavar="STAGE", help="of Grad-CAM; default: the highest whose map has 5 pixels a side"),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", help="steps to play, at most one episode")] = 500,
    frames: Annotated[int, typer.Option(metavar="N", help="moments on the sheet")] = 12,
    gif: Annotated[bool, typer.Option("--gif", help="episode.gif instead of episode.mp4")] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="of the environment")] = 0,
    wrapper: Wrapper = None,
    gym_packages: Packages = None,
    device: Device = "auto",
    trust: Trust = False,
) -> None:
    """Play an episode with the greedy actions, and show where the image decides their Q-values (PPO: logits)."""
    from sb3_resnet.cli import envs, pictures
    from sb3_resnet.cli.explain import METHODS, default_layer, heat_maps, play_greedily
    from sb3_resnet.cli.loading import load_model
    from sb3_resnet.common.arguments import choice, integer
    from sb3_resnet.nn.backbones import STAGES

    # An episode may take minutes: what is wrong is said before it.
    steps, frames = integer("--steps", steps, 1), integer("--frames", frames, 1)
    choice("--method", method, METHODS)
    if layer is not None:
        choice("--layer", layer, STAGES)
    pictures.check_folder(output)
    envs.import_packages(gym_packages or [])
    agent = load_model(model, device, trust)
    layer = layer or default_layer(agent)
    with contextlib.closing(envs.env_for(agent, env, seed, wrapper)) as game:
        episode = play_greedily(agent, game, steps)
    heat = heat_maps(agent, episode.observations, episode.actions, method, layer)
    output.mkdir(parents=True, exist_ok=True)
    how = f"Grad-CAM at {layer}" if method == "gradcam" else "saliency"
    picture = pictures.sheet(episode, heat, frames, f"{env}: {how} of the greedy action's score")
    picture.save(output / "sheet.png", optimize=True)
    video = output / f"episode.{'gif' if gif else 'mp4'}"
    pictures.write_video(video, episode, heat)
    returned = f"return {episode.rewards.sum():g} in {len(heat)} steps"
    context.obj.print(f"{output / 'sheet.png'} and {video}: {returned}", highlight=False, soft_wrap=True)


@app.command(short_help="ONNX of preprocessing and network, verified.")
@one_line_errors
def export(
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
    last. The output is one score an action: Q-values (QR-DQN: their mean over quantiles), or logits for PPO and A2C.
    """
    from sb3_resnet.cli import envs, trial
    from sb3_resnet.cli import export as exporting
    from sb3_resnet.cli.loading import load_model, model_file
    from sb3_resnet.common.arguments import integer

    frames = integer("--frames", frames, 2)
    envs.import_packages(gym_packages or [])
    agent = load_model(model, trust=trust)
    if env is None:
        observations = exporting.random_observations(agent, frames)
    else:
        with contextlib.closing(envs.env_for(agent, env, 0, wrapper)) as game:
            observations = trial.random_play(game, frames)
    done = exporting.export(agent, output or model_file(model).with_suffix(".onnx"), observations, channels_last)
    context.obj.print(
        f"{done.path}: {done.dtype} {done.shape} to scores; differs from torch by at most {done.difference:.1e} over "
        f"{done.compared} {'random observations' if env is None else 'frames of ' + env}",
        highlight=False,
        soft_wrap=True,
    )


@app.command(short_help="Learning curves with confidence bands.")
@one_line_errors
def plot(
    context: typer.Context,
    run_folders: Annotated[
        list[Path], typer.Argument(metavar="RUN_FOLDER", help="of runs, or of folders with runs in them")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="picture: .png, .svg or .pdf")] = Path(
        "curves.png"
    ),
    window: Annotated[int, typer.Option(metavar="N", help="training episodes in a mean")] = 100,
    confidence: Annotated[float, typer.Option(metavar="PERCENT", help="of the band")] = 95.0,
) -> None:
    """
    Learning curves from evaluations.npz and monitor.csv.

    Runs whose folders differ in the number at the end (Pong_1, Pong_2) are one curve: their mean, and as the band its
    percentile bootstrap interval over the runs, which is too narrow for fewer than about five. For a single run the
    band is over its episodes.
    """
    from sb3_resnet.cli.plot import check_output, draw
    from sb3_resnet.cli.runs import find_runs
    from sb3_resnet.common.arguments import integer, number

    check_output(output)
    runs = {run.folder.resolve(): run for folder in run_folders for run in find_runs(folder)}
    curves = draw(output, [*runs.values()], integer("--window", window, 1), number("--confidence", confidence, 1, 99.9))
    context.obj.print(f"{output}: {len(curves)} curves of {len(runs)} runs", highlight=False, soft_wrap=True)


def _pairs(option: str, texts: list[str] | None) -> dict[str, Any]:
    """Read KEY=VALUE, the value as YAML."""
    pairs = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"{option} takes KEY=VALUE, got {shown(text)}")
        yaml = import_extra("yaml")
        try:
            pairs[key.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"{option} {shown(text)}: the value is no YAML ({one_line(error)})") from error
    return pairs
