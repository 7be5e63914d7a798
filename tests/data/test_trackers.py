"""Trackers: exact, Lucas-Kanade and the CoTracker3 adapter (against a stand-in that checks what it is
given).
"""

from __future__ import annotations

import sys
import threading
import time
import types
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch

from data import trackers
from data.layer_alignment import Target, _by_soft_colors, _predicted
from data.motion_layers import _smoothed, fit_motion
from data.sprites import SpritesConfig, render_clip
from data.trackers import CoTracker3, TrackerConfig, build_tracker, grid_queries, on_own_device


def shifting_noise(num_frames: int = 9, size: int = 64, step=(1.5, -0.75)) -> tuple[np.ndarray, np.ndarray]:
    """Smooth noise that moves by `step` px a frame: frames, and the displacement [T, 2]."""
    rng = np.random.default_rng(0)
    waves = rng.uniform(-0.7, 0.7, (12, 2)), rng.uniform(0, 6.3, 12)
    shift = np.arange(num_frames)[:, None] * np.array(step)
    y, x = np.mgrid[:size, :size]
    frames = [sum(np.cos(k[0] * (x - s[0]) + k[1] * (y - s[1]) + phase) for k, phase in zip(*waves)) for s in shift]
    gray = np.clip(128 + 25 * np.stack(frames), 0, 255).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=-1), shift


def test_grid_queries_are_cell_centres():
    assert grid_queries(8, 12, 2, 3).tolist() == [[2, 2], [6, 2], [10, 2], [2, 6], [6, 6], [10, 6]]


def test_exact_tracker_returns_the_scene_s_motion():
    clip = render_clip(SpritesConfig(height=32, width=32, num_frames=9), 1)
    queries = grid_queries(32, 32, 4, 4)
    points, visibility = build_tracker(TrackerConfig("exact"), clip.scene).track(clip.frames, queries)
    assert np.allclose(points[0], queries, atol=1e-4) and points.shape == (9, 16, 2)
    assert visibility.dtype == bool
    with pytest.raises(ValueError, match="scene's"):
        build_tracker("exact", clip.scene).track(clip.frames[:5], queries)
    with pytest.raises(ValueError, match="use lucas_kanade"):
        build_tracker("exact")


@pytest.mark.parametrize("max_layers", [0, 3])
def test_lucas_kanade_follows_a_known_shift(max_layers):
    frames, shift = shifting_noise()
    queries = grid_queries(64, 64, 6, 6)
    points, visibility = build_tracker(TrackerConfig(max_layers=max_layers)).track(frames, queries)
    truth = queries + shift[:, None]
    inside = ((truth > 4) & (truth < 60)).all(-1)
    assert visibility[inside].mean() > 0.95
    assert np.linalg.norm(points - truth, axis=-1)[inside].mean() < 0.15
    outside = (truth < 0).any(-1) | (truth >= 64).any(-1)
    assert outside.any() and not visibility[outside & (np.linalg.norm(points - truth, axis=-1) < 0.2)].any()


def test_forward_backward_check_notices_a_cut():
    frames, _ = shifting_noise(6)
    frames[3:] = np.random.default_rng(1).integers(0, 255, frames[3:].shape)
    _, visibility = build_tracker(TrackerConfig(max_layers=0)).track(frames, grid_queries(64, 64, 6, 6))
    assert visibility[2].mean() > 0.9 and visibility[3].mean() < 0.4


def test_layers_find_a_point_again_after_occlusion():
    """A bar passes over still noise: frame-to-frame tracking loses what it covers, layers bring it back."""
    frames, _ = shifting_noise(12, step=(0.0, 0.0))
    rng = np.random.default_rng(2)
    bar = rng.integers(0, 255, (64, 10, 3), dtype=np.uint8)
    for t in range(12):
        left = 5 * t
        width = min(10, 64 - left)
        frames[t, :, left : left + width] = bar[:, :width]
    queries = grid_queries(64, 64, 8, 8)
    still = queries[:, 0] > 16
    _, plain_seen = build_tracker(TrackerConfig(max_layers=0)).track(frames, queries)
    points, seen = build_tracker(TrackerConfig(max_layers=3)).track(frames, queries)
    passed = queries[:, 0] < 5 * 11 - 4
    assert seen[11, still & passed].mean() > 0.9 > plain_seen[11, still & passed].mean()
    error = np.linalg.norm(points[11] - queries, axis=-1)[still & passed]
    assert np.median(error) < 0.1 and (error < 1).mean() > 0.9


def test_a_slow_body_does_not_drag_the_still_ground_along():
    """In a blurred, flickering video: one that a small model generated."""
    cv2, rng = pytest.importorskip("cv2"), np.random.default_rng(3)
    ground, body = rng.integers(0, 255, (48, 48, 3)), rng.integers(0, 255, (20, 20, 3))
    frames = np.stack([ground] * 20).astype(np.float32)
    for t in range(20):
        left = 4 + t // 2
        frames[t, 14:34, left : left + 20] = body
    frames = np.stack([cv2.GaussianBlur(f, (0, 0), 1.3) + 6 * rng.standard_normal((1, 1, 3)) for f in frames])
    queries = grid_queries(48, 48, 8, 8)
    points, _ = build_tracker(TrackerConfig(max_layers=2)).track(frames.clip(0, 255).astype(np.uint8), queries)
    aside = (np.abs(queries[:, 1] - 24) > 14) | (queries[:, 0] > 38)
    assert np.linalg.norm(points[-1] - queries, axis=-1)[aside].max() < 0.5
    on_body = (np.abs(queries - [14, 24]) < 8).all(-1)
    assert np.abs(points[-1] - queries - [9, 0])[on_body].max() < 1


def moving_square(steps, blur: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A textured square on still ground, shifted by steps [T] px to the right; its pattern is blurred ever more, up to
    ``blur`` px in the last frame: frames, and the square's corners before it moves.
    """
    cv2, rng = pytest.importorskip("cv2"), np.random.default_rng(4)

    def texture(size: int, color: tuple[int, int, int]) -> np.ndarray:
        noise = cv2.GaussianBlur(rng.standard_normal((size, size)), (0, 0), 2.0)
        return np.clip(np.array(color) * (1 + 0.5 * (noise / noise.std())[..., None]), 0, 255).astype(np.float32)

    ground, square = texture(64, (60, 80, 110)), texture(20, (180, 70, 60))
    frames = np.stack([ground] * len(steps))
    for t, step in enumerate(steps):
        sigma = blur * t / (len(steps) - 1)
        smeared = cv2.GaussianBlur(square, (0, 0), sigma) if sigma else square
        frames[t, 24:44, 8 + step : 28 + step] = smeared
    return frames.round().astype(np.uint8), np.array([[8, 24], [28, 44]])


@pytest.mark.parametrize("blur", [0.0, 2.0])
def test_a_body_that_rests_at_first_is_followed_when_it_moves(blur):
    steps = np.concatenate([np.zeros(16, int), np.arange(2, 34, 2)])
    frames, (low, high) = moving_square(steps, blur)
    queries = grid_queries(64, 64, 16, 16)
    points, _ = build_tracker(TrackerConfig(max_layers=2)).track(frames, queries)
    on_it = ((queries > low + 1) & (queries < high - 1)).all(-1)
    assert np.abs(points[-1] - queries - [32, 0])[on_it].max() < (0.5 if blur == 0 else 2)
    beside = ~((queries > low - 3) & (queries < high + 3)).all(-1)
    assert np.abs(points[-1] - queries)[beside].max() < 0.5


def test_a_body_whose_pattern_is_lost_is_found_by_its_colors():
    """As a small model generates it: the pattern of the start turns into another of the same colours."""
    frames, _ = moving_square([0, 4, 0])
    colors = frames.astype(np.float32) / 255
    colors[2, 24:44, 8:28] = colors[0, 24:44, 36:56]
    colors[1, 24:44, 12:32] = colors[0, 24:44, 8:28][::-1, ::-1].transpose(1, 0, 2)
    y, x = np.mgrid[24:44, 8:28]
    target = Target.of(colors[0], colors[0].mean(-1), (x + 1j * y).reshape(-1))
    found = _by_soft_colors(colors[1], target, (1.0, 1.0), gap=1)
    assert found is not None and abs(found.b - 4) < 2.5
    assert _by_soft_colors(colors[2], target, (1.0, 1.0), gap=1) is None


def test_neighbours_outvote_a_point_that_looks_like_another_layer():
    start = (np.arange(8)[:, None] + 1j * np.arange(8)[None]).reshape(-1) * 4
    score = np.where(start.real < 14, 10.0, -10.0) * np.array([[1], [-1]])
    score[:, 9] *= -1
    assert np.array_equal(_smoothed(score, start), np.where(start.real < 14, 0, 1))


def test_a_hidden_layer_turns_about_its_own_center_and_keeps_its_scale():
    t, center = np.arange(5), 40 + 30j
    a = 1.1**t * np.exp(0.3j * t)
    b = (center + (2 + 1j) * t) - a * center
    found_a, found_b = _predicted(a, b, center, before=2, last=3, t=5)
    assert np.isclose(found_a, 1.1**3 * np.exp(0.3j * 5))
    assert np.isclose(found_a * center + found_b, center + (2 + 1j) * 5)


def test_no_queries_and_one_frame():
    frames, _ = shifting_noise(3)
    points, visibility = build_tracker("lucas_kanade").track(frames, np.zeros((0, 2)))
    assert points.shape == (3, 0, 2) and visibility.shape == (3, 0)
    points, visibility = build_tracker("lucas_kanade").track(frames[:1], grid_queries(64, 64, 2, 2))
    assert np.array_equal(points[0], grid_queries(64, 64, 2, 2)) and visibility.all()


def test_fit_motion_recovers_a_similarity():
    rng = np.random.default_rng(0)
    start = rng.normal(size=6) + 1j * rng.normal(size=6)
    a, b = 1.2 * np.exp(0.4j), 3 - 2j
    found_a, found_b, held = fit_motion(start, (a * start + b)[None], np.ones((1, 6)))
    assert np.allclose([found_a[0], found_b[0]], [a, b]) and held[0]


@pytest.mark.parametrize(
    "settings, field",
    [
        ({"upsample": 5}, r"tracker\.upsample=5"),
        ({"window_px": 1.0}, r"tracker\.window_px=1\.0"),
        ({"max_layers": -1}, r"tracker\.max_layers=-1"),
        ({"mode": "live"}, r"tracker\.mode=.live"),
    ],
)
def test_settings_of_trackers_are_checked_at_once(settings, field):
    with pytest.raises(ValueError, match=field):
        TrackerConfig(**settings)


def test_unknown_tracker_is_refused():
    with pytest.raises(ValueError, match="exact"):
        build_tracker("optical_flow")


# ------------------------------------------------------------------------------------------ CoTracker3
class FakeOffline(torch.nn.Module):
    """Asserts the predictor's contract and moves every query by (1, 2) px a frame."""

    def __init__(self, checkpoint=None):
        super().__init__()
        self.checkpoint = checkpoint

    def forward(self, video, queries=None):
        assert video.dtype == torch.float32 and video.ndim == 5 and video.shape[2] == 3
        assert 1 < video.max() <= 255 and video.min() >= 0
        assert queries.shape[0] == 1 and queries.shape[2] == 3 and (queries[..., 0] == 0).all()
        steps = torch.arange(video.shape[1])[:, None, None] * torch.tensor([1.0, 2.0])
        points = queries[0, None, :, 1:] + steps
        return points[None], torch.ones(1, *points.shape[:2], dtype=torch.bool)


class FakeOnline(torch.nn.Module):
    step = 8

    def __init__(self, checkpoint=None):
        super().__init__()
        self.seen, self.windows = 0, []

    def forward(self, video_chunk, is_first_step=False, queries=None):
        if is_first_step:
            self.queries, self.seen = queries, 0
            return None, None
        assert queries is None and video_chunk.shape[1] <= 2 * self.step
        self.windows.append(video_chunk.shape[1])
        self.seen = video_chunk.shape[1] if self.seen == 0 else self.seen + video_chunk.shape[1] - self.step
        points = self.queries[0, None, :, 1:].expand(self.seen, -1, -1)
        return points[None], torch.ones(1, self.seen, points.shape[1], dtype=torch.bool)


@pytest.fixture(autouse=True)
def no_kept_model():
    trackers._kept_cotracker3.cache_clear()
    yield
    trackers._kept_cotracker3.cache_clear()


@pytest.fixture
def fake_cotracker(monkeypatch, tmp_path):
    """The installed package, and weights for it in the working directory."""
    package, predictor = types.ModuleType("cotracker"), types.ModuleType("cotracker.predictor")
    package.__spec__ = ModuleSpec("cotracker", None)
    predictor.CoTrackerPredictor, predictor.CoTrackerOnlinePredictor = FakeOffline, FakeOnline
    monkeypatch.setitem(sys.modules, "cotracker", package)
    monkeypatch.setitem(sys.modules, "cotracker.predictor", predictor)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scaled_offline.pth").touch()


def test_cotracker_offline(fake_cotracker):
    frames, _ = shifting_noise(5)
    queries = grid_queries(64, 64, 3, 3)
    tracker = build_tracker(TrackerConfig("cotracker3", checkpoint="scaled_offline.pth"))
    points, visibility = tracker.track(frames, queries)
    assert points.shape == (5, 9, 2) and points.dtype == np.float32 and visibility.shape == (5, 9)
    assert np.allclose(points, queries + np.arange(5)[:, None, None] * np.array([1.0, 2.0]), atol=1e-4)
    assert tracker.model.checkpoint == "scaled_offline.pth"


def test_cotracker_on_an_unknown_device_is_refused(fake_cotracker):
    with pytest.raises(ValueError, match="tracker.device=gpu must be auto, cpu or cuda"):
        build_tracker(TrackerConfig("cotracker3", checkpoint="scaled_offline.pth", device="gpu"))


@pytest.mark.parametrize("num_frames", [5, 8, 16, 17, 33, 40])
def test_cotracker_online_covers_every_frame(fake_cotracker, num_frames):
    frames = np.repeat(shifting_noise(1)[0], num_frames, axis=0)
    queries = grid_queries(64, 64, 3, 3)
    tracker = CoTracker3("online", checkpoint="scaled_online.pth")
    tracker.track(np.repeat(frames, 2, axis=0), queries[:2])  # another video before leaves nothing behind
    points, visibility = tracker.track(frames, queries)
    assert points.shape == (num_frames, 9, 2) and visibility.shape == (num_frames, 9)
    assert np.allclose(points, queries, atol=1e-4)


def test_cotracker_absent_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cotracker", None)
    monkeypatch.setitem(sys.modules, "cotracker.predictor", None)
    with pytest.raises(ImportError, match=r"tracker\.checkpoint=weights\.pth needs .*pip install git\+https.*CC-BY-NC"):
        build_tracker(TrackerConfig("cotracker3", checkpoint="weights.pth"))


def test_weights_that_are_not_there_are_named(fake_cotracker):
    with pytest.raises(FileNotFoundError, match=r"tracker\.checkpoint=absent\.pth: no such file"):
        build_tracker(TrackerConfig("cotracker3", checkpoint="absent.pth"))


def test_cotracker_without_weights_is_refused_even_if_installed(fake_cotracker):
    """Its predictors would take random weights."""
    with pytest.raises(ImportError, match=r"has no weights.*allow_download=true.*or set tracker\.checkpoint"):
        build_tracker("cotracker3")


def test_cotracker_from_the_hub_is_loaded_once(monkeypatch, tmp_path):
    """Until other settings are asked for."""
    asked = []
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load", lambda *args: asked.append(args[1]) or FakeOffline())
    first, second = (build_tracker(TrackerConfig("cotracker3", rows=n, allow_download=True)) for n in (2, 3))
    assert first is second and asked == ["cotracker3_offline"]
    build_tracker(TrackerConfig("cotracker3", mode="online", allow_download=True))
    assert asked == ["cotracker3_offline", "cotracker3_online"]


def test_workers_download_cotracker_one_after_the_other(monkeypatch, tmp_path):
    at_work, most = [], []

    def load(*args):
        at_work.append(args)
        time.sleep(0.05)
        most.append(len(at_work))
        at_work.pop()
        return FakeOffline()

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "load", load)
    workers = [threading.Thread(target=CoTracker3) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert most == [1, 1, 1]


@pytest.mark.parametrize(
    "device, devices",
    [
        ("cuda", ["cuda:0", "cuda:1", "cuda:0"]),
        ("auto", ["cuda:0", "cuda:1", "cuda:0"]),
        ("cuda:1", ["cuda:1"] * 3),
        ("cpu", ["cpu"] * 3),
    ],
)
def test_workers_share_the_gpus(monkeypatch, device, devices):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cfg = TrackerConfig("cotracker3", device=device)
    assert [on_own_device(cfg, worker).device for worker in range(3)] == devices
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert on_own_device(cfg, 1) == cfg, "what was asked for is what a refusal names"
