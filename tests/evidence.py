"""For the tests of benchmarks/atari.py: its modules, and result files as its runs write them."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "atari.py"
sys.path.insert(0, str(SCRIPT.parent))
from evidence import (  # noqa: E402  # its folder has to be on the path first
    agent,
    arms,
    budgets,
    commands,
    evaluation,
    games,
    pong,
    recording,
    results,
    runs,
    spec,
    statistics,
    suite,
    table,
    tuning,
)
from evidence import report as reports  # noqa: E402  # likewise

__all__ = [
    "ROOT", "SCRIPT", "agent", "arms", "budgets", "commands", "evaluation", "games", "pong", "recording", "reports",
    "result", "results", "runs", "spec", "statistics", "suite", "table", "tuning",
]  # fmt: skip


def result(folder, arm, game, seed, returns, steps=20_000, rate=1e-4, ratio=1.0, suite="atari", **others):
    """A result file and its times, as a run writes them: one evaluation after each half of the steps."""
    run = spec.Run(suite, "cpu", game, arm, seed, steps, rate, **others)
    log = recording.Log(steps=steps)
    for index, value in enumerate(returns):
        step = steps * (index + 1) // len(returns)
        log.evaluations.append({"step": step, "returns": [value]})
        log.seconds.append([step, 60.0 * index, 70.0 * index, 90.0 * index])
    shared = {"evaluation": {"every": 10_000, "episodes": 1, "epsilon": 0.01}, "updates per environment step": ratio}
    shared |= {"n_steps": 3, "batch_size": 32, "optimizer": {"class": "Adam"}}
    path = folder / run.folder / f"{run.name}.json"
    results.write_result(run, path, log, {"shared": shared})
    return path
