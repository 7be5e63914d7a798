"""The feature network of the sprites world: captions it reads, shapes it takes, files, text accuracy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.sprites import COLORS, SpritesConfig, simulate
from eval.metrics.sprites_network import (
    HEADS,
    LABELS,
    MOTION_UNIT,
    CaptionLabels,
    SpritesNetwork,
    SpritesNetworkConfig,
    ends_with_color,
    event_accuracy,
    labels_of_caption,
)

SMALL = SpritesNetworkConfig([8, 8, 8], [8, 8], 4)
TOLD = "a red striped disc and an orange two-tone square on a blue background then the disc turns yellow"


@pytest.fixture(scope="module")
def network() -> SpritesNetwork:
    return SpritesNetwork.from_config(SMALL).eval()


def video(frames: int = 9, height: int = 32, width: int = 40, clips: int = 2) -> torch.Tensor:
    rng = torch.Generator().manual_seed(frames)
    return torch.randint(256, (clips, 3, frames, height, width), generator=rng, dtype=torch.uint8)


def test_the_perceptual_distance_is_of_frames_and_leaves_out_the_first(network):
    frames = video(clips=1)[0].permute(1, 2, 3, 0)
    first_changed, last_changed = frames.clone(), frames.clone()
    first_changed[0] = 0
    last_changed[-1] = 0
    assert network.frame_distances(frames, first_changed).tolist() == [0.0] * 8
    *same, other = network.frame_distances(frames, last_changed).tolist()
    assert same == [0.0] * 7 and other > 0.0
    assert (network.frame_distances(frames, frames.flip(0))[:3] > 0).all()


def test_the_perceptual_distance_of_a_frame_depends_on_no_other(network):
    frames = video(frames=12, clips=1)[0].permute(1, 2, 3, 0)
    far = network.frame_distances(frames, frames.flip(1))
    two = network.frame_distances(frames[9:], frames[9:].flip(1))
    torch.testing.assert_close(two, far[9:])


def color_name(rgb: np.ndarray) -> str:
    return min(COLORS, key=lambda name: float(np.abs(rgb - np.array(COLORS[name])).max()))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.booleans(), st.sampled_from([8, 9, 33]))
def test_labels_of_a_caption_are_those_of_its_scene(seed, max_sprites, occlusion, num_frames):
    cfg = SpritesConfig(max_sprites=max_sprites, occlusion=occlusion, num_frames=num_frames, event_ratio=0.7)
    scene = simulate(cfg, seed)
    labels = labels_of_caption(scene.caption)
    assert labels.sprites == tuple((each.color, each.texture, each.shape) for each in scene.sprites)
    assert labels.background == scene.background.color
    layers = [*scene.sprites, scene.background]
    assert labels.shapes == {each.shape for each in scene.sprites}
    assert labels.start_colors == {color_name(layer.base_rgb[0]) for layer in layers}
    assert labels.end_colors == {color_name(layer.base_rgb[-1]) for layer in layers}
    bearers = [*(each.shape for each in scene.sprites), "background"]
    assert labels.end_bearers == {color_name(layer.base_rgb[-1]): name for layer, name in zip(layers, bearers)}
    assert (labels.event is None) == (labels.start_colors == labels.end_colors)
    assert (labels.event is None) == ("then" not in scene.caption)


def test_the_event_replaces_one_colour():
    labels = labels_of_caption(TOLD)
    assert labels == CaptionLabels(
        (("red", "striped", "disc"), ("orange", "two-tone", "square")), "blue", ("disc", "yellow")
    )
    assert labels.start_colors == {"red", "orange", "blue"} and labels.end_colors == {"yellow", "orange", "blue"}
    assert labels.end_bearers == {"yellow": "disc", "orange": "square", "blue": "background"}
    background = labels_of_caption(TOLD.replace("the disc", "the background"))
    assert background.end_colors == {"red", "orange", "yellow"}


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("", "must be one of the sprites world"),
        ("a red disc", "must be one of the sprites world"),
        (f"{TOLD}.", "must be one of the sprites world"),
        (TOLD.upper(), "must be one of the sprites world"),
        ("an red striped disc on a blue background", "must be one of the sprites world"),
        ("a orange striped disc on a blue background", "must be one of the sprites world"),
        ("a red striped disc on a blue background then", "must be one of the sprites world"),
        ("a red striped disc on a blue background then the disc turns gold", "must be one of the sprites world"),
        ("a red striped disc and a pink spotted disc on a blue background", "each shape and each colour once"),
        ("a red striped disc on a red background", "each shape and each colour once"),
        ("a red striped disc on a blue background then the ring turns pink", "a shape that it names"),
        ("a red striped disc on a blue background then the disc turns blue", "not there before; blue is"),
    ],
)
def test_other_captions_are_refused_by_name(caption, message):
    with pytest.raises(ValueError, match=message) as refused:
        labels_of_caption(caption)
    assert f"caption={caption!r}" in str(refused.value)


def test_event_accuracy_looks_at_the_named_colour_at_the_end():
    logits = torch.full((4, len(COLORS)), -1.0)
    yellow = list(COLORS).index("yellow")
    logits[0, yellow] = 0.1  # just over one half
    logits[1, list(COLORS).index("red")] = 5.0  # what it was before is no matter
    plain = "a red striped disc on a blue background"
    found = event_accuracy(logits, [TOLD, TOLD, plain, TOLD])
    assert math.isnan(event_accuracy(logits[:1], ["a bear walks"])[0]), "other captions are no evidence"
    assert found[:2] == [1.0, 0.0] and math.isnan(found[2]) and found[3] == 0.0
    assert ends_with_color(logits[0], "yellow") and not ends_with_color(logits[0], "red")
    with pytest.raises(ValueError, match="color='gold' must be one of red, orange"):
        ends_with_color(logits[0], "gold")


@pytest.mark.parametrize(("frames", "height", "width"), [(5, 32, 32), (6, 40, 32), (33, 64, 64), (50, 32, 96)])
def test_it_reads_any_length_and_size(network, frames, height, width):
    clip = video(frames, height, width)
    outputs = network(clip)
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {n: (2, *rest) for n, rest in HEADS.items()}
    assert network.features(clip).shape == (2, 4) and network.frame_features(clip).shape == (2, frames, 8)
    floats = clip.float() / 127.5 - 1
    for name, value in network(floats).items():
        torch.testing.assert_close(value, outputs[name])


def test_frames_are_seen_on_their_own_and_clips_too(network):
    clip = video()
    frames = network.frame_features(clip)
    torch.testing.assert_close(network.frame_features(clip.flip(2)), frames.flip(1))
    torch.testing.assert_close(network.features(clip[1:]), network.features(clip)[1:])
    assert not torch.allclose(network.features(clip.flip(2)), network.features(clip))


def test_features_know_where_something_is(network):
    """Far from the edges, which padding would tell: a mean over cells alone keeps no place, and so no motion."""
    here = torch.zeros(1, 3, 9, 160, 160)
    here[..., 72:80, 64:72] = 1.0
    there = here.roll(24, dims=-1)
    torch.testing.assert_close(network.frame_features(there), network.frame_features(here))
    assert not torch.allclose(network.features(there), network.features(here), atol=1e-4)


def test_motion_is_in_heights_per_frame(network):
    clip = video()
    expected = MOTION_UNIT * network.heads["motion"](network.features(clip))
    torch.testing.assert_close(network(clip)["motion"], expected)


def test_the_default_is_small_and_a_function_of_its_seed():
    network, same, other = (SpritesNetwork.from_config(seed=seed) for seed in (0, 0, 1))
    assert sum(parameter.numel() for parameter in network.parameters()) <= 500_000
    assert torch.equal(network.conv_in.weight, same.conv_in.weight)
    assert not torch.equal(network.conv_in.weight, other.conv_in.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded(network, tmp_path, dtype):
    stored = SpritesNetwork(SMALL).to(dtype)
    stored.load_state_dict(network.state_dict())
    stored.save(tmp_path / "features")
    loaded = SpritesNetwork.from_folder(tmp_path / "features").eval()
    assert loaded.config == SMALL and next(loaded.parameters()).dtype == torch.float32
    tolerance = 0.0 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(loaded.features(video()), network.features(video()), atol=tolerance, rtol=0)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["features", "model.json", "model.safetensors"]


def test_folders_that_are_not_one_are_refused(network, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no sprites network in .* stage=features"):
        SpritesNetwork.from_folder(tmp_path)
    network.save(tmp_path / "features")
    description = tmp_path / "features/model.json"
    saved = json.loads(description.read_text())
    saved["labels"]["colors"].reverse()
    description.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="was trained on the labels"):
        SpritesNetwork.from_folder(tmp_path / "features")
    assert LABELS["colors"] == list(COLORS)
    description.write_text(json.dumps({"config": {"dim": 256}, "provenance": {}}))
    with pytest.raises(ValueError, match="no sprites network in .*: its model.json tells no labels; .* stage=features"):
        SpritesNetwork.from_folder(tmp_path / "features")
    description.write_text('{"config"')
    with pytest.raises(ValueError, match="features/model.json is not JSON: .* stage=features"):
        SpritesNetwork.from_folder(tmp_path / "features")


def test_two_frames_have_a_perceptual_distance_and_smaller_ones_are_refused(network):
    frames = video(frames=5, clips=1)[0].permute(1, 2, 3, 0)
    assert float(network.frame_distances(frames[:2], frames[2:4])) > 0
    with pytest.raises(ValueError, match="frames are 32 x 24 px; .* at least 32 px, divisible by 8"):
        network.frame_distances(frames[:, :, :24], frames[:, :, :24])


@pytest.mark.parametrize(
    "shape", [(3, 9, 32, 32), (1, 4, 9, 32, 32), (1, 3, 4, 32, 32), (1, 3, 9, 36, 32), (1, 3, 9, 24, 32)]
)
def test_videos_it_cannot_read_are_refused(network, shape):
    with pytest.raises(ValueError, match="the sprites network takes (.B, 3, T, H, W. with T >= 5|height and width of)"):
        network(torch.zeros(shape))


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"frame_widths": [8, 8]}, r"frame_widths=\[8, 8\] must have 3 entries"),
        ({"frame_widths": [8, 8, 6]}, r"frame_widths=\[8, 8, 6\] must be multiples of 4"),
        ({"clip_widths": [0]}, r"clip_widths=\[0\] must be multiples of 4"),
        ({"num_features": 0}, "num_features=0 must be at least 1"),
    ],
)
def test_widths_are_refused_by_name(widths, message):
    with pytest.raises(ValueError, match=message):
        SpritesNetworkConfig(**widths)
