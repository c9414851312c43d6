"""The recommended fine-tuning schedule, as one call and as a section of YAML."""

import re
from pathlib import Path

import pytest
import yaml
from rl_zoo3.utils import get_callback_list
from stable_baselines3.common.callbacks import CallbackList, EvalCallback

import sb3_resnet
from sb3_resnet import fine_tuning_callbacks
from sb3_resnet.callbacks import BestCheckpointCallback, FeatureCacheCallback
from tests.helpers import TinyGame, make_model
from tests.test_unfreeze_callback import Rewards

ROOT = Path(__file__).parent.parent
CONFIG, README = ROOT / "zoo_configs" / "dqn_fine_tuning.yml", ROOT / "README.md"


def settings(callback):
    """What distinguishes two callbacks of the same class."""
    hidden = ("logger", "model", "parent")
    return {k: v for k, v in vars(callback).items() if not k.startswith("_") and k not in hidden}


@pytest.mark.slow
def test_the_recipe_runs_its_phases_and_keeps_the_best(tmp_path):
    model = make_model(learning_rate=1e-3)
    recipe = fine_tuning_callbacks(100, warmup_steps=5, ramp=2, save_path=tmp_path, save_freq=20, restore_best=True)
    seen = {}
    train = model.train
    model.train = lambda **kwargs: (seen.update({model.num_timesteps: model.policy.freeze_boundary}), train(**kwargs))
    model.learn(100, callback=[recipe, Rewards(range(10), eval_freq=10)])
    assert {stage: min(step for step in seen if seen[step] == stage) for stage in (None, "layer4", "layer3")} == {
        None: 12,
        "layer4": 40,
        "layer3": 72,  # the first rollout that ends at or after step 70
    }
    rates = {group["name"]: group["lr"] for group in model.policy.optimizer.param_groups}
    assert rates["backbone"] == pytest.approx(rates["head"] / 10)
    assert {"best.zip", "best_frozen.zip", "best_layer4.zip", "best_layer3.zip"} <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize("written", ["README", "docstring"])
def test_the_documented_call_runs(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = README.read_text() if written == "README" else fine_tuning_callbacks.__doc__
    call = re.search(r"^ *recipe = .*\n *model\.learn\(.*", text, re.MULTILINE).group()
    names = {"sb3_resnet": sb3_resnet, "EvalCallback": EvalCallback, "eval_env": TinyGame(), "model": make_model()}
    exec("\n".join(map(str.strip, call.replace("1_000_000", "20").splitlines())), names)
    assert names["model"].policy.freeze_boundary == "layer3"


def test_the_yaml_section_is_the_recipe_written_out():
    (section,) = yaml.safe_load(CONFIG.read_text()).values()
    cache, *written = get_callback_list({"callback": section["callback"]})
    assert isinstance(cache, FeatureCacheCallback)
    recipe = fine_tuning_callbacks(section["n_timesteps"]).callbacks
    assert [type(callback) for callback in written] == [type(callback) for callback in recipe]
    assert [settings(callback) for callback in written] == [settings(callback) for callback in recipe]


def test_rl_zoo_can_call_the_recipe_too():
    (callback,) = get_callback_list({"callback": [{"sb3_resnet.fine_tuning_callbacks": {"total_timesteps": 1e6}}]})
    assert isinstance(callback, CallbackList)
    assert isinstance(callback.callbacks[-1], BestCheckpointCallback)


@pytest.mark.parametrize("total", [0, -5, 1.5])
def test_bad_totals_are_refused(total):
    with pytest.raises(ValueError, match="total_timesteps must be"):
        fine_tuning_callbacks(total)
