"""
A small model of data-parallel training: from which phase and batch on more ranks pay, up to 1,000.

python benchmarks/scaling.py    # seconds; writes benchmarks/results/scaling.json and prints its tables

A rank collects ``steps`` environment steps, makes one update on a batch of ``batch``, and sums gradients with the
others. Its time per update is

    T(W) = collect + update + wait(W) + sum(W)
    collect = steps / rate                          rate: environment steps per second without updates
    update  = batch / 32 * update of batch 32       by phase
    wait    = spread * collect * sqrt(2 ln W)       the slowest of W ranks, whose rollouts vary by ``spread``
    sum     = hops(W) * latency * messages + 2 (W - 1) / W * bytes / bandwidth

with ``bytes`` those of the parameters that train, and ``hops`` those of the algorithm: 2 (W - 1) for the ring that gloo
uses, 2 log2(W) for NCCL's trees. Times of collecting and updating are measured: ``results/throughput.json``. Links are
assumptions, in ``LINKS``. A learner ``faster`` times as fast stands for a GPU.

Throughput is not learning. With batches of W * batch an update is worth more, but not W times as much: to reach the
same return takes ``1 + noise / batch`` times the least number of updates (arXiv 1812.06162), where ``noise`` is the
gradient's noise scale, in transitions. It is not known for a game beforehand; the tables are for ``NOISE``.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
RANKS = (1, 2, 4, 8, 16, 64, 256, 1000)
BATCHES = (32, 128, 512)
NOISE = 512
SPREAD = 0.1
#: Environment steps per update of one rank: four steps in each of four environments.
STEPS = 16
#: Messages of an update whose size does not matter: statistics of features, and the meeting after the rollout.
SHORT_MESSAGES = 2


class Link(NamedTuple):
    """A network between ranks: bytes per second, seconds of a hop, and whether NCCL's trees or gloo's ring cross it."""

    bandwidth: float
    latency: float
    trees: bool


class Phase(NamedTuple):
    """What one update of a phase takes and sends."""

    update: float
    size: int


LINKS = {
    "1 Gbit/s, gloo": Link(0.11e9, 100e-6, False),
    "10 Gbit/s, gloo": Link(1.1e9, 50e-6, False),
    "100 Gbit/s, NCCL": Link(11e9, 20e-6, True),
    "NVLink, NCCL": Link(200e9, 10e-6, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, default=NOISE, help="the gradient's noise scale, in transitions")
    arguments = parser.parse_args()
    measured = json.loads((RESULTS / "throughput.json").read_text())
    rate = measured["environment steps per second"]["one update per 4 steps"]["8"]["median"]["limit"]
    sizes = bytes_by_phase()
    updates = measured["update, milliseconds"]["median"]
    phases = {
        "A (head)": Phase(updates["ours, head"] / 1e3, sizes["head"]),
        "B (layer4)": Phase(updates["ours, layer4"] / 1e3, sizes["layer4"]),
        "C (everything)": Phase(updates["ours, everything"] / 1e3, sizes["stem"]),
    }
    found = {
        "assumptions": {
            "links": {name: link._asdict() for name, link in LINKS.items()},
            "environment steps per second of a rank, without updates": rate,
            "spread of rollouts": SPREAD,
            "noise scale, transitions": arguments.noise,
            "environment steps per update": STEPS,
        },
        "bytes per update": {name: phase.size for name, phase in phases.items()},
        "this CPU": tables(phases, rate, 1.0, arguments.noise),
        "a learner 50 times as fast": tables(phases, rate, 50.0, arguments.noise),
        "check": check(sizes, STEPS / rate),
    }
    (RESULTS / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    show(found)


def bytes_by_phase() -> dict[str, int]:
    """:return: bytes of the parameters that train, of ResNet-18 with a head of 256 units for six actions"""
    import numpy as np
    from gymnasium import spaces
    from stable_baselines3 import DQN
    from stable_baselines3.common.envs import FakeImageEnv

    import sb3_resnet  # noqa: F401  # registers the policy

    env = FakeImageEnv(screen_height=84, screen_width=84, n_channels=4, channel_first=True, discrete=True)
    env.action_space = spaces.Discrete(6)
    env.observation_space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    extractor = {"pooling": "spatial_softmax", "pretrained": False}
    options = {"buffer_size": 10, "device": "cpu", "policy_kwargs": {"features_extractor_kwargs": extractor}}
    policy: Any = DQN("ResNetCnnPolicy", env, **options).policy
    sizes = {}
    for name, stage in (("head", None), ("layer4", "layer4"), ("stem", "all")):
        policy.set_freeze_boundary(stage)
        sizes[name] = sum(p.numel() * p.element_size() for p in policy.q_net.parameters() if p.requires_grad)
    return sizes


def seconds_of_sums(ranks: int, size: int, link: Link) -> float:
    """:return: time of the messages of one update"""
    if ranks == 1:
        return 0.0
    hops = 2 * math.log2(ranks) if link.trees else 2 * (ranks - 1)
    return hops * link.latency * (1 + SHORT_MESSAGES) + 2 * (ranks - 1) / ranks * size / link.bandwidth


def seconds_per_update(ranks: int, phase: Phase, batch: int, rate: float, faster: float, link: Link) -> float:
    """:return: time of a rank from one update to the next"""
    collect = STEPS / rate
    wait = SPREAD * collect * math.sqrt(2 * math.log(ranks))
    return collect + phase.update * batch / 32 / faster + wait + seconds_of_sums(ranks, phase.size, link)


def speed_up(ranks: int, *setting: Any) -> float:
    """:return: environment steps per second of all ranks, relative to one"""
    return ranks * seconds_per_update(1, *setting) / seconds_per_update(ranks, *setting)


def learning_speed_up(ranks: int, noise: float, phase: Phase, batch: int, *setting: Any) -> float:
    """:return: how many times sooner the same return is reached"""
    fewer = (1 + noise / batch) / (1 + noise / (ranks * batch))
    return fewer * seconds_per_update(1, phase, batch, *setting) / seconds_per_update(ranks, phase, batch, *setting)


def tables(phases: dict[str, Phase], rate: float, faster: float, noise: float) -> dict[str, Any]:
    """:return: by phase, link and batch: the speed-ups, and the number of ranks beyond which nothing is gained"""
    found: dict[str, Any] = {}
    for name, phase in phases.items():
        for link_name, link in LINKS.items():
            for batch in BATCHES:
                setting = (phase, batch, rate, faster, link)
                learning = {ranks: learning_speed_up(ranks, noise, *setting) for ranks in RANKS}
                best = max(learning, key=lambda ranks: learning[ranks])
                found.setdefault(name, {}).setdefault(link_name, {})[f"batch {batch}"] = {
                    "steps": {str(ranks): round(speed_up(ranks, *setting), 2) for ranks in RANKS},
                    "learning": {str(ranks): round(value, 2) for ranks, value in learning.items()},
                    "most ranks that gain": best,
                    # A second rank in a search of independent runs is worth a whole one.
                    "a second machine pays": learning[2] >= 1.5,
                }
    return found


def check(sizes: dict[str, int], collect: float) -> dict[str, Any] | str:
    """:return: what the model says of two ranks on this machine, from one rank's time, beside what was measured"""
    path = RESULTS / "data_parallel.json"
    if not path.exists():
        return "run benchmarks/data_parallel.py first"
    measured = json.loads(path.read_text())
    link = Link(measured["link"]["bytes_per_second"], measured["link"]["seconds_of_a_hop"], False)
    found = {}
    for phase, size in (("A", sizes["head"]), ("B", sizes["layer4"])):
        one, two = measured["phases"][phase]["one_rank"], measured["phases"][phase]["two_ranks"]
        alone = one["seconds_per_update"]
        wait = SPREAD * collect * math.sqrt(2 * math.log(2))
        predicted = 2 * alone / (alone + wait + seconds_of_sums(2, size, link))
        found[phase] = {
            "speed-up of two ranks, model": round(predicted, 2),
            "measured": measured["phases"][phase]["speed_up"],
            "bytes per update, model": size,
            "bytes per update, measured": round(two["bytes_per_update"]),
        }
    return found


def show(found: dict[str, Any]) -> None:
    print("bytes per update:", found["bytes per update"])
    for machine in ("this CPU", "a learner 50 times as fast"):
        print(f"\n{machine}: how many times sooner the same return is reached, with 2, 8, 64 and 1000 ranks")
        for phase, links in found[machine].items():
            for link, batches in links.items():
                cells = [
                    f"{batch}: " + " / ".join(str(values["learning"][ranks]) for ranks in ("2", "8", "64", "1000"))
                    for batch, values in batches.items()
                ]
                print(f"  {phase}, {link}: {'; '.join(cells)}")
    print("\ncheck:", found["check"])


if __name__ == "__main__":
    main()
