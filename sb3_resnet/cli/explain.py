"""``sb3-resnet explain``: what the agent looks at, by Grad-CAM or saliency of the greedy action's score."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch as th
import typer
from stable_baselines3.common.utils import obs_as_tensor
from torch.nn import functional as F

from sb3_resnet.cache.frames import Array
from sb3_resnet.cli import envs, pictures
from sb3_resnet.cli.extras import import_extra
from sb3_resnet.cli.loading import extractors_of, load_model
from sb3_resnet.cli.network import ScoreNetwork
from sb3_resnet.cli.observed import by_key, label
from sb3_resnet.cli.options import Device, EnvId, Model, Packages, Trust, Wrapper
from sb3_resnet.cli.pictures import Episode
from sb3_resnet.common.arguments import choice, integer
from sb3_resnet.diagnosis.playing import lives_end_episodes
from sb3_resnet.nn.backbones import STAGES

METHODS = ("gradcam", "saliency")
#: Smallest map, in pixels of its shorter side, in which Grad-CAM can still locate something: at 84 pixels, the map of
#: layer4 has 3x3.
SMALLEST_MAP = 5
_BATCH = 32


def command(
    context: typer.Context,
    model: Model,
    env: EnvId,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="where sheet.png and episode.mp4 go")
    ] = Path("explain"),
    method: Annotated[
        str, typer.Option(metavar="NAME", help="gradcam: places that raise the score; saliency: pixels that change it")
    ] = "gradcam",
    key: Annotated[str | None, typer.Option(metavar="NAME", help="which image of a Dict; default: the first")] = None,
    layer: Annotated[
        str | None,
        typer.Option(metavar="STAGE", help="of Grad-CAM; default: the highest whose map has 5 pixels a side"),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", help="steps to play, at most one episode")] = 500,
    frames: Annotated[int, typer.Option(metavar="N", help="moments on the sheet")] = 12,
    gif: Annotated[bool, typer.Option("--gif", help="episode.gif instead of episode.mp4")] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="of the environment")] = 0,
    wrapper: Wrapper = None,
    gym_packages: Packages = None,
    device: Device = "auto",
    trust: Trust = False,
) -> None:
    """Play an episode with the greedy actions, and show where the image decides their Q-values (PPO: logits)."""
    # An episode may take minutes, so wrong options are refused before it.
    steps, frames = integer("--steps", steps, 1), integer("--frames", frames, 1)
    choice("--method", method, METHODS)
    if layer is not None:
        choice("--layer", layer, STAGES)
    pictures.refuse_unwritable(output)
    envs.import_packages(gym_packages or [])
    agent = load_model(model, device, trust, takes_dict=True)
    image = image_key(agent, key)
    layer = layer or default_layer(agent, image)
    # As in watch: an agent of Atari has not learned to press FIRE after a lost life.
    with contextlib.closing(envs.env_for(agent, env, seed, wrapper, serves=True)) as game:
        episode = play_greedily(agent, game, steps, image)
    heat = heat_maps(agent, episode.observations, episode.actions, method, layer, image, episode.features)
    output.mkdir(parents=True, exist_ok=True)
    how = f"{cam_name(agent, image)} at {layer}" if method == "gradcam" else "saliency"
    title = label(image, f"{how} of the greedy action's score")
    picture = pictures.sheet(episode, heat, frames, f"{env}: {title}")
    picture.save(output / "sheet.png", optimize=True)
    video = output / f"episode.{'gif' if gif else 'mp4'}"
    pictures.write_video(video, episode, heat)
    returned = f"return {episode.rewards.sum():g} in {len(heat)} steps{_said_of_precision(agent, episode, image)}"
    context.obj.print(f"{output / 'sheet.png'} and {video}: {returned}", highlight=False, soft_wrap=True)


def image_key(model: Any, given: str | None = None) -> str:
    """
    :param model: an SB3 model with a ResNet
    :param given: what the user wrote
    :return: the key of an image that it sees, the first by default; ``""`` if it sees one image and no Dict
    :raises ValueError: if it sees no such image
    """
    keys = [*extractors_of(model)]
    if given is None:
        return keys[0]
    if keys == [""]:
        raise ValueError(f"--key {given}: the model sees one image, and no Dict: leave --key out")
    return choice("--key", given, keys)


def _said_of_precision(model: Any, episode: Episode, key: str) -> str:
    network = ScoreNetwork(model, key).eval()
    frozen_dtype = network.extractor.frozen_dtype
    if frozen_dtype == "float32":
        return ""
    difference = network.difference(episode.observations, episode.features)
    return f"; explained in float32, whose scores differ from the model's in {frozen_dtype} by at most {difference:.1e}"


def play_greedily(model: Any, env: Any, steps: int, key: str = "") -> Episode:
    """
    Play one episode with the greedy actions.

    :param model: an SB3 model with a ResNet and discrete actions
    :param env: one environment that fits the model
    :param steps: largest number of steps
    :param key: the image of a Dict that is kept; ``""`` for a model of one image
    :return: the episode
    """
    network = ScoreNetwork(model, key).eval()
    has_lives = lives_end_episodes(env)
    observation = env.reset()
    seen, features, scores, rewards = [], [], [], []
    for _ in range(steps):
        found = network.features(obs_as_tensor(observation, model.device))
        with th.no_grad():
            score = network.scores(found).cpu().numpy()
        seen.append(by_key(observation)[key][0])
        features.append(found[0].cpu().numpy())
        scores.append(score[0])
        observation, reward, done, infos = env.step(score.argmax(axis=1))
        rewards.append(float(reward[0]))
        if done[0] and ("episode" in infos[0] or not has_lives):  # Monitor's, of the whole game
            break
    table, names = np.stack(scores), _action_names(env, network.n_actions)
    channels = network.extractor.preprocessing.frame_channels
    return Episode(np.stack(seen), table, table.argmax(1), np.array(rewards), names, np.stack(features), channels)


def heat_maps(
    model: Any,
    observations: Array,
    actions: Array,
    method: str = "gradcam",
    layer: str | None = None,
    key: str = "",
    features: Array | None = None,
) -> Array:
    """
    Compute where a change of the image would change the score of an action.

    Grad-CAM (arXiv 1610.02391) weighs the channels of a stage by their mean gradient, and shows what raises the score.
    A spatial softmax does not change when a whole channel becomes brighter, so this mean is zero. With
    ``pooling="spatial_softmax"`` each place has its own gradient as its weight instead (HiResCAM, arXiv 2011.08891).
    Saliency (arXiv 1312.6034) is the absolute gradient of each pixel, the largest over its channels.

    :param model: an SB3 model with a ResNet and discrete actions
    :param observations: the image, ``(n, C, H, W)``
    :param actions: the action to explain for each observation, ``(n,)``
    :param method: one of :data:`METHODS`
    :param layer: the stage that Grad-CAM looks at; ``None``: see :func:`default_layer`
    :param key: which image of a Dict this is; ``""`` for a model of one image
    :param features: those of the whole Dict, ``(n, m)``, as in :class:`~sb3_resnet.cli.pictures.Episode`; ``None`` for
        a model of one image
    :return: ``(n, H, W)``, each map scaled to 0..1; all zero where nothing raises the score
    """
    choice("method", method, METHODS)
    network = ScoreNetwork(model, key).eval()
    layer = layer or default_layer(model, key)
    choice("layer", layer, network.extractor.stages)
    maps = []
    for start in range(0, len(observations), _BATCH):
        part = slice(start, start + _BATCH)
        images = th.as_tensor(observations[part], device=model.device).float().requires_grad_()
        targets = th.as_tensor(actions[part], device=model.device)
        beside = None if features is None else th.as_tensor(features[part], device=model.device)
        if method == "saliency":
            hot = _saliency(network, images, targets, beside)
        else:
            hot = gradcam(network, images, targets, layer, beside=beside)
        maps.append(hot.detach().cpu().numpy())
    heat: Array = np.concatenate(maps).clip(min=0.0)
    highest = heat.max(axis=(1, 2), keepdims=True)
    return heat / np.where(highest > 0, highest, 1.0)


def default_layer(model: Any, key: str = "") -> str:
    """
    :param model: an SB3 model with a ResNet
    :param key: which image of a Dict; ``""`` for a model of one image
    :return: the highest stage whose map is at least :data:`SMALLEST_MAP` pixels high and wide, else the lowest stage
    """
    extractor = extractors_of(model)[key]
    stages = [stage for stage in extractor.stages if stage in STAGES]
    # The map is halved twice by the stem, and once by each layer after layer1.
    side = min(extractor.preprocessing.size)
    sizes = {stage: side / 2 ** (2 + max(0, index - 1)) for index, stage in enumerate(stages)}
    large = [stage for stage in stages if sizes[stage] >= SMALLEST_MAP]
    return large[-1] if large else stages[0]


def cam_name(model: Any, key: str = "") -> str:
    """
    :param model: an SB3 model with a ResNet
    :param key: which image of a Dict; ``""`` for a model of one image
    :return: what :func:`gradcam` computes of it
    """
    return "HiResCAM" if extractors_of(model)[key].pooling == "spatial_softmax" else "Grad-CAM"


def gradcam(
    network: ScoreNetwork,
    images: th.Tensor,
    targets: th.Tensor,
    layer: str,
    relu: bool = True,
    beside: th.Tensor | None = None,
) -> th.Tensor:
    """
    :param network: network of the model
    :param images: float images that require a gradient, ``(n, C, H, W)``
    :param targets: the action to explain for each image, ``(n,)``
    :param layer: a stage of the trunk
    :param relu: whether to show only what raises the score
    :param beside: the features of the whole Dict, ``(n, m)``; ``None`` for a model of one image
    :return: unscaled maps, ``(n, H, W)``; with ``adapter="per_frame"`` those of the newest frame
    """
    captum = import_extra("captum.attr")
    module = network.extractor.stage_modules(layer)[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum warns about its own hooks
        if network.extractor.pooling == "spatial_softmax":
            products = captum.LayerGradientXActivation(network, module)
            maps = products.attribute(images, targets, additional_forward_args=beside).sum(dim=1, keepdim=True)
            maps = maps.relu() if relu else maps
        else:
            method = captum.LayerGradCam(network, module)
            maps = method.attribute(images, targets, additional_forward_args=beside, relu_attributions=relu)
    newest = maps.reshape(len(images), -1, *maps.shape[-2:])[:, -1:]
    return F.interpolate(newest, images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def _saliency(network: ScoreNetwork, images: th.Tensor, targets: th.Tensor, beside: th.Tensor | None) -> th.Tensor:
    captum = import_extra("captum.attr")
    gradient: th.Tensor = captum.Saliency(network).attribute(images, targets, additional_forward_args=beside)
    return gradient.amax(dim=1)


def _action_names(env: Any, count: int) -> list[str]:
    try:
        names = env.env_method("get_action_meanings", indices=0)[0]
    except AttributeError:
        names = []
    return [str(name) for name in names] if len(names) == count else [str(index) for index in range(count)]
