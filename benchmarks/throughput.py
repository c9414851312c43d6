"""
Speed and memory of a frozen ResNet on real Pong, against NatureCNN and what people write by hand, in one run.

    python benchmarks/throughput.py      # about twenty minutes on two CPU cores

Arms, all DQN, 84x84x4, batch 32, environments of SB3 unless the name says C++:

- nature: SB3's ``CnnPolicy``, which trains its NatureCNN
- recipe: SB3's documentation: adapter and ResNet-18 in a ``BaseFeaturesExtractor``, parameters frozen
- wrapper: the advice of SB3's maintainers: features in a ``VecEnvWrapper``, ``MlpPolicy``; cannot fine-tune
- ours: ``ResNetCnnPolicy`` with its defaults (adapter, layer4, float32), frozen, and ``FeatureCacheCallback``
- lean: the same with each frame alone, up to layer2, ``spatial_softmax`` and ``frozen_dtype="auto"``
- lean C++: the same on ``make_atari_vec_env``
- limit: what lean cannot do without: stepping the environments, encoding each new frame once, and the arithmetic of
  the head's updates on features that lie ready

Arms are interleaved; each figure is the median of the rounds. A ratio is the median of the rounds' own ratios, since
both arms of a round meet the same load of the machine. Results are written as they come.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch as th
from peers import LEAN, FeatureWrapper, at_work, dqn, encoded, filled, head_alone, machine, pong, timed
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from synthetic import Recipe

from sb3_resnet.buffers import FrameReplayBuffer
from sb3_resnet.callbacks import AMPCallback

RESULTS = Path(__file__).parent / "results"
FILLED = 4_000  # transitions in our buffer before the clock starts, all encoded, as after some time of training
#: Environment steps in a round, by arm and number of environments: a second or a few each.
STEPS = {
    "nature": {1: 120, 8: 160, 32: 256},
    "recipe": {1: 24, 8: 48, 32: 64},
    "wrapper": {1: 120, 8: 320, 32: 512},
    "ours": {1: 240, 8: 480, 32: 768},
    "lean": {1: 480, 8: 1600, 32: 2560},
    "lean C++": {1: 480, 8: 1600, 32: 2560},
    "limit": {1: 480, 8: 1600, 32: 2560},
}


def learning(name: str, n_envs: int, ratio: float) -> Callable[[int], Any]:
    """An arm that learns, its buffer filled."""
    if name == "nature":
        model, callback = filled(dqn("CnnPolicy", pong(n_envs), ratio)), None
    elif name == "recipe":
        model, callback = (
            filled(dqn("CnnPolicy", pong(n_envs), ratio, features_extractor_class=Recipe, net_arch=[256])),
            None,
        )
    elif name == "wrapper":
        model, callback = filled(dqn("MlpPolicy", FeatureWrapper(pong(n_envs)), ratio, net_arch=[256])), None
    else:
        extractor = {} if name == "ours" else LEAN
        env = pong(n_envs, cpp=name.endswith("C++"))
        model = filled(dqn("ResNetCnnPolicy", env, ratio, features_extractor_kwargs=extractor), FILLED)
        callback = encoded(model)
    return lambda steps: model.learn(steps, callback=callback, reset_num_timesteps=False)


def limit(n_envs: int, ratio: float) -> Callable[[int], Any]:
    """Steps, one new frame each, and the head's arithmetic, without anything between them."""
    env = pong(n_envs)
    model = dqn("ResNetCnnPolicy", env, ratio, features_extractor_kwargs=LEAN)
    encoder, update = model.policy.online.features_extractor.encoder, head_alone(model)
    env.reset()
    actions = [np.array([env.action_space.sample() for _ in range(n_envs)]) for _ in range(1000)]

    def run(steps: int) -> None:
        done = 0.0
        for step in range(steps // n_envs):
            observations, *_ = env.step(actions[step % 1000])
            encoder(th.as_tensor(np.ascontiguousarray(observations[:, -1:])))
            done += n_envs * ratio
            while done >= 1:
                update()
                done -= 1

    return run


def phase_a(n_envs: int, ratio: float, names: list[str], rounds: int) -> dict[str, Any]:
    """Environment steps per second of each arm, by rounds."""
    work = {name: limit(n_envs, ratio) if name == "limit" else learning(name, n_envs, ratio) for name in names}
    rates: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(rounds + 1):
        for name, run in work.items():
            steps = STEPS[name][n_envs]
            seconds = timed(lambda: run(steps))  # noqa: B023  # called at once
            rates[name] += [steps / seconds] if round_ else []
    return rates


def repeated(work: Callable[[], Any]) -> Callable[[int], Any]:
    return lambda count: [work() for _ in range(count)]


def updates(rounds: int) -> dict[str, list[float]]:
    """Milliseconds of one update: NatureCNN, the recipe, and ours at some boundaries; and the head's arithmetic."""
    arms: dict[str, tuple[Callable[[int], Any], int]] = {}

    def train(model: DQN) -> Callable[[int], Any]:
        return lambda count: model.train(count, 32)

    arms["nature"] = train(filled(dqn("CnnPolicy", pong(1)))), 20
    for name, frozen in (("naive, frozen", True), ("naive, everything", False)):
        extractor = {"features_extractor_class": Recipe, "features_extractor_kwargs": {"frozen": frozen}}
        arms[name] = train(filled(dqn("CnnPolicy", pong(1), net_arch=[256], **extractor))), 4
    for name, stage, count, options in (
        ("ours, head", None, 200, {}),
        ("lean, head", None, 200, LEAN),
        ("ours, layer4", "layer4", 8, {}),
        ("ours, layer4, bfloat16", "layer4", 8, {}),
        ("ours, everything", "all", 4, {}),
        ("ours, everything, bfloat16", "all", 4, {}),
    ):
        model = filled(dqn("ResNetCnnPolicy", pong(1), features_extractor_kwargs=options))
        model.policy.set_freeze_boundary(stage)
        if stage != "all":
            encoded(model)
        if name.endswith("bfloat16"):
            at_work(AMPCallback("bfloat16"), model)
        arms[name] = train(model), count
        if name == "lean, head":
            arms["lean, head's arithmetic"] = repeated(head_alone(model)), 200
    times: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(rounds + 1):
        for name, (run, count) in arms.items():
            seconds = timed(lambda: run(count))  # noqa: B023  # called at once
            times[name] += [1000 * seconds / count] if round_ else []
    return times


def memory(arm: str, transitions: int) -> float:
    """Resident bytes per transition of a buffer with real transitions; ours with all of them encoded."""
    env = pong(8)
    model = dqn("ResNetCnnPolicy", env, features_extractor_kwargs=LEAN)
    model.predict(np.concatenate([env.reset()] * 4))  # what the first pass allocates belongs to the network
    cls = ReplayBuffer if arm == "stock" else FrameReplayBuffer
    model.replay_buffer = cls(8, env.observation_space, env.action_space, "cpu", n_envs=8)
    before = psutil.Process().memory_info().rss
    model.replay_buffer = cls(transitions, env.observation_space, env.action_space, "cpu", n_envs=8)
    model.buffer_size, model.gradient_steps = transitions, 0
    filled(model, transitions)
    if arm == "ours":
        encoded(model)
    return (psutil.Process().memory_info().rss - before) / transitions


def memories(transitions: int) -> dict[str, int]:
    """Of ours and of SB3's, each in a process of its own."""
    return {
        "transitions": transitions,
        "transitions, stock": transitions // 5,
        "lean, pixels and entries": round(in_fresh_process(memory, "ours", transitions)),
        "stock, pixels": round(in_fresh_process(memory, "stock", transitions // 5)),
    }


def in_fresh_process(function: Callable[..., float], *arguments: Any) -> float:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def medians(rounds: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(values), 2) for name, values in rounds.items()}


def ratios(rounds: dict[str, list[float]], pairs: list[tuple[str, str]]) -> dict[str, float]:
    """By pair: the median of the rounds' ratios."""
    return {
        f"{one} to {other}": round(statistics.median(a / b for a, b in zip(rounds[one], rounds[other], strict=True)), 2)
        for one, other in pairs
        if one in rounds and other in rounds
    }


RATE_PAIRS = [
    ("lean", "nature"), ("lean C++", "nature"), ("lean C++", "lean"), ("lean", "limit"), ("lean", "ours"),
    ("ours", "nature"), ("ours", "recipe"), ("ours", "wrapper"), ("lean", "recipe"), ("lean", "wrapper"),
]  # fmt: skip
TIME_PAIRS = [
    ("naive, frozen", "ours, head"), ("naive, everything", "ours, layer4"), ("naive, everything", "ours, everything"),
    ("naive, everything", "ours, layer4, bfloat16"), ("naive, everything", "ours, everything, bfloat16"),
    ("nature", "lean, head"), ("lean, head", "lean, head's arithmetic"),
]  # fmt: skip


def draw(result: dict[str, Any]) -> None:
    """Bars of environment steps per second, one update per 4 steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = result["environment steps per second"]["one update per 4 steps"]
    figure, axes = plt.subplots(figsize=(7, 3))
    arms = ["recipe", "nature", "wrapper", "ours", "lean", "lean C++"]
    for index, arm in enumerate(arms):
        places = [place + 0.14 * index for place in range(len(cells))]
        axes.bar(places, [cell["median"][arm] for cell in cells.values()], 0.13, label=arm)
    axes.set_xticks([place + 0.35 for place in range(len(cells))], [f"{n} environments" for n in cells])
    axes.set(ylabel="environment steps per second")
    axes.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "throughput.png", dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transitions", type=int, default=100_000, help="in the buffers whose memory is measured")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "throughput.json")
    parser.add_argument(
        "--steps-only", type=int, nargs="+", metavar="N", help="NatureCNN, lean and limit at N environments"
    )
    parser.add_argument("--updates-only", action="store_true", help="milliseconds of an update")
    parser.add_argument(
        "--memory-only", action="store_true", help="memory of a transition, which takes no quiet machine"
    )
    arguments = parser.parse_args()
    is_part = arguments.steps_only or arguments.updates_only or arguments.memory_only
    if is_part and arguments.output == RESULTS / "throughput.json":
        parser.error("a part of the measurement would replace the whole file: write -o FILE beside it")
    warnings.simplefilter("ignore")
    rates: dict[str, dict[str, Any]] = {"one update per 4 steps": {}, "one update per step": {}}
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/throughput.py", *sys.argv[1:]]),
        "machine": machine(),
        "rounds": arguments.rounds,
        "environment steps per second": rates,
    }

    def write(name: str, value: Any) -> None:
        print(name, value, flush=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")

    few = ["nature", "lean", "lean C++", "limit"]
    if arguments.steps_only:
        for ratio, label in ((0.25, "one update per 4 steps"), (1.0, "one update per step")):
            for n in arguments.steps_only:
                found = phase_a(n, ratio, few, arguments.rounds)
                rates[label][str(n)] = {"median": medians(found), "ratios": ratios(found, RATE_PAIRS)}
                write(f"{label}, {n} environments", rates[label][str(n)])
        return
    if arguments.memory_only:
        result = {name: result[name] for name in ("command", "machine")}
        result["resident bytes per transition"] = memories(arguments.transitions)
        write("memory", result["resident bytes per transition"])
        return
    times = updates(arguments.rounds)
    result["update, milliseconds"] = {"median": medians(times), "ratios": ratios(times, TIME_PAIRS)}
    write("updates", result["update, milliseconds"])
    if arguments.updates_only:
        return
    for ratio, label, names in ((0.25, "one update per 4 steps", [*STEPS]), (1.0, "one update per step", few)):
        for n in (1, 8, 32):
            found = phase_a(n, ratio, names, arguments.rounds)
            rates[label][str(n)] = {"median": medians(found), "ratios": ratios(found, RATE_PAIRS)}
            write(f"{label}, {n} environments", rates[label][str(n)])
    result["resident bytes per transition"] = memories(arguments.transitions)
    write("memory", result["resident bytes per transition"])
    draw(result)


if __name__ == "__main__":
    main()
