"""
Does a trunk that was pretrained on a game's frames show more of the game than a random one?

    python benchmarks/pretraining.py Pong Breakout SpaceInvaders     # half an hour per game, and two minutes
    python benchmarks/pretraining.py --report                        # table and pictures of all results

For each game: ``sb3_resnet.pretraining.pretrain``, then the probe of random and pretrained trunks of the same shape on
episodes that neither the training nor its own probes have seen. A run that was stopped goes on when it is started
again. With ``--blind`` the game's memory is read for that probe alone: the last weights are kept, not those that show
most. The trunks of ``atari.py`` are made so, since its games are reported. Results
are ``benchmarks/results/pretraining/<game>-<objective>-s<seed>.json``; the report writes ``scores.csv``,
``scores.png`` and ``history.png`` beside them.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch as th
from peers import machine

from sb3_resnet.cli.envs import make_env
from sb3_resnet.pretraining import Result, pretrain
from sb3_resnet.probing import Row, probe, record

RESULTS = Path(__file__).parent / "results" / "pretraining"
RUNS = Path("runs") / "pretraining"
NEVER = 10**9  # updates between two probes
UNSEEN = 2_000_003  # added to the seed: episodes of the last probe
CHOSEN = (
    "objective", "last_stage", "batch_size", "warmup", "learning_rate", "frames", "held_out", "probe_every", "seed",
    "neighbours", "shift_probability",
)  # fmt: skip
POOLINGS = ("spatial_softmax", "grid", "avg")


def one_game(game: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Pretrain on a game, and compare with random weights."""
    env = make_env(f"{game}NoFrameskip-v4", 8, arguments.seed)
    name = f"{game}-{arguments.objective}-s{arguments.seed}"
    chosen = {key: getattr(arguments, key) for key in CHOSEN}
    if arguments.blind:
        chosen |= {"labels": no_labels, "probe_every": NEVER}
    path = arguments.runs / f"{name}.safetensors"
    result = pretrain(env, path, minutes=arguments.minutes, updates=arguments.updates, told=Line(game), **chosen)
    print()
    recording = record(env, arguments.steps, arguments.seed + UNSEEN)
    env.close()
    options = {"last_stage": [arguments.last_stage], "pooling": POOLINGS, "adapter": ["per_frame"]}
    rows = probe(recording, weights=["random", str(path)], seed=arguments.seed, **options)
    return {
        "command": f"python {' '.join(sys.argv)}",
        "game": game,
        "settings": {**result.card["arguments"], "blind": arguments.blind},
        "machine": machine(),
        "versions": result.card["versions"],
        "updates": result.card["updates"],
        "best update": result.card["update"],
        "history": result.card["history"],
        "probe": [row_of(row, result) for row in rows],
    }


def no_labels(env: Any) -> dict[str, Any]:
    """What pretraining may know of the state of a game that is reported."""
    return {}


def row_of(row: Row, result: Result) -> dict[str, Any]:
    weights = "pretrained" if row.weights == str(result.path) else row.weights
    scores = {name: None if score.value is None else round(score.value, 4) for name, score in row.scores.items()}
    mean = None if math.isnan(row.mean) else round(row.mean, 4)  # games without annotated memory have none
    return {"weights": weights, "pooling": row.pooling, "mean R2": mean, "scores": scores}


class Line:
    """Says in one line of the terminal what goes on."""

    def __init__(self, game: str) -> None:
        self.game, self.last = game, 0.0

    def __call__(self, what: str, share: float, figures: str) -> None:
        if time.monotonic() - self.last > 1.0:
            self.last = time.monotonic()
            print(f"\r{self.game}: {what} {share:.0%} {figures}", end="   ", flush=True)


def report(folder: Path) -> None:
    """Table and pictures of all results in a folder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not found:
        sys.exit(f"no results in {folder}")
    found = {name: one for name, one in found.items() if one["probe"][0]["mean R2"] is not None}
    if not found:
        print(f"{folder}: no game with annotated memory, so nothing to draw")
        return
    with (folder / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "updates", "weights", "pooling", "mean R2"])
        for name, result in found.items():
            for row in result["probe"]:
                cells = (name, result["updates"], row["weights"], row["pooling"], row["mean R2"])
                writer.writerow(cells)
                print(*cells, sep="  ")
    figure, axes = plt.subplots(1, len(POOLINGS), figsize=(4 * len(POOLINGS), 3.5), sharey=True, squeeze=False)
    for axis, pooling in zip(axes[0], POOLINGS, strict=True):
        for shift, weights in ((-0.2, "random"), (0.2, "pretrained")):
            heights = [
                next(r["mean R2"] for r in one["probe"] if (r["weights"], r["pooling"]) == (weights, pooling))
                for one in found.values()
            ]
            axis.bar([place + shift for place in range(len(found))], heights, 0.4, label=weights)
        axis.set_xticks(range(len(found)), list(found), rotation=30, ha="right", fontsize=7)
        axis.set(title=pooling, ylim=(0, 1))
    axes[0][0].set_ylabel("mean R², unseen episodes")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(folder / "scores.png", dpi=90)
    figure, axis = plt.subplots(figsize=(6, 4))
    for name, result in found.items():
        if not result["settings"].get("blind"):  # whose score is another one
            axis.plot([e["update"] for e in result["history"]], [e["score"] for e in result["history"]], label=name)
    axis.set(xlabel="updates (0: random weights)", ylabel="mean R² while training")
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "history.png", dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("games", nargs="*", metavar="GAME", help="such as Pong")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--updates", type=int)
    parser.add_argument("--objective", default="atc")
    parser.add_argument("--last-stage", default="layer2")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--neighbours", type=int, default=1)
    parser.add_argument("--shift-probability", type=float, default=0.1)
    parser.add_argument("--frames", type=int, default=50_000)
    parser.add_argument("--held-out", type=int, default=2_400)
    parser.add_argument("--probe-every", type=int, default=200)
    parser.add_argument("--steps", type=int, default=4_000, help="observations of the last probe")
    parser.add_argument("--blind", action="store_true", help="keep the last weights, whatever the game's memory says")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=RUNS, help="weights files, and what unfinished runs need")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    th.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for game in arguments.games:
        result = one_game(game, arguments)
        name = f"{game}-{arguments.objective}-s{arguments.seed}.json"
        (arguments.output / name).write_text(json.dumps(result, indent=1) + "\n")
    if arguments.games or arguments.report:
        report(arguments.output)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
