"""An agent of a run as a small file, to look at with ``sb3-resnet watch``, and its card."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3 import DQN

from sb3_resnet.common.files import written_whole

from .arms import ARMS
from .evaluation import evaluate
from .games import suite_of
from .results import cpu_name
from .runs import AGENT, refuse_other_settings
from .spec import Run

#: Bytes that the repository has room for.
LARGEST = 3_000_000
_SEED = 12_345  # of the games that the small file is tried on; no run plays these
# What training needs and playing does not.
_EXCLUDED = ("_last_obs", "_last_original_obs", "_last_episode_starts", "ep_info_buffer", "ep_success_buffer")


def export(run: Run, results: Path, checkpoints: Path, folder: Path) -> Path:
    """
    Write ``<game>-<arm>.zip`` and its card, ``<game>-<arm>.json``.

    Of an agent that is too large there is the card alone, with the command that trains it again.

    :param run: that has ended
    :param results: folder of all results
    :param checkpoints: folder of all checkpoints
    :param folder: where to write
    :return: the agent's file, which ``DQN.load`` reads; its card, if it would be larger than :data:`LARGEST`
    :raises FileNotFoundError: without the run's result or agent
    :raises ValueError: if the result is of another run of this name
    """
    file = checkpoints / run.folder / run.name / AGENT
    result_file = results / run.folder / f"{run.name}.json"
    for needed in (file, result_file):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed} is not there: write first `{run.command}`")
    refuse_other_settings(run, result_file)
    result = json.loads(result_file.read_text())
    small = folder / f"{run.game}-{run.arm}.zip"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        made = Path(place) / small.name
        save_small(DQN.load(file, device="cpu"), made)
        played, content = DQN.load(made, device="cpu"), made.read_bytes()
    returns = evaluate(played, run.suite, run.game, run.arm, run.plan.episodes, _SEED)
    card = _card(run, result, returns, len(content), results)
    if len(content) > LARGEST:
        small.unlink(missing_ok=True)
        card = {"file": f"none, since it is larger than {LARGEST / 1e6:g} MB: see 'trained by'", **card}
    files = [small.with_suffix(".json"), *([small] if len(content) <= LARGEST else [])]
    with written_whole(*files) as (card_file, *agent_files):
        for agent_file in agent_files:
            agent_file.write_bytes(content)
        card_file.write_text(json.dumps(card, indent=1) + "\n")
    return files[-1]


def save_small(model: DQN, path: Path) -> None:
    """
    Save what plays: the online network, its trunk in 16 bits, and nothing that only training needs.

    :param model: is changed, and no longer trains as before
    :param path: of the file
    """
    policy: Any = model.policy
    policy.optimizer.state.clear()
    extractor = policy.q_net.features_extractor
    if hasattr(extractor, "backbone"):
        for parameter in extractor.backbone.parameters():
            parameter.data = parameter.data.half()
    # PyTorch writes a tensor once that two networks share.
    for target, online in zip(policy.q_net_target.parameters(), policy.q_net.parameters(), strict=True):
        target.data = online.data
    model.policy_kwargs = copy.deepcopy(model.policy_kwargs)
    chosen = (model.policy_kwargs or {}).get("features_extractor_kwargs", {})
    if "weights" in chosen:  # the file is not needed, and where it lay is nobody's business
        chosen["weights"] = Path(chosen["weights"]).name
    with path.open("wb") as file:
        model.save(file, exclude=_EXCLUDED)


def _watch(run: Run) -> str:
    """:return: the command that plays it; modules of the suite are found by ``PYTHONPATH``"""
    needs = []
    if run.suite == "minigrid":
        needs += ["--gym-packages minigrid", "--wrapper evidence.games.minigrid_images"]
    if not ARMS[run.arm].is_resnet and ARMS[run.arm].policy != "CnnPolicy":
        needs.append("--trust")
    path = "PYTHONPATH=benchmarks " if needs else ""
    return f"{path}sb3-resnet watch {run.game}-{run.arm}.zip {' '.join(needs)}".rstrip()


def _card(run: Run, result: dict[str, Any], returns: list[float], size: int, results: Path) -> dict[str, Any]:
    place = os.path.relpath(results)
    return {
        "environment": suite_of(run.suite).env_id(run.game),
        "arm": run.arm,
        "steps": run.steps,
        "seed": run.seed,
        "bytes": size,
        "mean return of this file": float(np.mean(returns)),
        "returns of this file": returns,
        "last evaluation of the run": result["last evaluation"],
        "evaluations of the run (step, mean return)": [
            [one["step"], round(float(np.mean(one["returns"])), 2)] for one in result["evaluations"]
        ],
        "trained by": result["command"],
        "watch": _watch(run),
        "written by": f"python benchmarks/atari.py agent {' '.join(run.named_options())} --results {place}",
        "result": f"{place}/{run.folder}/{run.name}.json",
        "pretraining": ((result["settings"].get("trunk") or {}).get("weights") or {}).get("pretraining"),
        "versions": result["versions"],
        "cpu": cpu_name(),
    }
