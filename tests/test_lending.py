"""However learn() ends, the model goes on as one that was never lent anything."""

import copy
import gc
import io
import pickle
import weakref

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_resnet.callbacks import (
    AMPCallback,
    DoctorCallback,
    FeatureCacheCallback,
    GradientClipCallback,
    LRScheduleCallback,
    MonitorCallback,
    NanGuardCallback,
    UnfreezeCallback,
)
from sb3_resnet.callbacks._tracker import Tracker, TrackerCallback
from tests.helpers import (
    LIVE,
    CutError,
    ForgetfulGame,
    assert_same,
    make_actor_critic,
    make_model,
    observations,
    probabilities_and_values,
    q_values,
    random_state,
    snapshot,
)

PHASES = [{"at_timestep": 12, "unfreeze_from": "layer4", "ramp": 1000}]
LENDERS = {
    "amp float16": (lambda: [AMPCallback("float16", verbose=0)], LIVE),
    "amp bfloat16": (lambda: [AMPCallback("bfloat16", verbose=0)], LIVE),
    "clip": (lambda: [GradientClipCallback(1e-3)], LIVE),
    "schedule": (lambda: [LRScheduleCallback(1000)], LIVE),
    "phases": (lambda: [UnfreezeCallback(PHASES, verbose=0)], {}),
    "monitor": (lambda: [MonitorCallback(every=1)], LIVE),
    "doctor": (lambda: [DoctorCallback(every=1, verbose=0)], LIVE),
    "nan guard": (lambda: [NanGuardCallback()], LIVE),
    "cache": (lambda: [FeatureCacheCallback()], {}),
    "cache of copies": (lambda: [FeatureCacheCallback(augment_copies=2)], {"augment": ["random_shift"]}),
    "all": (
        lambda: [
            FeatureCacheCallback(),
            AMPCallback("float16", verbose=0),
            UnfreezeCallback(PHASES, verbose=0),
            LRScheduleCallback(1000),
            GradientClipCallback(1e-3),
            MonitorCallback(every=1),
            NanGuardCallback(),
        ],
        {},
    ),
}
ON_POLICY = ["amp bfloat16", "clip", "schedule", "phases", "monitor", "nan guard"]


class FragileGame(ForgetfulGame):
    """Fails at a step that somebody has asked for."""

    fails_in = None

    def step(self, action):
        if self.fails_in is not None:
            self.fails_in -= 1
            if self.fails_in < 0:
                raise CutError
        return super().step(action)


class Interrupt(BaseCallback):
    """Ctrl-C, or another error, at one of SB3's hooks or in an update."""

    def __init__(self, where, left=22, error=KeyboardInterrupt):
        super().__init__()
        self.where, self.left, self.error = where, left, error

    def _act(self, here, left=0):
        if here == self.where:
            self.left -= 1
            if self.left <= left:
                self.where = None
                raise self.error

    def _on_training_start(self):
        self._act("training_start", 1000)
        self.model.policy.optimizer.register_step_post_hook(lambda *args: self._act("update", 17))

    def _on_rollout_start(self):
        self._act("rollout_start", 16)

    def _on_step(self):
        self._act("step")
        return True

    def _on_rollout_end(self):
        self._act("rollout_end", 16)


def interrupted(model, used, where):
    """Let learn() end by an exception."""
    used = [*used]
    if where == "environment":
        model.env.envs[0].fails_in = 21
    elif where == "nan":
        model.env.envs[0].step = lambda action: (*ForgetfulGame.step(game, action)[:1], np.nan, False, False, {})
        game = model.env.envs[0]
    else:
        used.append(Interrupt(where))
    with pytest.raises({"environment": CutError, "nan": ValueError}.get(where, KeyboardInterrupt)):
        model.learn(200, callback=used)
    model.env.envs[0].fails_in = None
    vars(model.env.envs[0]).pop("step", None)
    return model


def never_lent(model):
    """The same model from its file, with a copy of its buffer: nothing but what is saved."""
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    env = DummyVecEnv([FragileGame])
    other = type(model).load(file, env=env, device="cpu")
    if hasattr(model, "replay_buffer"):
        other.replay_buffer = pickle.loads(pickle.dumps(model.replay_buffer))
    env.set_attr("np_random", copy.deepcopy(model.env.envs[0].np_random))
    other.set_logger(Logger(None, []))
    model.set_logger(Logger(None, []))
    return other


def moments(model):
    """Moments of the optimizer and the rates that were used."""
    state = model.policy.optimizer.state_dict()
    return [
        *(value for key in sorted(state["state"]) for _, value in sorted(state["state"][key].items())),
        *(th.tensor(float(group["lr"])) for group in state["param_groups"]),
    ]


def assert_equal(model, other):
    assert_same(model.policy.state_dict(), other.policy.state_dict())
    assert all(th.equal(one, two) for one, two in zip(moments(model), moments(other), strict=True))


def same_randomness(act, *models):
    state = random_state()
    for model in models:
        random_state(state)
        act(model)


def begin(name, algorithm="dqn", **kwargs):
    make, extractor = LENDERS[name]
    game = DummyVecEnv([FragileGame])
    if algorithm == "dqn":
        options = {"exploration_fraction": 0.01, "exploration_final_eps": 0.1, "gradient_steps": 2, **kwargs}
        return make_model(env=game, extractor={"backbone": "resnet_mini", **extractor}, **options), make()
    return make_actor_critic(algorithm, game, extractor=extractor, **kwargs), make()


def train(model):
    if hasattr(model, "replay_buffer"):
        model.train(gradient_steps=3, batch_size=4)
    else:
        model.train()


WHERE = ["environment", "step", "update", "rollout_start", "training_start"]


def table(*pairs, fast=()):
    """Two parameters; what is not named as fast runs with the slow tests."""
    return [pytest.param(*pair, marks=[] if pair in fast else pytest.mark.slow) for pair in pairs]


SINGLE = [(name, where) for name in LENDERS for where in ("environment", "update") if name != "all"]
ALL = [("all", where) for where in WHERE]
LATER = [("all", where) for where in [*WHERE, "rollout_end", "nan"]]
LATER += [(name, where) for name in ("amp float16", "cache") for where in ("environment", "rollout_end")]


@pytest.mark.parametrize(
    ("name", "where"), table(*ALL, *SINGLE, fast=[("all", "environment"), ("amp bfloat16", "update")])
)
def test_updates_by_hand_are_those_of_a_model_that_was_never_lent_anything(name, where):
    model, used = begin(name)
    if where == "training_start":
        model.learn(40)  # so that there is something to train on
    interrupted(model, used, where)
    other = never_lent(model)
    same_randomness(train, model, other)
    assert_equal(model, other)
    obs = observations(model)
    assert th.equal(q_values(model, obs), q_values(other, obs))
    assert (model.predict(obs, deterministic=True)[0] == other.predict(obs, deterministic=True)[0]).all()


@pytest.mark.parametrize(("name", "where"), table(*LATER, fast=[("all", "rollout_end")]))
def test_a_learn_without_callbacks_is_that_of_a_model_that_was_never_lent_anything(name, where):
    model, used = begin(name)
    interrupted(model, used, where)
    if where == "nan":
        model.replay_buffer.rewards[:] = 0
    other = never_lent(model)
    obs = observations(model)
    model.policy.set_training_mode(False)
    assert th.equal(q_values(model, obs), q_values(other, obs))
    model.env.seed(5)
    other.env.seed(5)
    same_randomness(lambda one: (one.action_space.seed(1), one.learn(30)), model, other)
    assert_equal(model, other)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["environment", "update"])
@pytest.mark.parametrize("name", ON_POLICY)
@pytest.mark.parametrize("algorithm", ["ppo"])
def test_it_holds_for_ppo(name, algorithm, where):
    model, used = begin(name, algorithm)
    interrupted(model, used, where)
    other = never_lent(model)
    obs = observations(model)
    assert th.equal(probabilities_and_values(model, obs), probabilities_and_values(other, obs))
    model.env.seed(5)
    other.env.seed(5)
    same_randomness(lambda one: one.learn(16), model, other)
    assert_equal(model, other)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["environment", "update"])
def test_copies_and_pickles_are_possible_and_the_next_learn_works(where):
    model, used = begin("all")
    interrupted(model, used, where)
    copied = copy.deepcopy(model.policy)
    assert th.equal(q_values(copied, observations(model)), q_values(model, observations(model)))
    pickle.loads(pickle.dumps(model.replay_buffer))
    before = snapshot(model.policy)
    model.learn(40, callback=LENDERS["all"][0](), reset_num_timesteps=False)
    assert any(not th.equal(value, before[key]) for key, value in model.policy.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False])
def test_an_evaluation_between_acting_and_updating_takes_nothing_away(first):
    """Whatever the order of the callbacks; the evaluation asks about other observations."""

    class Watch(BaseCallback):
        def __init__(self):
            super().__init__()
            self.dtypes = []

        def _on_training_start(self):
            stage = self.model.q_net.features_extractor.backbone.layer4[-1].conv2
            stage.register_forward_hook(lambda module, args, output: self.dtypes.append(output.dtype))

        def _on_rollout_end(self):
            self.model.predict(observations(self.model, 1))
            del self.dtypes[:]

        def _on_rollout_start(self):
            assert {*self.dtypes} <= {th.bfloat16}
            self.seen = getattr(self, "seen", 0) + len(self.dtypes)

        def _on_step(self):
            return True

    model, used = begin("amp bfloat16")
    watch = Watch()
    evaluation = EvalCallback(DummyVecEnv([FragileGame]), eval_freq=5, n_eval_episodes=1, verbose=0)
    model.learn(40, callback=[evaluation, *used, watch] if first else [watch, *used, evaluation])
    assert watch.seen > 10


def test_acting_and_updates_of_learn_itself_use_what_was_lent():
    dtypes = {True: set(), False: set()}

    def see(module, args, output):
        dtypes[module.training or th.is_grad_enabled()].add(output.dtype)

    model, used = begin("amp bfloat16", exploration_initial_eps=0.0, exploration_final_eps=0.0)
    model.q_net.features_extractor.backbone.layer4[-1].conv2.register_forward_hook(see)
    model.learn(40, callback=used)
    assert dtypes == {True: {th.bfloat16}, False: {th.bfloat16}}


def test_another_train_in_one_rollout_is_still_that_of_learn():
    """A subclass may make its updates one by one."""

    class OneByOne(BaseCallback):
        norms = ()

        def _on_step(self):
            return True

        def _on_training_start(self):
            model, train = self.model, self.model.train
            model.train = lambda gradient_steps, batch_size: [train(1, batch_size) for _ in range(gradient_steps)]
            self.model.policy.optimizer.register_step_post_hook(self.see)
            self.norms = []

        def see(self, optimizer, *args):
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self.norms.append(float(th.linalg.vector_norm(th.stack([th.linalg.vector_norm(g) for g in gradients]))))

    model, used = begin("clip", gradient_steps=3)
    one_by_one = OneByOne()
    model.learn(32, callback=[*used, one_by_one])
    assert len(one_by_one.norms) > 6
    assert max(one_by_one.norms) < 2e-3


def test_updates_of_another_callback_are_plain_and_named(recwarn):
    class Eager(BaseCallback):
        def _on_step(self):
            if self.n_calls == 20:
                self.model.train(gradient_steps=1, batch_size=4)
            return True

    model, used = begin("clip")
    model.learn(32, callback=[*used, Eager()])
    assert [str(warning.message)[:45] for warning in recwarn if "sb3_resnet" in str(warning.message)] == [
        "An update was made before on_rollout_end or a"
    ]


class FakeTracker(Tracker):
    def __init__(self):
        super().__init__("fake")
        self.lines, self.is_closed = [], False

    def log_hyperparameters(self, values):
        pass

    def log_numbers(self, values, step):
        self.lines.append(step)

    def log_file(self, path):
        pass

    def close(self):
        self.is_closed = True


class FakeTrackerCallback(TrackerCallback):
    def _open(self, hyperparameters):
        self.opened = FakeTracker()
        return self.opened


class Null(KVWriter):
    def write(self, *args, **kwargs):
        pass


def test_a_trackers_run_gets_no_lines_of_a_later_learn_and_ends_with_the_callback():
    model, _ = begin("clip")
    model.set_logger(Logger(None, [Null()]))
    callback = FakeTrackerCallback(save_best=False, verbose=0)
    interrupted(model, [callback], "environment")
    tracker = callback.opened
    model.learn(30, log_interval=1)
    model.learn(30, log_interval=1, reset_num_timesteps=False)
    assert tracker.lines == []
    assert not tracker.is_closed
    reference = weakref.ref(callback)
    del callback
    model.set_logger(Logger(None, []))
    gc.collect()
    assert reference() is None
    assert tracker.is_closed
