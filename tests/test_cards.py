import json

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from safetensors.torch import save_file

from sb3_resnet import ResNetExtractor
from sb3_resnet.nn import backbones
from sb3_resnet.nn.cards import KEY, extractor_arguments, read_card, save_with_card
from sb3_resnet.probing import Recording, probe
from tests.helpers import resnet_mini  # noqa: F401  # makes the name known

IMAGENET = {"input_mean": [0.485, 0.456, 0.406], "input_std": [0.229, 0.224, 0.225]}
CARD = {
    "adapter": "per_frame",
    "backbone": "resnet_mini",
    "channels": 4,
    "env": "Tiny-v0",
    "frame_channels": 1,
    "image_size": [32, 32],
    "last_stage": "layer2",
    "observed_size": [32, 32],
    **IMAGENET,
}
COLOURS = {"adapter": "inflate", "channels": 6, "frame_channels": 3}
FITS = {"backbone": "resnet_mini", "adapter": "per_frame", "last_stage": "layer2"}


def space(channels=4, size=32):
    return spaces.Box(0, 255, (channels, size, size), np.uint8)


def write(path, **changes):
    """A file of a trunk with a card, the weights all different from those of a fresh network."""
    card = {**CARD, **changes}
    channels = card["channels"] if card["adapter"] == "inflate" else 3
    trunk = backbones.build(card["backbone"], last_stage=card["last_stage"], channels=channels)
    save_with_card(path, {key: value + 0.01 for key, value in trunk.state_dict().items()}, card)
    return path


@pytest.mark.parametrize("stage", ["stem", "layer1", "layer2"])
def test_stages_up_to_the_last_trained_one_are_read(stage, tmp_path):
    path = write(tmp_path / "w.safetensors")
    network = ResNetExtractor(space(), weights=path, **{**FITS, "last_stage": stage})
    written = backbones.build("resnet_mini", last_stage=stage).state_dict()
    assert network.backbone.state_dict().keys() == written.keys()
    assert float(network.backbone.bn1.running_mean.mean()) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("card", "used", "words"),
    [
        ({}, {"adapter": "conv1x1"}, "pretrained on Tiny-v0 .*another adapter: write adapter='per_frame'"),
        ({"adapter": "conv1x1"}, {}, "write adapter='conv1x1'"),
        ({"adapter": "none", "channels": 3, "frame_channels": 3}, {}, "takes RGB images of three channels"),
        ({}, {"last_stage": "layer3"}, "ends at layer2, and layer3 is asked for: write last_stage='layer2' or a lower"),
        ({}, {"backbone": "resnet_tiny"}, "the network is resnet_mini: write backbone='resnet_mini'"),
        ({}, {"image_size": 40}, r"saw images of 32x32, and these have 40x40: write image_size=\[32, 32\]"),
        ({}, {"use_imagenet_norm": False}, "another way: write use_imagenet_norm=True, or leave it out, and no input"),
        ({"input_mean": None, "input_std": None}, {}, "another way: write use_imagenet_norm=False"),
        (
            {"input_mean": [0.1, 0.2, 0.3], "input_std": [1.0, 1.0, 0.9]},
            {},
            r"write input_mean=\[0.1, 0.2, 0.3\], input_std=\[1.0, 1.0, 0.9\]",
        ),
        ({"input_std": [0.2, 0.2, 0.3]}, {}, r"write input_mean=\[0.485, 0.456, 0.406\], input_std=\[0.2, 0.2, 0.3\]"),
        ({"frame_channels": 3, "channels": 12}, {}, "knows RGB frames, and these are grey frames: write frame_channel"),
    ],
)
def test_another_preprocessing_is_refused_with_what_to_write(card, used, words, tmp_path):
    path = write(tmp_path / "w.safetensors", **card)
    with pytest.raises(ValueError, match=rf"w\.safetensors.*{words}"):
        ResNetExtractor(space(), weights=path, **{**FITS, **used})


def test_all_that_differs_is_said_at_once(tmp_path):
    path = write(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"last_stage='layer2'.*adapter='per_frame'.*image_size=\[32, 32\]"):
        ResNetExtractor(space(4, 64), backbone="resnet_mini", weights=path)


def test_other_numbers_of_frames_matter_only_where_the_trunk_sees_them_together(tmp_path):
    path = write(tmp_path / "w.safetensors")
    ResNetExtractor(space(2), weights=path, **FITS)
    stacked = write(tmp_path / "stacked.safetensors", adapter="conv1x1")
    with pytest.raises(ValueError, match="had 4 channels, and these have 2: stack as many frames"):
        ResNetExtractor(space(2), weights=stacked, **{**FITS, "adapter": "conv1x1"})


@pytest.mark.parametrize(
    ("kept", "words"), [(True, "of their own: write frame_channels=3"), (False, "of all: leave out frame_channels=3")]
)
def test_inflated_colours_are_normalised_as_in_the_pretraining(kept, words, tmp_path):
    used = {**FITS, "adapter": "inflate"}
    other, same = ({}, {"frame_channels": 3}) if kept else ({"frame_channels": 3}, {})
    for number, card in enumerate(({"keeps_colours": kept}, {"arguments": {"frame_channels": 3 if kept else None}})):
        path = write(tmp_path / f"{number}.safetensors", **COLOURS, **card)
        assert len(ResNetExtractor(space(6), weights=path, **used, **same).input_mean) == 6
        with pytest.raises(ValueError, match=f"normalised with statistics.*{words}"):
            ResNetExtractor(space(6), weights=path, **used, **other)


@pytest.mark.parametrize("mean", [None, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
def test_colours_of_one_normalisation_for_each_channel_or_none_are_not_compared(mean, tmp_path):
    std = None if mean is None else [0.5] * 6
    path = write(tmp_path / "w.safetensors", **COLOURS, keeps_colours=True, input_mean=mean, input_std=std)
    norm = {"use_imagenet_norm": False} if mean is None else {"input_mean": mean, "input_std": std}
    ResNetExtractor(space(6), weights=path, **{**FITS, "adapter": "inflate"}, **norm)


def test_rgb_frames_are_the_same_to_the_trunk_one_by_one_and_stacked(tmp_path):
    rgb = {"channels": 3, "frame_channels": 3}
    single = write(tmp_path / "single.safetensors", **rgb, adapter="none")
    stacked = write(tmp_path / "stacked.safetensors", **{**rgb, "channels": 12}, adapter="per_frame")
    kwargs = {"backbone": "resnet_mini", "last_stage": "layer2"}
    for path in (single, stacked):
        for channels in (3, 6):
            arguments = extractor_arguments(read_card(path), space(channels))
            assert arguments.get("adapter") == (None if channels == 3 else "per_frame")
            ResNetExtractor(space(channels), weights=path, **arguments)
    with pytest.raises(ValueError, match="takes RGB images of three channels: give it such images, of stacked ones"):
        ResNetExtractor(space(6), weights=single, **kwargs)


def test_statistics_of_imagenet_may_be_written_out(tmp_path):
    path = write(tmp_path / "w.safetensors")
    ResNetExtractor(space(), weights=path, **FITS, **IMAGENET)


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ({}, FITS),
        ({"observed_size": [40, 40]}, {**FITS, "image_size": [32, 32]}),
        ({"input_mean": None, "input_std": None}, {**FITS, "use_imagenet_norm": False}),
        ({"channels": 3}, {**FITS, "frame_channels": 1}),
        ({"adapter": "none", "channels": 3, "frame_channels": 3}, {"backbone": "resnet_mini", "last_stage": "layer2"}),
        ({"adapter": "inflate"}, {**FITS, "adapter": "inflate"}),
        ({**COLOURS, "keeps_colours": False}, {**FITS, "adapter": "inflate"}),
        ({**COLOURS, "keeps_colours": True}, {**FITS, "adapter": "inflate", "frame_channels": 3}),
        ({**COLOURS, "arguments": {"frame_channels": 3}}, {**FITS, "adapter": "inflate", "frame_channels": 3}),
        ({**COLOURS, "adapter": "per_frame", "keeps_colours": True}, FITS),
        (
            {"input_mean": [0.1, 0.2, 0.3], "input_std": [1.0, 1.0, 0.9]},
            {**FITS, "input_mean": [0.1, 0.2, 0.3], "input_std": [1.0, 1.0, 0.9]},
        ),
    ],
)
def test_the_arguments_that_a_card_tells_fit_it(card, expected, tmp_path):
    path = write(tmp_path / "w.safetensors", **card)
    arguments = extractor_arguments(read_card(path))
    assert arguments == expected
    read = {**CARD, **card}
    ResNetExtractor(space(read["channels"], read["observed_size"][0]), weights=path, **arguments)


@pytest.mark.parametrize("text", ["no json", "[]", json.dumps({**CARD, "last_stage": "layer9"}), '{"adapter": "none"}'])
def test_a_damaged_card_is_named(text, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"conv1.weight": th.zeros(1)}, path, metadata={KEY: text})
    with pytest.raises(ValueError, match="has a card that cannot be read: pretrain it again"):
        read_card(path)


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"w\.safetensors' is not a whole safetensors file .*: copy or write it again"):
        read_card(path)
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        probe(recorded(4), [str(path)], backbone="resnet_mini")


@pytest.mark.parametrize(
    ("card", "used", "channels", "frame_channels"),
    [
        ({}, {"size": 48}, 4, None),
        ({"observed_size": [40, 40]}, {"size": 48}, 4, None),
        ({}, {}, 3, None),
        ({}, {}, 3, 1),
        ({}, {"size": 48}, 6, None),
        ({"channels": 6, "frame_channels": 3}, {}, 3, None),
    ],
)
def test_a_probe_shows_pretrained_weights_the_images_they_know(card, used, channels, frame_channels, tmp_path):
    if channels == 3 and card:
        card = {**card, "adapter": "none", "channels": 3}
    path = str(write(tmp_path / "w.safetensors", **card))
    recording = recorded(channels, **used)
    options = {"last_stage": "layer1", "pooling": "avg", "frame_channels": frame_channels}
    (row,) = probe(recording, path, **options)
    assert row.features == (8 if card.get("adapter") == "none" else 8 * channels)


def test_other_files_have_no_card(tmp_path):
    save_file({"conv1.weight": th.zeros(1)}, tmp_path / "w.safetensors", metadata={"format": "pt"})
    assert read_card(tmp_path / "w.safetensors") is None
    th.save({}, tmp_path / "w.pth")
    assert read_card(tmp_path / "w.pth") is None


def recorded(channels, size=32):
    rng = np.random.default_rng(0)
    rows = 60
    return Recording(
        rng.integers(0, 256, (rows, channels, size, size), dtype=np.uint8),
        np.repeat(np.arange(6), 10),
        np.where(np.arange(rows) % 10 == 0, -1, rng.integers(0, 2, rows)),
        {"noise": rng.normal(size=rows)},
        space(channels, size),
    )


def test_a_probe_reads_pretrained_weights_as_they_were_trained_and_leaves_other_combinations_out(tmp_path):
    path = str(write(tmp_path / "w.safetensors", input_mean=None, input_std=None))
    recording = recorded(4)
    found = probe(recording, [path, "random"], ["layer1", "layer2", "layer3"], ["avg"], backbone="resnet_mini")
    combinations = {(row.weights == path, row.last_stage, row.adapter) for row in found}
    assert {one[1:] for one in combinations if one[0]} == {("layer1", "per_frame"), ("layer2", "per_frame")}
    assert len(combinations) == 2 + 6
    with pytest.raises(ValueError, match=r"Nothing to probe: .* with another adapter, or up to a lower stage"):
        probe(recording, [path], ["layer2"], ["avg"], ["conv1x1"])


def test_a_probe_of_rgb_images_takes_no_adapter_that_changes_nothing(tmp_path):
    path = str(write(tmp_path / "w.safetensors", adapter="none", channels=3, frame_channels=3))
    options = {"last_stage": ["layer1"], "pooling": ["avg"], "backbone": "resnet_mini"}
    found = probe(recorded(3), ["random", path], **options)
    assert sorted((row.weights, row.adapter) for row in found) == sorted([("random", "conv1x1"), (path, "conv1x1")])
    grey = probe(recorded(3), ["random", path], frame_channels=1, **options)
    expected = [("random", "conv1x1"), ("random", "per_frame"), (path, "conv1x1")]
    assert sorted((row.weights, row.adapter) for row in grey) == sorted(expected)
    with pytest.raises(ValueError, match="Nothing to probe: "):
        probe(recorded(3), [path], adapter=["per_frame"], **options)
    several = probe(recorded(6), ["random"], **options)
    assert {row.adapter for row in several} == {"conv1x1", "per_frame"}


@pytest.mark.parametrize(("adapter", "frame_channels"), [("inflate", None), ("per_frame", 1)])
def test_a_probe_takes_the_adapter_of_pretrained_weights_where_none_is_named(adapter, frame_channels, tmp_path):
    channels = 3 if frame_channels else 4
    statistics = {"input_mean": None, "input_std": None}
    path = str(write(tmp_path / "w.safetensors", adapter=adapter, channels=channels, **statistics))
    found = probe(recorded(channels), [path], ["layer1"], ["avg"], backbone="resnet_mini")
    assert [row.adapter for row in found] == [adapter]
