"""The recommended fine-tuning schedule, as one call and as a section of YAML."""

import re
from pathlib import Path

import pytest
import yaml
from rl_zoo3.utils import get_callback_list
from stable_baselines3.common.callbacks import CallbackList, EvalCallback
from stable_baselines3.common.logger import configure

import sb3_resnet
from sb3_resnet import fine_tuning_callbacks
from sb3_resnet.callbacks import (
    BestCheckpointCallback,
    FeatureCacheCallback,
    GradientClipCallback,
    LRScheduleCallback,
    MonitorCallback,
)
from sb3_resnet.callbacks._evaluations import walk
from tests.helpers import Rewards, TinyGame, fill, make_model

ROOT = Path(__file__).parent.parent
CONFIG, GUIDE = ROOT / "zoo_configs" / "dqn_fine_tuning.yml", ROOT / "docs" / "guides" / "phases.md"


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


@pytest.mark.parametrize(
    ("last_stage", "stages"),
    [("stem", ["stem"]), ("layer1", ["layer1", "stem"]), ("layer2", ["layer2", "layer1"])],
)
def test_the_recipe_works_with_lower_trunks_and_after_a_resume(last_stage, stages, tmp_path):
    model = make_model(extractor={"last_stage": last_stage})

    def train(steps):
        recipe = fine_tuning_callbacks(60, warmup_steps=5, ramp=2, save_path=tmp_path, last_stage=last_stage)
        model.learn(steps, callback=[recipe, Rewards(range(9), eval_freq=10)], reset_num_timesteps=False)
        return recipe.callbacks[1], model.policy.freeze_boundary

    train(28)
    model.save(tmp_path / "model")
    model = type(model).load(tmp_path / "model", env=TinyGame(), device="cpu")
    assert model.policy.freeze_boundary == stages[0]
    callback, boundary = train(32)
    assert [phase.unfreeze_from for phase in callback.phases] == stages
    assert boundary == stages[-1]


def test_a_trunk_that_ends_lower_says_what_to_write(tmp_path):
    model = make_model(extractor={"last_stage": "layer2"})
    recipe = fine_tuning_callbacks(40, save_path=tmp_path)
    with pytest.raises(ValueError, match=r"ends at layer2.* with fine_tuning_callbacks write last_stage='layer2'"):
        model.learn(20, callback=[recipe, Rewards(range(9), eval_freq=10)])
    with pytest.raises(ValueError, match="last_stage must be one of 'stem'"):
        fine_tuning_callbacks(40, last_stage="layer5")


@pytest.mark.parametrize("written", ["guide", "docstring"])
def test_the_documented_call_runs(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = GUIDE.read_text() if written == "guide" else fine_tuning_callbacks.__doc__
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


# The demo is a run of some minutes, without schedule and monitor, as it was measured.
SHIPPED = sorted(path for path in (ROOT / "zoo_configs").glob("*.yml") if path.stem != "demo")


@pytest.mark.parametrize("path", [None, *SHIPPED], ids=lambda path: "recipe" if path is None else path.stem)
def test_each_recipe_and_shipped_section_warms_up_clips_and_logs(path):
    """What the specification asks for, in numbers."""
    sections = [{"policy_kwargs": {}}] if path is None else yaml.safe_load(path.read_text()).values()
    for section in sections:
        callbacks = [fine_tuning_callbacks()] if path is None else get_callback_list({"callback": section["callback"]})
        flat = {type(callback): callback for root in callbacks for callback in walk(root)}
        assert 500 <= flat[LRScheduleCallback].warmup_steps <= 2000
        assert flat[MonitorCallback].every == 100
        clip = flat.get(GradientClipCallback)
        smallest = 0.5 if path is not None and path.stem == "ppo" else 1  # PPO's own default in SB3
        assert smallest <= (section["max_grad_norm"] if clip is None else clip.max_norm) <= 5


def test_the_recipe_logs_what_a_run_needs(tmp_path):
    """Loss, evaluation reward, rates, gradient norms and memory, without being asked."""
    model = make_model(learning_rate=1e-3)
    recipe = fine_tuning_callbacks(40, warmup_steps=5, ramp=2, save_path=tmp_path, monitor_every=1)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    evaluation = EvalCallback(TinyGame(), eval_freq=20, n_eval_episodes=1, verbose=0)
    model.learn(40, callback=[recipe, evaluation], log_interval=1)
    logged = {*(tmp_path / "progress.csv").read_text().split("\n")[0].split(",")}
    assert {"train/loss", "monitor/loss", "eval/mean_reward", "monitor/process_mb"} <= logged
    groups = {group["name"] for group in model.policy.optimizer.param_groups}
    assert {f"{key}{name}" for key in ("train/lr_", "grad_norm/", "grad_norm_clipped/") for name in groups} <= logged


def test_the_recipe_hands_its_arguments_on(tmp_path):
    arguments = {"warmup_steps": 3, "ramp": 4, "max_norm": 1.5, "save_freq": 7, "save_path": tmp_path}
    warmup, unfreeze, clip, monitor, best = fine_tuning_callbacks(100, restore_best=True, **arguments).callbacks
    assert (warmup.warmup_steps, clip.max_norm, monitor.every) == (3, 1.5, 100)
    assert (best.save_freq, best.save_path) == (7, tmp_path)
    assert {(phase.ramp, phase.restore_best) for phase in unfreeze.phases} == {(4, True)}


@pytest.mark.parametrize(("every", "found"), [(100, [100]), (7, [7]), (None, [])])
def test_the_recipes_monitor_can_be_left_out(every, found):
    recipe = fine_tuning_callbacks(monitor_every=every)
    assert [callback.every for callback in recipe.callbacks if isinstance(callback, MonitorCallback)] == found


@pytest.mark.slow
def test_warmup_is_counted_in_updates():
    """The default of the recipe: half the rate at update 500, the whole one from update 1,000 on."""
    model = make_model(learning_rate=1e-3, policy_kwargs={"net_arch": []}, extractor={"backbone": "resnet_mini"})
    (warmup,) = [one for one in fine_tuning_callbacks().callbacks if isinstance(one, LRScheduleCallback)]
    fill(model)
    warmup.init_callback(model)
    warmup.on_training_start({}, {})
    rates = []
    model.policy.optimizer.register_step_post_hook(
        lambda optimizer, args, kwargs: rates.append(optimizer.param_groups[0]["lr"])
    )
    model.train(gradient_steps=1002, batch_size=1)
    assert [rates[n - 1] for n in (1, 500, 1000, 1001)] == pytest.approx([1e-6, 5e-4, 1e-3, 1e-3])


@pytest.mark.parametrize("total", [0, -5, 1.5])
def test_bad_totals_are_refused(total):
    with pytest.raises(ValueError, match="total_timesteps must be"):
        fine_tuning_callbacks(total)
