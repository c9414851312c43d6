"""What VecNormalize has learnt goes with checkpoints and best models."""

import numpy as np
import pytest
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize, VecTransposeImage

import sb3_resnet
from sb3_resnet.callbacks import BestCheckpointCallback, PreemptionCallback
from sb3_resnet.common.checkpoints import save_model
from tests.helpers import DictGame, Rewards, TinyGame, make_dict_model, make_model

MINI = {"backbone": "resnet_mini"}


class Crash(BaseCallback):
    """Notes what has been learnt when a rollout begins, and ends learn() at a step."""

    def __init__(self, at):
        super().__init__()
        self.at, self.seen = at, {}

    def _on_rollout_start(self):
        self.seen[self.model.num_timesteps] = learnt(self.training_env)

    def _on_step(self):
        if self.model.num_timesteps == self.at:
            raise RuntimeError("power cut")
        return True


def games(**options):
    env = VecNormalize(DummyVecEnv([TinyGame]), norm_obs=False, **options)
    env.seed(1)
    return env


def learnt(env):
    rms = env.ret_rms
    return float(rms.mean), float(rms.var), float(rms.count)


@pytest.mark.filterwarnings("ignore:BestCheckpointCallback keeps only the newest")
@pytest.mark.parametrize("how", ["by hand", "PreemptionCallback"])
def test_a_run_that_is_resumed_goes_on_with_them(tmp_path, how):
    def callbacks(crash):
        first = [PreemptionCallback(tmp_path, verbose=0)] if how == "PreemptionCallback" else []
        return [*first, BestCheckpointCallback(20, tmp_path, save_replay_buffer=True), crash]

    crash = Crash(30)
    with pytest.raises(RuntimeError, match="power cut"):
        make_model(env=games(), extractor=MINI).learn(60, callback=callbacks(crash))
    path, env = sb3_resnet.newest_checkpoint(tmp_path), games()
    if how == "by hand":
        model = DQN.load(path, env=env, device="cpu")
        sb3_resnet.restore_random_states(path, model)
        assert learnt(env) == crash.seen[20]
    else:
        resumed = Crash(21)
        with pytest.raises(RuntimeError, match="power cut"):
            make_model(env=env, extractor=MINI).learn(60, callback=callbacks(resumed))
        assert resumed.seen[20] == crash.seen[20]
    assert crash.seen[20][2] > 20


def test_the_best_model_has_those_of_its_moment(tmp_path):
    env = VecNormalize(VecTransposeImage(DummyVecEnv([DictGame])), norm_obs_keys=["speed"])
    model = make_dict_model(env=env)
    model.learn(12, callback=[BestCheckpointCallback(0, tmp_path), Rewards([1.0, 3.0, 2.0])])
    count = env.obs_rms["speed"].count
    other = VecNormalize(DummyVecEnv([DictGame]), norm_obs_keys=["speed"], training=False)
    sb3_resnet.restore_vec_normalize(tmp_path / "best.zip", other)
    assert other.obs_rms["speed"].count == pytest.approx(count - 4)
    sb3_resnet.restore_vec_normalize(tmp_path / "best_frozen.zip", other)
    assert [type(rms).__name__ for rms in (*other.obs_rms.values(), other.ret_rms)] == ["RunningMeanStd"] * 2


def test_they_are_the_same_numbers_and_go_on(tmp_path):
    env = games()
    model = make_model(env=env, extractor=MINI)
    model.learn(9)
    save_model(model, tmp_path / "model.zip")
    other = games()
    sb3_resnet.restore_vec_normalize(tmp_path / "model.zip", other)
    assert learnt(other) == learnt(env)
    for one in (env, other):
        one.ret_rms.update(np.array([1.0, 4.0]))
    assert learnt(other) == learnt(env)


def test_what_cannot_be_put_back_is_named(tmp_path):
    model = make_model(env=games(), extractor=MINI)
    save_model(model, tmp_path / "with.zip")
    model.save(tmp_path / "without.zip")
    with pytest.raises(FileNotFoundError, match="is no file"):
        sb3_resnet.restore_vec_normalize(tmp_path / "none.zip", games())
    with pytest.raises(ValueError, match=r"holds no statistics of VecNormalize\. BestCheckpointCallback keeps them"):
        sb3_resnet.restore_vec_normalize(tmp_path / "without.zip", games())
    with pytest.raises(ValueError, match="The environment has no VecNormalize"):
        sb3_resnet.restore_vec_normalize(tmp_path / "with.zip", DummyVecEnv([TinyGame]))
    with pytest.raises(ValueError, match="saved with another VecNormalize"):
        sb3_resnet.restore_vec_normalize(tmp_path / "with.zip", VecNormalize(DummyVecEnv([TinyGame])))


def test_a_checkpoint_without_them_is_warned_of(tmp_path):
    plain = make_model(extractor=MINI)
    plain.learn(20, callback=BestCheckpointCallback(20, tmp_path))
    path = sb3_resnet.newest_checkpoint(tmp_path)
    model = DQN.load(path, env=games(), device="cpu")
    with pytest.warns(UserWarning, match="does not hold what VecNormalize had learnt"):
        sb3_resnet.restore_random_states(path, model)
