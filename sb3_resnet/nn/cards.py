"""The card of a weights file: what it was pretrained on, and what images must look like to be understood by it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch as th

from sb3_resnet.nn.backbones import STAGES
from sb3_resnet.nn.preprocessing import IMAGENET_MEAN, IMAGENET_STD

#: Key of the card in the metadata of a ``.safetensors`` file.
KEY = "sb3_resnet"
#: What :func:`check_card` compares; other entries are for the reader.
CHECKED = ("adapter", "channels", "frame_channels", "image_size", "input_mean", "input_std", "last_stage")
_ROUNDING = 1e-6


def save_with_card(path: Path, state: Mapping[str, th.Tensor], card: Mapping[str, Any]) -> None:
    """
    Write tensors and their card as one ``.safetensors`` file.

    :param path: where
    :param state: tensors by name
    :param card: plain numbers, strings, lists and dicts
    """
    from safetensors.torch import save_file

    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(tensors, path, metadata={KEY: json.dumps(card, sort_keys=True)})


def read_card(path: str | Path) -> dict[str, Any] | None:
    """
    :param path: a weights file that can be read
    :return: its card; ``None`` for a file without one, which every file is that this package has not pretrained
    :raises ValueError: for a file or a card that is damaged
    """
    path = Path(path).expanduser()
    if path.suffix.lower() != ".safetensors":
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is not a whole safetensors file ({error}): copy or write it again, or delete it"
        ) from error
    if text is None:
        return None
    try:
        card = json.loads(text)
        whole = {*CHECKED, "backbone", "observed_size"} <= {*card} and card["last_stage"] in STAGES
    except (ValueError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{str(path)!r} has a card that cannot be read: pretrain it again, or copy it again")
    return dict(card)


def check_card(card: Mapping[str, Any], source: str, backbone: str, seen: Mapping[str, Any]) -> None:
    """
    Refuse weights for images that look different from those on which they were trained.

    :param card: of the file
    :param source: name of the file, for the error
    :param backbone: of the network that reads it
    :param seen: what the trunk sees there, :meth:`~sb3_resnet.nn.preprocessing.Preprocessing.seen`
    :raises ValueError: with all that differs, and what to write instead
    """
    wrong = []
    if card["backbone"] != backbone:
        wrong.append(f"the network is {card['backbone']}: write backbone={card['backbone']!r}")
    if STAGES.index(seen["last_stage"]) > STAGES.index(card["last_stage"]):
        wrong.append(
            f"the file ends at {card['last_stage']}, and {seen['last_stage']} is asked for: write "
            f"last_stage={card['last_stage']!r} or a lower one"
        )
    if _is_rgb(card) and _is_rgb(seen):
        pass  # the trunk sees the same, whether frames are stacked or come one by one
    elif card["adapter"] != seen["adapter"]:
        wrong.append(_other_adapter(card))
    elif card["frame_channels"] != seen["frame_channels"]:
        kinds = {1: "grey frames", 3: "RGB frames"}
        known, given = (kinds.get(one["frame_channels"], "other frames") for one in (card, seen))
        wrong.append(f"it knows {known}, and these are {given}: write frame_channels={card['frame_channels']}")
    elif card["adapter"] in ("conv1x1", "inflate") and card["channels"] != seen["channels"]:
        wrong.append(
            f"its observations had {card['channels']} channels, and these have {seen['channels']}: stack as many "
            "frames, or pretrain on these"
        )
    elif _repeats_statistics(card) and _keeps_colours(card) not in (None, seen["keeps_colours"]):
        had, instead = ("their own", "write") if _keeps_colours(card) else ("those of all", "leave out")
        wrong.append(f"its colours were normalised with statistics of {had}: {instead} frame_channels=3")
    if [*card["image_size"]] != [*seen["image_size"]]:
        size, given = ("x".join(map(str, one["image_size"])) for one in (card, seen))
        wrong.append(f"it saw images of {size}, and these have {given}: write image_size={[*card['image_size']]}")
    if not (_alike(card["input_mean"], seen["input_mean"]) and _alike(card["input_std"], seen["input_std"])):
        wrong.append(f"images were normalised another way: write {_normalisation(card)}")
    if wrong:
        raise ValueError(
            f"{source} was pretrained on {card.get('env') or 'an environment'} with another preprocessing, so its "
            f"features would mean nothing here. {'; '.join(wrong)}."
        )


def extractor_arguments(card: Mapping[str, Any], space: Any = None) -> dict[str, Any]:
    """
    :param card: of a file
    :param space: observation space; ``None``: of the size and the number of channels that it was trained on
    :return: arguments of a :class:`~sb3_resnet.ResNetExtractor` beside ``weights`` that fit it
    """
    channels, *size = (card["channels"], *card["observed_size"]) if space is None else space.shape
    arguments: dict[str, Any] = {"backbone": card["backbone"], "last_stage": card["last_stage"]}
    if _is_rgb(card):
        arguments |= {"adapter": "per_frame"} if channels != 3 else {}
    else:
        arguments |= {"adapter": card["adapter"]}
    if card["frame_channels"] == 1 and channels % 3 == 0:
        arguments["frame_channels"] = 1
    if card["adapter"] == "inflate" and _keeps_colours(card):
        arguments["frame_channels"] = 3
    if [*card["image_size"]] != size:
        arguments["image_size"] = [*card["image_size"]]
    if card["input_mean"] is None:
        arguments["use_imagenet_norm"] = False
    elif not (_alike(card["input_mean"], IMAGENET_MEAN) and _alike(card["input_std"], IMAGENET_STD)):
        arguments |= {"input_mean": card["input_mean"], "input_std": card["input_std"]}
    return arguments


def _is_rgb(seen: Mapping[str, Any]) -> bool:
    """Whether the trunk gets RGB images of three channels, one by one."""
    return (seen["adapter"], seen["frame_channels"]) == ("per_frame", 3) or bool(seen["adapter"] == "none")


def _other_adapter(card: Mapping[str, Any]) -> str:
    if card["adapter"] == "none":
        return "it takes RGB images of three channels: give it such images, of stacked ones adapter='per_frame'"
    return f"its frames came through another adapter: write adapter={card['adapter']!r}"


def _repeats_statistics(card: Mapping[str, Any]) -> bool:
    """Whether statistics of three channels became those of all; weights of all channels are in the file itself."""
    return card["adapter"] == "inflate" and card["input_mean"] is not None and len(card["input_mean"]) == 3


def _keeps_colours(card: Mapping[str, Any]) -> bool | None:
    """Whether ``frame_channels=3`` was written out; in cards without this entry the arguments say it, if any do."""
    if "keeps_colours" in card:
        return bool(card["keeps_colours"])
    return card["arguments"].get("frame_channels") == 3 if "arguments" in card else None


def _normalisation(card: Mapping[str, Any]) -> str:
    mean, std = card["input_mean"], card["input_std"]
    if mean is None:
        return "use_imagenet_norm=False"
    if _alike(mean, IMAGENET_MEAN) and _alike(std, IMAGENET_STD):
        return "use_imagenet_norm=True, or leave it out, and no input_mean and input_std"
    return f"input_mean={mean}, input_std={std}"


def _alike(left: Any, right: Any) -> bool:
    if left is None or right is None:
        return left is right
    return len(left) == len(right) and all(
        abs(one - other) <= _ROUNDING for one, other in zip(left, right, strict=True)
    )
