"""Was a finished run healthy? From its logs and its model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sb3_resnet.cli.loading import load_model, one_line
from sb3_resnet.cli.runs import find_runs, summary
from sb3_resnet.diagnosis import history_findings, static_findings
from sb3_resnet.diagnosis.findings import Finding

# Of the replay buffer, which is loaded without its content.
_NOT_OF_A_LOADED_MODEL = {"buffer_memory"}


@dataclass(frozen=True)
class Examination:
    """
    What was found in the folder of a run.

    :param facts: names and values
    :param findings: what is wrong
    """

    facts: list[tuple[str, str]]
    findings: list[Finding]


def examine(folder: str | Path, trust: bool = False) -> Examination:
    """
    :param folder: of one run
    :param trust: also run code that its model holds
    :return: what its logs and its model say
    :raises FileNotFoundError: if there is no such folder
    :raises ValueError: if it holds no logs, empty or broken ones, or those of several runs
    """
    runs = find_runs(folder)
    if len(runs) > 1:
        raise ValueError(f"{folder} holds several runs, give one of them: {', '.join(str(run.folder) for run in runs)}")
    (run,) = runs
    if not (run.progress or len(run.episodes) or len(run.evaluations)):
        raise ValueError(f"{folder}: the logs hold no line, so nothing could be judged; let the run train for longer")
    facts, findings = summary(run), history_findings(run.columns(), finished=True)
    if not run.progress:
        facts.append(("log", "no progress.csv, so only rewards can be judged"))
    if run.model is not None:
        try:
            known = {finding.code for finding in findings} | _NOT_OF_A_LOADED_MODEL
            findings += [
                found for found in static_findings(load_model(run.model, trust=trust)) if found.code not in known
            ]
            facts.append(("model", str(run.model)))
        except (ValueError, ImportError) as error:
            facts.append(("model", f"not looked at: {one_line(error)}"))
    return Examination(facts, findings)
