"""RL-Zoo's search with our policy: trials run, and a refusal ends the search instead of pruning each trial."""

import argparse
import typing

import gymnasium as gym
import optuna
import pytest
import yaml
from rl_zoo3 import hyperparams_opt
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.callbacks import BaseCallback

from sb3_resnet.callbacks._evaluations import RefusedSetUpError
from sb3_resnet.optim.search.experiment import ATTRIBUTE
from tests.helpers import TinyGame

pytestmark = pytest.mark.slow

ENV = "TinyGame-v0"
SECTION = {
    "policy": "ResNetCnnPolicy",
    "n_timesteps": 24,
    "buffer_size": 100,
    "learning_starts": 8,
    "batch_size": 4,
    "callback": [
        "sb3_resnet.callbacks.FeatureCacheCallback",
        {"sb3_resnet.fine_tuning_callbacks": {"total_timesteps": 24, "monitor_every": 1}},
    ],
}


class Looks(BaseCallback):
    """Keeps what a trial trains; raises an error where it is told to."""

    seen: typing.ClassVar[list] = []

    def __init__(self, error=None):
        super().__init__()
        self.error = error

    def _on_training_start(self):
        policy = self.model.policy
        extractor = policy.trained.features_extractor
        rates = {group["name"]: group["lr"] for group in policy.optimizer.param_groups}
        self.seen.append(
            (policy.dropout, extractor.pooling, extractor.stages[-1], getattr(self.model, "batch_size", 8), rates)
        )

    def _on_step(self):
        if self.error is not None:
            raise ValueError(self.error)
        return True


@pytest.fixture
def search(tmp_path, monkeypatch):
    """:return: a function that searches with what a sampler gives, and returns the finished trials"""
    monkeypatch.setattr(gym.envs.registration, "registry", dict(gym.registry))
    monkeypatch.setattr(gym.envs, "registry", gym.envs.registration.registry)
    gym.register(ENV, TinyGame)
    studies = []
    create = optuna.create_study
    monkeypatch.setattr(optuna, "create_study", lambda **kwargs: studies.append(create(**kwargs)) or studies[-1])
    # The report needs pandas, which is not what is tested here.
    monkeypatch.setattr(optuna.Study, "trials_dataframe", lambda study: argparse.Namespace(to_csv=lambda path: None))

    def run(policy_kwargs, extractor=None, **section):
        def sample(trial, n_actions, n_envs, additional_args):
            rate = trial.suggest_float("learning_rate", 1e-4, 1e-3)
            given = {"backbone": "resnet_tiny", **(extractor or {})}
            return {"learning_rate": rate, "policy_kwargs": {**policy_kwargs, "features_extractor_kwargs": given}}

        monkeypatch.setitem(hyperparams_opt.HYPERPARAMS_SAMPLER, "dqn", sample)
        config = tmp_path / "config.yml"
        config.write_text(yaml.safe_dump({ENV: {**SECTION, **section}}))
        manager = ExperimentManager(
            argparse.Namespace(),
            "dqn",
            ENV,
            str(tmp_path),
            optimize_hyperparameters=True,
            n_trials=2,
            n_evaluations=2,
            n_eval_episodes=1,
            sampler="random",
            pruner="none",
            no_optim_plots=True,
            config=str(config),
            device="cpu",
            seed=0,
            verbose=0,
        )
        assert manager.setup_experiment() is None
        manager.hyperparameters_optimization()
        return studies[-1].trials

    run.studies = studies
    return run


def test_trials_run_to_their_end(search):
    trials = search({"optimizer_class": "AdamW", "backbone_optimizer_class": "SGD"})
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE"]
    assert all(0 <= trial.value <= 13 for trial in trials)


@pytest.mark.parametrize(
    ("policy_kwargs", "extractor", "message"),
    [
        ({"dropout": 2.0}, {}, "dropout must be"),
        ({"lr_backbone": -1.0}, {}, "lr_backbone must be finite and >= 0"),
        ({}, {"backbone": "resnet20"}, "backbone must be one of"),
        ({}, {"norm": "layer", "pretrained": True}, "norm='layer' has no pretrained weights"),
    ],
)
def test_a_refusal_of_policy_or_extractor_ends_the_search_in_its_own_words(search, policy_kwargs, extractor, message):
    with pytest.raises(ValueError, match=message):
        search(policy_kwargs, extractor)
    assert [trial.state.name for trial in search.studies[-1].trials] == ["FAIL"]


def test_a_refusal_of_a_callback_ends_the_search_in_its_own_words(search):
    phases = [{"at_timestep": 1, "unfreeze_from": "layer4", "restore_best": True}]
    with pytest.raises(RefusedSetUpError, match=r"UnfreezeCallback ends the search: .*restore_best"):
        search({}, callback=[{"sb3_resnet.callbacks.UnfreezeCallback": {"phases": phases}}])
    assert [trial.state.name for trial in search.studies[-1].trials] == ["FAIL"]


def our_manager(tmp_path, algo, section, **options):
    config = tmp_path / "config.yml"
    fixed = {"lr_head": 0.01, "lr_ratio": 0.5, "dropout": 0.25, "pooling": "grid"}
    fixed |= {} if algo == "a2c" else {"batch_size": 8}
    config.write_text(yaml.safe_dump({"search": {**fixed, "only": ["weight_decay"]}, "Tiny-v0": section}))
    defaults = {"optimize_hyperparameters": True, "n_evaluations": 2, "n_eval_episodes": 1, "n_trials": 2}
    defaults |= {"sampler": "random", "pruner": "none", "no_optim_plots": True, "device": "cpu", "verbose": 0}
    return ExperimentManager(
        argparse.Namespace(), algo, "Tiny-v0", str(tmp_path), config=str(config), **{**defaults, **options}
    )


def our_section(algo, **callback):
    own = {"n_steps": 8} if algo in ("ppo", "a2c") else {"buffer_size": 100, "learning_starts": 8}
    extractor = {"backbone": "resnet_tiny", "last_stage": "layer2"}
    return {
        "policy": "ResNetCnnPolicy",
        "n_timesteps": 24,
        "policy_kwargs": {"features_extractor_kwargs": extractor},
        "callback": [{"tests.test_zoo_search.Looks": callback} if callback else "tests.test_zoo_search.Looks"],
        **own,
    }


@pytest.mark.parametrize("algo", ["dqn", "qrdqn", "ppo", "a2c"])
def test_trials_train_with_the_values_of_our_sampler_and_can_be_loaded(algo, tmp_path, tiny_id):
    storage = str(tmp_path / "study.log")
    shared = {"storage": storage, "study_name": "s", "max_total_trials": 2}
    manager = our_manager(tmp_path, algo, our_section(algo), **shared)
    manager.setup_experiment()
    Looks.seen.clear()
    manager.hyperparameters_optimization()
    assert len(Looks.seen) == 2
    for dropout, pooling, stage, batch_size, rates in Looks.seen:
        assert (dropout, pooling, stage, batch_size) == (0.25, "grid", "layer2", 8)
        assert (rates["head"], rates["backbone"]) == pytest.approx((0.01, 0.005))

    loaded, _ = our_manager(tmp_path, algo, our_section(algo), trial_id=1, **shared).read_hyperparameters()
    study = optuna.load_study(
        study_name="s", storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
    )
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2
    assert [{*trial.params} for trial in study.trials] == [{"weight_decay"}] * 2
    assert loaded == study.trials[1].user_attrs[ATTRIBUTE]["section"]
    assert loaded["policy_kwargs"]["weight_decay"] == study.trials[1].params["weight_decay"]


def test_the_error_that_prunes_a_trial_is_kept(tmp_path, tiny_id):
    manager = our_manager(tmp_path, "dqn", our_section("dqn", error="wrong values"))
    manager.setup_experiment()
    study = optuna.create_study(direction="maximize")
    study.optimize(manager.objective, n_trials=1)
    (trial,) = study.trials
    assert trial.state.name == "PRUNED"
    assert trial.user_attrs["error"].startswith("ValueError: wrong values (")
    assert "test_zoo_search.py, line " in trial.user_attrs["error"]
