"""The report of a suite: Markdown, JSON and PNG from one command."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from sb3_resnet.common.files import written_whole

from . import figures, statistics
from .arms import ARMS, LEARNING_RATE
from .games import SCORES_SOURCE, Suite, suite_of
from .statistics import KINDS, Interval, Table
from .tuning import rates_file

#: Around what the report puts into a page of the documentation, followed by the name of the suite and budget.
BEGIN, END = "<!-- report: {} -->", "<!-- end of report: {} -->"
PICTURES = ("report_iqm.png", "report_steps.png", "report_seconds.png")


def report(folder: Path, name: str, steps: int | None = None, page: Path | None = None) -> str:
    """
    Write ``report.md``, ``report.json`` and three pictures beside the results.

    :param folder: of the result files
    :param name: of the suite
    :param steps: of the runs to compare; ``None``: the most that there are
    :param page: a page that has the two markers; the text between them is replaced
    :return: the Markdown text
    :raises FileNotFoundError: if there is no result
    :raises ValueError: if nothing can be compared, or the page has no markers
    """
    suite = suite_of(name)
    table = statistics.read(folder, suite, steps)
    scores = {kind: statistics.scores(table, suite, kind) for kind in KINDS}
    iqm = {kind: statistics.interquartile_means(by_arm) for kind, by_arm in scores.items()}
    better = statistics.improvements(scores["last"])
    _draw(folder, suite, table, iqm)
    command = f"python benchmarks/atari.py report --suite {name} --budget {folder.name}"
    command += "" if steps is None else f" --steps {steps}"
    found = _as_json(suite, table, iqm, better, command)
    with written_whole(folder / "report.json") as (file,):
        file.write_text(json.dumps(found, indent=1) + "\n")
    text = _text(folder, name, table, iqm, better, command)
    with written_whole(folder / "report.md") as (file,):
        file.write_text(text.replace("PLACE/", ""))
    if page is not None:
        _into_page(page, f"{name} {folder.name}", text.replace("PLACE", os.path.relpath(folder, page.parent)))
    return text.replace("PLACE/", "")


def summary(iqm: dict[str, Interval], shown: str, unit: str) -> list[str]:
    """
    The first lines of a report.

    :param iqm: by arm
    :param shown: how many seeds, games and steps
    :param unit: of the scores
    :return: what won, by how much, with which interval, what lost, and where nothing was shown
    """
    found = statistics.verdict(iqm)
    best, beaten, rest = found["best"], found["beaten"], found["open"]

    def listed(arms: list[str]) -> str:
        return ", ".join(f"`{arm}` {iqm[arm]}" for arm in arms)

    won = f"`{best}`, IQM {iqm[best]}"
    if beaten:
        gains = ", ".join(f"{iqm[best].value - iqm[arm].value:.3f} over `{arm}`" for arm in beaten)
        first = f"**Won:** {won}, by {gains}: the 95 % intervals do not overlap."
        second = f"**Lost to it:** {listed(beaten)}."
    else:
        reason = (
            "there is one seed, so no interval" if np.isnan(iqm[best].low) else "all other intervals overlap its own"
        )
        first = f"**Nothing was shown to win.** The highest is {won}, but {reason}."
        second = "**Nothing was shown to lose** to it."
    others = [f"`{one}` over `{other}`" for one, other in found["pairs"] if one != best]
    third = f"**Nothing was shown** between `{best}` and {listed(rest)}." if rest else "No arm is left undecided."
    third += f" Shown besides: {', '.join(others)}." if others else ""
    return [first, second, third, f"**Measured:** {shown}; {unit}."]


def _text(
    folder: Path,
    name: str,
    table: Table,
    iqm: dict[str, dict[str, Interval]],
    better: dict[tuple[str, str], Interval],
    command: str,
) -> str:
    suite = suite_of(name)
    tuning = [game for game in table.games if game in map(suite.env_id, suite.tuning)]
    note = f"; {', '.join(tuning)}: games for tuning, so no evidence for games that were not seen" if tuning else ""
    *first, last = summary(iqm["last"], _shown(table), f"{suite.unit}{note}")
    # Each a line of its own, also where Markdown joins lines.
    lines = [*(f"{line}<br>" for line in first), last, ""]
    lines += [f"`{command}` made all of this from [the result files](PLACE/report.json).", ""]
    lines += _aggregate_rows(table, iqm)
    lines += ["", f"IQM: interquartile mean over {_shown(table)}; in brackets 95 % stratified bootstrap intervals", ""]
    lines[-2] += " of rliable. File: [report.json](PLACE/report.json)."
    if better:
        lines += ["| arm | probability of improvement over |  |", "|---|---|---|"]
        lines += [f"| `{arm}` | `{control}` | {found} |" for (arm, control), found in better.items()]
        lines += ["", f"{_shown(table)}. File: [report.json](PLACE/report.json).", ""]
    for picture, words in zip(PICTURES, ("IQM of each arm", "IQM by environment steps", "IQM by time"), strict=True):
        lines += [f"![{words}, {_shown(table)}](PLACE/{picture})", ""]
    lines += ["Returns of the last evaluation, raw: mean, lowest and highest of the seeds.", ""]
    lines += _game_rows(table)
    lines += ["", f"{_shown(table)}. Each figure is linked to its file, which names its command.", ""]
    lines += [_about(folder, name, table)]
    return "\n".join(lines) + "\n"


def _aggregate_rows(table: Table, iqm: dict[str, dict[str, Interval]]) -> list[str]:
    _, spent = statistics.seconds(table)
    rows = [
        f"| arm | what sees | {' | '.join(KINDS.values())} | learning rate | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for arm in sorted(table.arms, key=lambda arm: -iqm["last"][arm].value):
        rate = table.results[arm, table.games[0], table.seeds[0]]["learning_rate"]
        cells = [str(iqm[kind][arm]) for kind in KINDS]
        rows.append(f"| `{arm}` | {ARMS[arm].words} | {' | '.join(cells)} | {rate:g} | {spent[arm][-1] / 60:.0f} |")
    return rows


def _game_rows(table: Table) -> list[str]:
    rows = [f"| game | {' | '.join(f'`{arm}`' for arm in table.arms)} |", "|---|" + "---|" * len(table.arms)]
    for game in table.games:
        cells = []
        for arm in table.arms:
            found = [table.results[arm, game, seed] for seed in table.seeds]
            text = statistics.mean_and_range([result["last evaluation"] for result in found])
            cells.append(f"[{text}](PLACE/{found[0]['file']})")
        rows.append(f"| {game} | {' | '.join(cells)} |")
    return rows


def _about(folder: Path, name: str, table: Table) -> str:
    suite = suite_of(name)
    first = table.results[table.arms[0], table.games[0], table.seeds[0]]
    shared, cpus = first["settings"]["shared"], sorted({result["times"]["cpu"] for result in table.results.values()})
    evaluation = shared["evaluation"]
    rates = rates_file(folder.parent.parent, name, folder.name)
    tuned = [*json.loads(rates.read_text())["arms"]] if rates.exists() else []
    untuned = [arm for arm in table.arms if arm not in tuned]
    whose, _ = statistics.seconds(table)
    lines = [
        f"* Evaluation: {evaluation['episodes']} whole games every {evaluation['every']:,} steps, greedy with epsilon "
        f"{evaluation['epsilon']}, raw returns.",
        f"* {shared['updates per environment step']:g} updates per environment step, {shared['n_steps']}-step returns, "
        f"batch {shared['batch_size']}, {shared['optimizer']['class']}; all arms alike, as a test checks.",
        f"* Minutes are {whose}, training alone, on {', '.join(cpus)}.",
    ]
    if untuned:
        rate = f"{LEARNING_RATE:g}"
        lines.append(f"* Learning rate not tuned, {rate} as in RL-Zoo: {', '.join(f'`{arm}`' for arm in untuned)}.")
    if tuned:
        lines.append(f"* Learning rates tuned on {', '.join(suite.tuning)}: [tries](PLACE/{rates.name}).")
    missing = [arm for arm in suite.arms if arm not in table.arms]
    if missing:
        lines.append(f"* Not run: {', '.join(f'`{arm}`' for arm in missing)}.")
    if table.left_out:
        lines.append(f"* Not compared, since other arms lack the game or seed: {', '.join(table.left_out)}.")
    if name == "atari":
        lines.append(f"* Scores: {SCORES_SOURCE}.")
    return "\n".join(lines)


def _as_json(suite: Suite, table: Table, iqm: Any, better: Any, command: str) -> dict[str, Any]:
    decided = statistics.verdict(iqm["last"])
    return {
        "command": command,
        "steps": table.steps,
        "games": [*table.games],
        "seeds": [*table.seeds],
        "unit": suite.unit,
        "iqm": {kind: {arm: found.as_dict() for arm, found in by_arm.items()} for kind, by_arm in iqm.items()},
        "probability of improvement": {f"{arm} over {other}": f.as_dict() for (arm, other), f in better.items()},
        "verdict": {**decided, "pairs": [list(pair) for pair in decided["pairs"]]},
        "files": sorted(result["file"] for result in table.results.values()),
        "left out": [*table.left_out],
    }


def _draw(folder: Path, suite: Suite, table: Table, iqm: dict[str, dict[str, Interval]]) -> None:
    shown = _shown(table)
    figures.intervals(folder / PICTURES[0], {KINDS[kind]: found for kind, found in iqm.items()}, suite.unit, shown)
    steps, by_arm = statistics.curves(table, suite)
    found = statistics.iqm_curves(by_arm)
    y = f"IQM of the {suite.unit}"
    figures.curves(folder / PICTURES[1], dict.fromkeys(table.arms, steps), found, ("environment steps", y), shown)
    whose, spent = statistics.seconds(table)
    minutes = {arm: [*(spent[arm] / 60)] for arm in table.arms}
    figures.curves(folder / PICTURES[2], minutes, found, (f"minutes {whose}, training alone", y), shown)


def _shown(table: Table) -> str:
    seeds, games = len(table.seeds), len(table.games)
    numbers = f"{seeds} seed{'s' * (seeds > 1)} x {games} game{'s' * (games > 1)}"
    return f"{numbers}, {table.steps:,} steps"


def _into_page(page: Path, name: str, text: str) -> None:
    begin, end = BEGIN.format(name), END.format(name)
    before = page.read_text()
    if begin not in before or end not in before:
        raise ValueError(f"{page} lacks a line {begin} and, below it, a line {end}")
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    with written_whole(page) as (file,):
        file.write_text(pattern.sub(lambda match: f"{begin}\n{text}\n{end}", before))
