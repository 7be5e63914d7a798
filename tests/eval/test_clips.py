"""The clips of a benchmark."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.sources import FolderSource
from data.trackers import TrackerConfig, grid_queries
from data.video import write_video
from eval.clips import EvalClip, folder_clips
from models.condition import ClipGeometry
from models.diffusion.noise import KeyedNoise
from models.wan.text_encoder import VocabularyEncoder


def read(folder: Path, **settings) -> list[EvalClip]:
    return folder_clips(
        FolderSource(FolderSource.Config(str(folder), str(folder / "list.csv"))),
        ClipGeometry(36, 64, 5, 16),
        num_clips=4,
        tracker=TrackerConfig(),
        queries=grid_queries(36, 64, 2, 2),
        noise=KeyedNoise(0),
        **settings,
    )


def test_a_clip_keeps_its_noise_when_another_goes(tmp_path: Path) -> None:
    """Else two runs could not be compared clip by clip."""
    (tmp_path / "list.csv").write_text("file,caption\n")
    frames = np.random.default_rng(0).integers(0, 255, (6, 36, 64, 3), dtype=np.uint8)
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, frames, 16)
    before = {clip.key: (clip.sample_id, clip.tracks.ids.tolist()) for clip in read(tmp_path)}
    (tmp_path / "a.mp4").unlink()
    assert {clip.key: (clip.sample_id, clip.tracks.ids.tolist()) for clip in read(tmp_path)} == {"b": before["b"]}


def test_frames_may_be_spread_over_the_whole_video(tmp_path: Path, caplog) -> None:
    (tmp_path / "list.csv").write_text("file,caption\n")
    shades = np.broadcast_to(np.arange(0, 255, 10, dtype=np.uint8)[:, None, None, None], (26, 36, 64, 3))
    write_video(tmp_path / "a.mp4", shades[:21], 30)
    write_video(tmp_path / "short.mp4", shades[:4], 30)
    (clip,) = read(tmp_path, whole=True)
    np.testing.assert_allclose(clip.frames[:, 0, 0, 0], [0, 50, 100, 150, 200], atol=3)
    assert "short.mp4 is left out: short.mp4 has 4 frames; 5 needed" in caplog.text


def test_a_caption_that_the_model_cannot_read_leaves_its_clip_out(tmp_path: Path, caplog) -> None:
    (tmp_path / "list.csv").write_text("file,caption\na.mp4,a red disc\nb.mp4,a zebra\n")
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, np.zeros((6, 36, 64, 3), np.uint8), 16)
    encoder = VocabularyEncoder(8)
    clips = read(tmp_path, check_caption=lambda caption: encoder.encode([caption]))
    assert [clip.key for clip in clips] == ["a"] and "unknown word 'zebra'" in caplog.text


def test_a_folder_is_read_as_it_is_to_train_on(tmp_path: Path, caplog) -> None:
    """Subfolders, any container, and captions in each of the three kinds of files."""
    frames = np.random.default_rng(0).integers(0, 255, (6, 36, 64, 3), dtype=np.uint8)
    for name in ("a.mp4", "b.mkv", "broken.mp4", "more/c.mp4"):
        write_video(tmp_path / name, frames, 16)
    (tmp_path / "a.txt").write_text("caption a\n")
    (tmp_path / "b.json").write_text('{"caption": "caption b"}')
    (tmp_path / "broken.txt").write_bytes(b"caf\xe9")
    (tmp_path / "list.csv").write_text("file,caption\nmore/c.mp4,caption c\n")
    clips = read(tmp_path)
    assert {clip.key: clip.caption for clip in clips} == {"a": "caption a", "b": "caption b", "more_c": "caption c"}
    assert len({clip.sample_id for clip in clips}) == 3 and clips[2].frames.shape == (5, 36, 64, 3)
    assert "broken.mp4 is left out" in caplog.text and "must be UTF-8" in caplog.text
