"""Load saved models, and say in one line what is wrong with a file."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3, HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer

from sb3_resnet.cli.extras import import_extra
from sb3_resnet.cli.pickles import trusted_part, unpickled_data
from sb3_resnet.cli.texts import one_line
from sb3_resnet.common.arguments import shown
from sb3_resnet.common.playing import refuse_memory
from sb3_resnet.diagnosis.setup_rules import eyes_of
from sb3_resnet.extractor import ResNetExtractor
from sb3_resnet.extractor_combined import ResNetCombinedExtractor

#: An attribute that only the saved data of this algorithm has, or of it and those above.
_MARKS = {"qrdqn": "n_quantiles", "dqn": "exploration_initial_eps", "ppo": "clip_range", "a2c": "normalize_advantage"}
# Likewise of algorithms whose models these commands can let play, and no more.
_PLAYS = {"sac": "target_entropy", "td3": "policy_delay"}
# What a model needs for training alone is kept small.
_SMALL: dict[str, Any] = {"buffer_size": 1, "n_envs": 1, "tensorboard_log": None, "verbose": 0}


def load_model(
    path: str | Path, device: str = "cpu", trust: bool = False, takes_dict: bool = False, only_plays: bool = False
) -> Any:
    """
    Load a model that Stable-Baselines3 saved, without a replay buffer of its size and without its environment.

    Tensors are read with ``weights_only=True``. SB3 would unpickle the rest, and so run code that the file may hold.
    Here only the classes that an ordinary model needs are accepted.

    :param path: a ``.zip`` of DQN, QRDQN, PPO or A2C; where it only plays, also of SAC, TD3 or DDPG
    :param device: device of the model: ``"auto"``, ``"cpu"`` or ``"cuda"``
    :param trust: also run code that the file holds, such as a learning rate that is a function
    :param takes_dict: whether a model that sees a Dict will do
    :param only_plays: whether a model without a ResNet will do
    :return: the model
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is not such a model, has no ResNet, is recurrent, or names other code than ``trust``
        allows
    """
    device = read_device(device)
    path = model_file(path)
    algorithm = algorithm_class(algorithm_name(path, only_plays))
    content = path.read_bytes()  # once: what is looked at is what is loaded
    parts = None if trust else unpickled_data(content, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as those about attributes that this version of SB3 does not have
            options = {**_SMALL, **_buffer_without_environment(content, path, parts)}
            model = algorithm.load(io.BytesIO(content), device=device, custom_objects=parts, **options)
    except Exception as error:  # damaged archives and foreign pickles raise almost anything
        raise ValueError(f"{path} cannot be loaded as a {algorithm.__name__} model ({one_line(error)})") from error
    refuse_memory(model)
    if not only_plays:
        (extractors_of if takes_dict else extractor_of)(model, str(path))
    return model


def _buffer_without_environment(content: bytes, path: Path, parts: dict[str, Any] | None) -> dict[str, Any]:
    """What takes the place of HerReplayBuffer, which wants an environment; nothing is sampled here."""
    name = "replay_buffer_class"
    saved = trusted_part(content, path, name) if parts is None else parts.get(name)
    if isinstance(saved, type) and issubclass(saved, HerReplayBuffer):
        return {name: DictReplayBuffer, "replay_buffer_kwargs": {}}
    return {}


def read_device(name: str) -> str:
    """
    :param name: what the user wrote
    :return: the same; SB3 takes the CPU in silence where there is no GPU
    :raises ValueError: if there is no such device
    """
    if name == "auto":
        return name
    try:
        device = th.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu or cuda, got {shown(name)}") from None
    if device.type == "cuda" and (device.index or 0) >= th.cuda.device_count():
        found = f"{th.cuda.device_count()} GPUs" if th.cuda.device_count() else "no GPU"
        raise ValueError(f"--device {name}, but PyTorch finds {found}: write --device auto or cpu")
    return name


def extractors_of(model: Any, name: str = "The model") -> dict[str, ResNetExtractor]:
    """
    :param model: an SB3 model
    :param name: name of the model in the error
    :return: the ResNet of each image in the network that acts, by its key in the Dict; ``""`` for a single image
    :raises ValueError: if it has no ResNet
    """
    eyes = eyes_of(model)
    if isinstance(eyes, ResNetCombinedExtractor):
        return eyes.resnets
    if not isinstance(eyes, ResNetExtractor):
        other = getattr(model.policy, "features_extractor_class", type(eyes)).__name__
        raise ValueError(
            f"{name} sees with {other}, not with ResNetExtractor: give a model trained with "
            "ResNetCnnPolicy, or with features_extractor_class=ResNetExtractor"
        )
    return {"": eyes}


def extractor_of(model: Any, name: str = "The model") -> ResNetExtractor:
    """
    :param model: an SB3 model
    :param name: name of the model in the error
    :return: the ResNet of its one image, in the network that acts
    :raises ValueError: if it has no ResNet, or sees a Dict
    """
    if isinstance(eyes_of(model), ResNetCombinedExtractor):
        raise ValueError(
            f"{name} sees a Dict with ResNetCombinedExtractor, and this command works with one image: give a model of "
            "ResNetCnnPolicy (sb3-resnet groups, doctor, plot, check, explain and watch work with a Dict)"
        )
    return extractors_of(model, name)[""]


def model_file(path: str | Path) -> Path:
    """
    :param path: what the user wrote, with or without ``.zip``
    :return: an existing file
    :raises FileNotFoundError: with the models in the same folder
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if path.name and path.with_name(f"{path.name}.zip").is_file():  # "." and "/" have no name
        return path.with_name(f"{path.name}.zip")
    folder = path if path.is_dir() else path.parent
    models = sorted(str(file) for file in folder.glob("*.zip")) if folder.is_dir() else []
    hint = f"; models there: {', '.join(models)}" if models else ""
    raise FileNotFoundError(f"{path} is {'a folder, not a model' if path.is_dir() else 'no file'}{hint}")


def algorithm_name(path: Path, only_plays: bool = False) -> str:
    """
    :param path: a saved model
    :param only_plays: whether an algorithm that these commands do not know further will do
    :return: ``"dqn"``, ``"qrdqn"``, ``"ppo"`` or ``"a2c"``, and ``"sac"`` or ``"td3"`` where it only plays
    :raises ValueError: for any other file
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            data = json.loads(archive.read("data")) if "data" in names else None
    except (zipfile.BadZipFile, ValueError, RecursionError, NotImplementedError) as error:
        raise ValueError(f"{path} is no model of Stable-Baselines3 ({one_line(error)})") from error
    if not isinstance(data, dict) or "policy.pth" not in names:
        raise ValueError(f"{path} is a zip, but no model of Stable-Baselines3: it lacks 'data' or 'policy.pth'")
    marks = {**_MARKS, **(_PLAYS if only_plays else {})}
    found = next((name for name, mark in marks.items() if mark in data), None)
    if found is None:
        raise ValueError(f"{path} was saved by another algorithm than {', '.join(marks)}")
    return found


def algorithm_class(name: str) -> Any:
    """
    :param name: one of the names of :func:`algorithm_name`
    :return: its class
    :raises ImportError: if sb3-contrib is needed and missing
    """
    if name == "qrdqn":
        return import_extra("sb3_contrib", "contrib").QRDQN
    return {"dqn": DQN, "ppo": PPO, "a2c": A2C, "sac": SAC, "td3": TD3}[name]
