from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from data.video import read_video
from eval.report import (
    Section,
    Table,
    contact_sheet,
    curves_from_log,
    enlarge,
    line_figure,
    video_side_by_side,
    write_report,
)
from eval.results import Results


class _Balance(HTMLParser):
    """Every opened element is closed, in order."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _ramp(frames: int, size: int = 16) -> np.ndarray:
    return np.stack([np.full((size, size, 3), 40 + 20 * t, np.uint8) for t in range(frames)])


def test_the_page_holds_everything_inside(tmp_path: Path) -> None:
    video = video_side_by_side({"ground truth": _ramp(6), "student <3": _ramp(4)}, fps=8, caption="two")
    figure = line_figure({"a": ([0, 1, 2], [1.0, float("nan"), 3.0])}, x_label="frame", y_label="px")
    table = Table(["figure", "mean"], [["epe & more", "1.5"]])
    path = write_report(tmp_path / "deep" / "report.html", [Section("Clips", "one\ntwo", table, [figure], [video])])
    page = path.read_text(encoding="utf-8")
    parser = _Balance()
    parser.feed(page)
    assert parser.open == []
    assert "epe &amp; more" in page and "student &lt;3" in page
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(links) == 2 and all(link.startswith("data:") for link in links)
    assert "<script" not in page
    assert not list(path.parent.glob("*.tmp"))


def test_the_embedded_video_shows_both_clips_in_step() -> None:
    video = video_side_by_side({"left": _ramp(6), "right": _ramp(4)}, fps=8)
    content = base64.b64decode(video.data_uri.removeprefix("data:video/mp4;base64,"))
    frames = read_video(content)
    assert frames.shape == (6, 256, 256 + 8 + 256, 3)
    assert abs(frames[5, 100, 100].astype(int) - 140).max() <= 4  # left plays on
    assert abs(frames[5, 100, 400].astype(int) - 100).max() <= 4  # right holds its last frame
    assert list(video.labels) == ["left", "right"]


def test_a_contact_sheet_shows_first_and_last_frame_of_every_row() -> None:
    sheet = contact_sheet({"truth": _ramp(5), "student": 255 - _ramp(5)}, num_frames=3)
    content = base64.b64decode(sheet.data_uri.removeprefix("data:image/png;base64,"))
    picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE)
    upper, lower = picture[: len(picture) // 2], picture[len(picture) // 2 :]
    for level in (40, 80, 120):
        assert (upper == level).sum() > 1000 and (lower == 255 - level).sum() > 1000
        assert not (lower == level).sum() > 1000


def test_small_clips_are_enlarged_and_large_ones_kept() -> None:
    frames = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    large, factor = enlarge(frames)
    assert factor == 86 and large.shape == (2, 258, 344, 3)
    assert (large[:, ::86, ::86] == frames).all()
    assert enlarge(np.zeros((1, 300, 270, 3), np.uint8))[1] == 1
    with pytest.raises(ValueError, match="one size"):
        video_side_by_side({"a": _ramp(2), "b": _ramp(2, size=8)}, fps=8)


def test_curves_from_a_log(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text("\n".join(json.dumps({"step": s, "loss": 1 / (s + 1)}) for s in range(5)) + "\n\n")
    svg = base64.b64decode(curves_from_log(log, ["loss", "absent"]).data_uri.split(",")[1]).decode()
    assert "loss" in svg and "absent" not in svg
    with pytest.raises(ValueError, match="'loss', 'step'"):
        curves_from_log(log, ["lss"])


def test_results_write_flat_keys_with_intervals(tmp_path: Path) -> None:
    results = Results(seed=0)
    results.add("student.epe_px", [1.0, 2.0, 6.0])
    results.add_difference("student.gain_px", [3.0, 4.0, 8.0], [1.0, 2.0, 6.0])
    results.put("student.lpips", "unavailable: no weights")
    results.put("broken_px", float("nan"))
    results.write(tmp_path, {"seed": 0}, torch.device("cpu"))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["student.epe_px"] == 3.0
    assert 1.0 <= metrics["student.epe_px_low"] < 3.0 < metrics["student.epe_px_high"] <= 6.0
    assert metrics["student.gain_px"] == metrics["student.gain_px_low"] == 2.0
    assert metrics["broken_px"] is None and metrics["student.lpips"].startswith("unavailable")
    per_clip = json.loads((tmp_path / "per_clip.json").read_text())
    assert per_clip == {"student.epe_px": [1.0, 2.0, 6.0]}
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["config"] == {"seed": 0} and meta["machine"]["cpu_count"] and meta["git_commit"]
    results.add("teacher.epe_px", [2.0, 2.0])
    roles, others = results.by_role(), results.others()
    assert others.columns == ["", "value, with its 95% interval over clips"]
    assert Results(seed=0, unit="chunks").others().columns[1].endswith("over chunks")
    assert roles.columns == ["", "student", "teacher"]
    assert [row[0] for row in roles.rows] == ["epe_px"] and roles.rows[0][2] == "2 [2, 2]"
    assert {row[0]: row[1] for row in others.rows} == {
        "student.gain_px": "2 [2, 2]", "student.lpips": "unavailable", "broken_px": "n/a"
    }  # fmt: skip
    assert results.notes() == ["lpips: unavailable: no weights"]
    assert roles.as_text().splitlines()[1].startswith("epe_px  3 [")


def test_a_table_for_a_document() -> None:
    assert Table(["a", "b"], [["1", "x|y"]]).as_markdown() == "| a | b |\n| --- | --- |\n| 1 | x\\|y |\n"


def test_a_ragged_table_is_refused() -> None:
    with pytest.raises(ValueError, match="2 columns"):
        Table(["a", "b"], [["1"]])
