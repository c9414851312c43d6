"""Heat maps with a known answer, and the pictures made of them."""

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch as th
from PIL import Image
from stable_baselines3.common.env_util import make_vec_env
from torch.nn import functional as F

from sb3_resnet.cli import pictures
from sb3_resnet.cli.envs import env_for
from sb3_resnet.cli.explain import cam_name, default_layer, gradcam, heat_maps, play_greedily
from sb3_resnet.cli.export import random_observations
from sb3_resnet.cli.network import ScoreNetwork
from tests.helpers import TinyGame, make_model, q_values

LINEAR = {"net_arch": [], "feature_norm": "none"}


def test_gradcam_of_a_linear_head_sums_to_the_score():
    # With mean pooling the score is the sum of the weighted maps, whatever the trunk: arXiv 1610.02391, section 3.
    model = make_model(policy_kwargs=LINEAR)
    network = ScoreNetwork(model).eval()
    images = th.as_tensor(random_observations(model, 4)).float().requires_grad_()
    targets = th.tensor([0, 1, 2, 1])
    scores = network(images)[range(4), targets] - network.head[-1].bias[targets]
    maps = gradcam(network, images, targets, "layer4", relu=False)
    # layer4's map is a single pixel at 32x32, which interpolation spreads.
    assert th.allclose(maps.mean(dim=(1, 2)), scores, atol=1e-6)
    assert float(scores.detach().abs().max()) > 1e-3


@pytest.mark.parametrize("adapter", ["conv1x1", "per_frame"])
def test_behind_a_spatial_softmax_each_place_has_its_own_weight(adapter):
    """The mean gradient of each channel is zero there, and Grad-CAM's weights would be rounding errors."""
    extractor = {"adapter": adapter, "last_stage": "layer2", "pooling": "spatial_softmax"}
    model = make_model(policy_kwargs=LINEAR, extractor=extractor, env=TinyGame((4, 64, 64)))
    network = ScoreNetwork(model).eval()
    eyes, head = network.extractor, network.head[-1].weight
    images = th.as_tensor(random_observations(model, 3)).float().requires_grad_()
    targets = th.tensor([0, 1, 2])
    seen = []
    hook = eyes.stage_modules("layer2")[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    network(images)
    hook.remove()
    maps = seen[0].detach().reshape(3, -1, *seen[0].shape[-3:])[:, -1].double()  # of the newest frame
    channels = maps.shape[1]
    weights = head[targets].detach().double().reshape(3, -1, 2, channels)[:, -1]  # rows, columns
    share = maps.flatten(2).softmax(dim=2).reshape(maps.shape)
    row = th.linspace(-1, 1, maps.shape[2], dtype=th.double)[:, None].expand(maps.shape[2:])
    expected = th.zeros(3, *maps.shape[2:], dtype=th.double)
    for which, place in enumerate((row, row.T)):
        mean = (share * place).sum(dim=(2, 3), keepdim=True)
        expected += (weights[:, which, :, None, None] * maps * share * (place - mean)).sum(dim=1)
    for relu in (False, True):
        shown = expected.relu() if relu else expected
        shown = F.interpolate(shown[:, None], images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        found = gradcam(network, images, targets, "layer2", relu=relu).detach().double()
        th.testing.assert_close(found, shown, rtol=1e-3, atol=1e-3 * float(shown.abs().max()))
    assert cam_name(model) == "HiResCAM"
    assert cam_name(make_model()) == "Grad-CAM"


@pytest.mark.parametrize("pooling", ["avg", "spatial_softmax"])
@pytest.mark.parametrize("adapter", ["conv1x1", "per_frame"])
@pytest.mark.parametrize("method", ["gradcam", "saliency"])
def test_maps_are_hot_only_where_the_image_matters(method, adapter, pooling):
    """Behind a stem that sees the left half alone, the right half cannot matter."""
    model = make_model(extractor={"adapter": adapter, "pooling": pooling}, env=TinyGame((4, 64, 64)))
    extractor = model.policy.online.features_extractor
    extractor.backbone.layer1.register_forward_pre_hook(lambda module, args: (args[0] * _left(args[0]),))
    observations = random_observations(model, 6)
    actions = q_values(model, observations).argmax(dim=1).numpy()
    heat = heat_maps(model, observations, actions, method, "layer1" if method == "gradcam" else None)
    assert heat.shape == (6, 64, 64)
    assert heat.min() == 0.0
    assert set(heat.max(axis=(1, 2)).tolist()) <= {0.0, 1.0}
    assert heat.max() == 1.0
    left, right = heat[..., :28].mean(), heat[..., 44:].mean()
    assert left > 10 * right


def _left(maps):
    mask = th.zeros_like(maps)
    mask[..., : maps.shape[-1] // 2] = 1.0
    return mask


@pytest.mark.parametrize(("size", "layer"), [(32, "layer1"), (84, "layer3"), (224, "layer4"), (18, "stem")])
def test_default_layer(size, layer):
    model = make_model(env=TinyGame((3, size, size)), buffer_size=1)
    assert default_layer(model) == layer
    maps = th.zeros(1, 3, size, size)
    extractor = model.policy.online.features_extractor
    stages = extractor.stages[: extractor.stages.index(layer) + 1]
    assert size == 18 or min(extractor.run_stages(maps, stages).shape[-2:]) >= 5


def test_unknown_methods_and_layers_are_refused():
    model = make_model()
    obs = random_observations(model, 1)
    with pytest.raises(ValueError, match="method must be one of"):
        heat_maps(model, obs, np.array([0]), "gradcamm")
    with pytest.raises(ValueError, match="layer must be one of"):
        heat_maps(model, obs, np.array([0]), layer="layer5")


def test_an_episode_is_played_greedily_to_its_end(tiny_id):
    model = make_model()
    episode = play_greedily(model, env_for(model, tiny_id), 100)
    assert len(episode.observations) == 13
    assert episode.names == ["0", "1", "2"]
    np.testing.assert_allclose(episode.scores, q_values(model, episode.observations).numpy(), atol=1e-6)
    assert (episode.actions == episode.scores.argmax(axis=1)).all()
    assert len(play_greedily(model, env_for(model, tiny_id), 5).rewards) == 5


def test_an_episode_that_a_wrapper_ends_is_over_though_no_monitor_tells():
    class Ends(gym.Wrapper):
        def step(self, action):
            observation, reward, _, cut, info = super().step(action)
            return observation, reward, self.unwrapped.clock == 7, cut, info

    env = make_vec_env(TinyGame, 1, wrapper_class=Ends)
    assert len(play_greedily(make_model(), env, 100).rewards) == 7


def test_overlay_leaves_cold_places_as_they_are():
    observation = random_observations(make_model(), 1)[0]
    heat = np.zeros((32, 32), np.float32)
    heat[:, :8] = 1.0
    picture = pictures.overlay(observation, heat)
    assert picture.shape == (256, 256, 3)
    newest = np.repeat(np.repeat(observation[-1], 8, axis=0), 8, axis=1)
    np.testing.assert_array_equal(picture[:, 128:, 0], newest[:, 128:])
    assert (picture[:, :32] != newest[:, :32, None]).mean() > 0.9


@pytest.mark.parametrize(("dtype", "high"), [(np.uint8, 255), (np.float32, 1.0), (np.float32, 255.0)])
def test_newest_frame(dtype, high):
    grey = np.zeros((4, 2, 2), dtype)
    grey[-1, 0, 1] = high
    frame = pictures.newest_frame(grey)
    assert frame[0, 1].tolist() == [255, 255, 255]
    assert frame.sum() == 3 * 255
    colour = np.zeros((6, 2, 2), dtype)
    colour[4, 1, 0] = high
    assert pictures.newest_frame(colour)[1, 0].tolist() == [0, 255, 0]


def test_newest_frame_of_three_grey_ones_and_of_values_below_zero():
    grey = np.arange(3, dtype=np.uint8).reshape(3, 1, 1) * 100
    assert pictures.newest_frame(grey, 1)[0, 0].tolist() == [200, 200, 200]
    assert pictures.newest_frame(grey, 3)[0, 0].tolist() == [0, 100, 200]
    assert pictures.newest_frame(np.array([-1.0, -0.5, 0.0]).reshape(3, 1, 1))[0, 0].tolist() == [0, 127, 255]


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_video_has_each_step(suffix, tmp_path, tiny_id):
    model = make_model()
    episode = play_greedily(model, env_for(model, tiny_id), 100)
    heat = heat_maps(model, episode.observations, episode.actions)
    path = tmp_path / f"episode.{suffix}"
    pictures.write_video(path, episode, heat)
    frames = [frame[..., :3] for frame in imageio.get_reader(path)]
    assert len(frames) == 13
    assert frames[0].shape == (256, 256 + 240, 3)
    assert np.abs(frames[3].astype(int) - frames[4]).mean() > 1
    # The best action's bar is orange.
    assert all((frame[..., 0].astype(int) - frame[..., 2]).max() > 100 for frame in frames)
    sheet = pictures.sheet(episode, heat, 6, "title")
    assert isinstance(sheet, Image.Image)
    assert sheet.size == (4 * 260, 22 + 2 * 278)
