"""``sb3-resnet best``: the best trial of a search, as a YAML that RL-Zoo trains with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sb3_resnet.cli.extras import import_extra
from sb3_resnet.cli.texts import printable
from sb3_resnet.common.arguments import integer

_COMMAND = "python -m rl_zoo3.train --algo {algo} --env {env} --gym-packages sb3_resnet --conf-file {file}"


def command(
    context: typer.Context,
    storage: Annotated[
        str, typer.Argument(metavar="STORAGE", help="what --storage had: a journal file (.log), or a database's URL")
    ],
    study_name: Annotated[str | None, typer.Option(metavar="NAME", help="if the storage has several studies")] = None,
    trial: Annotated[int | None, typer.Option(metavar="N", help="number of another trial than the best")] = None,
    n_timesteps: Annotated[
        int | None, typer.Option("--n-timesteps", "-n", metavar="N", help="train longer than the trial did")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="write it to a new file")
    ] = None,
) -> None:
    """
    The best trial of a search, as a YAML that `rl_zoo3.train --conf-file` runs as it is.

    It has all that the section of the search had, with the values of the trial: policy_kwargs, callbacks, wrappers.
    """
    text = best(storage, study_name, trial, n_timesteps, "best.yml" if output is None else str(output))
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        with output.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise FileExistsError(f"{output} is there, and is not overwritten: write another --output") from None
    context.obj.print(str(output), highlight=False, soft_wrap=True)


def best(
    storage: str,
    study_name: str | None = None,
    trial: int | None = None,
    n_timesteps: int | None = None,
    file: str = "best.yml",
) -> str:
    """
    :param storage: a journal file, or the URL of a database
    :param study_name: name of the study; ``None``: the only one
    :param trial: number of the trial; ``None``: the best
    :param n_timesteps: environment steps of the training; ``None``: as in the trial
    :param file: name of the YAML, for the command that is written into it
    :return: the YAML
    :raises ValueError: if there is no such study or trial
    """
    import_extra("optuna", "search")
    from sb3_resnet.optim.search.results import find_trial, zoo_sections

    steps = None if n_timesteps is None else integer("--n-timesteps", n_timesteps, 1)
    study, found = find_trial(storage, study_name, trial)
    algo, sections = zoo_sections(found, steps)
    reward = f"mean reward {found.value:g}" if found.value is not None else f"state {found.state.name}"
    head = [
        f"Trial {found.number} of study {study.study_name}: {reward}",
        _COMMAND.format(algo=algo, env=next(iter(sections)), file=file),
    ]
    comments = "".join(f"# {' '.join(printable(line).split())}\n" for line in head)
    return comments + str(import_extra("yaml").safe_dump(sections, sort_keys=False, allow_unicode=True))
