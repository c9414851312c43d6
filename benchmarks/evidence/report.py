"""The report of a suite: Markdown, JSON and PNG from one command."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sb3_resnet.common.files import written_whole

from . import figures, statistics
from . import table as tables
from .arms import ARMS, LEARNING_RATE
from .games import SCORES_SOURCE, Suite, suite_of
from .headline import Compared, summary
from .statistics import Interval
from .table import KINDS, Table
from .tuning import rates_file

#: Around what the report puts into a page of the documentation, followed by the name of the suite and budget.
BEGIN, END = "<!-- report: {} -->", "<!-- end of report: {} -->"
_ROOT = Path(__file__).resolve().parent.parent.parent
PICTURES = ("report_iqm.png", "report_steps.png", "report_seconds.png")


def report(
    folder: Path,
    name: str,
    steps: int | None = None,
    page: Path | None = None,
    arms: Sequence[str] | None = None,
    games: Sequence[str] | None = None,
    kind: str = "last",
) -> str:
    """
    Write ``report.md``, ``report.json`` and three pictures beside the results.

    :param folder: of the result files
    :param name: of the suite
    :param steps: of the runs to compare; ``None``: those of most results
    :param page: a page that has the two markers; the text between them is replaced
    :param arms: to compare; ``None``: those that have results enough
    :param games: to compare; ``None``: those of the suite
    :param kind: of the scores that decide: one of :data:`~evidence.table.KINDS`
    :return: the Markdown text
    :raises FileNotFoundError: if there is no result
    :raises ValueError: if nothing can be compared, or the page has no markers
    """
    suite = suite_of(name)
    if page is not None:
        _check_page(page, f"{name} {folder.name}")
    table = tables.read(folder, suite, steps, arms, games)
    scores = {kind: tables.scores(table, suite, kind) for kind in KINDS}
    iqm = {kind: statistics.interquartile_means(by_arm) for kind, by_arm in scores.items()}
    better = statistics.improvements(scores[kind])
    gains, chances = statistics.differences(scores[kind]), statistics.chances(scores[kind])
    _draw(folder, suite, table, iqm)
    command = f"python benchmarks/atari.py report --suite {name} --budget {folder.name}"
    command += "" if steps is None else f" --steps {steps}"
    for option, values in (("arms", arms), ("games", games)):
        command += f" --{option} {' '.join(values)}" if values else ""
    command += "" if kind == "last" else f" --score {kind}"
    place = folder.resolve().parent.parent
    if _ROOT in place.parents and place != _ROOT / "benchmarks" / "results":
        command += f" --results {place.relative_to(_ROOT)}"
    compared = Compared(iqm, gains, chances, better, kind)
    found = _as_json(suite, table, compared, command)
    with written_whole(folder / "report.json") as (file,):
        file.write_text(json.dumps(found, indent=1) + "\n")
    text = _text(folder, name, table, compared, command)
    with written_whole(folder / "report.md") as (file,):
        file.write_text(text.replace("PLACE/", ""))
    if page is not None:
        _into_page(page, f"{name} {folder.name}", text.replace("PLACE", os.path.relpath(folder, page.parent)))
    return text.replace("PLACE/", "")


def _text(
    folder: Path,
    name: str,
    table: Table,
    compared: Compared,
    command: str,
) -> str:
    suite = suite_of(name)
    tuning = [game for game in table.games if game in map(suite.env_id, suite.tuning)]
    note = f"; {', '.join(tuning)}: games for tuning, so no evidence for games that were not seen" if tuning else ""
    if "nature" in table.arms and "nature_head" not in table.arms:
        note += "; `nature_head` is not among them, so what sees and the head are not told apart"
    decides = not compared.chances or statistics.can_decide(len(table.seeds), len(table.games), len(compared.chances))
    *first, last = summary(compared, _shown(table), f"{suite.unit}{note}", decides)
    # Each a line of its own, also where Markdown joins lines.
    lines = [*(f"{line}<br>" for line in first), last, ""]
    lines += [f"`{command}` made all of this from [the result files](PLACE/report.json).", ""]
    lines += _aggregate_rows(table, compared)
    lines += ["", f"IQM: interquartile mean over {_shown(table)}; in brackets 95 % stratified bootstrap intervals", ""]
    lines[-2] += (
        " of rliable. An arm won or lost where these do not overlap, and where chance makes such a difference with a "
        f"probability below {statistics.CHANCE:g}, by a permutation test within each game that counts how many pairs "
        "were tested. File: [report.json](PLACE/report.json)."
    )
    if compared.better:
        lines += ["| arm | probability of improvement over |  |", "|---|---|---|"]
        lines += [f"| `{arm}` | `{control}` | {found} |" for (arm, control), found in compared.better.items()]
        lines += ["", f"{_shown(table)}. File: [report.json](PLACE/report.json).", ""]
    for picture, words in zip(PICTURES, ("IQM of each arm", "IQM by environment steps", "IQM by time"), strict=True):
        lines += [f"![{words}, {_shown(table)}](PLACE/{picture})", ""]
    lines += ["Returns of the last evaluation, raw: mean, lowest and highest of the seeds.", ""]
    lines += _game_rows(table)
    lines += ["", f"{_shown(table)}. The numbers link to the file of each seed, which names its command.", ""]
    lines += [_about(folder, name, table)]
    return "\n".join(lines) + "\n"


def _aggregate_rows(table: Table, compared: Compared) -> list[str]:
    _, spent = tables.seconds(table)
    iqm, chances = compared.iqm, compared.chances
    controls = [*compared.verdict]
    by_chance = [f"by chance, to `{control}`" for control in controls]
    heads = ["arm", "what sees", *KINDS.values(), *by_chance, "learning rate", "minutes", "before it"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm in sorted(table.arms, key=lambda arm: -iqm[compared.kind][arm].value):
        rate = table.results[arm, table.games[0], table.seeds[0]]["learning_rate"]
        cells = [str(iqm[kind][arm]) for kind in KINDS]
        cells += [f"{chances[arm, one]:.2g}" if (arm, one) in chances else "" for one in controls]
        cells += [f"{rate:g}", f"{spent[arm][-1] / 60:.0f}", _before(table, arm)]
        rows.append(f"| `{arm}` | {ARMS[arm].words} | {' | '.join(cells)} |")
    return rows


def _before(table: Table, arm: str) -> str:
    """What pretraining took that is in no other column."""
    files = [
        table.results[arm, game, table.seeds[0]]["settings"].get("trunk", {}).get("weights") for game in table.games
    ]
    cards = [file.get("pretraining") for file in files if file]
    if not cards or not all(cards):
        return "" if not files[0] else "weights of others"
    frames, minutes = ({card.get(name) for card in cards} for name in ("frames", "minutes"))
    told = [f"{number:,} frames" for number in sorted(frames - {None})]
    return ", ".join([*told, *(f"{number:g} minutes" for number in sorted(minutes - {None}))])


def _game_rows(table: Table) -> list[str]:
    rows = [f"| game | {' | '.join(f'`{arm}`' for arm in table.arms)} |", "|---|" + "---|" * len(table.arms)]
    for game in table.games:
        cells = []
        for arm in table.arms:
            found = [table.results[arm, game, seed] for seed in table.seeds]
            text = statistics.mean_and_range([result["last evaluation"] for result in found])
            files = ", ".join(f"[{index}](PLACE/{result['file']})" for index, result in enumerate(found))
            cells.append(f"{text}: {files}")
        rows.append(f"| {game} | {' | '.join(cells)} |")
    return rows


def _about(folder: Path, name: str, table: Table) -> str:
    suite = suite_of(name)
    first = table.results[table.arms[0], table.games[0], table.seeds[0]]
    shared = first["settings"]["shared"]
    times = [result["times"] for result in table.results.values()]
    machines = sorted({time[kind] for time in times for kind in ("cpu", "gpu") if time[kind]})
    evaluation = shared["evaluation"]
    rates = rates_file(folder.parent.parent, name, folder.name)
    chosen = json.loads(rates.read_text())["arms"] if rates.exists() else {}
    trained = {arm: table.results[arm, table.games[0], table.seeds[0]]["learning_rate"] for arm in table.arms}
    tuned = [arm for arm in table.arms if arm in chosen and chosen[arm]["learning_rate"] == trained[arm]]
    other = [arm for arm in table.arms if arm in chosen and arm not in tuned]
    untuned = [arm for arm in table.arms if arm not in chosen]
    whose, _ = tables.seconds(table)
    lines = [
        f"* Evaluation: {evaluation['episodes']} whole games every {evaluation['every']:,} steps, greedy with epsilon "
        f"{evaluation['epsilon']}, raw returns.",
        f"* {shared['updates per environment step']:g} updates per environment step, {shared['n_steps']}-step returns, "
        f"batch {shared['batch_size']}, {shared['optimizer']['class']}; all arms alike, as a test checks.",
        f"* Minutes are {whose}, training alone, on {', '.join(machines)}.",
        f"* Versions: {', '.join(f'{package} {number}' for package, number in first['versions'].items())}.",
    ]
    codes = sorted({code for result in table.results.values() for code in result.get("code", ["an older one"])})
    if len(codes) > 1:
        lines.append(f"* The code of these runs is not the same for all; each file names its own: {', '.join(codes)}.")
    if untuned:
        named = ", ".join(f"`{arm}` ({trained[arm]:g})" for arm in untuned)
        lines.append(f"* Learning rate not tuned (RL-Zoo's is {LEARNING_RATE:g}): {named}.")
    if other:
        named = ", ".join(f"`{arm}` ({trained[arm]:g}, tuned {chosen[arm]['learning_rate']:g})" for arm in other)
        lines.append(f"* Learning rate other than the one that tuning chose ([tries](PLACE/{rates.name})): {named}.")
    if tuned:
        named, played = ", ".join(f"`{arm}`" for arm in tuned), ", ".join(chosen[tuned[0]]["games"])
        lines.append(f"* Learning rate tuned on {played}: {named} ([tries](PLACE/{rates.name})).")
    if any(ARMS[arm].weights == "game" for arm in table.arms):
        lines.append(
            "* All seeds of a game share one pretrained trunk, so the intervals of these arms do not hold how much "
            "pretraining itself varies. Its frames and minutes stand in the last column, and are in no curve."
        )
    missing = [arm for arm in suite.arms if arm not in table.arms]
    if missing:
        lines.append(f"* Arms not run, or not to the end: {', '.join(f'`{arm}`' for arm in missing)}.")
    lacking = [game for game in suite.games if suite.env_id(game) not in table.games]
    if lacking:
        lines.append(f"* Games of the suite without runs of all these arms: {', '.join(lacking)}.")
    if table.left_out:
        lines.append(f"* Results that are not compared: {', '.join(table.left_out)}.")
    if name == "atari":
        lines.append(f"* Scores: {SCORES_SOURCE}.")
    return "\n".join(lines)


def _as_json(suite: Suite, table: Table, compared: Compared, command: str) -> dict[str, Any]:
    return {
        "command": command,
        "steps": table.steps,
        "games": [*table.games],
        "seeds": [*table.seeds],
        "unit": suite.unit,
        "score that decides": KINDS[compared.kind],
        "iqm": {kind: {arm: found.as_dict() for arm, found in by_arm.items()} for kind, by_arm in compared.iqm.items()},
        "difference": {f"{arm} over {one}": found.as_dict() for (arm, one), found in compared.gains.items()},
        "probability of such a difference by chance": {
            f"{arm} over {one}": round(chance, 5) for (arm, one), chance in compared.chances.items()
        },
        "probability of improvement": {f"{arm} over {one}": f.as_dict() for (arm, one), f in compared.better.items()},
        "verdict": compared.verdict,
        "files": sorted(result["file"] for result in table.results.values()),
        "left out": [*table.left_out],
    }


def _draw(folder: Path, suite: Suite, table: Table, iqm: dict[str, dict[str, Interval]]) -> None:
    shown = _shown(table)
    figures.intervals(folder / PICTURES[0], {KINDS[kind]: found for kind, found in iqm.items()}, suite.unit, shown)
    steps, by_arm = tables.curves(table, suite)
    found = statistics.iqm_curves(by_arm)
    y = f"IQM of the {suite.unit}"
    figures.curves(folder / PICTURES[1], dict.fromkeys(table.arms, steps), found, ("environment steps", y), shown)
    whose, spent = tables.seconds(table)
    minutes = {arm: [*(spent[arm] / 60)] for arm in table.arms}
    figures.curves(folder / PICTURES[2], minutes, found, (f"minutes {whose}, training alone", y), shown)


def _shown(table: Table) -> str:
    seeds, games = len(table.seeds), len(table.games)
    numbers = f"{seeds} seed{'s' * (seeds > 1)} x {games} game{'s' * (games > 1)}"
    return f"{numbers}, {table.steps:,} steps"


def _check_page(page: Path, name: str) -> None:
    begin, end = BEGIN.format(name), END.format(name)
    if not page.is_file():
        raise FileNotFoundError(f"--page {page} is no file: write a page that has the lines {begin} and {end}")
    _, marker, after = page.read_text().partition(begin)
    if not marker or end not in after:
        raise ValueError(f"--page {page} lacks a line {begin} and, below it, a line {end}")


def _into_page(page: Path, name: str, text: str) -> None:
    begin, end = BEGIN.format(name), END.format(name)
    before = page.read_text()
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    with written_whole(page) as (file,):
        file.write_text(pattern.sub(lambda match: f"{begin}\n{text}\n{end}", before))
