"""The ``sb3-resnet`` command: its subcommands, the options of all of them, and how errors end them."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from sb3_resnet.cli import (
    best,
    card,
    check,
    doctor,
    explain,
    export,
    groups,
    plot,
    pretrain,
    probe,
    watch,
    zoo_config,
)
from sb3_resnet.cli.texts import at_home, check_picture, console_for, one_line

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut option names off where the terminal is narrow
    help="Look at sb3_resnet's runs: before, while and after they train. Exit status 1 means that something is wrong.",
)

_COMMANDS: dict[str, tuple[Callable[..., bool | None], str]] = {
    "check": (check.command, "Before a run: what is set up wrong, memory, time."),
    "groups": (groups.command, "Parameter groups of a saved model."),
    "doctor": (doctor.command, "After a run: what its logs say went wrong."),
    "explain": (explain.command, "What the agent looks at: heat maps over an episode."),
    "watch": (watch.command, "A film of an episode, and its return."),
    "export": (export.command, "ONNX of preprocessing and network, verified."),
    "plot": (plot.command, "Learning curves with confidence bands."),
    "pretrain": (pretrain.command, "Train a ResNet on frames of an environment, without rewards."),
    "best": (best.command, "After a search: the best trial as a YAML for RL-Zoo."),
    "probe": (probe.command, "What the features of a frozen ResNet show of an environment."),
    "card": (card.command, "The model card of a run, to share its model."),
    "zoo-config": (zoo_config.command, "Path of a configuration for RL-Zoo."),
}
_PICTURE = "sb3_resnet.picture"  # key of the picture's file in the context that all commands share


@app.callback()
def options(
    context: typer.Context,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="also save what is printed as a picture")] = None,
) -> None:
    """Options of all commands."""
    # The user's own modules are found, as with `python -m`, but never in place of an installed one.
    if not {"", os.getcwd()} & {*sys.path}:
        sys.path.append(os.getcwd())
    context.obj = console_for(svg)
    if svg is not None:
        svg = at_home(svg)
        try:
            check_picture(svg)
        except (ValueError, OSError) as error:
            _fail(one_line(error))
        context.meta[_PICTURE] = svg


def one_line_errors(command: Callable[..., bool | None]) -> Callable[..., None]:
    """
    Let a command end with its error in one line and exit status 1, instead of a traceback.

    :param command: takes the context, and its own arguments by name; returns whether it found something wrong
    :return: the function that typer runs; it also saves what was printed, if ``--svg`` asks for it
    """

    @functools.wraps(command)
    def run(context: typer.Context, **kwargs: Any) -> None:
        try:
            found = command(context, **{key: at_home(value) for key, value in kwargs.items()})
            if _PICTURE in context.meta:
                context.obj.save_svg(str(context.meta[_PICTURE]), title=f"sb3-resnet {context.info_name}")
        except (ValueError, TypeError, OSError, ImportError) as error:
            _fail(one_line(error))
        except Exception as error:  # of torch, SB3 or an environment
            _fail(f"{type(error).__name__}: {one_line(error)}")
        if found:
            raise typer.Exit(1)

    return run


def _fail(message: str) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(1)


for _name, (_command, _help) in _COMMANDS.items():
    app.command(_name, short_help=_help)(one_line_errors(_command))
