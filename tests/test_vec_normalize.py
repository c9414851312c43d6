"""VecNormalize in a place where images change their shape above it is named before the first step."""

import pytest
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize, VecTransposeImage

from sb3_resnet.callbacks import (
    AMPCallback,
    BestCheckpointCallback,
    GradientClipCallback,
    LRScheduleCallback,
    MonitorCallback,
    NanGuardCallback,
    PreemptionCallback,
    UnfreezeCallback,
)
from tests.helpers import TinyGame, make_actor_critic, make_model

PHASES = [{"at_timestep": 12, "unfreeze_from": "layer4"}]
CALLBACKS = {
    "amp": lambda folder: AMPCallback(verbose=0),
    "clip": lambda folder: GradientClipCallback(),
    "schedule": lambda folder: LRScheduleCallback(),
    "monitor": lambda folder: MonitorCallback(),
    "nan guard": lambda folder: NanGuardCallback(),
    "phases": lambda folder: UnfreezeCallback(PHASES),
    "checkpoints": lambda folder: BestCheckpointCallback(save_path=folder),
    "preemption": lambda folder: PreemptionCallback(folder),
}


def channels_last():
    return DummyVecEnv([lambda: TinyGame((32, 32, 4))])


@pytest.mark.parametrize("name", CALLBACKS)
def test_each_callback_says_where_vec_normalize_belongs_with_any_replay_buffer(name, tmp_path):
    model = make_model(env=VecNormalize(channels_last(), norm_obs=False), extractor={"backbone": "resnet_mini"})
    with pytest.raises(ValueError, match=r"VecNormalize\(VecTransposeImage\(env\), norm_obs=False\)"):
        model.learn(20, callback=CALLBACKS[name](tmp_path))
    assert model.num_timesteps == 0


def test_what_works_is_left_alone():
    env = VecNormalize(VecTransposeImage(channels_last()), norm_obs=False)
    make_model(env=env, extractor={"backbone": "resnet_mini"}).learn(20, callback=NanGuardCallback())
    # An on-policy algorithm stores what the network sees.
    make_actor_critic(env=VecNormalize(channels_last(), norm_obs=False)).learn(8, callback=NanGuardCallback())
