"""The command line of ``benchmarks/atari.py``."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from .arms import ARMS, LEARNING_RATE, LEARNING_RATES, weights_for
from .budgets import BUDGETS, budget_of, check_device
from .games import SUITES, check_game, suite_of
from .runs import execute
from .spec import Run
from .suite import STEPS, end_with_parent, execute_all, runs_of
from .table import KINDS
from .tuning import check_tries, choose, learning_rate_of, rates_file

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CHECKPOINTS = ROOT / "runs"
_COMMANDS = ("suite", "run", "tune", "report", "pong", "agent")


def main(words: Sequence[str]) -> int:
    """
    :param words: the command line; without a command, the suite
    :return: exit status
    """
    words = [*words] if words and words[0] in (*_COMMANDS, "-h", "--help") else ["suite", *words]
    given = _parser().parse_args(words)
    warnings.filterwarnings("ignore", message="The backbone is frozen with random weights")
    commands = {"suite": _suite, "run": _run, "tune": _tune, "report": _report, "pong": _pong, "agent": _agent}
    try:
        commands[given.command](given)
    except (ValueError, OSError, ImportError, LookupError, RuntimeError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped: the same command goes on", file=sys.stderr)
        return 130
    return 0


def _suite(given: argparse.Namespace) -> None:
    check_device(given.budget)
    steps = _steps(given)
    domain = suite_of(given.suite)
    arms = given.arms or [*domain.arms]
    games = given.games or ["Pong"] * (given.suite == "atari" and given.budget == "smoke") or [*domain.games]
    known = [arm for arm in arms if arm in ARMS]
    rates = {arm: [learning_rate_of(arm, given.results, given.suite, given.budget)] for arm in known}
    common = (given.suite, given.budget, steps, arms, games, _seeds(given), rates, given.weights, given.imagenet)
    _check_weights(given.weights, games)
    runs, skipped = runs_of(*common)
    print(*skipped, sep="\n", end="\n" * bool(skipped), flush=True)
    for file in execute_all(runs, given.results, given.checkpoints, given.processes):
        print(file)


def _tune(given: argparse.Namespace) -> None:
    domain = suite_of(given.suite)
    arms = given.arms or [*domain.arms]
    check_device(given.budget)
    steps = _steps(given)
    rates = dict.fromkeys(arms, given.rates)
    games = _tuning_games(given)
    _check_rates(given.rates)
    _check_weights(given.weights, games)
    common = (given.suite, given.budget, steps, arms, games, _seeds(given), rates, given.weights)
    runs, skipped = runs_of(*common, given.imagenet, is_try=True)
    print(*skipped, sep="\n", end="\n" * bool(skipped), flush=True)
    # An arm that lacks the weights of one game would be judged by the others alone.
    lacking = {run.arm for run in runs if {other.game for other in runs if other.arm == run.arm} != {*games}}
    runs = [run for run in runs if run.arm not in lacking]
    if not runs:
        raise ValueError("No arm has all that it needs on all tuning games")
    place = rates_file(given.results, given.suite, given.budget)
    check_tries({run.arm for run in runs}, (given.rates, games, len(_seeds(given)), steps), place)
    files = execute_all(runs, given.results, given.checkpoints, given.processes)
    said = " ".join(_said(given, ("suite", "budget", "steps", "seeds")))
    said += "".join(f" --{name} {' '.join(getattr(given, name))}" for name in ("arms", "games") if getattr(given, name))
    files_used = [f"--weights {game}={Path(file).name}" for game, file in given.weights.items()]
    files_used += [f"--imagenet {Path(given.imagenet).name}"] if given.imagenet else []
    rates_tried = " ".join(f"{rate:g}" for rate in given.rates)
    command = " ".join(["python benchmarks/atari.py tune", said, f"--rates {rates_tried}", *files_used])
    for arm, found in choose(files, given.suite, given.budget, given.results, command)["arms"].items():
        print(f"{arm}: {found['learning_rate']:g} of {found['tries']}")


def _tuning_games(given: argparse.Namespace) -> list[str]:
    domain = suite_of(given.suite)
    for game in given.games or ():
        if game not in domain.tuning:
            raise ValueError(f"--games must be of {', '.join(domain.tuning)}, which are never reported, got {game!r}")
    return given.games or [*domain.tuning]


def _run(given: argparse.Namespace) -> None:
    if given.child:
        end_with_parent()
    check_device(given.budget)
    run = _run_of(given)
    print_steps = (lambda done: print(STEPS, done, flush=True)) if given.child else (lambda done: None)
    file = execute(run, given.results, given.checkpoints, print_steps)
    if not given.child:
        print(file)


def _run_of(given: argparse.Namespace) -> Run:
    check_game(given.suite, given.game)
    _check_weights(given.weights, [given.game])
    steps = _steps(given)
    names = (given.suite, given.budget, given.game, given.arm)
    weights = weights_for(given.arm, given.game, given.weights, given.imagenet)
    rate = given.learning_rate
    if rate is None:
        rate = learning_rate_of(given.arm, given.results, given.suite, given.budget)
    _check_rates([rate], "--learning-rate")
    minutes = given.minutes if given.budget == "pong" else None
    return Run(*names, given.seed, steps, rate, weights, given.is_try, minutes)


def _agent(given: argparse.Namespace) -> None:
    from .agent import export

    print(export(_run_of(given), given.results, given.checkpoints, given.output))


def _report(given: argparse.Namespace) -> None:
    from .report import report

    folder = given.results / given.suite / given.budget
    print(report(folder, given.suite, given.steps, given.page, given.arms, given.games, given.score))


def _pong(given: argparse.Namespace) -> None:
    from .pong import SEEDS, pong

    if not 0 < given.minutes < math.inf:
        raise ValueError(f"--minutes must be above 0, got {given.minutes:g}")
    _check_weights(given.weights, ["Pong"])
    _check_rates([given.learning_rate], "--learning-rate")
    weights = given.weights.get("Pong")
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"{weights} is no file: the weights of Pong")
    pong(given.results, given.checkpoints, _seeds(given, SEEDS), given.minutes, weights, given.learning_rate)


def _steps(given: argparse.Namespace) -> int:
    plan = budget_of(given.budget, given.steps)
    if plan.steps <= plan.learning_starts:
        raise ValueError(
            f"--steps {plan.steps}: nothing is trained before step {plan.learning_starts:,}, so write more"
        )
    return plan.steps


def _seeds(given: argparse.Namespace, default: int | None = None) -> list[int]:
    """Numbers from 0 on; those of tries are others than those that are reported."""
    count = given.seeds if given.seeds is not None else default or budget_of(given.budget).seeds
    if count < 1:
        raise ValueError(f"--seeds is the number of seeds, at least 1, got {count}")
    return [100 + seed if given.command == "tune" else seed for seed in range(count)]


def _check_rates(rates: Sequence[float], option: str = "--rates") -> None:
    for rate in rates:
        if not 0 < rate < math.inf:
            raise ValueError(f"{option} must be above 0, got {rate:g}")
    if len({*rates}) < len(rates):
        raise ValueError(f"{option} has the same rate twice: {' '.join(f'{rate:g}' for rate in rates)}")


def _check_weights(weights: dict[str, str], games: Sequence[str]) -> None:
    for game in weights:
        if game not in games:
            raise ValueError(f"--weights {game}=...: {game} is not played here, but {', '.join(games)}")


def _said(given: argparse.Namespace, names: Sequence[str]) -> list[str]:
    values = [(name, getattr(given, name)) for name in names]
    return [f"--{name} {value}" for name, value in values if value is not None]


def _weights(word: str) -> tuple[str, str]:
    game, _, file = word.partition("=")
    if not file:
        raise argparse.ArgumentTypeError(f"write GAME=FILE, such as Pong=pong.safetensors, got {word!r}")
    return game, file


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"write a whole number of at least 1, got {word!r}")
    return int(word)


class _ByGame(argparse.Action):
    """Collects ``--weights GAME=FILE``."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: object, option: object = None) -> None:
        namespace.weights = {**namespace.weights, **dict([values])}  # type: ignore[list-item]  # a pair, by _weights


def _parser() -> argparse.ArgumentParser:
    places = argparse.ArgumentParser(add_help=False)
    places.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    places.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, metavar="FOLDER")
    kind = argparse.ArgumentParser(add_help=False)
    kind.add_argument("--suite", choices=[*SUITES], default="atari")
    kind.add_argument("--budget", choices=[name for name in BUDGETS if name != "pong"], default="cpu")
    any_kind = argparse.ArgumentParser(add_help=False)
    any_kind.add_argument("--suite", choices=[*SUITES], default="atari")
    any_kind.add_argument("--budget", choices=[*BUDGETS], default="cpu")
    any_kind.add_argument("--steps", type=_count, metavar="N", help="environment steps of the run")
    kind.add_argument("--steps", type=_count, metavar="N", help="environment steps of a run, instead of the budget's")
    trunks = argparse.ArgumentParser(add_help=False)
    trunks.add_argument(
        "--weights", type=_weights, action=_ByGame, default={}, metavar="GAME=FILE", help="trunk for a game; repeat"
    )
    files = argparse.ArgumentParser(add_help=False, parents=[trunks])
    files.add_argument("--imagenet", metavar="FILE", help="local file with ResNet-18's ImageNet weights")
    many = argparse.ArgumentParser(add_help=False)
    many.add_argument("--arms", nargs="+", metavar="ARM", help=f"of {', '.join(ARMS)}")
    many.add_argument("--seeds", type=int, metavar="N", help="number of seeds, instead of the budget's")
    many.add_argument("--processes", type=_count, metavar="N", help="at once; default: one per core")

    parser = argparse.ArgumentParser(prog="atari.py", description=sys.modules["__main__"].__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    suite = commands.add_parser("suite", parents=[places, kind, files, many], help="all runs (the default command)")
    suite.add_argument("--games", nargs="+", metavar="GAME")
    tune = commands.add_parser("tune", parents=[places, kind, files, many], help="a learning rate for each arm")
    tune.add_argument("--games", nargs="+", metavar="GAME", help="of those for tuning; default: all")
    tune.add_argument("--rates", type=float, nargs="+", default=LEARNING_RATES, metavar="RATE", help="those tried")
    one = argparse.ArgumentParser(add_help=False)
    one.add_argument("--game", required=True)
    one.add_argument("--arm", required=True, choices=[*ARMS])
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--learning-rate", type=float, dest="learning_rate", help="default: that of `tune`")
    one.add_argument("--try", action="store_true", dest="is_try", help="one of the tries of `tune`")
    run = commands.add_parser("run", parents=[places, kind, files, one], help="one run")
    run.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    agent = commands.add_parser("agent", parents=[places, any_kind, files, one], help="its agent as a small file")
    agent.add_argument("--minutes", type=float, default=60.0, help="of --budget pong: as `pong` was given")
    agent.add_argument("--output", type=Path, default=RESULTS / "agents", metavar="FOLDER")
    report = commands.add_parser("report", parents=[places, kind], help="Markdown, JSON and PNG of all results")
    report.add_argument("--arms", nargs="+", metavar="ARM", help="to compare; default: those with results enough")
    report.add_argument("--games", nargs="+", metavar="GAME", help="to compare; default: those of the suite")
    report.add_argument(
        "--score", choices=[*KINDS], default="last", help="evaluation that decides: last, or mean of all"
    )
    report.add_argument("--page", type=Path, metavar="FILE", help="also put the text between this page's two markers")
    pong = commands.add_parser("pong", parents=[places, trunks], help="until Pong is won, on two cores")
    pong.add_argument("--seeds", type=int, metavar="N", help="number of seeds, default 5")
    pong.add_argument("--learning-rate", type=float, dest="learning_rate", default=LEARNING_RATE, help="of the head")
    pong.add_argument("--minutes", type=float, default=60.0, help="of a run, at most")
    return parser
