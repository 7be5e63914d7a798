"""The clips of a benchmark."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.sources import FolderSource
from data.trackers import TrackerConfig, grid_queries
from data.video import write_video
from eval.clips import folder_clips
from models.condition import ClipGeometry
from models.diffusion.noise import KeyedNoise


def test_a_folder_is_read_as_it_is_to_train_on(tmp_path: Path, caplog) -> None:
    """Subfolders, any container, and captions in each of the three kinds of files."""
    frames = np.random.default_rng(0).integers(0, 255, (6, 36, 64, 3), dtype=np.uint8)
    for name in ("a.mp4", "b.mkv", "broken.mp4", "more/c.mp4"):
        write_video(tmp_path / name, frames, 16)
    (tmp_path / "a.txt").write_text("caption a\n")
    (tmp_path / "b.json").write_text('{"caption": "caption b"}')
    (tmp_path / "broken.txt").write_bytes(b"caf\xe9")
    (tmp_path / "list.csv").write_text("file,caption\nmore/c.mp4,caption c\n")
    clips = folder_clips(
        FolderSource(FolderSource.Config(str(tmp_path), str(tmp_path / "list.csv"))),
        ClipGeometry(36, 64, 5, 16),
        num_clips=4,
        tracker=TrackerConfig(max_layers=0),
        queries=grid_queries(36, 64, 2, 2),
        noise=KeyedNoise(0),
    )
    assert {clip.key: clip.caption for clip in clips} == {"a": "caption a", "b": "caption b", "more_c": "caption c"}
    assert [clip.sample_id for clip in clips] == [0, 1, 2] and clips[2].frames.shape == (5, 36, 64, 3)
    assert "broken.mp4 is left out" in caplog.text and "must be UTF-8" in caplog.text
