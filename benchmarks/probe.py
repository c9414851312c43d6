"""
Which frozen features show the state of a game: every depth, pooling and adapter, with random weights.

    python benchmarks/probe.py Pong      # a quarter of an hour on one core
    python benchmarks/probe.py Pong --weights runs/pretraining/Pong-atc-s0.safetensors      # random and pretrained

Writes a table and a picture, ``benchmarks/results/probe/Pong.csv`` and ``.png``. It is ``sb3-resnet probe`` with these
options. A pretrained trunk is probed as it was trained: frame by frame, and up to its own last stage.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "probe"
SEED = 2_000_003
GRID = {
    "--last-stage": ["layer1", "layer2", "layer3", "layer4"],
    "--pooling": ["avg", "grid", "spatial_softmax"],
    "--adapter": ["conv1x1", "per_frame"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("game", help="such as Pong")
    parser.add_argument("--weights", nargs="+", default=[], metavar="FILE", help="beside random weights")
    parser.add_argument("--steps", type=int, default=4_800, help="observations")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, metavar="FOLDER")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    grid = {"--weights": ["random", *arguments.weights], **GRID}
    options = [word for option, values in grid.items() for value in values for word in (option, value)]
    file = arguments.output / f"{arguments.game}.csv"
    chosen = ["--env", f"{arguments.game}NoFrameskip-v4", "--steps", str(arguments.steps), "-o", str(file)]
    # Other episodes than those of a pretraining, whose seed is 0.
    chosen += ["--plot", str(file.with_suffix(".png")), "--seed", str(SEED)]
    subprocess.run([sys.executable, "-m", "sb3_resnet", "probe", *chosen, *options], check=True)


if __name__ == "__main__":
    main()
