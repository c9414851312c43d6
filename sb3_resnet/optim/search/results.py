"""What a search has found: a trial, and its section as a YAML that RL-Zoo trains with."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from sb3_resnet.common.arguments import shown
from sb3_resnet.optim.search import sections
from sb3_resnet.optim.search.experiment import ATTRIBUTE


def find_trial(storage: str, study_name: str | None = None, number: int | None = None) -> tuple[Any, Any]:
    """
    :param storage: what RL-Zoo's ``--storage`` had: a journal file, or the URL of a database
    :param study_name: what ``--study-name`` had; ``None``: the only study there
    :param number: of the trial; ``None``: the best
    :return: the study and the trial
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if there is no such study or trial
    """
    import optuna

    from sb3_resnet.common.host_optuna import read_storage

    try:
        opened = read_storage(storage)
        names = optuna.get_all_study_names(opened)
    except optuna.exceptions.StorageInternalError as error:
        raise ValueError(f"{storage} cannot be read as a storage of Optuna: {error.__cause__ or error}") from error
    if study_name is None and len(names) != 1:
        found = f"has {len(names)} studies, write --study-name with one of {', '.join(names)}" if names else "has none"
        raise ValueError(f"{storage} must hold one study, but it {found}")
    if study_name is not None and study_name not in names:
        raise ValueError(f"{storage} has no study {shown(study_name)}, only {', '.join(names) or 'an empty list'}")
    study = optuna.load_study(study_name=study_name or names[0], storage=opened)
    trials = study.get_trials(deepcopy=False)
    if number is not None:
        if not 0 <= number < len(trials):
            raise ValueError(f"{study.study_name} has no trial {number}: it has {len(trials)}, counted from 0")
        return study, trials[number]
    if not any(trial.state.name == "COMPLETE" for trial in trials):
        states = [trial.state.name for trial in trials]
        counts = ", ".join(f"{states.count(state)} {state}" for state in sorted({*states})) or "none at all"
        errors = [trial.user_attrs["error"] for trial in trials if "error" in trial.user_attrs]
        why = f". The last error of a trial: {errors[-1]}" if errors else ""
        raise ValueError(f"{study.study_name} has no trial that was completed ({counts}){why}")
    return study, study.best_trial


def zoo_sections(trial: Any, n_timesteps: int | None = None) -> tuple[str, dict[str, Any]]:
    """
    :param trial: a trial of a search with our policy
    :param n_timesteps: environment steps of the training; ``None``: as in the trial. A phase whose time was searched
        begins at the same part of them
    :return: name of the algorithm, and the sections of a YAML that RL-Zoo trains with
    :raises ValueError: if the trial holds no section
    """
    kept = trial.user_attrs.get(ATTRIBUTE)
    if not isinstance(kept, Mapping):
        raise ValueError(
            f"Trial {trial.number} holds no section: it failed before its values were drawn, or was not a search with "
            "--gym-packages sb3_resnet, ResNetCnnPolicy and DQN, QR-DQN, PPO or A2C"
        )
    section = dict(kept["section"])
    if n_timesteps is not None:
        section["n_timesteps"] = n_timesteps
        at = {name: value for name, value in kept["values"].items() if name == "unfreeze_at"}
        before = sections.phases_of(section)
        section = sections.with_values(section, at)
        lost = len(before) - len(sections.phases_of(section))
        if lost:
            warnings.warn(
                f"The last {lost} of the {len(before)} phases would begin before the searched one, which begins later "
                f"in {n_timesteps} steps. They are left out: write their at_timestep for the longer run into the YAML",
                stacklevel=2,
            )
    return str(kept["algo"]), {str(kept["env"]): section}
