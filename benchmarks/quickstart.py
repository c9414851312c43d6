"""
What the quickstart of the README prints, and how long it takes: ``python benchmarks/quickstart.py``, some minutes.

It runs the first block of Python in README.md as it stands, and writes ``benchmarks/results/quickstart.json``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peers import machine

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "quickstart.json"


def main() -> None:
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        line = [sys.executable, "-c", block[1]]
        done = subprocess.run(line, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
        seconds = round(time.perf_counter() - start)
    result = {
        "command": "python benchmarks/quickstart.py",
        "machine": machine(),
        "prints": done.stdout.splitlines()[-1],
        "seconds": seconds,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(result)


if __name__ == "__main__":
    main()
