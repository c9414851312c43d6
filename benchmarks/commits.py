"""
Is one commit as fast as another? The same arms of ``throughput.py`` in both, in turns.

    python benchmarks/commits.py 078c6cd main      # writes benchmarks/results/commits.json, about six minutes

Each measurement is a process of its own in a work tree of the commit, with that commit's ``benchmarks/throughput.py``:
environment steps per second of Pong with a frozen ResNet-18 and the feature cache at 1 and 8 environments, and
updates of the head per second. A ratio is the median of the rounds' own ratios: both commits of a round meet the same
load of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "commits.json"
ARM = """
import json, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, "benchmarks")
from throughput import dqn, encoded, filled, pong, timed
found = {}
for n, steps in ((1, 240), (8, 640)):
    model = filled(dqn("ResNetCnnPolicy", pong(n)), 1000)
    callback = encoded(model)
    learn = lambda count: model.learn(count, callback=callback, reset_num_timesteps=False)
    learn(steps // 4)
    found[f"{n} environments, steps per second"] = steps / timed(lambda: learn(steps))
    if n == 1:
        encoded(model)
        model.train(20, 32)
        found["head, updates per second"] = 300 / timed(lambda: model.train(300, 32))
print(json.dumps(found))
"""


def measure(tree: Path) -> dict[str, float]:
    """:return: the figures of one commit, from a fresh process"""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, "-c", ARM], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs=2, metavar="COMMIT")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    names = [
        subprocess.check_output(["git", "rev-parse", "--short", name], cwd=ROOT, text=True).strip()
        for name in arguments.commits
    ]
    with tempfile.TemporaryDirectory() as folder:
        trees = [Path(folder) / name for name in names]
        for tree, name in zip(trees, names, strict=True):
            subprocess.check_call(["git", "worktree", "add", "-q", "--detach", str(tree), name], cwd=ROOT)
        try:
            rounds = []
            for index in range(arguments.rounds):
                order = [*zip(names, trees, strict=True)][:: 1 if index % 2 else -1]
                rounds.append({name: measure(tree) for name, tree in order})
                print(rounds[-1], flush=True)
        finally:
            for tree in trees:
                subprocess.check_call(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT)
    old, new = names
    keys = [*rounds[0][old]]
    result = {
        "command": f"python benchmarks/commits.py {' '.join(arguments.commits)}",
        "commits": {"old": old, "new": new},
        "rounds": arguments.rounds,
        "median": {
            name: {key: round(statistics.median(one[name][key] for one in rounds), 1) for key in keys} for name in names
        },
        "new to old": {
            key: round(statistics.median(one[new][key] / one[old][key] for one in rounds), 2) for key in keys
        },
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
