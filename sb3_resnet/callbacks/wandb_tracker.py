"""SB3's log, the hyperparameters and the best model in Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sb3_resnet.callbacks._tracker import Tracker, TrackerCallback
from sb3_resnet.common.arguments import choice, path_of, shown, text

MODES = ("online", "offline", "disabled")


class WandbTrackerCallback(TrackerCallback):
    """
    Log to Weights & Biases, beside TensorBoard and all other outputs. Example::

        WandbTrackerCallback(project="pong", mode="offline")

    Every line of SB3's log is logged with ``timesteps`` as its axis. The hyperparameters become the run's config, and
    the best model (of ``BestCheckpointCallback``, else of ``EvalCallback``) an artifact. If a run is active already, it
    is used and stays open; otherwise a run is started, and finished at the end of training.

    W&B's own ``WandbCallback`` needs a call of ``wandb.init`` before it, which YAML cannot make, gets its numbers only
    through TensorBoard, and does not know the best model. For histograms of gradients, use both callbacks.

    :param project: name of the project
    :param name: name of the run; ``None``: W&B chooses one
    :param mode: ``"online"``, ``"offline"`` or ``"disabled"``; ``None``: W&B's own setting
    :param folder: where W&B stores its files; ``None``: ``wandb`` in the current folder
    :param init: further arguments of ``wandb.init``, such as ``{"tags": ["resnet"], "group": "seeds"}``
    :param save_best: whether to store the best model with the run
    :param verbose: SB3's verbosity
    :raises ImportError: if wandb is not installed
    :raises TypeError: for wrong types
    :raises ValueError: for an unknown mode and for empty names
    """

    def __init__(
        self,
        project: str = "sb3_resnet",
        name: str | None = None,
        mode: str | None = None,
        folder: str | Path | None = None,
        init: Mapping[str, Any] | None = None,
        save_best: bool = True,
        verbose: int = 0,
    ) -> None:
        super().__init__(save_best, verbose)
        text("project", project)
        if name is not None:
            text("name", name)
        if mode is not None:
            choice("mode", mode, MODES)
        if not (init is None or isinstance(init, Mapping)):
            raise TypeError(f"init must be a dict of arguments of wandb.init, got {shown(init)}")
        self._init = {
            "project": project,
            "name": name,
            "mode": mode,
            "dir": None if folder is None else str(path_of("folder", folder)),
            **(init or {}),
        }
        _wandb()

    def _open(self, hyperparameters: Mapping[str, Any]) -> Tracker:
        wandb = _wandb()
        active = wandb.run
        tracker = _WandbTracker(active or wandb.init(**self._init), owned=active is None)
        tracker.log_hyperparameters(hyperparameters)
        return tracker


class _WandbTracker(Tracker):
    """
    A run of W&B.

    :param run: the run
    :param owned: whether to finish it
    """

    def __init__(self, run: Any, owned: bool) -> None:
        super().__init__("wandb")
        self.run = run
        self._owned = owned
        # W&B's own step must not decrease, but timesteps do in a learn() that resets them.
        run.define_metric("timesteps", hidden=True)
        run.define_metric("*", step_metric="timesteps")

    def log_hyperparameters(self, values: Mapping[str, Any]) -> None:
        self.run.config.update(dict(values), allow_val_change=True)

    def log_numbers(self, values: Mapping[str, float], step: int) -> None:
        self.run.log({**values, "timesteps": step})

    def log_file(self, path: Path) -> None:
        artifact = _wandb().Artifact(f"best-model-{self.run.id}", type="model")
        artifact.add_file(str(path))
        self.run.log_artifact(artifact)

    def close(self) -> None:
        if self._owned:
            self.run.finish()
            self._owned = False


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError("WandbTrackerCallback needs wandb: pip install 'sb3_resnet[wandb]'") from error
    return wandb
