"""What the agent looks at: Grad-CAM and saliency of the greedy action's score, by captum."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from torch.nn import functional as F

from sb3_resnet.cache.frames import Array
from sb3_resnet.cli.extras import import_extra
from sb3_resnet.cli.loading import extractor_of
from sb3_resnet.cli.network import ScoreNetwork
from sb3_resnet.common.arguments import choice
from sb3_resnet.nn.backbones import STAGES

METHODS = ("gradcam", "saliency")
#: Smallest map, in pixels of its shorter side, of which Grad-CAM still shows a place: layer4's is 3x3 at 84 pixels.
SMALLEST_MAP = 5
_BATCH = 32


@dataclass(frozen=True)
class Episode:
    """
    What the agent saw and did.

    :param observations: ``(steps, C, H, W)``
    :param scores: of each action, ``(steps, actions)``: Q-values, or logits for PPO and A2C
    :param actions: the greedy ones, which were taken, ``(steps,)``
    :param rewards: what they earned, ``(steps,)``
    :param names: of the actions
    """

    observations: Array
    scores: Array
    actions: Array
    rewards: Array
    names: list[str]


def play_greedily(model: Any, env: Any, steps: int) -> Episode:
    """
    Play one episode with the greedy actions.

    :param model: an SB3 model with a ResNet and discrete actions
    :param env: one environment that fits it
    :param steps: the most
    :return: the episode
    """
    network = ScoreNetwork(model).eval()
    observation = env.reset()
    seen, scores, rewards = [], [], []
    for _ in range(steps):
        with th.no_grad():
            score = network(th.as_tensor(observation, device=model.device)).cpu().numpy()
        seen.append(observation[0])
        scores.append(score[0])
        observation, reward, done, _ = env.step(score.argmax(axis=1))
        rewards.append(float(reward[0]))
        if done[0]:
            break
    table = np.stack(scores)
    return Episode(
        np.stack(seen), table, table.argmax(axis=1), np.array(rewards), _action_names(env, network.n_actions)
    )


def heat_maps(
    model: Any, observations: Array, actions: Array, method: str = "gradcam", layer: str | None = None
) -> Array:
    """
    Where a change of the image would change the score of an action.

    Grad-CAM (arXiv 1610.02391) weighs a stage's channels by their mean gradient, and shows what raises the score.
    Saliency (arXiv 1312.6034) is the size of the gradient of each pixel, the largest of its channels.

    :param model: an SB3 model with a ResNet and discrete actions
    :param observations: ``(n, C, H, W)``
    :param actions: the action to explain for each, ``(n,)``
    :param method: one of :data:`METHODS`
    :param layer: the stage that Grad-CAM looks at; ``None``: see :func:`default_layer`
    :return: ``(n, H, W)``, each map scaled to 0..1; all zero where nothing raises the score
    """
    choice("method", method, METHODS)
    network = ScoreNetwork(model).eval()
    layer = layer or default_layer(model)
    choice("layer", layer, network.extractor.stages)
    maps = []
    for start in range(0, len(observations), _BATCH):
        part = slice(start, start + _BATCH)
        images = th.as_tensor(observations[part], device=model.device).float().requires_grad_()
        targets = th.as_tensor(actions[part], device=model.device)
        hot = _saliency(network, images, targets) if method == "saliency" else gradcam(network, images, targets, layer)
        maps.append(hot.detach().cpu().numpy())
    heat: Array = np.concatenate(maps).clip(min=0.0)
    highest = heat.max(axis=(1, 2), keepdims=True)
    return heat / np.where(highest > 0, highest, 1.0)


def default_layer(model: Any) -> str:
    """:return: the highest stage whose map is at least :data:`SMALLEST_MAP` pixels high and wide, else the lowest"""
    extractor = extractor_of(model)
    stages = [stage for stage in extractor.stages if stage in STAGES]
    # The map is halved twice by the stem, and once by each layer after layer1.
    side = min(extractor.preprocessing.size)
    sizes = {stage: side / 2 ** (2 + max(0, index - 1)) for index, stage in enumerate(stages)}
    large = [stage for stage in stages if sizes[stage] >= SMALLEST_MAP]
    return large[-1] if large else stages[0]


def gradcam(network: ScoreNetwork, images: th.Tensor, targets: th.Tensor, layer: str, relu: bool = True) -> th.Tensor:
    """
    :param network: of the model
    :param images: float, with a gradient, ``(n, C, H, W)``
    :param targets: an action for each
    :param layer: a stage of the trunk
    :param relu: whether to show only what raises the score
    :return: maps ``(n, H, W)``, not scaled; of the newest frame where each frame passes the trunk alone
    """
    captum = import_extra("captum.attr")
    module = network.extractor.stage_modules(layer)[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum's own, about hooks
        maps = captum.LayerGradCam(network, module).attribute(images, target=targets, relu_attributions=relu)
    newest = maps.reshape(len(images), -1, *maps.shape[-2:])[:, -1:]
    return F.interpolate(newest, images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def _saliency(network: ScoreNetwork, images: th.Tensor, targets: th.Tensor) -> th.Tensor:
    captum = import_extra("captum.attr")
    gradient: th.Tensor = captum.Saliency(network).attribute(images, target=targets, abs=True)
    return gradient.amax(dim=1)


def _action_names(env: Any, count: int) -> list[str]:
    try:
        names = env.env_method("get_action_meanings", indices=0)[0]
    except AttributeError:
        names = []
    return [str(name) for name in names] if len(names) == count else [str(index) for index in range(count)]
