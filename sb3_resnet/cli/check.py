"""``sb3-resnet check``: build a run small before it starts, try an update, and compute what it will need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sb3_resnet.callbacks import FeatureCacheCallback
from sb3_resnet.cli import check_parts, envs, setups, trial
from sb3_resnet.cli.check_rules import gradient_findings, memory_findings, settings_findings
from sb3_resnet.cli.extras import import_extra, missing_extra
from sb3_resnet.cli.loading import extractors_of
from sb3_resnet.cli.options import Device, EnvId, Packages, Strict, Trust, Wrapper
from sb3_resnet.cli.show import gigabytes, pairs_table, show_findings, show_groups
from sb3_resnet.cli.texts import one_line
from sb3_resnet.common.arguments import integer, number, shown
from sb3_resnet.common.memory import available_bytes
from sb3_resnet.diagnosis import Finding
from sb3_resnet.optim.summary import param_group_summary

Param = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="argument of the algorithm; repeat")]
PolicyKwarg = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="argument of the policy; repeat")]
ExtractorKwarg = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="argument of the features extractor; repeat")
]
ConfFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="RL-Zoo's YAML; without one, the options below and defaults")
]
_PLAYED = 200  # random steps: enough to see how frames are stacked, and done within a second
_TWO_COLUMNS = 100  # characters


@dataclass
class Report:
    """
    What was found about a run before it starts.

    :param findings: what is wrong or doubtful
    :param model: names and values that describe the model
    :param shapes: each step of the forward pass, with the shape of its output
    :param memory: each buffer, with its size in bytes
    :param speed: each part of training, with the time that it takes, as text
    :param groups: rows of :func:`~sb3_resnet.optim.groups.param_group_summary`
    """

    findings: list[Finding] = field(default_factory=list)
    model: list[tuple[str, str]] = field(default_factory=list)
    shapes: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    memory: list[tuple[str, int]] = field(default_factory=list)
    speed: list[tuple[str, str]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)


def command(
    context: typer.Context,
    env: EnvId,
    conf_file: ConfFile = None,
    algo: Annotated[str, typer.Option(metavar="NAME", help="name of the algorithm, as for RL-Zoo")] = "dqn",
    n_timesteps: Annotated[
        int, typer.Option("--n-timesteps", "-n", metavar="N", help="steps of the run; 0: the YAML's, else a million")
    ] = 0,
    backbone: Annotated[str | None, typer.Option(metavar="NAME", help="torchvision ResNet, such as resnet50")] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="observations of an update")] = None,
    buffer_size: Annotated[int | None, typer.Option(metavar="N", help="transitions in replay memory")] = None,
    learning_rate: Annotated[float | None, typer.Option(metavar="RATE", help="of the head")] = None,
    param: Param = None,
    policy_kwarg: PolicyKwarg = None,
    extractor_kwarg: ExtractorKwarg = None,
    n_envs: Annotated[int, typer.Option(metavar="N", help="environments side by side (without a YAML)")] = 1,
    wrapper: Wrapper = None,
    gym_packages: Packages = None,
    memory: Annotated[
        float | None, typer.Option(metavar="GB", help="memory that the run may take; default: what is free now")
    ] = None,
    device: Device = "auto",
    strict: Strict = False,
    trust: Trust = False,
) -> bool:
    """Before a run: build it small, try an update, and compute memory, time and what is set up wrong."""
    n_timesteps, n_envs = integer("-n", n_timesteps), integer("--n-envs", n_envs, 1)
    available = None if memory is None else int(1e9 * number("--memory", memory, above=True))
    given = {"batch_size": batch_size, "buffer_size": buffer_size, "learning_rate": learning_rate}
    arguments = setups.Arguments(
        {**_pairs("--param", param), **{key: value for key, value in given.items() if value is not None}},
        _pairs("--policy-kwarg", policy_kwarg),
        {**_pairs("--extractor-kwarg", extractor_kwarg), **({} if backbone is None else {"backbone": backbone})},
    )
    envs.import_packages(gym_packages or [])
    if conf_file is None:
        build = partial(setups.from_arguments, env, algo, arguments, n_timesteps, device, n_envs, wrapper)
    else:
        setups.read_sections(conf_file)  # a file that cannot be read is no finding about a run
        build = partial(setups.from_zoo, conf_file, env, algo, arguments, n_timesteps, device, trust)
    return show_report(context.obj, check(build, available), strict)


def check(build: Callable[[], setups.Setup], available: int | None = None) -> Report:
    """
    Examine a run before it starts. The full replay buffer is never allocated.

    :param build: builds the model that would be trained
    :param available: bytes of memory that the run may take; ``None``: what is free now
    :return: the report; a model that cannot be built is a finding too
    """
    report = Report()
    try:
        setup = build()
        extractors_of(setup.model)
    except Exception as error:  # any error of environment, RL-Zoo, policy or algorithm would stop the run
        report.findings.append(Finding("setup", one_line(error), "", missing_extra(error), "error"))
        return report
    available = available_bytes() if available is None else available
    try:
        _inspect(report, setup, available)
    except Exception as error:  # of a forward or backward pass, such as too little GPU memory for the batch
        report.findings.append(Finding("trial", f"A trial update failed: {one_line(error)}", "", "", "error"))
    finally:
        setup.model.get_env().close()
    return report


def show_report(console: Console, report: Report, strict: bool) -> bool:
    """
    Print what was found, findings last; tables stand side by side where there is room.

    :param console: where to print
    :param report: what was found
    :param strict: whether warnings are as bad as errors
    :return: whether the command fails
    """
    memory = [(name, gigabytes(count)) for name, count in report.memory]
    shapes = [(name, str(shape)) for name, shape in report.shapes]
    parts = {"Model": report.model, "Memory": memory, "Shapes of a batch": shapes, "Speed, measured": report.speed}
    tables = [pairs_table(title, rows) for title, rows in parts.items() if rows]
    if len(tables) == len(parts) and console.width >= _TWO_COLUMNS:
        grid = Table.grid(padding=(0, 4))
        grid.add_row(tables[0], tables[2])
        grid.add_row(tables[1], tables[3])
        tables = [grid]
    for table in tables:
        console.print(table)
    if report.groups:
        show_groups(console, report.groups)
    return show_findings(console, report.findings, strict)


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


def _inspect(report: Report, setup: setups.Setup, available: int | None) -> None:
    model = setup.model
    extractors = extractors_of(model)
    report.model = check_parts.model_rows(setup, extractors)
    report.groups = param_group_summary(model, show=False)
    report.findings += settings_findings(setup)
    played, env_step = trial.play(model, max(2, _PLAYED // model.n_envs))
    report.memory = check_parts.memory_rows(setup, extractors, played, available)
    report.findings += memory_findings(setup, dict(report.memory))
    report.shapes = check_parts.shape_rows(model, extractors, played)
    report.model += check_parts.precision_rows(model, extractors, played)
    cache = setup.callback(FeatureCacheCallback)
    speed = trial.measure(model, extractors, played, env_step, cache)
    if cache is not None and speed.cache_refusal is not None:
        seen = f"FeatureCacheCallback: {speed.cache_refusal}."
        report.findings.append(Finding("feature_cache", seen, "Training would end at its start.", "", "error"))
    report.findings += gradient_findings(model)
    report.speed = check_parts.speed_rows(speed, setup.total_timesteps)
    told = "frozen with random weights"  # there is a finding about it already
    report.findings += [Finding("warned", text, "", "") for text in setup.warnings if told not in text]
