"""Many runs: as many processes as cores, one progress bar, and nothing lost where they are killed."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .arms import ARMS, weights_for
from .games import check_game
from .runs import refuse_other_settings
from .spec import Run

#: Begins a line that tells how many steps a run has done.
STEPS = "steps"
SCRIPT = Path(__file__).parent.parent / "atari.py"


def runs_of(
    suite: str,
    budget: str,
    steps: int,
    arms: Sequence[str],
    games: Sequence[str],
    seeds: Sequence[int],
    rates: dict[str, Sequence[float]],
    weights: dict[str, str],
    imagenet: str | None,
    is_try: bool = False,
) -> tuple[list[Run], list[str]]:
    """
    :param rates: learning rates by arm
    :param weights: weights files by game
    :param imagenet: file with ImageNet weights
    :return: all runs, game by game and seed by seed so that what is finished can be compared; and what is skipped, with
        the reason
    """
    for arm in arms:
        if arm not in ARMS:
            raise ValueError(f"--arms must be of {', '.join(ARMS)}, got {arm!r}")
    for game in games:
        check_game(suite, game)
    runs, skipped = [], {}
    for seed, game, arm in itertools.product(seeds, games, arms):
        try:
            file = weights_for(arm, game, weights, imagenet)
        except LookupError as error:
            skipped[arm, game] = f"skipped: {error}"
            continue
        runs += [Run(suite, budget, game, arm, seed, steps, rate, file, is_try) for rate in rates[arm]]
    return runs, [*skipped.values()]


def execute_all(runs: Sequence[Run], results: Path, checkpoints: Path, processes: int | None = None) -> list[Path]:
    """
    Run what has no result yet, in processes of one thread each. They end with this one, however it ends.

    :param runs: all runs
    :param results: folder of all results
    :param checkpoints: folder of all checkpoints
    :param processes: at once; ``None``: one per core that this process may use, and one on a GPU, so that no run
        waits for another one's
    :return: the result files
    :raises RuntimeError: if a run fails; the others go on until then
    """
    files = {run: results / run.folder / f"{run.name}.json" for run in runs}
    for run, file in files.items():
        if file.exists():
            refuse_other_settings(run, file)
    bar = tqdm(total=sum(run.steps for run in runs), unit="step", unit_scale=True, dynamic_ncols=True)
    # One that was killed right after its result has its checkpoints still.
    missing = [
        run
        for run in runs
        if not files[run].exists() or [*(checkpoints / run.folder / run.name).glob(f"model-{run.steps}.zip")]
    ]
    bar.update(sum(run.steps for run in runs) - sum(run.steps for run in missing))
    at_once = 1 if any(run.plan.device == "cuda" for run in runs) else cores()
    done, lock = [len(runs) - len(missing)], threading.Lock()
    running = _Running()

    def one(run: Run) -> str | None:
        seen = 0

        def tell(steps: int) -> None:
            nonlocal seen
            with lock:
                bar.update(steps - seen)
                bar.set_postfix_str(f"{done[0]} of {len(runs)} runs")
            seen = steps

        error = _process(run, results, checkpoints, tell, running)
        if error is None:
            done[0] += 1
            tell(run.steps)
        return error

    with bar, ThreadPoolExecutor(processes or at_once) as pool:
        try:
            errors = [error for error in pool.map(one, missing) if error is not None]
        except BaseException:  # such as Ctrl-C: nothing more is begun, and what runs ends
            pool.shutdown(wait=False, cancel_futures=True)
            running.end()
            raise
    if errors:
        raise RuntimeError("\n".join(errors))
    return [*files.values()]


class _Running:
    """Processes that are at work, to be ended all at once."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        self._lock, self._is_over = threading.Lock(), False

    def begin(self, command: list[str], **options: Any) -> subprocess.Popen[str]:
        """:return: a new process; it ends at once where the others did"""
        with self._lock:
            process = subprocess.Popen(command, text=True, **options)
            self._processes.append(process)
            if self._is_over:
                process.terminate()
        return process

    def end(self) -> None:
        """End those that are at work, and all that begin after that."""
        with self._lock:
            self._is_over = True
            for process in self._processes:
                process.terminate()  # nothing happens to one that has ended


def _process(run: Run, results: Path, checkpoints: Path, tell: Any, running: _Running) -> str | None:
    """:return: what went wrong, if something did"""
    command = [sys.executable, str(SCRIPT), "run", *run.options(), "--child"]
    command += ["--results", str(results), "--checkpoints", str(checkpoints)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "OMP_NUM_THREADS": str(run.plan.threads)}
    with running.begin(command, env=environment, **pipes) as process:
        texts: list[str] = []
        reader = threading.Thread(target=lambda: texts.append(process.stderr.read()))
        reader.start()
        for line in process.stdout:
            word, _, number = line.partition(" ")
            if word == STEPS:  # libraries may print what they like
                tell(int(number))
        reader.join()
    return None if process.returncode == 0 else f"{run.name}: {texts[0].strip() or process.returncode}"


def cores() -> int:
    """:return: those that this process may use"""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def end_with_parent() -> None:
    """End this process when the one that started it does: its end of our standard input is closed then."""

    def wait() -> None:
        # Not sys.stdin, whose lock would be held when this process ends by itself.
        while os.read(0, 4096):
            pass
        os._exit(3)

    threading.Thread(target=wait, daemon=True).start()
