"""
Install a built wheel into an empty environment, and use it from another folder: ``make dist`` and ``make test-wheel``.

The empty environment gets its dependencies from the registry. With ``--borrow`` it takes them from the Python that runs
this script instead, which needs seconds and no network; the package itself still comes from the wheel alone.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GAME = "RoadRunnerNoFrameskip-v4"
WHERE = "import pathlib, sb3_resnet; print(pathlib.Path(sb3_resnet.__file__).parent)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path, nargs="?", help="the newest in dist/ if not given")
    parser.add_argument("--borrow", action="store_true", help="take the dependencies from this Python")
    arguments = parser.parse_args()
    wheel = arguments.wheel or max((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)
    with tempfile.TemporaryDirectory() as folder:
        python = install(wheel.resolve(), Path(folder, "env"), arguments.borrow)
        elsewhere = Path(folder, "elsewhere")
        elsewhere.mkdir()
        for what, command in commands(python):
            print(f"== {what}", flush=True)
            run(command, elsewhere)
        installed = Path(run([python, "-c", WHERE], elsewhere, quiet=True).strip())
        if not installed.is_relative_to(Path(folder, "env").resolve()):
            raise SystemExit(f"sb3_resnet was imported from {installed}, not from the wheel")
    print(f"{wheel.name} works from another folder")
    return 0


def install(wheel: Path, folder: Path, borrow: bool) -> str:
    """:return: the Python of a new environment that has the wheel"""
    venv.create(folder, with_pip=True)
    python = str(folder.resolve() / "bin" / "python")
    options = ["--no-deps"] if borrow else []
    if borrow:
        # Paths that such a file adds are not searched for such files again, so an editable install there stays unseen.
        query = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        site = Path(subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())
        borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    run([python, "-m", "pip", "install", "-q", *options, f"sb3_resnet[atari,contrib,tools,zoo] @ {wheel.as_uri()}"])
    return python


def commands(python: str) -> list[tuple[str, list[str]]]:
    """:return: names and command lines of what users do first, in small"""
    command = str(Path(python).with_name("sb3-resnet"))
    zoo = ["-m", "rl_zoo3.train", "--algo", "dqn", "--env", GAME, "--gym-packages", "sb3_resnet"]
    config = run([command, "zoo-config", "demo"], quiet=True).strip()
    small = ["-n", "60", "--eval-freq", "-1", "-params", "learning_starts:20", "buffer_size:200", "batch_size:4"]
    code = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[0]
    # The quickstart as it stands, but for its number of steps.
    quickstart = re.sub(r"\b\d\d?\d?_000\b", "100", code)
    return [
        ("zoo-config", [command, "zoo-config"]),
        ("quickstart of the README", [python, "-c", quickstart]),
        ("sb3-resnet check", [command, "check", "--env", GAME, "--conf-file", config]),
        ("RL-Zoo", [python, *zoo, "--conf-file", config, *small]),
    ]


def run(command: list[str], folder: Path | None = None, quiet: bool = False) -> str:
    """:return: what the command prints; its failure ends this program"""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment = {"PYTHONNOUSERSITE": "1", **inherited}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    if not quiet or done.returncode != 0:
        print(done.stdout, end="", flush=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)[:300]} ended with exit status {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
