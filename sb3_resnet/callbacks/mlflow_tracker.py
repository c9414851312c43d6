"""SB3's log, the hyperparameters and the best model in MLflow."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sb3_resnet.callbacks._tracker import Tracker, TrackerCallback
from sb3_resnet.common.arguments import shown, text

_PARAMS_PER_CALL = 100  # MLflow's limits for one call
_METRICS_PER_CALL = 1000


class MLflowTrackerCallback(TrackerCallback):
    """
    Log to MLflow, beside TensorBoard and all other outputs. Example::

        MLflowTrackerCallback(experiment="pong", tracking_uri="sqlite:///mlflow.db")

    Every line of SB3's log is logged with the timestep as its step. The hyperparameters become the run's parameters,
    and the best model (of ``BestCheckpointCallback``, else of ``EvalCallback``) the artifact ``best_model``. Each
    ``learn()`` is a run of its own; MLflow's global active run is not used.

    :param experiment: name of the experiment; it is created if it does not exist
    :param name: name of the run; ``None``: MLflow chooses one
    :param tracking_uri: a server or ``sqlite:///FILE`` (recent MLflow refuses plain folders); ``None``: MLflow's own
        setting
    :param artifact_location: where a new experiment stores files; ``None``: the default of the tracking server
    :param tags: tags of the run
    :param save_best: whether to store the best model with the run
    :param verbose: SB3's verbosity
    :raises ImportError: if MLflow is not installed
    :raises TypeError: for wrong types
    :raises ValueError: for empty strings
    """

    def __init__(
        self,
        experiment: str = "sb3_resnet",
        name: str | None = None,
        tracking_uri: str | None = None,
        artifact_location: str | None = None,
        tags: Mapping[str, str] | None = None,
        save_best: bool = True,
        verbose: int = 0,
    ) -> None:
        super().__init__(save_best, verbose)
        given = {"name": name, "tracking_uri": tracking_uri, "artifact_location": artifact_location}
        for key, value in given.items():
            if value is not None:
                text(key, value)
        if not (tags is None or isinstance(tags, Mapping)):
            raise TypeError(f"tags must be a dict of strings, got {shown(tags)}")
        for key, value in (tags or {}).items():
            text(f"tags: {shown(key)}", value)
        self.experiment = text("experiment", experiment)
        self.name = name
        # Both take paths beside URIs.
        self.tracking_uri = None if tracking_uri is None else os.path.expanduser(tracking_uri)
        self.artifact_location = None if artifact_location is None else os.path.expanduser(artifact_location)
        self.tags = dict(tags or {})
        _mlflow()

    def _open(self, hyperparameters: Mapping[str, Any]) -> Tracker:
        client = _mlflow().MlflowClient(self.tracking_uri)
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            experiment_id = client.create_experiment(self.experiment, self.artifact_location)
        else:
            experiment_id = found.experiment_id
        run = client.create_run(experiment_id, run_name=self.name, tags=self.tags)
        tracker = _MLflowTracker(client, run.info.run_id)
        tracker.log_hyperparameters(hyperparameters)
        return tracker


class _MLflowTracker(Tracker):
    """
    A run of MLflow.

    :param client: client of MLflow
    :param run_id: id of the run
    """

    def __init__(self, client: Any, run_id: str) -> None:
        super().__init__("mlflow")
        self.run_id = run_id
        self._client = client
        self._open = True

    def log_hyperparameters(self, values: Mapping[str, Any]) -> None:
        param = _mlflow().entities.Param
        params = [param(key, str(value)) for key, value in values.items()]
        for start in range(0, len(params), _PARAMS_PER_CALL):
            self._client.log_batch(self.run_id, params=params[start : start + _PARAMS_PER_CALL])

    def log_numbers(self, values: Mapping[str, float], step: int) -> None:
        metric, now = _mlflow().entities.Metric, int(time.time() * 1000)
        metrics = [metric(key, value, now, step) for key, value in values.items()]
        for start in range(0, len(metrics), _METRICS_PER_CALL):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + _METRICS_PER_CALL])

    def log_file(self, path: Path) -> None:
        self._client.log_artifact(self.run_id, str(path), "best_model")

    def close(self) -> None:
        if self._open:
            self._client.set_terminated(self.run_id)
            self._open = False


def _mlflow() -> Any:
    try:
        import mlflow
    except ImportError as error:
        raise ImportError("MLflowTrackerCallback needs MLflow: pip install 'sb3_resnet[mlflow]'") from error
    return mlflow
