"""
Which ``feature_norm`` suits a frozen ResNet-18 with random weights on Pong?

ALE Pong is played once and encoded once by each trunk; then heads train on the stored features, so that nothing but
the norm differs between arms: same data, same initial weights, same batches.

- A, policy evaluation: regress the discounted return; score: explained variance on held-out streams.
- B, fitted Q as DQN does it (target network, Huber, clipped gradients): score: correlation of ``max_a Q`` with the
  observed discounted return on held-out streams.

The rule, fixed before the first run: cells are A at each learning rate and B; in each, arms are ranked by the median
score over runs. The best arm has the lowest mean rank (ties: the higher median in the first cell). It is "clear" if
it also scores higher than each other arm in at least 80 % of the paired runs of all cells together.

Added after the first run, beside the rule and not part of it: the same scores without *padded* observations, the
three after a reset whose frame stack still holds empty frames. They are 0.2 % of the data, far from all others, and
six of 2,320 were nearly half of one held-out error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecFrameStack
from torch import nn
from torch.nn import functional as F

from sb3_resnet import ResNetExtractor
from sb3_resnet.nn.heads import FEATURE_NORMS, make_head
from sb3_resnet.optim.groups import build_optimizer

STREAMS = 8  # environments; each run holds out two whole ones, so no frame has a neighbour on the other side
EPSILON = 0.5
GAMMA = 0.95  # a point is played about every 80 steps, so a return looks at one point
TAIL = 90  # the last returns of a stream are cut off, so they are left out: 0.95 ** 90 = 1 %
RATES = (1e-4, 1e-3)
TARGET_EVERY = 500
COLUMNS = ("actions", "rewards", "dones", "padded", "returns")

Data = dict[str, th.Tensor]


def collect(steps: int) -> dict[str, np.ndarray]:
    """Play Pong: half random, half a script that moves the paddle to the ball, so that points go both ways."""
    gym.register_envs(ale_py)
    envs = VecFrameStack(make_atari_env("PongNoFrameskip-v4", STREAMS, seed=0), 4)
    ales = [env.unwrapped.ale for env in envs.unwrapped.envs]
    rng = np.random.default_rng(0)
    rows: list[tuple[np.ndarray, ...]] = []
    observations = envs.reset()
    for _ in range(steps // STREAMS):
        ram = np.array([ale.getRAM() for ale in ales]).astype(int)
        follow = np.where(ram[:, 54] < ram[:, 51] + 8, 2, 3)  # ball above the paddle's middle: up, else down
        actions = np.where(rng.random(STREAMS) < EPSILON, rng.integers(envs.action_space.n, size=STREAMS), follow)
        before = observations.transpose(0, 3, 1, 2)
        observations, rewards, dones, _ = envs.step(actions)
        padded = ~before.any(axis=(2, 3)).all(axis=1)
        rows.append((before, actions, rewards, dones.astype(np.float32), padded, np.zeros_like(rewards)))
    envs.close()
    data = dict(zip(("observations", *COLUMNS), map(np.stack, zip(*rows, strict=True)), strict=True))
    following = np.zeros(STREAMS, dtype=np.float32)
    for step in reversed(range(len(rows))):
        following = data["rewards"][step] + GAMMA * (1.0 - data["dones"][step]) * following
        data["returns"][step] = following
    return data


@th.no_grad()
def encode(observations: np.ndarray, trunk: int) -> th.Tensor:
    """:return: features ``(steps, streams, 512)`` of the frozen random trunk with that seed"""
    th.manual_seed(trunk)
    extractor = ResNetExtractor(spaces.Box(0, 255, observations.shape[2:], np.uint8)).eval()
    extractor = extractor.to(memory_format=th.channels_last)
    flat = th.from_numpy(observations).flatten(0, 1)
    # SB3 divides uint8 images by 255 before the extractor.
    features = th.cat([extractor(images.float() / 255.0) for images in flat.split(64)])
    return features.reshape(*observations.shape[:2], -1)


def split(data: dict[str, np.ndarray], features: th.Tensor, run: int) -> tuple[Data, Data]:
    """:return: transitions of six training streams and of two held-out ones, which rotate with the run"""
    held_out = [(2 * run) % STREAMS, (2 * run + 1) % STREAMS]
    parts = []
    for streams in ([i for i in range(STREAMS) if i not in held_out], held_out):
        part = {name: th.from_numpy(data[name][:-TAIL, streams]) for name in COLUMNS}
        part["features"] = features[:-TAIL, streams]
        part["next"] = features[1 : 1 - TAIL, streams]  # after a done another game's, which the target masks
        parts.append({name: value.flatten(0, 1) for name, value in part.items()})
    return parts[0], parts[1]


def fit(
    arm: str, train: Data, outputs: int, lr: float, seed: int, updates: int, loss_of: Callable[..., th.Tensor]
) -> tuple[nn.Module, list[float]]:
    """Train a head as SB3's DQN does; ``loss_of`` gets it, the number of the update and a batch's indices."""
    th.manual_seed(1000 + seed)  # the norms draw no random numbers: all arms begin with the same weights
    head = make_head(train["features"].shape[1], outputs, [256], feature_norm=arm)
    # fused: the same AdamW in fewer calls
    parts = {"head": list(head.parameters())}
    optimizer = build_optimizer(th.optim.AdamW, parts, lr, {"head": 1.0}, weight_decay=1e-4, fused=True)
    rng = np.random.default_rng(seed)
    losses = []
    for update in range(updates):
        loss = loss_of(head, update, th.from_numpy(rng.integers(len(train["returns"]), size=32)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parts["head"], 10.0)
        optimizer.step()
        losses.append(loss.item())
    return head.eval(), losses


def evaluate_policy(arm: str, train: Data, test: Data, lr: float, seed: int, updates: int) -> dict[str, float]:
    def loss_of(head: nn.Module, _: int, index: th.Tensor) -> th.Tensor:
        return F.mse_loss(head(train["features"][index])[:, 0], train["returns"][index])

    head, _ = fit(arm, train, 1, lr, seed, updates, loss_of)
    with th.no_grad():
        on_test, on_train = (score(explained, head(part["features"])[:, 0], part) for part in (test, train))
    return {**on_test, **{f"train_{name}": value for name, value in on_train.items()}}


def fitted_q(arm: str, train: Data, test: Data, lr: float, seed: int, updates: int) -> dict[str, float]:
    goal = th.empty(0)

    def loss_of(head: nn.Module, update: int, index: th.Tensor) -> th.Tensor:
        nonlocal goal
        if update % TARGET_EVERY == 0:  # a new target network; its values stay until the next one: all at once
            goal = td_target(deepcopy(head).eval(), train)
        q = head(train["features"][index]).gather(1, train["actions"][index, None])[:, 0]
        return F.smooth_l1_loss(q, goal[index])

    head, losses = fit(arm, train, int(train["actions"].max()) + 1, lr, seed, updates, loss_of)
    late = np.array(losses[-updates // 4 :])
    with th.no_grad():
        q, goal = head(test["features"]), td_target(head, test)
    values = q.max(dim=1).values
    error = q.gather(1, test["actions"][:, None])[:, 0] - goal
    return {
        **score(correlation, values, test),
        "explained_variance_unpadded": score(explained, values, test)["score_unpadded"],
        "td_error_over_target_variance": float(error.square().mean() / goal.var()),
        "late_loss_median": float(np.median(late)),
        "late_loss_p99_over_median": float(np.quantile(late, 0.99) / np.median(late)),
        "largest_q": float(q.abs().max()),
        "largest_q_unpadded": float(q[~test["padded"]].abs().max()),
    }


@th.no_grad()
def td_target(head: nn.Module, data: Data) -> th.Tensor:
    goal: th.Tensor = data["rewards"] + GAMMA * (1.0 - data["dones"]) * head(data["next"]).max(dim=1).values
    return goal


def score(metric: Callable[..., float], prediction: th.Tensor, data: Data) -> dict[str, float]:
    usual = ~data["padded"]
    on_usual = metric(prediction[usual].numpy(), data["returns"][usual].numpy())
    return {"score": metric(prediction.numpy(), data["returns"].numpy()), "score_unpadded": on_usual}


def explained(prediction: np.ndarray, returns: np.ndarray) -> float:
    return float(explained_variance(prediction, returns))


def correlation(prediction: np.ndarray, returns: np.ndarray) -> float:
    return float(np.corrcoef(prediction, returns)[0, 1]) if prediction.std() > 0 else 0.0


def ridge(train: Data, test: Data) -> dict[str, float]:
    """:return: held-out explained variance of ridge regression: what is linearly in the features, without SGD"""
    mean, std = train["features"].mean(dim=0), train["features"].std(dim=0) + 1e-6
    x = (train["features"] - mean) / std
    gram = x.T @ x + 0.01 * len(x) * th.eye(x.shape[1])
    weights = th.linalg.solve(gram, x.T @ (train["returns"] - train["returns"].mean()))
    return score(explained, (test["features"] - mean) / std @ weights, test)


def verdict(runs: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """Apply the rule of this file's docstring to the scores of that name."""
    scores: dict[str, dict[str, list[float]]] = {row["cell"]: {arm: [] for arm in FEATURE_NORMS} for row in runs}
    for row in runs:
        scores[row["cell"]][row["arm"]].append(row[key])
    table = {c: {a: np.quantile(v, (0.25, 0.5, 0.75)).tolist() for a, v in arms.items()} for c, arms in scores.items()}
    rank = {
        arm: float(np.mean([1 + sum(other[1] > row[arm][1] for other in row.values()) for row in table.values()]))
        for arm in FEATURE_NORMS
    }
    best = min(FEATURE_NORMS, key=lambda arm: (rank[arm], -next(iter(table.values()))[arm][1]))
    wins = {
        arm: float(np.mean([x > y for c in scores.values() for x, y in zip(c[best], c[arm], strict=True)]))
        for arm in FEATURE_NORMS
        if arm != best
    }
    clear = min(wins.values()) >= 0.8
    return {"quartiles": table, "mean_rank": rank, "best": best, "paired_wins_of_best_over": wins, "clear": clear}


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    data = collect(args.steps)
    splits: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    for run in range(args.trunks * args.seeds):
        trunk = run // args.seeds
        if run % args.seeds == 0:
            features = encode(data["observations"], trunk)
        stds = features.flatten(0, 1).std(dim=0).quantile(th.tensor([0.05, 0.5, 0.95])).tolist()
        train, test = split(data, features, run)
        split_facts = {"ridge": ridge(train, test), "return_std": test["returns"].std().item()}
        split_facts |= {"feature_mean": features.mean().item(), "feature_std_q5_q50_q95": stds}
        splits.append({"run": run, "trunk": trunk, **split_facts})
        for task, lr in [*(("A", lr) for lr in RATES), ("B", RATES[0])]:
            for arm in FEATURE_NORMS:
                learn = evaluate_policy if task == "A" else fitted_q
                result = learn(arm, train, test, lr, run, args.updates if task == "A" else args.updates * 4 // 3)
                runs.append({"cell": f"{task}, lr {lr:g}", "arm": arm, "run": run, **result})
        print(f"run {run} of trunk {trunk} done after {time.perf_counter() - args.start:.0f} s", flush=True)
    rewards = {str(value): int((data["rewards"] == value).sum()) for value in (-1, 1)}
    verdicts = {key: verdict(runs, key) for key in ("score", "score_unpadded")}
    facts = {"rewards": rewards, "padded": int(data["padded"].sum())}
    return {"verdicts": verdicts, **facts, "splits": splits, "runs": runs}


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    packages = {name: version(name) for name in ("torch", "stable-baselines3", "ale-py", "numpy")}
    return {"cpu": cpu, "cores": os.cpu_count(), "torch_threads": th.get_num_threads(), **packages}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the feature_norm values of ResNetCnnPolicy on Pong.")
    parser.add_argument("--steps", type=int, default=10_000, help="transitions to collect")
    parser.add_argument("--updates", type=int, default=3_000, help="updates of task A; task B does 4/3 of it")
    parser.add_argument("--trunks", type=int, default=3, help="random trunks, seeded 0, 1, ...")
    parser.add_argument("--seeds", type=int, default=2, help="heads per trunk")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "feature_norm.json")
    args = parser.parse_args()
    args.start = time.perf_counter()
    th.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The backbone is frozen with random weights")
    result = run_all(args)
    settings = {name: getattr(args, name) for name in ("steps", "updates", "trunks", "seeds")}
    settings |= {"epsilon": EPSILON, "gamma": GAMMA, "streams": STREAMS, "tail": TAIL, "target_every": TARGET_EVERY}
    command = " ".join(["python", "benchmarks/feature_norm.py", *sys.argv[1:]])
    head = {"command": command, "machine": machine(), "seconds": round(time.perf_counter() - args.start)}
    args.out.write_text(json.dumps({**head, "settings": settings, **result}, indent=1) + "\n")
    for key, found in result["verdicts"].items():
        print(f"{key:<20}" + "".join(f"{arm:<24}" for arm in FEATURE_NORMS) + "median [quartiles]")
        for cell, row in found["quartiles"].items():
            print(f"{cell:<20}" + "".join(f"{f'{mid:.3f} [{lo:.3f}, {hi:.3f}]':<24}" for lo, mid, hi in row.values()))
        print(f"best: {found['best']}, clear: {found['clear']}, paired wins: {found['paired_wins_of_best_over']}")


if __name__ == "__main__":
    main()
