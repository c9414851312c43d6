"""Golden resume through ``learn()`` for PPO and A2C: cut and resumed from checkpoints, a run equals one that is not."""

import random

import pytest
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

import sb3_resnet
from sb3_resnet.common.checkpoints import checkpoints
from tests.helpers import ON_POLICY, CutError, ForgetfulGame, Fuse, assert_same, make_actor_critic, resuming_callbacks

pytestmark = pytest.mark.slow

TOTAL = 144
SETTINGS = {
    "ppo": {"algorithm": "ppo"},
    "ppo, 3 environments, two ResNets": {"algorithm": "ppo", "n_envs": 3, "n_steps": 4, "shared": False},
    "ppo, target_kl": {"algorithm": "ppo", "target_kl": 1e-4},
    "a2c": {"algorithm": "a2c"},
    "ppo, cache, two environments": {"algorithm": "ppo", "n_envs": 2, "n_steps": 4, "cached": True},
    "ppo, cache of frames": {"algorithm": "ppo", "extractor": {"adapter": "per_frame"}, "cached": True},
    "a2c, cache, two ResNets": {"algorithm": "a2c", "shared": False, "cached": True},
}


def begin_or_resume(folder, algorithm, n_envs=1, shared=True, **settings):
    """A model at its beginning, or at its newest checkpoint."""
    env = DummyVecEnv([lambda: Monitor(ForgetfulGame())] * n_envs)
    if not folder.exists() or not checkpoints(folder):
        policy_kwargs = {"dropout": 0.2, "share_features_extractor": shared}
        return make_actor_critic(algorithm, env, policy_kwargs, learning_rate=1e-3, **{**settings, "seed": 3})
    path = sb3_resnet.newest_checkpoint(folder)
    env.reset()
    model = ON_POLICY[algorithm].load(path, env=env, device="cpu", force_reset=False)
    sb3_resnet.restore_random_states(path, model)
    return model


def run(folder, cuts=(), cached=False, **settings):
    """Train to the end, through the cuts."""
    for left in [*cuts, 10**9]:
        model = begin_or_resume(folder, **settings)
        used = [*resuming_callbacks(folder, cached), Fuse(left)]
        try:
            model.learn(TOTAL - model.num_timesteps, callback=used, reset_num_timesteps=False)
        except CutError:
            continue
        return model
    raise AssertionError("cut each time")


def settings_of(model):
    """The optimizer's groups without what names files."""
    groups = model.policy.optimizer.state_dict()["param_groups"]
    return [{key: value for key, value in group.items() if key != "best_checkpoint"} for group in groups]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_is_cut_and_resumed_equals_the_run_that_is_not(tmp_path, name):
    whole = run(tmp_path / "whole", **SETTINGS[name])
    assert whole.policy.freeze_boundary == "layer3"
    generator = random.Random(name)
    resumed = run(tmp_path / "cut", [generator.randrange(25, 70) for _ in range(6)], **SETTINGS[name])
    assert_same(whole.policy.state_dict(), resumed.policy.state_dict())
    assert settings_of(whole) == settings_of(resumed)
    assert (whole.num_timesteps, whole._n_updates) == (resumed.num_timesteps, resumed._n_updates)
    moments, others = (model.policy.optimizer.state_dict()["state"] for model in (whole, resumed))
    assert moments.keys() == others.keys()
    for key, state in moments.items():
        assert_same(state, others[key])
