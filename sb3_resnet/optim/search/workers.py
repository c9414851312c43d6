"""One of several processes that search in one study: none of its trials is lost, and none run twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sb3_resnet.common import host_zoo
from sb3_resnet.optim.search.experiment import Experiment


class SurplusTrialError(Exception):
    """A trial that was begun although others had begun the last one; nothing of it was run."""


class Worker:
    """
    Runs trials of a study that other processes share.

    :param study: an Optuna study
    :param objective: runs a trial and returns its value
    :param total: trials of all workers together; ``None``: each has its own number
    :param seconds: between two looks at the others
    """

    def __init__(
        self, study: Any, objective: Callable[[Any], float], total: int | None = None, seconds: float = 30
    ) -> None:
        from optuna.trial import TrialState

        self.study, self.objective, self.total, self.seconds = study, objective, total, seconds
        self._waits = False
        self._waiting, self._running = TrialState.WAITING, TrialState.RUNNING
        # Those that RL-Zoo counts for --max-total-trials.
        self._counted = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.PRUNED)

    def run(self, n_trials: int, n_jobs: int = 1) -> None:
        """
        Run this worker's part, then wait for the trials that others run, and run those again whose worker dies.

        :param n_trials: the number of its trials, unless there is a number for all workers
        :param n_jobs: threads
        """
        from optuna.study import MaxTrialsCallback

        if self.total is None:
            self._optimize(n_trials=n_trials, n_jobs=n_jobs)
        elif len(self._trials(self._counted)) < self.total:
            stop = MaxTrialsCallback(self.total, states=self._counted)
            self._optimize(n_jobs=n_jobs, callbacks=[stop])
        self._wait()

    def __call__(self, trial: Any) -> float:
        """
        :param trial: an Optuna trial
        :return: its value
        :raises SurplusTrialError: if others have begun enough trials in the meantime
        """
        from sb3_resnet.common.host_optuna import is_retry

        (frozen,) = (one for one in self._trials() if one.number == trial.number)
        earlier = [one for one in self._trials(self._counted) if one.number < trial.number]
        enough = self._waits or (self.total is not None and len(earlier) >= self.total)
        if enough and not is_retry(frozen):
            raise SurplusTrialError("other workers have begun the last trials")
        return self.objective(trial)

    def _wait(self) -> None:
        from sb3_resnet.common.host_optuna import fail_the_dead, is_retry

        self._waits = True
        watched = {trial.number for trial in self._trials((self._running,))}
        while True:
            fail_the_dead(self.study)
            if any(is_retry(trial) for trial in self._trials((self._waiting,))):
                self._optimize(n_trials=1)
                continue
            running = self._trials((self._running,))
            if not any(self.total is not None or trial.number in watched or is_retry(trial) for trial in running):
                return
            time.sleep(self.seconds)

    def _trials(self, states: Any = None) -> list[Any]:
        found: list[Any] = self.study.get_trials(deepcopy=False, states=states)
        return found

    def _optimize(self, **options: Any) -> None:
        self.study.optimize(self, catch=(SurplusTrialError,), gc_after_trial=True, **options)


def search_with_others(experiment: Experiment, manager: Any) -> None:
    """
    Run this process's trials of a study in a storage that others may share.

    :param experiment: what is searched in
    :param manager: RL-Zoo's ``ExperimentManager``, which then finds the study as it would have left it
    """
    import optuna

    from sb3_resnet.common.host_optuna import open_storage

    seconds = experiment.space.heartbeat_seconds
    sampler, pruner = host_zoo.sampler_and_pruner_of(manager)
    sampler.reseed_rng()  # workers with the same --seed would all try the same values
    study = optuna.create_study(
        sampler=sampler,
        pruner=pruner,
        storage=open_storage(manager.storage, seconds),
        study_name=manager.study_name,
        load_if_exists=True,
        direction="maximize",
    )
    manager.study_name = study.study_name
    print(f"Study {study.study_name} in {manager.storage}, a sign of life every {seconds} s")
    try:
        Worker(study, manager.objective, manager.max_total_trials, seconds).run(manager.n_trials, manager.n_jobs)
    except KeyboardInterrupt:
        print("Stopped: trials of other workers go on")
    manager.max_total_trials = 0  # RL-Zoo has only its report left to write
