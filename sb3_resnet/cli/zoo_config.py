"""``sb3-resnet zoo-config``: where the configurations for RL-Zoo lie that come with the package."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer

#: In a wheel, and in a clone of the repository or an editable install, which holds no copy of its own.
PLACES = (Path(__file__).parents[1] / "zoo_configs", Path(__file__).parents[2] / "zoo_configs")


def command(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="of a configuration, such as dqn")] = None,
    show: Annotated[bool, typer.Option("--show", help="print the text instead of the path")] = False,
) -> None:
    """
    Path of a configuration for RL-Zoo, or the names of all.

    The path is for RL-Zoo's command line: --conf-file "$(sb3-resnet zoo-config dqn)".
    """
    files = configurations()
    if name is None:
        typer.echo("\n".join(f"{stem}: {file}" for stem, file in files.items()))
        return
    path = files.get(name.removesuffix(".yml"))
    if path is None:
        close = get_close_matches(name, files, 1)
        meant = f", did you mean {close[0]!r}?" if close else ":"
        raise ValueError(f"There is no configuration {name!r}{meant} write one of {', '.join(files)}")
    typer.echo(path.read_text(encoding="utf-8") if show else path, nl=not show)


def configurations() -> dict[str, Path]:
    """
    :return: the configurations by name
    :raises FileNotFoundError: if none were installed
    """
    for place in PLACES:
        files = {path.stem: path for path in sorted(place.glob("*.yml"))}
        if files:
            return files
    raise FileNotFoundError(f"{PLACES[0]} holds no configurations: install sb3_resnet again")
