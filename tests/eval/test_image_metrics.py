from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from eval.metrics.drift import drift, frame_saturation, latent_moments, window_means
from eval.metrics.image import PSNR_CEILING_DB, frame_psnr, frame_ssim
from eval.metrics.lpips import BACKBONE_FILE, HEADS_FILE, Lpips, load_lpips


@pytest.fixture
def video() -> torch.Tensor:
    return torch.randint(20, 230, (4, 24, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_psnr_in_closed_form_and_without_frame_zero(video: torch.Tensor) -> None:
    other = video + 5
    other[0] = 0  # frame 0 must not matter
    torch.testing.assert_close(frame_psnr(other, video), torch.full((3,), 20 * math.log10(255 / 5)))


def test_identical_frames_reach_the_ceilings(video: torch.Tensor) -> None:
    assert frame_psnr(video, video).tolist() == [PSNR_CEILING_DB] * 3
    torch.testing.assert_close(frame_ssim(video, video), torch.ones(3))


def test_ssim_falls_with_noise_and_does_not_read_the_batch_range(video: torch.Tensor) -> None:
    flat = torch.full_like(video, 120)
    slight = flat.clone()
    slight[:, ::2] += 1  # a one-level ripple on grey: next to invisible, unless the range is taken from the data
    assert frame_ssim(slight, flat).min() > 0.9
    assert frame_ssim(video.flip(2), video).max() < 0.5


def test_a_long_video_is_measured_a_few_frames_at_a_time(video: torch.Tensor) -> None:
    long, other = video.repeat(5, 1, 1, 1), video.flip(2).repeat(5, 1, 1, 1)
    for measure in (frame_ssim, frame_psnr):
        pairs = [measure(long[[0, n]], other[[0, n]]) for n in range(1, 20)]
        torch.testing.assert_close(measure(long, other), torch.cat(pairs))


def test_refuses_float_frames_and_other_sizes(video: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="uint8"):
        frame_psnr(video.float(), video)
    with pytest.raises(ValueError, match="equal"):
        frame_ssim(video[:, :-1], video)


def test_lpips_says_how_to_get_it_or_loads(tmp_path: Path, video: torch.Tensor) -> None:
    assert re.fullmatch("unavailable: put .* set bench.lpips_weights=FOLDER", str(load_lpips(None)))
    torch.manual_seed(0)
    random = Lpips()
    features = {key: value for key, value in random.state_dict().items() if key.startswith("features.")}
    heads = {f"lin{i}.model.1.weight": head.weight.data.abs() for i, head in enumerate(random.heads)}
    torch.save(features | {"classifier.1.weight": torch.zeros(1)}, tmp_path / BACKBONE_FILE)
    with pytest.raises(FileNotFoundError, match=f"stage.lpips_weights={tmp_path} holds no {HEADS_FILE}; put "):
        load_lpips(str(tmp_path), "stage.lpips_weights")
    torch.save(heads, tmp_path / HEADS_FILE)
    metric = load_lpips(str(tmp_path))
    assert isinstance(metric, Lpips)
    video = video.repeat(1, 2, 2, 1)
    assert metric.frame_distances(video, video).tolist() == [0.0] * 3
    assert metric.frame_distances(video.flip(1), video).min() > 0
    del features["features.3.bias"]
    torch.save(features, tmp_path / BACKBONE_FILE)
    with pytest.raises(ValueError, match="does not hold LPIPS"):
        load_lpips(str(tmp_path))
    torch.save([features], tmp_path / BACKBONE_FILE)
    with pytest.raises(ValueError, match="does not hold LPIPS .* by name; put "):
        load_lpips(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04 cut short"])
def test_damaged_lpips_weights_are_named(tmp_path: Path, content: bytes) -> None:
    for name in (BACKBONE_FILE, HEADS_FILE):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{BACKBONE_FILE} .* cannot be read as weights"):
        load_lpips(str(tmp_path))


def test_saturation_of_known_colours() -> None:
    colours = torch.tensor([[0, 0, 0], [80, 80, 80], [255, 0, 0], [200, 100, 100]], dtype=torch.uint8)
    frames = colours[:, None, None].expand(-1, 2, 3, -1)
    torch.testing.assert_close(frame_saturation(frames), torch.tensor([0.0, 0.0, 1.0, 0.5]))


def test_drift_compares_the_two_ends() -> None:
    assert drift(torch.cat([torch.zeros(15), torch.rand(70), torch.ones(15) * 2])) == pytest.approx(2.0)
    assert drift(torch.full((50,), 0.3)) == pytest.approx(0.0)
    nan = float("nan")
    assert drift(torch.tensor([nan, 1.0] + [0.0] * 10 + [3.0, nan])) == pytest.approx(2.0)
    torch.testing.assert_close(window_means(torch.tensor([1.0, 3.0, nan, 5.0, 7.0]), 2), torch.tensor([2.0, 5.0, 7.0]))
    mean, std = latent_moments(torch.stack([torch.full((2, 3, 4), float(f)) for f in range(3)], dim=1))
    assert mean.tolist() == [0, 1, 2] and std.tolist() == [0, 0, 0]
