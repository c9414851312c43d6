"""Run the demo with several seeds, one after the other, and keep what each showed: ``python benchmarks/demo.py``."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "demo.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    runs = []
    for seed in arguments.seeds:
        subprocess.run([sys.executable, str(ROOT / "scripts" / "demo.py"), "--seed", str(seed)], check=True)
        written = max((ROOT / "logs" / "demo").glob("dqn/*/demo.json"), key=lambda path: path.stat().st_mtime)
        runs.append(json.loads(written.read_text()))
        result = {"machine": platform.processor() or platform.machine(), "runs": runs}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")  # each time, so that a stop loses nothing
    risen = sum(run["rises"] for run in runs)
    print(f"{risen} of {len(runs)} runs rise clearly above random play: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
