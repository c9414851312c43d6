"""Arguments that several commands of ``sb3-resnet`` take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[Path, typer.Argument(metavar="MODEL.zip", help="a model saved by DQN, QRDQN, PPO or A2C")]
EnvId = Annotated[str, typer.Option("--env", metavar="ID", help="environment of gymnasium's registry")]
Packages = Annotated[
    list[str] | None, typer.Option("--gym-packages", metavar="NAME", help="package that registers environments; repeat")
]
Wrapper = Annotated[
    str | None, typer.Option(metavar="PATH", help="class that wraps the environment: package.module.Class")
]
FrameChannels = Annotated[int | None, typer.Option(metavar="N", help="write 1 for three stacked grey frames")]
ImageSize = Annotated[int | None, typer.Option(metavar="PIXELS", help="resize to this")]
FrameStack = Annotated[
    int | None,
    typer.Option(metavar="N", help="frames of an observation; default: the model's, else 4 for Atari, 1 for others"),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or cuda")]
Trust = Annotated[bool, typer.Option("--trust", help="also run code that the file holds: only if you know who made it")]
Strict = Annotated[bool, typer.Option("--strict", help="exit status 1 for warnings too")]
