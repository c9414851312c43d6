"""``sb3-resnet doctor``: what the logs and the model of a run say went wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sb3_resnet.cli.loading import load_model
from sb3_resnet.cli.options import Strict, Trust
from sb3_resnet.cli.runs import find_runs, summary
from sb3_resnet.cli.show import show_findings, show_pairs
from sb3_resnet.cli.texts import one_line
from sb3_resnet.diagnosis import Finding, history_findings, static_findings


@dataclass(frozen=True)
class Examination:
    """
    What was found in the folder of a run.

    :param facts: names and values of what is there
    :param findings: what is wrong
    """

    facts: list[tuple[str, str]]
    findings: list[Finding]


def command(
    context: typer.Context,
    run_folder: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="such as logs/dqn/PongNoFrameskip-v4_1")],
    strict: Strict = False,
    trust: Trust = False,
) -> bool:
    """
    What the logs of a run say went wrong, what it means, and what to change.

    Reads progress.csv (written where SB3's logger has "csv"; with MonitorCallback it tells more), monitor.csv and
    evaluations.npz, and looks at the model.
    """
    found = examine(run_folder, trust)
    show_pairs(context.obj, "Run", found.facts)
    return show_findings(context.obj, found.findings, strict)


def examine(folder: str | Path, trust: bool = False) -> Examination:
    """
    Read the logs and the model of one run.

    :param folder: folder of the run
    :param trust: also run code that its model holds
    :return: what was found
    :raises FileNotFoundError: if there is no such folder
    :raises ValueError: if it holds no logs, empty or broken ones, or those of several runs
    """
    runs = find_runs(folder)
    if len(runs) > 1:
        raise ValueError(f"{folder} holds several runs, give one of them: {', '.join(str(run.folder) for run in runs)}")
    (run,) = runs
    if not (run.progress or len(run.episodes) or len(run.evaluations)):
        raise ValueError(f"{folder}: the logs hold no line, so nothing could be judged; let the run train for longer")
    facts = summary(run)
    if not run.progress:
        facts.append(("log", "no progress.csv, so only rewards can be judged"))
    model: Any = None
    static: list[Finding] = []
    if run.model is not None:
        try:
            model = load_model(run.model, trust=trust, takes_dict=True)
            static = static_findings(model)
            facts.append(("model", str(run.model)))
        except (ValueError, ImportError) as error:
            facts.append(("model", f"not looked at: {one_line(error)}"))
    findings = history_findings(run.columns(), finished=True, model=model)
    # The replay buffer is loaded without its content, so its memory says nothing.
    known = {"buffer_memory", *(finding.code for finding in findings)}
    return Examination(facts, findings + [found for found in static if found.code not in known])
