"""Heat maps over frames: a sheet of moments as PNG, an episode with its scores as MP4 or GIF."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sb3_resnet.cache.frames import Array
from sb3_resnet.cli.extras import import_extra

_SIDE = 256  # pixels of a frame's longer side
_LINE = 18  # pixels of a line of text
_COLUMNS = 4
_PANEL = 240  # pixels of the scores beside a frame
_STRENGTH = 0.6  # opacity of the colours where the map is 1
FPS = 15  # frames per second; Atari games run at 60, and AtariWrapper shows every fourth frame


@dataclass(frozen=True)
class Episode:
    """
    What the agent saw and did.

    :param observations: observations, of a Dict those of one image, ``(steps, C, H, W)``
    :param scores: score of each action, ``(steps, actions)``: Q-values, or logits for PPO and A2C
    :param actions: the greedy actions, which were taken, ``(steps,)``
    :param rewards: the rewards, ``(steps,)``
    :param names: names of the actions
    :param features: what the head of the network got of each whole observation, ``(steps, n)``
    :param frame_channels: channels of one frame: 3 (RGB) or 1 (grey); ``None``: 3 where their number is a multiple
    """

    observations: Array
    scores: Array
    actions: Array
    rewards: Array
    names: list[str]
    features: Array
    frame_channels: int | None = None


def refuse_unwritable(path: Path) -> None:
    """
    :param path: a folder to write into, which need not exist yet
    :raises ValueError: if it cannot be created, or is not writable
    """
    there = next(part for part in (path.absolute(), *path.absolute().parents) if part.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is a file, so no folder {path} can be written: write another --output")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{there} may not be written into: write another --output")


def sheet(episode: Episode, heat: Array, count: int, title: str) -> Any:
    """
    :param episode: the episode that was played
    :param heat: a map for each step, ``(steps, H, W)`` in 0..1
    :param count: number of moments to show, evenly spread over the episode
    :param title: first line of the picture
    :return: a Pillow image
    """
    image = import_extra("PIL.Image")
    draw = import_extra("PIL.ImageDraw")
    moments = np.unique(np.linspace(0, len(heat) - 1, count).round().astype(int))
    cells = [overlay(episode.observations[step], heat[step], episode.frame_channels) for step in moments]
    height, width = cells[0].shape[:2]
    columns = min(_COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    picture = image.new("RGB", (columns * (width + 4), _LINE + 4 + rows * (height + _LINE + 4)), "white")
    pen = draw.Draw(picture)
    pen.text((4, 3), title, fill="black", font=_font())
    for index, (step, cell) in enumerate(zip(moments, cells, strict=True)):
        left, top = index % columns * (width + 4), _LINE + 4 + index // columns * (height + _LINE + 4)
        picture.paste(image.fromarray(cell), (left, top))
        pen.text((left + 2, top + height + 1), _caption(episode, step), fill="black", font=_font())
    return picture.quantize(256)  # a third of the bytes


def write_video(path: str | Path, episode: Episode, heat: Array) -> None:
    """
    Write the whole episode, each frame with its map and the scores of all actions beside it.

    :param path: ``.mp4`` or ``.gif``
    :param episode: the episode that was played
    :param heat: a map for each step, ``(steps, H, W)`` in 0..1
    """
    low, high = np.percentile(
        episode.scores, (2, 98)
    )  # the first observations are half empty, and their scores differ widely
    pairs = zip(episode.observations, heat, strict=True)
    frames = (overlay(seen, hot, episode.frame_channels) for seen, hot in pairs)
    write_film(path, (_beside(frame, episode, step, low, high) for step, frame in enumerate(frames)))


def write_film(path: str | Path, frames: Iterable[Array]) -> None:
    """
    Write frames, :data:`FPS` of them per second.

    :param path: ``.mp4`` or ``.gif``
    :param frames: RGB, ``(h, w, 3)`` uint8, all of one size
    """
    path = Path(path)
    imageio = import_extra("imageio.v2")
    if path.suffix.lower() == ".gif":
        options: dict[str, Any] = {"duration": 1000 / FPS, "loop": 0}
    else:
        import_extra("imageio_ffmpeg")
        options = {"fps": FPS, "macro_block_size": 2}
    with imageio.get_writer(path, **options) as writer:
        for frame in frames:
            writer.append_data(frame)


def beside(frame: Array, heat: Array) -> Array:
    """
    :param frame: a picture of the game, ``(h, w, 3)`` uint8
    :param heat: a map of what the agent sees at that time, ``(H, W)`` in 0..1
    :return: the frame, and to its right the same with the map over it, ``(h, 2 w, 3)`` uint8
    """
    return np.concatenate([frame, _coloured(frame, heat)], axis=1)


def overlay(observation: Array, heat: Array, frame_channels: int | None = None) -> Array:
    """
    :param observation: ``(C, H, W)``, of which the newest frame is shown
    :param heat: its map, ``(H, W)`` in 0..1
    :param frame_channels: as in :func:`newest_frame`
    :return: enlarged frame with the map over it, ``(h, w, 3)`` uint8; where the map is 0 the frame is unchanged
    """
    image = import_extra("PIL.Image")
    frame = newest_frame(observation, frame_channels)
    scale = max(1, _SIDE // max(frame.shape[:2]))
    size = (frame.shape[1] * scale // 2 * 2, frame.shape[0] * scale // 2 * 2)  # MP4 needs even sides
    large = np.asarray(image.fromarray(frame).resize(size, image.Resampling.NEAREST))
    return _coloured(large, heat)


def _coloured(frame: Array, heat: Array) -> Array:
    """The frame with a map of any size over it."""
    image = import_extra("PIL.Image")
    size = (frame.shape[1], frame.shape[0])
    smooth = np.asarray(image.fromarray(heat.astype(np.float32)).resize(size, image.Resampling.BILINEAR))
    colours = import_extra("matplotlib").colormaps["inferno"](smooth)[..., :3] * 255
    alpha = _STRENGTH * smooth[..., None]
    mixed: Array = (1 - alpha) * frame.astype(np.float32) + alpha * colours
    rounded: Array = mixed.round().astype(np.uint8)
    return rounded


def newest_frame(observation: Array, frame_channels: int | None = None) -> Array:
    """
    :param observation: ``(C, H, W)``
    :param frame_channels: channels of one frame: 3 (RGB) or 1 (grey); ``None``: 3 where their number is a multiple
    :return: the newest frame, ``(H, W, 3)`` uint8; floats in 0..1 or 0..255 as they are, all others from their smallest
        value, black, to their largest
    """
    is_rgb = len(observation) % 3 == 0 if frame_channels is None else frame_channels == 3
    frame = observation[-3:] if is_rgb else np.repeat(observation[-1:], 3, axis=0)
    if np.issubdtype(frame.dtype, np.floating):
        low, high = float(frame.min()), float(frame.max())
        if low < 0 or high > 255:
            frame = (frame - low) * (255.0 / max(high - low, 1e-12))
        elif high <= 1:
            frame = frame * 255.0
    return np.ascontiguousarray(np.moveaxis(frame, 0, -1)).astype(np.uint8)


def _beside(frame: Array, episode: Episode, step: int, low: float, high: float) -> Array:
    """The frame, with a bar for the score of each action to its right; the greedy action is marked."""
    image, draw = import_extra("PIL.Image"), import_extra("PIL.ImageDraw")
    height = max(frame.shape[0], (len(episode.names) + 2) * _LINE + 8) // 2 * 2
    picture = image.new("RGB", (frame.shape[1] + _PANEL, height), "white")
    picture.paste(image.fromarray(frame), (0, 0))
    pen = draw.Draw(picture)
    left = frame.shape[1] + 8
    pen.text((left, 2), f"step {step}   return {episode.rewards[:step].sum():g}", fill="black", font=_font())
    for index, (name, score) in enumerate(zip(episode.names, episode.scores[step], strict=True)):
        top = (index + 1) * _LINE + 6
        chosen = index == episode.actions[step]
        pen.text((left, top), name[:11], fill="black", font=_font())
        bar = int(80 * np.clip((score - low) / max(high - low, 1e-9), 0, 1))
        pen.rectangle((left + 84, top + 3, left + 84 + bar, top + _LINE - 4), fill="#d95f02" if chosen else "#9e9e9e")
        pen.text((left + 174, top), f"{score:.3g}", fill="black", font=_font())
    return np.asarray(picture)


def _caption(episode: Episode, step: int) -> str:
    action = int(episode.actions[step])
    return f"step {step}  {episode.names[action]}  {episode.scores[step, action]:.3g}"


def _font() -> Any:
    return import_extra("PIL.ImageFont").load_default(13)
