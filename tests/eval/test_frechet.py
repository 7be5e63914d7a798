from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import Tensor, nn

from eval.metrics.detectors import (
    Detectors,
    Distances,
    I3d,
    Inception,
    SpritesDetector,
    load_i3d,
    load_inception,
    load_sprites_detector,
)
from eval.metrics.frechet import Features, frechet_distance, joined
from eval.metrics.sprites_network import SpritesNetwork


def draw(count: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)


@settings(max_examples=25, deadline=None)
@given(width=st.integers(1, 6), seed=st.integers(0, 1000))
def test_equals_the_formula_with_scipys_matrix_root(width: int, seed: int):
    first, second = draw(60, width, seed), draw(50, width, seed + 1)
    c1, c2 = (np.cov(x, rowvar=False).reshape(width, width) for x in (first, second))
    expected = np.square(first.mean(0) - second.mean(0)).sum() + np.trace(c1 + c2 - 2 * np.real(sqrtm(c1 @ c2)))
    assert frechet_distance(Features(first, "a"), Features(second, "a")) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_of_gaussians_with_known_moments():
    base = draw(400, 3, 0)
    base = (base - base.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(base, rowvar=False))).T
    shifted = 2.0 * base + [3.0, 0.0, 4.0]  # mean 5 away, deviation 2 for 1
    assert frechet_distance(Features(base, "a"), Features(shifted, "a")) == pytest.approx(25 + 3 * (2 - 1) ** 2)
    assert frechet_distance(Features(base, "a"), Features(base, "a")) == pytest.approx(0, abs=1e-9)


def test_fewer_samples_than_features_still_give_a_real_number():
    value = frechet_distance(Features(draw(5, 20, 0), "a"), Features(draw(5, 20, 1), "a"))
    assert np.isfinite(value) and value > 0


def test_what_does_not_compare_is_refused():
    good = Features(draw(5, 3, 0), "i3d raw")
    with pytest.raises(ValueError, match="'i3d raw' and of 'i3d prepared' do not compare"):
        frechet_distance(good, Features(good.values, "i3d prepared"))
    with pytest.raises(ValueError, match="features of i3d prepared and of i3d raw do not compare"):
        joined([good, Features(good.values, "i3d prepared")])
    with pytest.raises(ValueError, match="N >= 2"):
        frechet_distance(good, Features(good.values[:1], "i3d raw"))
    with pytest.raises(ValueError, match="widths 3 and 2"):
        frechet_distance(good, Features(good.values[:, :2], "i3d raw"))


class ScriptedI3d(nn.Module):
    """The call signature of the StyleGAN-V file: scales and resizes if told to, then returns a mean per channel."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        if rescale:
            x = 2 * x / 255 - 1
        if resize:
            size = [x.shape[2], 224, 224]
            x = torch.nn.functional.interpolate(x, size=size, mode="trilinear", align_corners=False)
        return x.mean(dim=[2, 3, 4])


@pytest.fixture
def i3d(tmp_path: Path) -> I3d:
    torch.jit.script(ScriptedI3d()).save(str(tmp_path / "i3d.pt"))
    loaded = load_i3d(str(tmp_path / "i3d.pt"))
    assert isinstance(loaded, I3d)
    return loaded


def test_i3d_knows_its_two_call_styles_and_refuses_a_mixture(i3d: I3d):
    videos = np.random.default_rng(0).integers(0, 256, (3, 10, 32, 32, 3), dtype=np.uint8)
    raw = i3d.features(videos)
    floats = torch.from_numpy(videos).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    prepared = i3d.features(torch.nn.functional.interpolate(floats, size=(10, 224, 224)))
    assert (raw.origin, prepared.origin) == ("i3d raw", "i3d prepared")
    np.testing.assert_allclose(raw.values, prepared.values, atol=1e-3)
    with pytest.raises(ValueError, match="do not compare"):
        frechet_distance(raw, prepared)
    for mixture in (floats, torch.from_numpy(videos).permute(0, 4, 1, 2, 3), 255 * prepared_like()):
        with pytest.raises(ValueError, match="scaled twice or not at all"):
            i3d.features(mixture)
    with pytest.raises(ValueError, match="9 frames; I3D needs at least 10"):
        i3d.features(videos[:, :9])


def prepared_like() -> Tensor:
    return torch.ones(1, 3, 10, 224, 224)


def test_missing_weights_say_how_to_get_them(tmp_path: Path):
    for load in (load_i3d, load_inception):
        assert str(load(None)).startswith("unavailable: get ")
        with pytest.raises(FileNotFoundError, match=r"gone.pt is no file; get .* and set bench\."):
            load(str(tmp_path / "gone.pt"))
    assert load_sprites_detector(None).startswith("unavailable: set bench.features")
    (tmp_path / "bad.pt").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="is not a TorchScript file"):
        load_i3d(str(tmp_path / "bad.pt"))


class ScriptedInception(nn.Module):
    """The call signature of the StyleGAN2-ADA file."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        return x.float().mean(dim=[2, 3])


def test_a_network_in_the_place_of_another_is_refused_when_it_is_loaded(i3d: I3d, tmp_path: Path):
    torch.jit.script(ScriptedInception()).save(str(tmp_path / "inception.pt"))
    assert isinstance(load_inception(str(tmp_path / "inception.pt")), Inception)
    with pytest.raises(ValueError, match=r"inception.pt holds another network, .*; get i3d_torchscript.pt"):
        load_i3d(str(tmp_path / "inception.pt"))
    with pytest.raises(ValueError, match=r"i3d.pt holds another network, .*; get inception-2015-12-05.pt"):
        load_inception(str(tmp_path / "i3d.pt"))


def test_videos_too_short_for_a_network_have_no_distance_of_it():
    detectors = Detectors(SpritesDetector(SpritesNetwork.from_config(seed=0)), "unavailable", "unavailable")
    videos = np.zeros((3, 4, 32, 32, 3), np.uint8)
    distances = Distances(detectors)
    for video in videos:
        distances.add(video, video)
    found = distances.found()
    assert found["fvd_sprites"] == found["fid_sprites"] != found["fid"]
    assert found["fvd_sprites"] == "unavailable: videos of 4 frames; the sprites network needs 5 or more"


def test_videos_given_one_at_a_time_are_compared_as_sets():
    detector = SpritesDetector(SpritesNetwork.from_config(seed=0))
    videos, references = np.random.default_rng(0).integers(0, 256, (2, 4, 10, 32, 32, 3), dtype=np.uint8)
    distances = Distances(Detectors(detector, "unavailable: test", "unavailable: test"))
    for pair in zip(videos, references):
        distances.add(*pair)
    found = distances.found()
    for name, features in (("fvd_sprites", detector.video_features), ("fid_sprites", detector.frame_features)):
        assert found[name] == pytest.approx(frechet_distance(features(videos), features(references)), rel=1e-3)
    assert found["fvd"] == found["fid"] == "unavailable: test"


def test_the_sprites_network_gives_both_kinds_of_features():
    detector = SpritesDetector(SpritesNetwork.from_config(seed=0))
    videos = np.random.default_rng(0).integers(0, 256, (4, 9, 32, 32, 3), dtype=np.uint8)
    assert detector.video_features(videos).values.shape == (4, 64)
    assert detector.frame_features(videos).values.shape[0] == 36
