"""Build the model that a training command would train, with a replay buffer of a few rows."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from gymnasium import spaces

from sb3_resnet.callbacks._evaluations import walk
from sb3_resnet.cli import envs
from sb3_resnet.cli.extras import import_extra
from sb3_resnet.cli.loading import algorithm_class, read_device
from sb3_resnet.cli.texts import one_line
from sb3_resnet.cli.zoo_code import refuse_code
from sb3_resnet.common.arguments import shown
from sb3_resnet.optim.policy import DICT_POLICY_NAME, POLICY_NAME

#: Algorithms that :func:`from_arguments` builds.
ALGORITHMS = ("dqn", "qrdqn", "ppo", "a2c")
Callback = TypeVar("Callback")
_TIMESTEPS = 1_000_000
_ROWS = 8  # rows of the small replay buffer, per environment
_HER_ROWS = 256  # HerReplayBuffer samples whole episodes: all rows are kept that are played in a trial


@dataclass(frozen=True)
class Arguments:
    """
    Hyperparameters that go before those of a configuration file.

    :param model: arguments of the algorithm, such as ``batch_size``
    :param policy: ``policy_kwargs``
    :param extractor: ``features_extractor_kwargs``
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)
    extractor: Mapping[str, Any] = field(default_factory=dict)

    def onto(self, hyperparams: Mapping[str, Any]) -> dict[str, Any]:
        """
        :param hyperparams: hyperparameters of the configuration file
        :return: those that replace some of them
        """
        model = dict(self.model)
        if isinstance(model.get("replay_buffer_class"), str):
            model["replay_buffer_class"] = envs.class_of("replay_buffer_class", model["replay_buffer_class"])
        if not self.policy and not self.extractor:
            return model
        given = hyperparams.get("policy_kwargs") or {}
        if not isinstance(given, Mapping):
            raise ValueError(
                "policy_kwargs is Python code in the configuration: write it as a dict to change parts of it"
            )
        policy = {**given, **self.policy}
        policy["features_extractor_kwargs"] = {**(policy.get("features_extractor_kwargs") or {}), **self.extractor}
        return {**model, "policy_kwargs": policy}


@dataclass
class Setup:
    """
    A model as it will be trained, except that its replay buffer has a few rows.

    :param model: the model
    :param total_timesteps: environment steps of the run
    :param buffer_size: number of transitions that its replay buffer would hold; ``None`` if it has no replay buffer
    :param callbacks: callbacks of the configuration
    :param warnings: warnings during construction
    :param from_yaml: whether the arguments are written in RL-Zoo's YAML
    """

    model: Any
    total_timesteps: int
    buffer_size: int | None
    callbacks: Sequence[Any] = ()
    warnings: list[str] = field(default_factory=list)
    from_yaml: bool = False

    @property
    def all_callbacks(self) -> list[Any]:
        """The callbacks, and those inside lists of callbacks."""
        return [child for callback in self.callbacks for child in walk(callback)]

    def callback(self, kind: type[Callback]) -> Callback | None:
        """
        :param kind: class of the callback
        :return: the first callback of this class, or ``None``
        """
        return next((callback for callback in self.all_callbacks if isinstance(callback, kind)), None)


def from_zoo(
    conf_file: str | Path,
    env_id: str,
    algo: str = "dqn",
    arguments: Arguments | None = None,
    total_timesteps: int = 0,
    device: str = "auto",
    trust: bool = False,
) -> Setup:
    """
    Build what RL-Zoo would train with a configuration; RL-Zoo itself reads it.

    :param conf_file: YAML of RL-Zoo, by algorithm
    :param env_id: id of the environment, which chooses the section
    :param algo: name of the algorithm, as for RL-Zoo
    :param arguments: hyperparameters to replace
    :param total_timesteps: environment steps of the run; 0: the section's ``n_timesteps``
    :param device: device of the model
    :param trust: also run code that the configuration holds or names
    :return: the set-up
    :raises ValueError: if the configuration would run code without it, or cannot be read or built, with the reason in
        one line
    """
    sections = read_sections(conf_file)
    device = read_device(device)
    manager = import_extra("rl_zoo3.exp_manager", "zoo")
    algorithms = import_extra("rl_zoo3.utils", "zoo").ALGOS
    if algo not in algorithms:
        raise ValueError(f"--algo {algo} is none of RL-Zoo's algorithms: {', '.join(sorted(algorithms))}")
    envs.is_atari(env_id)  # raises where RL-Zoo would fail with a KeyError

    with tempfile.TemporaryDirectory() as folder, _quiet() as caught:
        # A copy of what was read as YAML: RL-Zoo runs files whose name ends otherwise, and imports what is no file.
        config = Path(folder) / "config.yml"
        config.write_text(import_extra("yaml").safe_dump(sections))

        def experiment(**replaced: Any) -> Any:
            options = {"n_timesteps": total_timesteps, "eval_freq": -1, "device": device, "verbose": 0}
            return manager.ExperimentManager(
                argparse.Namespace(), algo, env_id, folder, hyperparams=replaced, config=str(config), **options
            )

        try:
            hyperparams, _ = experiment().read_hyperparameters()
        except KeyError as error:
            raise ValueError(f"{conf_file} has no section for {env_id}: it needs {env_id!r} or {error}") from error
        if not trust:
            refuse_code(hyperparams, conf_file)
        changes = (arguments or Arguments()).onto(hyperparams)
        hyperparams = {**hyperparams, **changes}
        if "n_timesteps" not in hyperparams:
            raise ValueError(f"{conf_file} has no n_timesteps for {env_id}: write it, RL-Zoo wants it even beside -n")
        _refuse_bad_counts(hyperparams)
        small, buffer_size = _small_buffer(algorithms[algo], hyperparams, hyperparams.get("n_envs", 1))
        final = experiment(**{**changes, **small})
        model, _ = final.setup_experiment()
        return Setup(model, final.n_timesteps, buffer_size, final.callbacks, caught, from_yaml=True)


def from_arguments(
    env_id: str,
    algo: str = "dqn",
    arguments: Arguments | None = None,
    total_timesteps: int = 0,
    device: str = "auto",
    n_envs: int = 1,
    wrapper: str | None = None,
) -> Setup:
    """
    Build what a script would train: ``DQN("ResNetCnnPolicy", env, ...)``.

    :param env_id: id of the environment, wrapped as :func:`~sb3_resnet.cli.envs.make_env` does
    :param algo: one of :data:`ALGORITHMS`
    :param arguments: hyperparameters other than the defaults
    :param total_timesteps: environment steps of the run; 0: a million
    :param device: device of the model
    :param n_envs: number of environments
    :param wrapper: dotted path of a wrapper class
    :return: the set-up
    :raises ValueError: if it cannot be built
    """
    if algo not in ALGORITHMS:
        raise ValueError(f"--algo must be one of {', '.join(ALGORITHMS)}, got {shown(algo)}; others need a --conf-file")
    device = read_device(device)
    algorithm: Any = algorithm_class(algo)
    kwargs = (arguments or Arguments()).onto({})
    _refuse_bad_counts(kwargs)
    small, buffer_size = _small_buffer(algorithm, kwargs, n_envs)
    with _quiet() as caught:
        env = envs.make_env(env_id, n_envs, 0, None, wrapper)
        policy = DICT_POLICY_NAME if isinstance(env.observation_space, spaces.Dict) else POLICY_NAME
        model = algorithm(policy, env, **{**kwargs, **small, "device": device})
        return Setup(model, total_timesteps or _TIMESTEPS, buffer_size, (), caught)


def read_sections(conf_file: str | Path) -> dict[str, Any]:
    """
    :param conf_file: YAML of RL-Zoo
    :return: its sections by environment
    :raises FileNotFoundError: if it is not there
    :raises ValueError: if it is not such YAML
    """
    yaml = import_extra("yaml")
    path = Path(conf_file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: write the path of an RL-Zoo YAML such as zoo_configs/dqn.yml")
    try:
        sections = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {one_line(error)}") from error
    if not isinstance(sections, dict) or not all(isinstance(values, dict) for values in sections.values()):
        raise ValueError(f"{path} is no configuration of RL-Zoo: it must hold sections of hyperparameters")
    return sections


def _refuse_bad_counts(hyperparams: Mapping[str, Any]) -> None:
    """SB3 takes whole numbers only; with others it fails late, in a place that does not name them."""
    for name in ("n_envs", "batch_size", "buffer_size"):
        value = hyperparams.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be a whole number, with neither point nor exponent, got {shown(value)}")
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")


def _small_buffer(algorithm: type, hyperparams: Mapping[str, Any], n_envs: int) -> tuple[dict[str, Any], int | None]:
    """:return: arguments that keep the replay buffer small, and the size that was asked for"""
    parameter = inspect.signature(algorithm).parameters.get("buffer_size")
    if parameter is None:
        return {}, None
    samples_episodes = "HerReplayBuffer" in str(hyperparams.get("replay_buffer_class"))  # a class, or a text of YAML
    rows = max(_HER_ROWS if samples_episodes else 0, _ROWS * n_envs)
    return {"buffer_size": rows}, hyperparams.get("buffer_size", parameter.default)


@contextlib.contextmanager
def _quiet() -> Iterator[list[str]]:
    """Hide what other libraries print, and collect their warnings in the list."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        yield found
    # Gymnasium's warnings are about its own API, such as an environment without a render mode.
    found += [
        one_line(entry.message)
        for entry in caught
        if isinstance(entry.message, Warning) and "gymnasium" not in Path(entry.filename).parts
    ]
