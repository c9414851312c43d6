"""
One GPU in at most four minutes: is everything right there, and how fast is it?

    python benchmarks/gpu.py                          # writes benchmarks/results/gpu.json and prints the tables
    python benchmarks/gpu.py --device cpu --smoke     # the same program in small, to see that it runs

First come the tests that are marked for CUDA (``tests/test_cuda.py`` and the marked ones elsewhere); if one fails the
figures are still taken, and the exit status is 1. Then, on synthetic frames, so that neither Atari games nor a network
are needed: times of an update and environment steps per second of ResNet-18 and -50 at 84 and 224 pixels, frozen, with
``layer4`` and with everything trainable, in float32, TF32, bfloat16 and float16, with captured graphs and without,
beside the recipe of SB3's documentation and its NatureCNN; memory; and the price of deterministic algorithms.

Needs PyTorch with CUDA, torchvision, stable-baselines3 and pytest, and this repository, which need not be installed.
The time limit is kept: what does not fit into it is left out and named in the result.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from stable_baselines3 import DQN  # noqa: E402  # after the path of this repository
from stable_baselines3.common.vec_env import DummyVecEnv  # noqa: E402  # likewise
from synthetic import Recipe, fill  # noqa: E402  # likewise

import sb3_resnet  # noqa: E402  # likewise
from sb3_resnet.callbacks import AMPCallback, FeatureCacheCallback  # noqa: E402  # likewise

BATCH = 32
#: How numbers are computed: of the extractor's frozen stages, of AMP's live ones, and whether float32 may be TF32.
PRECISIONS = {
    "float32": ("float32", None, False),
    "tf32": ("float32", None, True),
    "bfloat16": ("bfloat16", "bfloat16", True),
    "float16": ("float16", "float16", True),
}
BOUNDARIES = {"frozen": None, "layer4": "layer4", "everything": "all"}


class Frames(gym.Env[np.ndarray, int]):
    """A stack of four grey frames that moves on by one random frame each step."""

    def __init__(self, size: int) -> None:
        self.observation_space = spaces.Box(0, 255, (4, size, size), np.uint8)
        self.action_space = spaces.Discrete(6)
        rng = np.random.default_rng(0)
        self._frames = rng.integers(0, 256, (64, size, size), dtype=np.uint8)
        self._clock = 0

    def _observe(self) -> np.ndarray:
        return self._frames[[(self._clock + index) % 64 for index in range(4)]]

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        return self._observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._clock += 1
        return self._observe(), float(self._clock % 7 == 0), self._clock % 500 == 0, False, {}


def model_of(policy: str, size: int, device: str, n_envs: int = 8, **policy_kwargs: Any) -> DQN:
    env = DummyVecEnv([lambda: Frames(size)] * n_envs)
    model = DQN(
        policy,
        env,
        buffer_size=2_000,
        learning_starts=0,
        batch_size=BATCH,
        train_freq=1,
        gradient_steps=2,
        policy_kwargs=policy_kwargs,
        exploration_initial_eps=0.05,
        exploration_final_eps=0.05,
        seed=0,
        device=device,
    )
    return fill(model, 400)


@contextmanager
def precision(name: str) -> Iterator[None]:
    before = th.backends.cuda.matmul.allow_tf32, th.backends.cudnn.allow_tf32
    th.backends.cuda.matmul.allow_tf32 = th.backends.cudnn.allow_tf32 = PRECISIONS[name][2]
    try:
        yield
    finally:
        th.backends.cuda.matmul.allow_tf32, th.backends.cudnn.allow_tf32 = before


def start(callbacks: list[Any], model: DQN) -> None:
    """Callbacks at work without ``learn()``."""
    for callback in callbacks:
        callback.init_callback(model)
        callback.on_training_start({"callback": None}, {})


def milliseconds(work: Callable[[], Any], device: str, seconds: float = 0.6) -> float:
    """Median time of one call, the first ones left out, within about so many seconds."""

    def once() -> float:
        wait(device)
        begin = time.perf_counter()
        work()
        wait(device)
        return 1000 * (time.perf_counter() - begin)

    for _ in range(3):
        once()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 50):
        times.append(once())
    return round(statistics.median(times), 3)


def wait(device: str) -> None:
    if device == "cuda":
        th.cuda.synchronize()


def peak_megabytes(work: Callable[[], Any], device: str) -> float | None:
    if device != "cuda":
        return None
    gc.collect()  # of the arms before
    th.cuda.empty_cache()
    before = th.cuda.memory_allocated()
    th.cuda.reset_peak_memory_stats()
    work()
    return round((th.cuda.max_memory_allocated() - before) / 1e6, 1)


def ours(size: int, backbone: str, boundary: str, kind: str, graphs: bool, device: str) -> dict[str, Any]:
    """Update, acting of 8 environments and training steps per second of one arm."""
    frozen_dtype, amp, _ = PRECISIONS[kind]
    extractor = {"backbone": backbone, "adapter": "per_frame", "frozen_dtype": frozen_dtype}
    model = model_of("ResNetCnnPolicy", size, device, features_extractor_kwargs=extractor)
    model.policy.set_freeze_boundary(BOUNDARIES[boundary])
    model.policy.online.features_extractor.encoder.uses_graphs = graphs
    callbacks: list[Any] = [] if boundary == "everything" else [FeatureCacheCallback()]
    callbacks += [AMPCallback(amp)] if amp is not None and boundary != "frozen" else []
    with precision(kind):
        start(callbacks, model)
        train = lambda: model.train(1, BATCH)  # noqa: E731  # one line, used twice
        observations = np.stack([model.observation_space.sample() for _ in range(8)])
        found = {
            "update ms": milliseconds(train, device),
            "act ms": milliseconds(lambda: model.predict(observations, deterministic=True), device),
            "peak MB": peak_megabytes(train, device),
        }
        for callback in callbacks:
            callback.on_training_end()
        found["steps per second"] = steps_per_second(model, callbacks, device)
    return found


def peer(name: str, size: int, device: str) -> dict[str, Any]:
    """The same of what people use without this package."""
    policy_kwargs: dict[str, Any] = {}
    if name != "nature":
        frozen = name == "recipe, frozen"
        policy_kwargs = {"features_extractor_class": Recipe, "features_extractor_kwargs": {"frozen": frozen}}
        policy_kwargs["net_arch"] = [256]
    model = model_of("CnnPolicy", size, device, **policy_kwargs)
    observations = np.stack([model.observation_space.sample() for _ in range(8)])
    train = lambda: model.train(1, BATCH)  # noqa: E731  # one line, used twice
    return {
        "update ms": milliseconds(train, device),
        "act ms": milliseconds(lambda: model.predict(observations, deterministic=True), device),
        "peak MB": peak_megabytes(train, device),
        "steps per second": steps_per_second(model, [], device),
    }


def steps_per_second(model: DQN, callbacks: list[Any], device: str) -> float:
    model.learn(64, callback=callbacks, reset_num_timesteps=False)
    wait(device)
    begin, steps = time.perf_counter(), 160
    model.learn(steps, callback=callbacks, reset_num_timesteps=False)
    wait(device)
    return round(steps / (time.perf_counter() - begin), 1)


def determinism(device: str) -> dict[str, float]:
    """Milliseconds of an update of everything with and without deterministic algorithms."""
    found = {}
    for name, deterministic in (("free", False), ("deterministic", True)):
        sb3_resnet.seed_everything(0, deterministic)
        model = model_of("ResNetCnnPolicy", 84, device)
        model.policy.set_freeze_boundary("all")
        found[name] = milliseconds(lambda: model.train(1, BATCH), device)  # noqa: B023  # called at once
    sb3_resnet.seed_everything(0, False)
    return {**found, "ratio": round(found["deterministic"] / found["free"], 3)}


def tests() -> dict[str, Any]:
    """The tests that are marked for CUDA, in a process of their own."""
    # Files without such a test may import libraries that are not here, such as RL-Zoo.
    files = sorted((ROOT / "tests").glob("test_*.py"))
    marked = [str(file) for file in files if "pytest.mark.cuda" in file.read_text(encoding="utf-8")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", *marked]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    tail = done.stdout.replace(f"{ROOT}/", "").strip().splitlines()[-12:]
    return {"passed": done.returncode == 0, "exit status": done.returncode, "tail": tail}


def arms(smoke: bool) -> list[tuple[str, Callable[[str], dict[str, Any]]]]:
    """What is measured, the most telling first."""
    if smoke:
        return [
            ("nature 84", lambda device: peer("nature", 36, device)),
            ("resnet18 84 frozen float32", lambda device: ours(36, "resnet18", "frozen", "float32", False, device)),
            ("resnet18 84 layer4 bfloat16", lambda device: ours(36, "resnet18", "layer4", "bfloat16", False, device)),
        ]
    found: list[tuple[str, Callable[[str], dict[str, Any]]]] = []
    for size in (84, 224):
        for name in ("nature", "recipe, frozen", "recipe, everything"):
            found.append((f"{name} {size}", lambda device, n=name, s=size: peer(n, s, device)))
        for backbone in ("resnet18", "resnet50"):
            for boundary in BOUNDARIES:
                for kind in PRECISIONS:
                    for graphs in (False, True) if boundary != "everything" else (False,):
                        name = f"{backbone} {size} {boundary} {kind}{' graphs' * graphs}"
                        arguments = (size, backbone, boundary, kind, graphs)
                        found.append((name, lambda device, a=arguments: ours(*a, device)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--minutes", type=float, default=4.0, help="after which no other arm is begun")
    parser.add_argument("--smoke", action="store_true", help="three small arms and no tests")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not th.cuda.is_available():
        sys.exit("PyTorch finds no GPU. Write --device cpu --smoke to see that the program runs.")
    warnings.simplefilter("ignore")
    end = time.perf_counter() + 60 * arguments.minutes
    result: dict[str, Any] = {
        "command": "python benchmarks/gpu.py",
        "device": th.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "torch": th.__version__,
        "cuda": th.version.cuda,
        "batch": BATCH,
        "tests": None if arguments.smoke else tests(),
        "arms": {},
        "left out": [],
    }
    for name, measure in arms(arguments.smoke):
        if time.perf_counter() > end - 10:
            result["left out"].append(name)
            continue
        try:
            result["arms"][name] = measure(arguments.device)
        except RuntimeError as error:  # one arm that fails must not cost the others
            result["arms"][name] = {"error": " ".join(str(error).split())[:300]}
        print(f"{name:<40} {result['arms'][name]}", flush=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    if not arguments.smoke:
        result["determinism"] = determinism(arguments.device)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("tests", "left out") if result[key]}, indent=1))
    failed = result["tests"] is not None and not result["tests"]["passed"]
    sys.exit(int(failed or any("error" in found for found in result["arms"].values())))


if __name__ == "__main__":
    main()
