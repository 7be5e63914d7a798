"""The example of docs/streaming.md does what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from data.video import read_video
from models.condition import ClipGeometry

REPO = Path(__file__).resolve().parents[2]


def test_the_square_follows_the_hand_and_turns_orange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = (REPO / "docs" / "streaming.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(REPO)
    with torch.random.fork_rng():
        exec(compile(example.replace('"live.mp4"', repr(str(tmp_path / "live.mp4"))), "streaming.md", "exec"), {})
    frames = read_video(tmp_path / "live.mp4", ClipGeometry(64, 64, 69, 16)).astype(int)

    blue = frames[..., 2] > frames[..., :2].max(-1) + 40  # [T, H, W]
    rows, columns = np.nonzero(blue[40])
    assert abs(rows.mean() - (16 + 0.9 * 32)) < 4 and abs(columns.mean() - (26 + 0.9 * 8)) < 4
    orange = (frames[..., 0] > 150) & (frames[..., 2] < 110)
    assert not orange[40].any()
    rows, columns = np.nonzero(orange[68])
    assert abs(rows.mean() - (16 + 0.9 * 32)) < 4 and abs(columns.mean() - (26 + 0.9 * 24)) < 4
