"""``sb3-resnet groups``: what each optimizer group of a saved model trains, and how fast."""

from __future__ import annotations

import typer

from sb3_resnet.cli.options import Model
from sb3_resnet.cli.saved_groups import saved_groups
from sb3_resnet.cli.show import show_groups


def command(context: typer.Context, model: Model) -> None:
    """What each optimizer group of a saved model trains, and how fast; read from its tensors alone."""
    show_groups(context.obj, saved_groups(model))
