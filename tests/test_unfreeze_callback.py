"""UnfreezeCallback: transitions, ramps, restoring the best (invariants 3, 5, 13 and 14)."""

import copy
import itertools
import json
import math
import warnings

import numpy as np
import pytest
import torch as th
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback

from sb3_resnet.callbacks import BestCheckpointCallback, UnfreezeCallback
from sb3_resnet.optim.groups import is_part, recall
from tests.helpers import Rewards, TinyGame, assert_same, fill, make_model, slowly, snapshot, start

LR = 1e-3


def rollout(model, *callbacks, steps=4, updates=1):
    """One round of ``learn()``'s loop without an environment."""
    model.num_timesteps += steps
    for callback in callbacks:
        callback.on_rollout_end()
    model.train(updates, 4)


def rates(model, part="backbone"):
    return {group["lr"] for group in model.policy.optimizer.param_groups if is_part(group, part)}


@pytest.mark.parametrize("clock", ["at_timestep", "at_update"])
def test_phases_begin_in_order_at_or_after_their_trigger(clock, capsys):
    model = fill(make_model(learning_rate=LR))
    phases = [{clock: 8 if clock == "at_timestep" else 2, "unfreeze_from": "layer4"},
              {clock: 17 if clock == "at_timestep" else 5, "unfreeze_from": "layer2"}]  # fmt: skip
    callback = start(model, UnfreezeCallback(phases))
    seen = []
    for _ in range(8):
        rollout(model, callback)
        seen.append(model.policy.freeze_boundary)
    expected = 1 if clock == "at_timestep" else 2  # rounds before the first phase
    assert seen[:expected] == [None] * expected
    assert seen[expected : expected + 3] == ["layer4"] * 3
    assert seen[expected + 3 :] == ["layer2"] * (5 - expected)
    callback.on_training_end()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Phase")]
    assert [line.split(" begins")[0] for line in lines] == ["Phase 1 of 2", "Phase 2 of 2"]


@pytest.mark.parametrize(
    ("triggers", "total", "reached"),
    [
        ([{"at_timestep": 100}, {"at_timestep": 200}], 99, 0),
        ([{"at_timestep": 100}, {"at_timestep": 200}], 100, 1),
        ([{"at_timestep": 100}, {"at_timestep": 200}], None, 2),
        ([{"at_timestep": 100}, {"at_update": 10**9}], 50, 2),  # a phase that is due takes those before it along
        ([{"on_plateau": {"patience": 1}}, {"at_timestep": 200}], 50, 1),
        ([{"on_plateau": {"patience": 1, "latest_timestep": 100}}], 50, 1),  # the plateau may come before
    ],
)
def test_it_tells_beforehand_which_phases_a_run_reaches(triggers, total, reached):
    stages = ["layer4", "layer3"]
    phases = [{**trigger, "unfreeze_from": stage} for trigger, stage in zip(triggers, stages, strict=False)]
    callback = UnfreezeCallback(phases)
    assert callback.reached_by(total) == callback.phases[:reached]


def test_frozen_until_its_transition_and_moving_after_it():
    model = fill(make_model(learning_rate=LR))
    callback = start(model, UnfreezeCallback([{"at_update": 3, "unfreeze_from": "layer4", "lr_backbone": LR}]))
    extractor = model.q_net.features_extractor
    before = snapshot(extractor.backbone)
    for _ in range(3):
        rollout(model, callback)
    assert_same(before, extractor.backbone.state_dict())
    head = model.q_net.q_net[1].weight
    moments = model.policy.optimizer.state[head]["exp_avg"].clone()
    step = int(model.policy.optimizer.state[head]["step"])
    callback.on_rollout_end()
    assert model.policy.freeze_boundary == "layer4"
    assert model.q_net_target.features_extractor.freeze_boundary == "layer4"
    assert th.equal(model.policy.optimizer.state[head]["exp_avg"], moments)
    layer4 = [*extractor.backbone.layer4.parameters()]
    assert not any(parameter in model.policy.optimizer.state for parameter in layer4)
    rollout(model, callback)
    assert int(model.policy.optimizer.state[head]["step"]) == step + 1
    assert {int(model.policy.optimizer.state[parameter]["step"]) for parameter in layer4} == {1}
    after = extractor.backbone.state_dict()
    moved = {key.split(".")[0] for key in before if not th.equal(before[key], after[key])}
    assert moved == {"layer4"}


@pytest.mark.parametrize(("norm", "updates_statistics"), [("frozen", False), ("batch", True)])
def test_batchnorm_is_as_norm_says_on_both_sides_of_the_boundary(norm, updates_statistics):
    model = fill(make_model(extractor={"norm": norm}))
    callback = start(model, UnfreezeCallback([{"at_update": 2, "unfreeze_from": "layer4"}]))
    backbone = model.q_net.features_extractor.backbone
    rollout(model, callback)
    before = snapshot(backbone)
    for _ in range(3):
        rollout(model, callback)
    moved = {key for key, value in backbone.state_dict().items() if not th.equal(value, before[key])}
    statistics = {key for key in moved if "running_" in key}
    assert {key.split(".")[0] for key in statistics} == ({"layer4"} if updates_statistics else set())


@pytest.mark.parametrize("gradient_steps", [1, 4])
def test_the_ramp_rises_from_zero_to_the_phases_rate_and_stays(gradient_steps):
    model = fill(make_model(learning_rate=LR))
    used = []
    callback = start(
        model, UnfreezeCallback([{"at_update": 4, "unfreeze_from": "layer4", "lr_backbone": 2e-4, "ramp": 4}])
    )
    model.policy.optimizer.register_step_post_hook(lambda optimizer, args, kwargs: used.append(max(rates(model))))
    for _ in range(16 // gradient_steps):
        rollout(model, callback, updates=gradient_steps)
    assert used == pytest.approx([1e-4] * 4 + [0.0, 0.5e-4, 1e-4, 1.5e-4] + [2e-4] * 8)
    assert rates(model, "head") == {LR}


@pytest.mark.parametrize("updates", [1, 3])
def test_the_ramp_counts_updates_from_the_moment_at_which_a_timestep_began_the_phase(updates):
    """Neither from the start of training, nor in environment steps."""
    model = fill(make_model(learning_rate=LR))
    used = []
    phase = {"at_timestep": 17, "unfreeze_from": "layer4", "lr_backbone": 2e-4, "ramp": 4}
    callback = start(model, UnfreezeCallback([phase], verbose=0))
    model.policy.optimizer.register_step_post_hook(lambda optimizer, args, kwargs: used.append(max(rates(model))))
    for _ in range(10):
        rollout(model, callback, updates=updates)
    before = 4 * updates  # rounds end at timesteps 4, 8, 12, 16 and 20
    ramp = [0.0, 0.5e-4, 1e-4, 1.5e-4]
    assert used == pytest.approx([1e-4] * before + ramp + [2e-4] * (6 * updates - 4))
    assert model.policy.online.features_extractor.boundary.moved_at_update == before


def test_lr_backbone_follows_the_hosts_schedule_and_the_stages_scales():
    model = fill(make_model(learning_rate=lambda progress: LR * progress, policy_kwargs={"lr_decay_per_stage": 0.5}))
    callback = start(model, UnfreezeCallback([{"at_update": 0, "unfreeze_from": "all", "lr_backbone": 1e-4}]))
    model._current_progress_remaining = 0.5
    rollout(model, callback)
    groups = {group["name"]: group["lr"] for group in model.policy.optimizer.param_groups}
    assert groups["backbone.layer4"] == pytest.approx(0.5e-4)
    assert groups["backbone.layer3_no_decay"] == pytest.approx(0.25e-4)
    assert groups["backbone.adapter"] == pytest.approx(0.5e-4 / 32)
    assert groups["head"] == pytest.approx(LR / 2)


def test_two_phases_that_are_due_together_both_apply():
    model = fill(make_model(learning_rate=LR))
    phases = [
        {"at_timestep": 2, "unfreeze_from": "layer4", "lr_backbone": 3e-4},
        {"at_timestep": 3, "unfreeze_from": "layer3"},
    ]
    callback = start(model, UnfreezeCallback(phases))
    rollout(model, callback)
    assert model.policy.freeze_boundary == "layer3"
    assert [*rates(model)] == pytest.approx([3e-4])


@pytest.mark.parametrize("order", [1, -1])
def test_invariant_13_transitions_happen_after_all_steps_and_before_train(order):
    events = []

    class Spy(BaseCallback):
        def _on_step(self):
            events.append(("step", self.model.policy.freeze_boundary))
            return True

    model = make_model(learning_starts=0)
    train = model.train
    model.train = lambda **kwargs: (events.append(("train", model.policy.freeze_boundary)), train(**kwargs))
    callbacks = [UnfreezeCallback([{"at_timestep": 8, "unfreeze_from": "layer4"}], verbose=0), Spy()]
    model.learn(12, callback=callbacks[::order])
    assert events == [("step", None)] * 4 + [("train", None)] + [("step", None)] * 4 + [("train", "layer4")] + [
        ("step", "layer4")
    ] * 4 + [("train", "layer4")]


REWARDS = [1.0, 2.0, 1.0, 2.0, math.nan, 5.0]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("plateau", "begins"),
    [
        ({"patience": 2}, 20),  # 1.0, 2.0 and NaN do not improve on 2.0: the third is one too many
        ({"patience": 2, "latest_timestep": 12}, 12),
        ({"patience": 0, "min_delta": 5.0}, 8),
        ({"patience": 9}, None),
    ],
)
def test_on_plateau(plateau, begins, first):
    model = make_model(learning_starts=0)
    seen = {}
    callback = UnfreezeCallback([{"on_plateau": plateau, "unfreeze_from": "layer4"}], verbose=0)
    train = model.train
    model.train = lambda **kwargs: (seen.update({model.num_timesteps: model.policy.freeze_boundary}), train(**kwargs))
    evaluations = Rewards(REWARDS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(24, callback=[callback, evaluations] if first else [evaluations, callback])
    assert [step for step, stage in seen.items() if stage] == ([*range(begins, 25, 4)] if begins else [])
    assert any("never began" in str(warning.message) for warning in caught) == (begins is None)


def test_plateau_state_lives_in_the_checkpoint(tmp_path):
    phases = [{"on_plateau": {"patience": 2}, "unfreeze_from": "layer4"}]
    model = make_model(learning_starts=0)
    with pytest.warns(UserWarning, match="never began"):
        model.learn(16, callback=[UnfreezeCallback(phases), Rewards(REWARDS[:4])])
    model.save(tmp_path / "model")
    resumed = DQN.load(tmp_path / "model", env=TinyGame(), device="cpu")
    resumed.learn(4, callback=[UnfreezeCallback(phases), Rewards([0.0])])
    assert resumed.policy.freeze_boundary == "layer4"


@pytest.mark.parametrize("first", [True, False])
def test_the_plateau_knows_the_evaluation_that_stops_training(first):
    model = make_model(learning_starts=0, extractor={"backbone": "resnet_mini"})
    callback = UnfreezeCallback([{"on_plateau": {"patience": 5}, "unfreeze_from": "layer4"}], verbose=0)
    evaluations = Rewards([5.0, 4.0], stop_at=4.0)
    with pytest.warns(UserWarning, match="never began"):
        model.learn(40, callback=[callback, evaluations] if first else [evaluations, callback])
    callback.on_training_end()  # RL-Zoo calls it again
    kept = recall(model.policy.optimizer, "unfreeze")
    assert (kept["timesteps"], kept["plateau"]) == (8, {"best": 5.0, "bad": 1, "factor": 1.0})


def test_a_callback_starts_anew_with_another_model():
    callback = UnfreezeCallback([{"on_plateau": {"patience": 5}, "unfreeze_from": "layer4"}], verbose=0)
    for _ in range(2):
        model = make_model(learning_starts=0, extractor={"backbone": "resnet_mini"})
        with pytest.warns(UserWarning, match="never began"):
            model.learn(8, callback=[callback, Rewards([5.0, 4.0])])
        assert recall(model.policy.optimizer, "unfreeze")["plateau"] == {"best": 5.0, "bad": 1, "factor": 1.0}


def test_invariant_3_timesteps_count_on_after_a_reset(tmp_path):
    phases = [{"at_timestep": 30, "unfreeze_from": "layer4"}]
    model = make_model()
    with pytest.warns(UserWarning, match="never began: training ended at timestep 20"):
        model.learn(20, callback=UnfreezeCallback(phases))
    model.save(tmp_path / "model")
    for reset in (True, False):
        resumed = DQN.load(tmp_path / "model", env=TinyGame(), device="cpu")
        callback = UnfreezeCallback(phases)
        resumed.learn(8, callback=callback, reset_num_timesteps=reset)
        assert callback.timesteps == 28
        assert resumed.policy.freeze_boundary is None
        resumed.learn(8, callback=UnfreezeCallback(phases), reset_num_timesteps=reset)
        assert resumed.policy.freeze_boundary == "layer4"
        moved = resumed.policy.q_net.features_extractor.boundary.moved_at_update
        resumed.learn(8, callback=UnfreezeCallback(phases), reset_num_timesteps=reset)
        assert resumed.policy.q_net.features_extractor.boundary.moved_at_update == moved


def moments_of(model):
    """A copy of the optimizer's moments."""
    return copy.deepcopy(model.policy.optimizer.state_dict()["state"])


def settings_of(model):
    """A copy of the settings of the optimizer's groups, without the rates that follow and the states of callbacks."""
    derived = {"params", "lr", "effective_lr", "unfreeze", "best_checkpoint"}
    groups = model.policy.optimizer.param_groups
    settings = [{key: value for key, value in group.items() if key not in derived} for group in groups]
    return copy.deepcopy([{**s, "lr_factors": {**s["lr_factors"], "ramp": 1.0}} for s in settings])


class Checkpoint(BaseCallback):
    """Weights and moments as they are at each ``on_step`` in which an evaluation takes place."""

    def __init__(self):
        super().__init__()
        self.states = []

    def _on_step(self):
        if self.n_calls % 4 == 0:
            self.states.append((snapshot(self.model.policy), moments_of(self.model)))
        return True


BEST = [([0.0, 3.0, 1.0], 1), ([2.0, 2.0, 2.0], 0), ([math.nan, -5.0, math.nan], 1)]


@pytest.mark.parametrize("order", [1, *slowly(-1)])
@pytest.mark.parametrize(("rewards", "best"), BEST)
def test_restore_best_takes_weights_and_moments_only(tmp_path, rewards, best, order):
    model = make_model(learning_starts=0, learning_rate=lambda progress: LR * progress, exploration_fraction=1.0)
    spy, phases = Checkpoint(), [{"at_timestep": 12, "unfreeze_from": "layer4", "restore_best": True}]
    callbacks = [UnfreezeCallback(phases), Rewards(rewards), BestCheckpointCallback(0, tmp_path)]
    seen, before_restore = {}, {}

    class Change(BaseCallback):
        """What a user, or another callback, has set since the best model was saved."""

        def _on_step(self):
            for group in self.model.policy.optimizer.param_groups:
                group["weight_decay"] = 1e-3 * self.num_timesteps
                group["lr_factors"]["of a user"] = 1 + 0.1 * self.num_timesteps
            before_restore["groups"] = settings_of(self.model)
            return True

    def train(**kwargs):
        if model.num_timesteps == 12:
            seen["weights"], seen["moments"] = snapshot(model.policy), moments_of(model)
            seen["updates"], seen["buffer"] = model._n_updates, model.replay_buffer.pos
            seen["groups"] = settings_of(model)
            seen["epsilon"] = model.exploration_rate
        DQN.train(model, **kwargs)

    model.train = train
    model.learn(12, callback=[spy, Change(), *callbacks[::order]])
    weights, moments = spy.states[best]
    boundary = {key for key in weights if ".boundary." in key}
    assert_same({key: value for key, value in weights.items() if key not in boundary},
                {key: value for key, value in seen["weights"].items() if key not in boundary})  # fmt: skip
    assert moments.keys() == seen["moments"].keys()
    for key, state in moments.items():
        assert_same(state, seen["moments"][key])
    assert model.policy.freeze_boundary == "layer4"
    assert (seen["updates"], seen["buffer"]) == (2, 12)
    # Those of the step at which the phase begins, whatever they were when the best model was saved.
    assert seen["groups"] == before_restore["groups"]
    assert [group["base_lr"] for group in seen["groups"]] == pytest.approx([LR * (1 - 8 / 12)] * 4)
    now, then = (model.exploration_schedule(1 - step / 12) for step in (12, 4 * (best + 1)))
    assert seen["epsilon"] == now < then


ORDERS = [*itertools.permutations(range(3))]


@pytest.mark.parametrize("order", [ORDERS[0], ORDERS[-1], *slowly(*((order,) for order in ORDERS[1:-1]))])
def test_an_evaluation_at_a_transition_belongs_to_the_phase_that_ends(tmp_path, order):
    model = make_model(extractor={"backbone": "resnet_mini"})
    phases = UnfreezeCallback([{"at_timestep": 8, "unfreeze_from": "layer4"}])
    callbacks = [phases, BestCheckpointCallback(0, tmp_path), Rewards([10.0, 11.0, 4.0])]
    model.learn(12, callback=[callbacks[index] for index in order])
    record = json.loads((tmp_path / "best.json").read_text())
    assert {key: entry["reward"] for key, entry in record.items()} == {"best": 11.0, "frozen": 11.0, "layer4": 4.0}
    boundaries = {key: DQN.load(entry["file"], device="cpu").policy.freeze_boundary for key, entry in record.items()}
    assert boundaries == {"best": None, "frozen": None, "layer4": "layer4"}


def test_restore_best_without_an_evaluation_keeps_the_weights(tmp_path, capsys):
    model = make_model(learning_starts=0)
    phases = [{"at_timestep": 8, "unfreeze_from": "layer4", "restore_best": True}]
    model.learn(12, callback=[UnfreezeCallback(phases), Rewards([1.0], 99), BestCheckpointCallback(0, tmp_path)])
    assert "there was no evaluation in the phase that ends" in capsys.readouterr().out
    assert model.policy.freeze_boundary == "layer4"


def test_restore_best_with_a_lost_file_warns_and_goes_on(tmp_path):
    model = make_model(learning_starts=0)
    phases = [{"at_timestep": 8, "unfreeze_from": "layer4", "restore_best": True}]

    class Vandal(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 7:
                (tmp_path / "best_frozen.zip").unlink()
            return True

    callbacks = [Rewards([1.0, 0.0, 0.0], 4), BestCheckpointCallback(0, tmp_path), Vandal(), UnfreezeCallback(phases)]
    with pytest.warns(UserWarning, match=r"best_frozen\.zip is gone"):
        model.learn(12, callback=callbacks)
    assert model.policy.freeze_boundary == "layer4"


def test_what_a_schedule_needs_is_asked_for_at_the_start_of_training():
    model = make_model()
    with pytest.raises(ValueError, match="add an EvalCallback"):
        model.learn(4, callback=UnfreezeCallback([{"on_plateau": {"patience": 1}, "unfreeze_from": "layer4"}]))
    with pytest.raises(ValueError, match="needs a BestCheckpointCallback"):
        model.learn(4, callback=UnfreezeCallback([{"at_timestep": 1, "unfreeze_from": "layer4", "restore_best": True}]))
    rgb = make_model(env=TinyGame((3, 32, 32)))
    with pytest.raises(ValueError, match="unfreeze_from must be one of 'stem'"):
        rgb.learn(4, callback=UnfreezeCallback([{"at_timestep": 1, "unfreeze_from": "adapter"}]))
    plain = DQN("CnnPolicy", TinyGame((4, 36, 36)), buffer_size=10)
    with pytest.raises(TypeError, match="needs ResNetCnnPolicy"):
        plain.learn(4, callback=UnfreezeCallback([{"at_timestep": 1, "unfreeze_from": "layer4"}]))
    late = make_model(learning_rate=lambda progress: 1e-3 * (1 - progress))
    with pytest.raises(ValueError, match="which is 0"):
        late.learn(12, callback=UnfreezeCallback([{"at_timestep": 1, "unfreeze_from": "layer4", "lr_backbone": 1e-4}]))


@pytest.mark.parametrize("stage", ["layer4", "all"])
def test_a_model_that_already_trains_there_is_refused(stage):
    model = make_model(extractor={"freeze_backbone": False})
    with pytest.raises(ValueError, match=r"boundary only moves down.*freeze_backbone=True"):
        model.learn(4, callback=UnfreezeCallback([{"at_timestep": 1, "unfreeze_from": stage}]))


@pytest.mark.parametrize("loaded", [True, False])
def test_a_model_that_has_trained_there_without_phases_is_refused(tmp_path, loaded):
    model = make_model(extractor={"backbone": "resnet_mini", "freeze_backbone": False}, learning_starts=0)
    model.learn(8)
    if loaded:
        model.save(tmp_path / "model")
        model = DQN.load(tmp_path / "model", env=TinyGame(), device="cpu")
    assert model._n_updates > 0
    with pytest.raises(ValueError, match=r"boundary only moves down.*freeze_backbone=True"):
        model.learn(4, callback=UnfreezeCallback([{"at_timestep": 1, "unfreeze_from": "layer4"}]))


def test_invariant_14_a_phase_that_never_began_warns_once_at_the_end():
    model = make_model()
    callback = UnfreezeCallback([{"at_timestep": 100, "unfreeze_from": "layer4"}])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(12, callback=callback)
        callback.on_training_end()  # RL-Zoo calls it again
    messages = [str(warning.message) for warning in caught if "never began" in str(warning.message)]
    assert messages == [
        "The phase with unfreeze_from='layer4' at timestep 100 never began: training ended at timestep 12, update 1. "
        "Train longer, or let it begin earlier."
    ]


LAYER4 = {"at_timestep": 5, "unfreeze_from": "layer4"}


@pytest.mark.parametrize(
    ("phases", "error", "message"),
    [
        ([], ValueError, "must be a list of dicts"),
        (LAYER4, ValueError, "must be a list of dicts"),
        (["layer4"], TypeError, "must be a dict such as"),
        ([{"unfreeze_from": "layer4"}], ValueError, "exactly one of at_timestep, at_update, on_plateau, got none"),
        ([{**LAYER4, "at_update": 3}], ValueError, "exactly one of"),
        ([{"at_timestep": 5}], ValueError, "needs unfreeze_from"),
        ([{**LAYER4, "unfreeze_from": "layer5"}], ValueError, "did you mean 'layer4'"),
        ([{**LAYER4, "lr": 1e-3}], TypeError, "no argument 'lr'"),
        ([{**LAYER4, "lr_backbone": -1.0}], ValueError, "lr_backbone must be finite and >= 0"),
        ([{**LAYER4, "ramp": -1}], ValueError, "ramp must be finite and >= 0"),
        ([{**LAYER4, "restore_best": "yes"}], TypeError, "restore_best must be true or false"),
        ([{**LAYER4, "at_timestep": -5}], ValueError, "at_timestep must be finite and >= 0"),
        ([{"on_plateau": 5, "unfreeze_from": "layer4"}], ValueError, "must be a dict with patience"),
        ([{"on_plateau": {"patience": 1, "latest": 9}, "unfreeze_from": "layer4"}], TypeError, "latest_timestep"),
        ([LAYER4, {"at_timestep": 9, "unfreeze_from": "layer4"}], ValueError, "only moves down"),
        ([{"at_timestep": 5, "unfreeze_from": "stem"}, {**LAYER4, "at_timestep": 9}], ValueError, "only moves down"),
        ([{"at_timestep": 5, "unfreeze_from": "all"}, {**LAYER4, "at_timestep": 9}], ValueError, "only moves down"),
        ([LAYER4, {"at_timestep": 5, "unfreeze_from": "layer3"}], ValueError, "must begin after the one before"),
        ([LAYER4, {"at_timestep": 3, "unfreeze_from": "layer3"}], ValueError, "must begin after the one before"),
    ],
)
def test_bad_phases_are_refused_at_construction(phases, error, message):
    with pytest.raises(error, match=message):
        UnfreezeCallback(phases)


def test_it_can_be_driven_before_there_is_a_logger():
    model = make_model()
    callback = start(model, UnfreezeCallback([{"at_timestep": 4, "unfreeze_from": "layer4"}], verbose=0))
    model.num_timesteps = 4
    callback.on_rollout_end()
    assert model.policy.freeze_boundary == "layer4"


def test_the_boundary_is_logged():
    model = fill(make_model())
    callback = start(model, UnfreezeCallback([{"at_update": 0, "unfreeze_from": "layer4"}], verbose=0))
    callback.on_rollout_end()
    assert model.logger.name_to_value["train/phase"] == 1
    assert model.logger.name_to_value["train/freeze_boundary"] == 5
    assert np.isfinite(model.logger.name_to_value["train/freeze_boundary"])
