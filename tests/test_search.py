"""What a search changes in a section of RL-Zoo's YAML, and what it leaves."""

import argparse
import copy
import sys
import types

import optuna
import pytest
import yaml
from optuna.trial import FixedTrial
from rl_zoo3 import hyperparams_opt
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import SimpleLinearSchedule

import sb3_resnet
from sb3_resnet.callbacks import UnfreezeCallback
from sb3_resnet.cli.setups import read_sections
from sb3_resnet.common import host_zoo
from sb3_resnet.optim.search.experiment import ATTRIBUTE, Sampler, experiment_of, trial_of
from sb3_resnet.optim.search.ranges import Choices, Fixed, Range
from sb3_resnet.optim.search.results import zoo_sections
from sb3_resnet.optim.search.sections import with_values
from sb3_resnet.optim.search.space import SearchSpace, read_space

UNFREEZE = "sb3_resnet.callbacks.UnfreezeCallback"
SCHEDULE = "sb3_resnet.callbacks.LRScheduleCallback"
ARGUMENTS = ("learning_rate", "batch_size", "gamma", "tau", "seed")
SECTION = {
    "policy": "ResNetCnnPolicy",
    "n_timesteps": 1000,
    "learning_rate": 1e-4,
    "env_wrapper": ["stable_baselines3.common.atari_wrappers.AtariWrapper"],
    "policy_kwargs": {
        "net_arch": [16],
        "features_extractor_kwargs": {"backbone": "resnet_tiny", "last_stage": "layer3", "weights": "a.pth"},
    },
    "callback": [
        "sb3_resnet.callbacks.FeatureCacheCallback",
        {SCHEDULE: {"warmup_steps": 10, "schedule": "cosine"}},
        {UNFREEZE: {"phases": [{"at_timestep": 400, "unfreeze_from": "layer3", "ramp": 7}]}},
    ],
}
EVERYTHING = {
    "lr_head": 2e-4,
    "lr_ratio": 0.5,
    "weight_decay": 1e-3,
    "batch_size": 64,
    "warmup_steps": 500,
    "dropout": 0.25,
    "last_stage": "layer2",
    "pooling": "flatten",
    "unfreeze_from": "layer1",
    "unfreeze_at": 0.3,
}


def phases_of(section):
    return next(entry[UNFREEZE]["phases"] for entry in section["callback"] if UNFREEZE in entry)


def with_phases(*phases, **changes):
    return {**SECTION, "callback": [{UNFREEZE: {"phases": [*phases]}}], **changes}


def test_each_value_goes_to_its_place_and_all_else_stays():
    before = copy.deepcopy(SECTION)
    changed = with_values(SECTION, EVERYTHING)
    assert before == SECTION
    assert changed == {
        **SECTION,
        "learning_rate": 2e-4,
        "batch_size": 64,
        "policy_kwargs": {
            "net_arch": [16],
            "lr_backbone": 1e-4,
            "weight_decay": 1e-3,
            "dropout": 0.25,
            "features_extractor_kwargs": {
                "backbone": "resnet_tiny",
                "last_stage": "layer2",
                "pooling": "flatten",
                "weights": "a.pth",
            },
        },
        "callback": [
            "sb3_resnet.callbacks.FeatureCacheCallback",
            {SCHEDULE: {"warmup_steps": 500, "schedule": "cosine"}},
            {UNFREEZE: {"phases": [{"at_timestep": 300, "unfreeze_from": "layer1", "ramp": 7}]}},
        ],
    }


def test_what_a_trial_does_to_its_section_is_its_own_affair():
    before = copy.deepcopy(SECTION)
    changed = with_values(SECTION, EVERYTHING)
    changed["policy_kwargs"]["net_arch"].append(7)
    phases_of(changed)[0].clear()
    assert before == SECTION


def test_without_values_the_section_stays_as_it_is():
    assert with_values(SECTION, {}) == SECTION
    wrong = with_phases({"at_timestep": 5, "unfreeze_from": "layer4"}, {"at_timestep": 1, "unfreeze_from": "layer4"})
    assert with_values(wrong, {"dropout": 0.1})["callback"] == wrong["callback"]


@pytest.mark.parametrize(
    ("section", "values", "rates"),
    [
        ({"learning_rate": "lin_1e-4"}, {"lr_head": 0.01}, {"learning_rate": "lin_0.01"}),
        ({"learning_rate": "lin_1e-4"}, {"lr_ratio": 0.5}, {"learning_rate": "lin_1e-4", "lr_backbone": 5e-5}),
        ({"learning_rate": "1e-4"}, {"lr_ratio": 0.5}, {"learning_rate": "1e-4", "lr_backbone": 5e-5}),
        ({}, {"lr_ratio": 0.5}, {"lr_backbone": 1.5e-4}),
        ({"learning_rate": 1.0, "policy_kwargs": {"lr_head": 0.1}}, {"lr_head": 0.2}, {"lr_head": 0.2}),
        ({"policy_kwargs": {"lr_head": 0.1}}, {"lr_ratio": 0.1}, {"lr_head": 0.1, "lr_backbone": 0.01}),
        ({"policy_kwargs": {"lr_backbone": 0.1}}, {"lr_head": 0.2}, {"learning_rate": 0.2, "lr_backbone": 0.1}),
    ],
)
def test_rates(section, values, rates):
    changed = with_values({"n_timesteps": 10, **section}, values, 3e-4)
    policy = changed["policy_kwargs"]
    found = {name: holder[name] for holder in (changed, policy) for name in rates if name in holder}
    assert found == {name: pytest.approx(value) if isinstance(value, float) else value for name, value in rates.items()}


@pytest.mark.parametrize("written", [SCHEDULE, [SCHEDULE], [{SCHEDULE: None}], {SCHEDULE: {}}, None])
def test_the_warmup_finds_its_callback_however_it_is_written_or_makes_one(written):
    section = {"n_timesteps": 10} if written is None else {"n_timesteps": 10, "callback": written}
    assert with_values(section, {"warmup_steps": 7})["callback"] == [{SCHEDULE: {"warmup_steps": 7}}]


def test_the_warmup_of_the_recipe_is_its_argument():
    recipe = {"sb3_resnet.fine_tuning_callbacks": {"total_timesteps": 10}}
    changed = with_values({"n_timesteps": 10, "callback": recipe}, {"warmup_steps": 7})
    assert changed["callback"] == [{"sb3_resnet.fine_tuning_callbacks": {"total_timesteps": 10, "warmup_steps": 7}}]


def test_a_callback_of_the_same_name_from_elsewhere_is_left_alone():
    other = {"mine.LRScheduleCallback": {"warmup_steps": 1}}
    changed = with_values({"n_timesteps": 10, "callback": [other]}, {"warmup_steps": 7})
    assert changed["callback"] == [other, {SCHEDULE: {"warmup_steps": 7}}]


@pytest.mark.parametrize(
    ("phases", "values", "expected"),
    [
        ([(400, "layer4"), (700, "layer3")], {"unfreeze_at": 0.5}, [(500, "layer4"), (700, "layer3")]),
        ([(400, "layer4"), (700, "layer3")], {"unfreeze_at": 0.7}, [(700, "layer4")]),
        ([(400, "layer4"), (700, "layer3")], {"unfreeze_at": 0.8}, [(800, "layer4")]),
        ([(400, "layer4"), (700, "layer3")], {"unfreeze_from": "layer3"}, [(400, "layer3")]),
        ([(400, "layer4"), (700, "layer2")], {"unfreeze_from": "layer3"}, [(400, "layer3"), (700, "layer2")]),
        ([(400, "layer4"), (700, "all")], {"unfreeze_from": "adapter"}, [(400, "adapter"), (700, "all")]),
        ([(400, "layer4"), (700, "layer3"), (900, "stem")], {"last_stage": "layer2"}, [(400, "layer2"), (900, "stem")]),
        ([(400, "layer4")], {"last_stage": "layer2", "unfreeze_from": "layer3"}, [(400, "layer2")]),
    ],
)
def test_phases_stay_in_order_and_within_the_trunk(phases, values, expected):
    written = [{"at_timestep": at, "unfreeze_from": stage} for at, stage in phases]
    found = phases_of(with_values(with_phases(*written, policy_kwargs={}), values))
    assert [(phase["at_timestep"], phase["unfreeze_from"]) for phase in found] == expected
    UnfreezeCallback(found)


def test_phases_on_plateaus_and_updates_keep_their_triggers():
    plateau = {"on_plateau": {"patience": 2, "latest_timestep": 600}, "unfreeze_from": "layer3"}
    update = {"at_update": 5, "unfreeze_from": "layer2"}
    section = with_phases({"at_timestep": 100, "unfreeze_from": "layer4"}, plateau, update, policy_kwargs={})
    assert phases_of(with_values(section, {"unfreeze_at": 0.5}))[1:] == [plateau, update]
    assert phases_of(with_values(section, {"unfreeze_at": 0.6}))[1:] == [update]


def test_gamma_and_n_steps_go_to_the_buffer_that_has_them():
    """Its gamma is the one that SB3 trains with."""
    section = {"n_timesteps": 1, "replay_buffer_kwargs": {"n_steps": 3, "gamma": 0.99}}
    changed = with_values(section, {"gamma": 0.9, "n_steps": 5})
    assert changed["replay_buffer_kwargs"] == {"n_steps": 5, "gamma": 0.9}
    assert changed["gamma"] == 0.9
    assert "n_steps" not in changed
    assert with_values({"n_timesteps": 1}, {"gamma": 0.9, "n_steps": 5})["n_steps"] == 5


def test_phases_that_a_longer_run_would_lose_are_said():
    phases = ({"at_timestep": 60, "unfreeze_from": "layer3"}, {"at_timestep": 100, "unfreeze_from": "layer2"})
    section = with_phases(*phases, n_timesteps=200)
    kept = {"algo": "dqn", "env": "Tiny-v0", "section": section, "values": {"unfreeze_at": 0.3}}
    trial = types.SimpleNamespace(number=0, user_attrs={ATTRIBUTE: kept})
    assert len(phases_of(zoo_sections(trial)[1]["Tiny-v0"])) == 2
    with pytest.warns(UserWarning, match="The last 1 of the 2 phases would begin before the searched one"):
        _, found = zoo_sections(trial, 10_000)
    assert phases_of(found["Tiny-v0"]) == [{"at_timestep": 3000, "unfreeze_from": "layer3"}]


def test_a_grid_size_goes_with_its_grid():
    section = {"n_timesteps": 1, "policy_kwargs": {"features_extractor_kwargs": {"pooling": "grid", "grid_size": 3}}}
    for pooling, expected in (("grid", 3), ("avg", None)):
        changed = with_values(section, {"pooling": pooling})["policy_kwargs"]["features_extractor_kwargs"]
        assert (changed["pooling"], changed.get("grid_size")) == (pooling, expected)


def test_what_the_section_says_of_its_trunk_is_not_searched_and_absent_callbacks_are_not_added():
    everywhere = {"lr_head", "lr_ratio", "weight_decay", "batch_size", "dropout"}
    assert {*read_space(None, SECTION, ARGUMENTS).values} == everywhere | {
        "pooling",
        "warmup_steps",
        "unfreeze_from",
        "unfreeze_at",
    }
    assert {*read_space({}, {}, ARGUMENTS).values} == everywhere | {"last_stage", "pooling"}
    on_update = with_phases({"at_update": 3, "unfreeze_from": "layer4"}, policy_kwargs={})
    assert {*read_space({}, on_update, ARGUMENTS).values} == everywhere | {"last_stage", "pooling", "unfreeze_from"}
    recipe = {"callback": ["sb3_resnet.fine_tuning_callbacks"]}
    assert {*read_space({}, recipe, ARGUMENTS).values} == everywhere | {"warmup_steps", "pooling"}


def test_whole_numbers_may_be_written_as_yaml_writes_them():
    """``1e4`` is a string to YAML."""
    given = {"buffer_size": {"low": "1e4", "high": 5e4}, "gamma": {"low": "0.9", "high": 1.0}}
    values = read_space(given, {}, [*ARGUMENTS, "buffer_size"], ["buffer_size"]).values
    assert values["buffer_size"] == Range(10_000, 50_000)
    assert (type(values["buffer_size"].low), type(values["gamma"].high)) == (int, float)


def test_the_boundary_is_searched_from_the_last_stage_down():
    space = read_space(None, SECTION, ARGUMENTS)
    assert space.values["unfreeze_from"] == Choices(("layer1", "layer2", "layer3"))
    space = read_space({"last_stage": ["stem", "layer1"]}, SECTION, ARGUMENTS)
    assert space.values["unfreeze_from"] == Choices(("stem", "layer1"))


def test_without_batches_there_is_no_batch_size():
    arguments = [name for name in ARGUMENTS if name != "batch_size"]
    assert "batch_size" not in read_space(None, {}, arguments).values
    with pytest.raises(TypeError, match="knows no 'batch_size'"):
        read_space({"batch_size": [8, 16]}, {}, arguments)


def test_what_is_named_is_searched_and_a_phase_of_the_searchs_own_has_both_parts():
    given = {"last_stage": ["layer1", "layer2"], "unfreeze_at": {"low": 0.5, "high": 0.9}, "warmup_steps": [0, 10]}
    space = read_space(given, {"n_timesteps": 100}, ARGUMENTS)
    assert {"last_stage", "unfreeze_at", "unfreeze_from", "warmup_steps"} <= {*space.values}
    values = space.suggest(FixedTrial({**EVERYTHING, "warmup_steps": 10, "unfreeze_at": 0.5}))
    changed = with_values({"n_timesteps": 100}, values, 1e-4)
    assert changed["callback"] == [
        {SCHEDULE: {"warmup_steps": 10}},
        {UNFREEZE: {"phases": [{"unfreeze_from": "layer1", "at_timestep": 50}]}},
    ]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"low": "1e-5", "high": 1, "log": True}, Range(1e-5, 1.0, log=True)),
        ({"low": 0, "high": 1, "step": 0.25}, Range(0.0, 1.0, step=0.25)),
        ({"low": 0.5, "high": 0.5}, Fixed(0.5)),
        ([0.1, "2e-1"], Choices((0.1, 0.2))),
        ([0.1], Fixed(0.1)),
        (0.3, Fixed(0.3)),
    ],
)
def test_ranges_as_yaml_writes_them(written, expected):
    assert SearchSpace(lr_ratio=written).values["lr_ratio"] == expected


def test_null_leaves_the_section_alone_and_one_value_is_written_but_not_searched():
    space = SearchSpace(dropout=None, weight_decay=0.0, only=["lr_head"])
    assert {*space.values} == {"lr_head", "weight_decay"}
    trial = FixedTrial({"lr_head": 1e-4})
    assert space.suggest(trial) == {"lr_head": 1e-4, "weight_decay": 0.0}
    assert {*trial.distributions} == {"lr_head"}


def test_arguments_of_the_algorithm_are_searched_where_they_are_named():
    space = read_space({"gamma": {"low": 0.9, "high": 0.999}, "tau": [1, 0.5], "only": ["gamma"]}, SECTION, ARGUMENTS)
    assert space.values == {"gamma": Range(0.9, 0.999)}
    assert with_values(SECTION, {"gamma": 0.95})["gamma"] == 0.95


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"drop_out": 0.1}, TypeError, "did you mean 'dropout'"),
        ({"learning_rate": [1e-4, 1e-3]}, TypeError, "knows no 'learning_rate'"),
        ({"seed": [1, 2]}, TypeError, "knows no 'seed'"),
        ([1], TypeError, "search must be a mapping"),
        ({"dropout": {"low": 0.1}}, ValueError, "must be a range with low and high"),
        ({"dropout": {"low": 0.1, "hi": 0.2}}, TypeError, "did you mean 'high'"),
        ({"dropout": {"low": 0.3, "high": 0.2}}, ValueError, "low must not be above high"),
        ({"dropout": {"low": 0, "high": 0.2, "log": True}}, ValueError, "above 0 where log"),
        ({"dropout": {"low": 0.1, "high": 0.2, "log": True, "step": 0.1}}, ValueError, "either log or step"),
        ({"dropout": 1.5}, ValueError, "dropout must be finite and >= 0 and <= 0.99"),
        ({"batch_size": [0, 1]}, ValueError, "batch_size must be finite and >= 1"),
        ({"batch_size": []}, ValueError, "has no choices"),
        ({"batch_size": [8, 8]}, ValueError, "a choice twice"),
        ({"pooling": ["mean"]}, ValueError, "pooling must be one of"),
        ({"pooling": {"low": "avg", "high": "grid"}}, TypeError, "names, which have no range"),
        ({"only": "dropout"}, TypeError, "only must be a list"),
        ({"only": ["dropuot"]}, ValueError, "did you mean 'dropout'"),
        ({"heartbeat_seconds": 0}, ValueError, "heartbeat_seconds must be"),
        ({"gamma": {}}, ValueError, "must be a range"),
        ({"gamma": [{}, {}]}, TypeError, "must be a number, a string or a boolean"),
    ],
)
def test_wrong_ranges_are_refused_before_the_first_trial(given, error, message):
    with pytest.raises(error, match=message):
        read_space(given, SECTION, ARGUMENTS)


@pytest.mark.parametrize(
    ("given", "section", "message"),
    [
        ({"unfreeze_at": 0.5}, {"callback": "sb3_resnet.fine_tuning_callbacks"}, "write the callbacks that it makes"),
        ({"only": ["last_stage"]}, {"callback": "sb3_resnet.fine_tuning_callbacks"}, "last_stage would change"),
        ({"unfreeze_at": [0.5]}, with_phases({"at_update": 3, "unfreeze_from": "layer4"}), "write at_timestep"),
    ],
)
def test_what_the_section_has_no_place_for_is_refused(given, section, message):
    with pytest.raises(ValueError, match=message):
        read_space(given, section, ARGUMENTS)


def manager_of(tmp_path, section, algo="dqn", search=None, env="Tiny-v0", **options):
    """RL-Zoo's manager for a search, set up."""
    config = tmp_path / "config.yml"
    beside = {} if search is None else {"search": search}
    config.write_text(yaml.safe_dump({env: section, **beside}))
    defaults = {"optimize_hyperparameters": True, "n_evaluations": 1, "verbose": 0, "device": "cpu", "seed": 0}
    manager = ExperimentManager(
        argparse.Namespace(), algo, env, str(tmp_path), config=str(config), **{**defaults, **options}
    )
    manager.setup_experiment()
    return manager


def small_section(**changes):
    extractor = {"backbone": "resnet_tiny", "last_stage": "layer2"}
    return {
        "policy": "ResNetCnnPolicy",
        "n_timesteps": 24,
        "policy_kwargs": {"net_arch": [8], "features_extractor_kwargs": extractor},
        **changes,
    }


def sampled(manager, params):
    """:return: what RL-Zoo's registry of samplers returns in a trial, and the trial"""
    trial = FixedTrial(params)
    own = copy.copy(manager)
    with trial_of(experiment_of(manager), own):
        found = hyperparams_opt.HYPERPARAMS_SAMPLER[manager.algo](trial, 0, 1, {"using_her_replay_buffer": False})
    return found, trial, own


@pytest.mark.parametrize("algo", ["dqn", "qrdqn", "ppo"])
def test_samplers_keep_policy_kwargs_and_leave_rl_zoos_other_values_alone(algo, tmp_path, tiny_id):
    section = small_section(gamma=0.9, learning_rate="lin_1e-3", callback=[{SCHEDULE: {"warmup_steps": 1}}])
    manager = manager_of(tmp_path, section, algo, {"pooling": ["avg", "grid"]})
    found, trial, own = sampled(manager, {**EVERYTHING, "pooling": "grid"})
    assert found.keys() == {"learning_rate", "batch_size", "policy_kwargs"}
    assert isinstance(found["learning_rate"], SimpleLinearSchedule)
    assert found["learning_rate"](0.5) == pytest.approx(1e-4)
    assert found["policy_kwargs"] == {
        "net_arch": [8],
        "lr_backbone": 1e-4,
        "weight_decay": 1e-3,
        "dropout": 0.25,
        "features_extractor_kwargs": {"backbone": "resnet_tiny", "last_stage": "layer2", "pooling": "grid"},
    }
    assert own.specified_callbacks == [{SCHEDULE: {"warmup_steps": 500}}]
    assert manager.specified_callbacks == [{SCHEDULE: {"warmup_steps": 1}}]
    kept = trial.user_attrs[ATTRIBUTE]
    assert (kept["algo"], kept["env"], kept["section"]["learning_rate"]) == (algo, tiny_id, "lin_0.0002")


def test_other_policies_keep_rl_zoos_sampler(tmp_path, tiny_id):
    manager = manager_of(tmp_path, {"policy": "CnnPolicy", "n_timesteps": 24})
    assert experiment_of(manager) is None
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = hyperparams_opt.HYPERPARAMS_SAMPLER["dqn"](study.ask(), 0, 1, {"using_her_replay_buffer": False})
    assert {"gamma", "train_freq", "policy_kwargs"} <= {*found}
    assert found["policy_kwargs"]["net_arch"]


def test_a_policy_by_its_path_and_policy_kwargs_as_code_are_ours_too(tmp_path, tiny_id):
    section = small_section(policy="sb3_resnet.ResNetCnnPolicy")
    section["policy_kwargs"] = "dict(net_arch=[8], features_extractor_kwargs=dict(backbone='resnet_tiny'))"
    found, trial, _ = sampled(manager_of(tmp_path, section), {**EVERYTHING, "pooling": "avg"})
    assert found["policy_kwargs"]["net_arch"] == [8]
    assert trial.user_attrs[ATTRIBUTE]["section"]["policy_kwargs"] == found["policy_kwargs"]


def test_what_yaml_cannot_hold_is_refused_at_once(tmp_path, tiny_id):
    manager = manager_of(tmp_path, small_section(policy_kwargs="dict(activation_fn=nn.ReLU)"))
    with pytest.raises(ValueError, match=r"of the section of Tiny-v0\.policy_kwargs\.activation_fn: write a name"):
        experiment_of(manager)


def test_the_command_lines_values_are_in_the_trials_section(tmp_path, tiny_id):
    options = {"n_timesteps": 48, "hyperparams": {"gamma": 0.5}, "env_kwargs": {"length": 5}}
    manager = manager_of(tmp_path, small_section(), **options)
    section = experiment_of(manager).section
    assert (section["n_timesteps"], section["gamma"], section["env_kwargs"]) == (48, 0.5, {"length": 5})


def test_poolings_for_which_images_are_too_small_are_left_out_or_refused(tmp_path, tiny_id):
    # layer4 of 32x32 pixels is one pixel, layer2 is 4x4.
    section = small_section(policy_kwargs={"features_extractor_kwargs": {"backbone": "resnet_tiny"}})
    manager = manager_of(tmp_path, section)
    assert experiment_of(manager).space.values["pooling"] == Choices(("avg", "flatten", "grid"))
    manager = manager_of(tmp_path, section, search={"last_stage": ["layer1", "layer2"]})
    assert "spatial_softmax" in experiment_of(manager).space.values["pooling"].values
    manager = manager_of(tmp_path, section, search={"pooling": ["avg", "spatial_softmax"]})
    with pytest.raises(ValueError, match="search: pooling: Images of 32x32 are too small"):
        experiment_of(manager)


def test_a_file_with_ranges_is_a_configuration_for_the_commands_too(tmp_path, tiny_id):
    manager = manager_of(tmp_path, small_section(), search={"only": ["dropout"]})
    assert read_sections(manager.config).keys() == {tiny_id, "search"}


def test_ranges_come_from_a_python_configuration_too(tmp_path, tiny_id):
    path = tmp_path / "config.py"
    sections = {tiny_id: small_section(), "search": {"dropout": 0.125}}
    path.write_text(f"hyperparams = {sections!r}")
    manager = manager_of(tmp_path, small_section())
    manager.config = str(path)
    assert experiment_of(manager).space.values["dropout"] == Fixed(0.125)


def test_registering_twice_wraps_once():
    before = dict(hyperparams_opt.HYPERPARAMS_SAMPLER), ExperimentManager.objective
    sb3_resnet.register_samplers()
    assert (hyperparams_opt.HYPERPARAMS_SAMPLER, ExperimentManager.objective) == before
    ours = {name for name, sampler in before[0].items() if isinstance(sampler, Sampler)}
    assert ours == {"dqn", "qrdqn", "ppo", "a2c"}
    assert not isinstance(before[0]["dqn"].plain, Sampler)


def test_a_module_is_extended_when_it_is_imported_and_at_once_if_it_is(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    (tmp_path / "imported_later.py").write_text("value = 1")
    seen = []
    for _ in range(2):
        host_zoo.when_imported("imported_later", lambda module: seen.append(module.value))
    assert seen == []
    module = __import__("imported_later")
    assert (seen, module.__spec__.name) == ([1], "imported_later")
    host_zoo.when_imported("imported_later", lambda module: seen.append(module.value))
    assert seen == [1, 1]
    monkeypatch.delitem(sys.modules, "imported_later")


def test_a_module_that_is_just_being_imported_is_left_for_later(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    lines = ["from sb3_resnet.common import host_zoo", "host_zoo.when_imported(__name__, lambda module: module.end)"]
    (tmp_path / "imported_now.py").write_text("\n".join([*lines, "end = 1"]))
    with pytest.warns(UserWarning, match=r"call sb3_resnet\.register_samplers\(\) later"):
        module = __import__("imported_now")
    monkeypatch.delitem(sys.modules, "imported_now")
    assert module.end == 1


def test_a_manager_without_what_is_needed_is_named():
    with pytest.raises(RuntimeError, match=r"rl_zoo3 .* has no ExperimentManager.objective"):
        host_zoo.wrap_method(types.ModuleType("rl_zoo3.exp_manager"), "objective", print)
