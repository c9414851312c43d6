"""
Train a ResNet on frames of your environment, without rewards; the result is a file for ``weights=``.

:func:`pretrain` plays, trains, probes the features on episodes held out, and keeps the best weights. A run that was
killed goes on where it was when the same call is made again.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3.common.vec_env import VecEnv

from sb3_resnet.common.arguments import listed
from sb3_resnet.common.files import prepare_folder, remove_left_overs, written_whole
from sb3_resnet.common.labels import check_labels
from sb3_resnet.common.vec_normalize import resting
from sb3_resnet.diagnosis.readout import Score
from sb3_resnet.diagnosis.scores import features_of, know_state, mark_of, scores_of, splits_of, warn_of_repeated
from sb3_resnet.envs.atari_ram import ram_labels
from sb3_resnet.extractor import ResNetExtractor
from sb3_resnet.nn.cards import read_card, save_with_card
from sb3_resnet.nn.image_spaces import check_played_images
from sb3_resnet.nn.pretraining.board import tensorboard
from sb3_resnet.nn.pretraining.checks import check_memory, check_player, read_output
from sb3_resnet.nn.pretraining.frames import Frames
from sb3_resnet.nn.pretraining.identity import source_of
from sb3_resnet.nn.pretraining.run import CHECKPOINT, CLOCK, Probe, Probed, Run, Told, refuse_other
from sb3_resnet.nn.pretraining.settings import Settings
from sb3_resnet.nn.pretraining.sources import from_buffer, n_actions, play
from sb3_resnet.nn.pretraining.store import is_stored, store, stored
from sb3_resnet.nn.pretraining.trainer import Trainer
from sb3_resnet.probing import LabelFunction, Recording, record

_HELD_OUT_SEED = 1_000_003  # added to the seed: other episodes
_LEAST_FRAMES = 5  # of each environment, however slow it is
_SPREAD = 4  # with eight environments and 2,400 rows each shows 1,200 steps
_SPLITS = 3  # ways to split the episodes held out, since one alone scores by luck
_FRAMES = "frames.safetensors"


@dataclass(frozen=True)
class Result:
    """
    What a pretraining has come to.

    :param path: the weights file
    :param card: what it says of itself: environment, frames, objective, seed, versions, preprocessing, and the history
        of loss, score, spread and effective rank
    """

    path: Path
    card: Mapping[str, Any]

    @property
    def score(self) -> float:
        """
        Probe score of the weights, over several ways to split: see :attr:`sb3_resnet.probing.Row.mark`.

        Where no label tells the state of the environment it is that of the actions. It does not tell good weights from
        bad ones, so it chooses nothing: ``card["kept"]`` is ``"last"`` then, and ``"best"`` otherwise.
        """
        return _number(self.card["score"])

    @property
    def random_score(self) -> float:
        """That of the random weights from which it began."""
        return _number(self.card["random_score"])


def pretrain(
    env: VecEnv,
    output: str | Path,
    *,
    model: Any = None,
    replay_buffer: Any = None,
    labels: LabelFunction = ram_labels,
    info_keys: Sequence[str] = (),
    tensorboard_log: str | Path | None = None,
    told: Told = lambda what, share, figures: None,
    **settings: Any,
) -> Result:
    """
    Pretrain a trunk on frames of an environment.

    What is needed to go on after a stop lies in a folder beside the file, ``<output>.run``, until it is done.

    :param env: environments of uint8 images, channels first, as the agent will see them
    :param output: file to write, ``.safetensors``
    :param model: an SB3 model whose greedy actions are played, beside random ones; ``None``: random actions only
    :param replay_buffer: of a finished run: its frames are trained on, and ``env`` is played for the probe only
    :param labels: what the probe reads, as in :func:`~sb3_resnet.probing.record`; without any the last weights are kept
    :param info_keys: likewise
    :param tensorboard_log: folder for TensorBoard
    :param told: called with what goes on, such as ``"Pretraining"``, the share of it that is done, and figures as text
    :param settings: fields of :class:`Settings`
    :return: the result; of a file that this call has written before, without training it again
    :raises ValueError: for values that cannot work, a file or folder of another run, too little memory, and features
        that collapse
    """
    began = time.monotonic()
    chosen = Settings.read(settings)
    path, info_keys = read_output(output), listed("info_keys", info_keys)
    check_played_images(env)
    check_labels(labels)
    needed = chosen.frame_bytes(chosen.images(env.observation_space))
    check_player(chosen, env, model, replay_buffer)
    source = source_of(env, model, replay_buffer, labels, info_keys)
    identity = {**source, **chosen.plain()}
    budget = {"updates": chosen.updates, "minutes": chosen.minutes}
    folder = path.with_name(f"{path.name}.run")
    if path.exists():
        result = _finished(path, {**identity, **budget})
        _remove(folder)  # an attempt may have been killed right before this
        return result
    check_memory(needed)
    prepare_folder(folder)
    remove_left_overs(folder)
    run = Run(folder, chosen, identity, began)
    collecting = {**source, **chosen.plain(only_collecting=True)}
    with _cleared_if_empty(folder), tensorboard(tensorboard_log, run.next_update) as log:
        if not is_stored(folder / _FRAMES, collecting, run.next_update is not None):
            held_out = _held_out(env, run, model, labels, info_keys, told)
            store(folder / _FRAMES, _collected(env, model, replay_buffer, run, told), held_out, collecting)
            del held_out
        # Read back in any case, so that a run without a stop has nothing that one with a stop lacks.
        frames, held_out = stored(folder / _FRAMES, env.observation_space)
        trainer = Trainer(chosen, env.observation_space, frames, n_actions(env.action_space))
        run.train(trainer, _probe_of(held_out, chosen), told, log)
    return _written(path, run, trainer, {**identity, **budget})


def _written(path: Path, run: Run, trainer: Trainer, arguments: Mapping[str, Any]) -> Result:
    card = _card(run, trainer, arguments)
    remove_left_overs(path.parent)
    with written_whole(path) as (temporary,):
        save_with_card(temporary, run.best["trunk"], card)
    _remove(run.folder)
    return Result(path, card)


@contextmanager
def _cleared_if_empty(folder: Path) -> Iterator[None]:
    """Where an error comes before there is anything to go on from, leave no folder behind."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # it is not empty
            folder.rmdir()
        raise


def _remove(folder: Path) -> None:
    """Remove what a run has written into its folder, and nothing else that may be there."""
    for name in (CHECKPOINT, CLOCK, _FRAMES):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _finished(path: Path, identity: Mapping[str, Any]) -> Result:
    card = read_card(path)
    if card is None:
        raise ValueError(f"{str(path)!r} exists and is no file of a pretraining: write another output, or delete it")
    refuse_other(path, card.get("arguments", {}), identity)
    return Result(path, card)


def _held_out(
    env: VecEnv, run: Run, model: Any, labels: LabelFunction, info_keys: Sequence[str], told: Told
) -> Recording:
    settings = run.settings

    def report(done: int, total: int) -> None:
        told("Playing episodes to be held out", done / total, "")
        run.note_time()

    seed = settings.seed + _HELD_OUT_SEED
    recording = record(env, settings.held_out, seed, model, settings.epsilon, labels, info_keys, _SPREAD, report)
    for split in range(_SPLITS):  # better refused now
        splits_of(recording, settings.seed + split, settings.held_out)
    warn_of_repeated(recording, settings.seed)
    return recording


def _collected(env: VecEnv, model: Any, replay_buffer: Any, run: Run, told: Told) -> tuple[Frames, bool]:
    """:return: the frames, and whether these are all that were asked for, time not counted"""
    settings = run.settings
    channels = settings.images(env.observation_space).frame_channels

    def report(share: float) -> None:
        told("Collecting frames", share, "")
        run.note_time()

    if replay_buffer is not None:
        return from_buffer(replay_buffer, settings.frames, channels, env.observation_space, report), True
    needed = max(2 * settings.batch_size, _LEAST_FRAMES * env.num_envs)  # else there might be nothing to train on

    def may_go_on(frames: int) -> bool:
        return frames < needed or run.may_collect()

    with resting(env):
        frames = play(env, settings.frames, channels, settings.seed, model, settings.epsilon, report, may_go_on)
    used = len(frames.pixels)
    is_whole = used + frames.parts.shape[1] > settings.frames
    if not is_whole:
        warnings.warn(
            f"Half of the minutes left are spent, and {used:,} of {settings.frames:,} frames are there: these are "
            "trained on. Write fewer frames or held_out, or more minutes.",
            stacklevel=3,
        )
    return frames, is_whole


def _probe_of(held_out: Recording, settings: Settings) -> Probe:
    with th.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The backbone is frozen with random weights")  # not for long
        extractor = ResNetExtractor(held_out.space, **settings.extractor(held_out.space))
    extractor.eval().to(settings.device)

    def probe(weights: Mapping[str, th.Tensor]) -> Probed:
        extractor.backbone.load_state_dict(weights)
        features = features_of(held_out, extractor)
        found = [scores_of(held_out, features, settings.seed + split) for split in range(_SPLITS)]
        kinds = {name: score.kind for one in found for name, score in one.items() if score.value is not None}
        scores = {name: _mean([one[name].value for one in found]) for name in sorted(found[0])}
        means = {name: Score(scores[name], kind) for name, kind in kinds.items()}
        return Probed(mark_of(means), know_state(means), scores, features)

    return probe


def _card(run: Run, trainer: Trainer, identity: Mapping[str, Any]) -> dict[str, Any]:
    images, settings = trainer.images, trainer.settings
    versions = {}
    for name in ("sb3_resnet", "torch", "torchvision", "stable_baselines3"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # not installed, but on the path
            versions[name] = "unknown"
    return {
        **images.seen(settings.last_stage, *settings.normalisation(images)),
        "arguments": dict(identity),
        "backbone": settings.backbone,
        "env": identity["env"],
        "frames": len(trainer.frames.pixels),
        "history": run.history,
        "kept": "best" if run.best.get("knows_state", True) else "last",
        "objective": settings.objective,
        "observed_size": [*images.observed_size],
        "random_score": run.history[0]["score"],
        "random_scores": run.random_scores,
        "score": run.best["score"],
        "scores": run.best["scores"],
        "seed": settings.seed,
        "update": run.best["update"],
        "updates": trainer.update,
        "versions": versions,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
