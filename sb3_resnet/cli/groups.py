"""``sb3-resnet groups``: what each optimizer group of a saved model trains, and how fast."""

from __future__ import annotations

import typer

from sb3_resnet.cli.loading import load_model
from sb3_resnet.cli.options import Model
from sb3_resnet.cli.show import show_groups
from sb3_resnet.optim.summary import param_group_summary


def command(context: typer.Context, model: Model) -> None:
    """What each optimizer group of a saved model trains, and how fast."""
    show_groups(context.obj, param_group_summary(load_model(model), show=False))
