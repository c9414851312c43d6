"""
The one place that touches parts of Optuna which its documentation does not promise.

It imports Optuna, an extra: import it inside functions. Optuna's own heartbeat needs a database, and does not notice
who dies before the first sign of life. Here a journal file has one too, and each process goes by its own clock.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import TrialState

JOURNAL = ".log"  # how RL-Zoo knows a journal file
_BEAT = "sb3_resnet:heartbeat"  # the trial's own attribute
_MISSED = 5  # signs of life that a dead trial has missed
_RETRIES = 2  # after that the values themselves may bring workers down, such as by taking too much memory
_ATTEMPTS = 10


class Watch:
    """
    Says which of several values have not changed for long, by this process's own clock.

    :param seconds: how long
    :param clock: returns seconds
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._seen: dict[Hashable, tuple[Any, float]] = {}

    def unchanged(self, values: Iterable[tuple[Hashable, Any]]) -> list[Any]:
        """
        :param values: keys and values as they are now; others are forgotten
        :return: keys whose values were the same in all calls of so many seconds
        """
        now = self._clock()
        current = dict(values)
        same = {key for key, (value, _) in self._seen.items() if key in current and current[key] == value}
        self._seen = {key: self._seen[key] if key in same else (value, now) for key, value in current.items()}
        return [key for key, (_, since) in self._seen.items() if now - since > self._seconds]


class _Heartbeat(BaseHeartbeat):
    """
    Signs of life of running trials, among the attributes of the trials themselves.

    A trial is dead when others have seen none for long. So clocks of several machines need not agree, and a process
    that is killed before its first sign is noticed as well.
    """

    seconds: int = 30
    _watch: Watch | None = None

    def record_heartbeat(self, trial_id: int) -> None:
        storage: Any = self
        storage.set_trial_system_attr(trial_id, _BEAT, time.time())

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        storage: Any = self
        self._watch = self._watch or Watch(_MISSED * self.seconds)
        running = storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        return self._watch.unchanged((trial._trial_id, trial.system_attrs.get(_BEAT)) for trial in running)

    def get_heartbeat_interval(self) -> int | None:
        return self.seconds

    def get_heartbeat_stale_trial_callback(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=_RETRIES)


class JournalHeartbeatStorage(_Heartbeat, JournalStorage):
    """A journal file whose running trials give signs of life."""


class DatabaseHeartbeatStorage(_Heartbeat, RDBStorage):
    """A database whose running trials give signs of life."""


def is_retry(trial: Any) -> bool:
    """
    :param trial: a frozen trial
    :return: whether it runs the values of a dead one again
    """
    return bool(trial.system_attrs.get("retry_history"))


def open_storage(written: str, heartbeat_seconds: int) -> Any:
    """
    :param written: as in RL-Zoo's ``--storage``: a journal file, whose name ends with ``.log``, or a database's URL
    :param heartbeat_seconds: between two signs of life
    :return: an Optuna storage for a worker
    """
    if written.endswith(JOURNAL):
        Path(written).parent.mkdir(parents=True, exist_ok=True)
        # A worker that dies while it writes holds the lock. It must be broken before the others, who cannot write
        # signs of life, seem to be dead too; Optuna warns of less than three seconds.
        lock = JournalFileSymlinkLock(written, grace_period=max(3, 2 * int(heartbeat_seconds)))
        storage: Any = JournalHeartbeatStorage(JournalFileBackend(written, lock))
    else:
        storage = _database(written)
    storage.seconds = heartbeat_seconds
    return storage


def _database(url: str) -> Any:
    """Workers that begin at the same time may all make the tables: who comes late tries again."""
    from sqlalchemy.exc import SQLAlchemyError

    for attempt in range(_ATTEMPTS):
        try:
            # A search may be idle for longer than a server keeps a connection.
            return DatabaseHeartbeatStorage(url, engine_kwargs={"pool_pre_ping": True})
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            words = {*f"{error} {error.__cause__}".lower().split()}
            if attempt == _ATTEMPTS - 1 or not {"exists", "unique"} & words:
                raise
            time.sleep(random.uniform(0.05, 0.5))
    raise AssertionError("unreachable")


def read_storage(written: str) -> Any:
    """
    :param written: as in :func:`open_storage`
    :return: a storage for somebody who only reads; nothing is made
    :raises FileNotFoundError: if there is no such file
    """
    path = None
    if "://" not in written:
        written = str(path := Path(written).expanduser())
    elif written.startswith("sqlite:///") and ":memory:" not in written:
        path = Path(written.removeprefix("sqlite:///"))
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"{path} is no file: write what --storage had, a journal file or the URL of a database")
    if "://" not in written:
        return JournalStorage(JournalFileBackend(written))
    return RDBStorage(written, skip_table_creation=True, skip_compatibility_check=True)


def fail_the_dead(study: Any) -> None:
    """
    Mark trials without a sign of life as failed, and put their values back into the queue.

    :param study: an Optuna study on a storage of :func:`open_storage`
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
