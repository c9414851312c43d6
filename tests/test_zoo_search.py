"""RL-Zoo's search with our policy: trials run, and a refusal ends the search instead of pruning each trial."""

import argparse

import gymnasium as gym
import optuna
import pytest
import yaml
from rl_zoo3 import hyperparams_opt
from rl_zoo3.exp_manager import ExperimentManager

from sb3_resnet.callbacks._evaluations import RefusedSetUpError
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
