"""The official on-disk format, read and written."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from stream.dragstream.drag import Drag, Handle, Pose, check_drag
from stream.dragstream.features import Reference
from stream.dragstream.labels import DragLabel

OFFICIAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "dragstream_label"
official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason=f"no official label in {OFFICIAL}")


def mask(x0: int = 10, x1: int = 20) -> np.ndarray:
    inside = np.zeros((48, 64), bool)
    inside[8:24, x0:x1] = True
    return inside


def label(mode: str, trajectories: list[dict]) -> dict:
    return {"block_number": 2, "prompt": "ein Bär", "drag_or_animation_select": mode, "movable_area_mask_file": None,
            "trajectories": trajectories}  # fmt: skip


def write(folder: Path, name: str, content: dict) -> Path:
    cv2.imwrite(str(folder / "m.png"), mask().astype(np.uint8) * 255)
    (folder / name).write_text(json.dumps(content))
    return folder / name


@official
def test_the_official_label_is_read_and_written_back_as_it_is(tmp_path: Path):
    source = OFFICIAL / "block_3_Drag_trajectory.json"
    read = DragLabel.read(source)
    path = read.write(tmp_path)
    assert path.name == source.name
    assert json.loads(path.read_text()) == json.loads(source.read_text())
    again = DragLabel.read(path)
    for file, found in again.masks.items():
        np.testing.assert_array_equal(found, read.masks[file])

    drag = read.to_drag()
    assert (drag.mode, drag.chunk, len(drag.handles)) == ("edit", 2, 1)
    assert drag.handles[0].point == (381.5, 141.5)
    pose = drag.handles[0].poses[0]
    assert (pose.dx, pose.dy, pose.degrees) == (9.0, -121.0, 0.0)
    assert drag.editable is not None and drag.editable[drag.handles[0].mask].all()
    check_drag(drag, height=480, width=832, chunk_frames=3)


def test_animation_joins_its_blocks_and_extra_keys_survive(tmp_path: Path):
    blocks = [
        {"is_rotation": False, "deltas": [[1.0, 0.5], [2, 1], [3, 1.5]], "start_point": [15, 12]},
        {"is_rotation": False, "deltas": [[4, 2], [5, 2.5], [6, 3]], "start_point": [15, 12]},
    ]
    turning = {"is_rotation": True, "deltas": [-5.0, -10, -15, -200, -300, -400], "start_point": [20, 12],
               "rotation_center": [15, 12]}  # fmt: skip
    content = label("Animation", [
        {"original_trajectory": None, "block_trajectories": blocks, "mask_file": "m.png", "note": "kept"},
        {"original_trajectory": None, "block_trajectories": [turning], "mask_file": "m.png"},
    ])  # fmt: skip
    read = DragLabel.read(write(tmp_path, "block_4_Animation_trajectory.json", content))
    drag = read.to_drag()
    assert (drag.mode, drag.num_frames, drag.chunk) == ("animate", 6, 3)
    assert [pose.dx for pose in drag.handles[0].poses] == [1, 2, 3, 4, 5, 6]
    assert drag.handles[1].poses[-1].degrees == -400
    assert drag.handles[1].center == (15.5, 12.5)
    other = read.write(tmp_path / "other")
    assert json.loads(other.read_text()) == content


def test_missing_deltas_are_computed_from_the_points(tmp_path: Path):
    drawn = [
        {"is_rotation": False, "control_points": [], "points": [[10, 10], [12, 9], [15, 4], [16, 0]]},
        {"is_rotation": True, "points": [[20, 20], [30, 20], [20, 30], [10, 20], [20, 10]]},
    ]
    content = label("Animation", [{"original_trajectory": each, "mask_file": "m.png"} for each in drawn])
    drag = DragLabel.read(write(tmp_path, "block_1_Animation_trajectory.json", content)).to_drag()
    assert [(pose.dx, pose.dy) for pose in drag.handles[0].poses] == [(2, -1), (5, -6), (6, -10)]
    assert [pose.degrees for pose in drag.handles[1].poses] == pytest.approx([90, 180, 270])  # clockwise on screen


def test_our_drags_survive_the_format(tmp_path: Path):
    handles = (
        Handle.translation(mask(), [(12.5, 10.5), (14, 11), (15.5, 12), (17, 12.5)]),
        Handle.rotation(mask(30, 50), (40.5, 16.5), [10, 20, 30]),
    )
    drag = Drag("animate", handles, editable=~mask(0, 5), chunk=1)
    path = DragLabel.from_drag(drag, "a red disc", 2, chunk_frames=3).write(tmp_path)
    assert path.name == "block_2_Animation_trajectory.json"
    for trajectory in DragLabel.from_drag(drag, "a red disc", 2, chunk_frames=1).content["trajectories"]:
        assert [len(part["deltas"]) for part in trajectory["block_trajectories"]] == [1, 1, 1], "one part a chunk"
    found = DragLabel.read(path).to_drag()
    assert found.chunk == 1 and found.mode == "animate"
    np.testing.assert_array_equal(found.editable, drag.editable)
    for ours, theirs in zip(drag.handles, found.handles):
        np.testing.assert_array_equal(ours.mask, theirs.mask)
        assert ours.poses == theirs.poses and ours.center == theirs.center


def test_a_drag_keeps_its_place_in_a_picture_of_another_size():
    """From 64 x 48 px the middle 48 x 48 are left, at two thirds of their size."""
    handle = Handle(mask(29, 50), (35.0, 12.0), (Pose(dx=3.0, dy=-6.0, degrees=10.0),), (41.0, 15.0))
    found = Drag("edit", (handle,), editable=mask(8, 32)).resize_to(32, 32)
    (moved,) = found.handles
    np.testing.assert_allclose([*moved.point, *moved.center], [18.0, 8.0, 22.0, 10.0])
    (pose,) = moved.poses
    np.testing.assert_allclose([pose.dx, pose.dy, pose.degrees], [2.0, -4.0, 10.0])
    for inside, columns in ((moved.mask, slice(14, 28)), (found.editable, slice(0, 16))):
        wanted = np.zeros((32, 32), bool)
        wanted[5:16, columns] = True
        np.testing.assert_array_equal(inside, wanted)


def test_what_the_format_cannot_say_is_refused():
    turned = Handle(mask(), (12.5, 10.5), (Pose(dx=1.0, degrees=5.0),), (12.5, 10.5))
    back = Handle.translation(mask(), [(12.5, 10.5), (14, 11)], reference=Reference(torch.zeros(4, 8, 8)))
    for handle, message in ((turned, "handle 0 turns and moves at once"), (back, "handle 0 brings back a reference")):
        with pytest.raises(ValueError, match=message):
            DragLabel.from_drag(Drag("edit", (handle,)), "a red disc", 1, chunk_frames=3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("drag.json", label("Drag", []), "a label is named block_"),
        ("block_1_Drag_trajectory.json", {"prompt": "x"}, "is not a DragStream label"),
        ("block_1_Drag_trajectory.json", label("Pull", []), "'Pull', but its name says 'Drag'"),
        ("block_1_Drag_trajectory.json", label("Animation", []), "'Animation', but its name says 'Drag'"),
        ("block_1_Drag_trajectory.json", label("Drag", [{"mask_file": 5}]), "is not a DragStream label"),
        ("block_1_Drag_trajectory.json", label("Drag", [{"mask_file": "gone.png"}]), "names this mask"),
    ],
)
def test_what_is_no_label_is_refused_by_name(tmp_path: Path, name: str, content: dict, message: str):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        DragLabel.read(write(tmp_path, name, content))


def test_a_mask_painted_on_transparent_ground_is_read(tmp_path: Path):
    part = {"is_rotation": False, "deltas": [[1.0, 2.0]], "start_point": [15, 12]}
    content = label("Drag", [{"mask_file": "m.png", "block_trajectories": [part]}])
    path = write(tmp_path, "block_1_Drag_trajectory.json", content)
    black = np.zeros((48, 64), np.uint8)
    cv2.imwrite(str(tmp_path / "m.png"), np.dstack([black, black, black, mask().astype(np.uint8) * 255]))
    np.testing.assert_array_equal(DragLabel.read(path).to_drag().handles[0].mask, mask())


def test_a_trajectory_without_a_mask_is_refused(tmp_path: Path):
    content = label("Drag", [{"original_trajectory": None, "block_trajectories": []}])
    with pytest.raises(ValueError, match="trajectory 0 has no mask_file"):
        DragLabel.read(write(tmp_path, "block_1_Drag_trajectory.json", content)).to_drag()


@pytest.mark.parametrize(
    "part",
    [
        {"is_rotation": False, "deltas": [[1.0, 2.0]]},  # no start_point
        {"is_rotation": False, "deltas": [[1.0]], "start_point": [15, 12]},  # a delta of one number
        {"is_rotation": True, "deltas": [5.0], "start_point": [15, 12]},  # no rotation_center
        {"is_rotation": False, "deltas": [["right", 0]], "start_point": [15, 12]},
    ],
)
def test_a_malformed_trajectory_is_named(tmp_path: Path, part: dict):
    whole = {"is_rotation": False, "deltas": [[1.0, 2.0]], "start_point": [15, 12]}
    each = [{"mask_file": "m.png", "block_trajectories": [blocks]} for blocks in (whole, part)]
    read = DragLabel.read(write(tmp_path, "block_1_Drag_trajectory.json", label("Drag", each)))
    with pytest.raises(ValueError, match="block_1_Drag: trajectory 1 is incomplete or malformed"):
        read.to_drag()


def test_masks_of_different_sizes_are_refused(tmp_path: Path):
    """Of different frames: stretching one to the other would move the border of what may change."""
    cv2.imwrite(str(tmp_path / "wide.png"), np.full((48, 96), 255, np.uint8))
    part = {"is_rotation": False, "deltas": [[1.0, 2.0]], "start_point": [15, 12]}
    content = label("Drag", [{"mask_file": "m.png", "block_trajectories": [part]}])
    content["movable_area_mask_file"] = "wide.png"
    read = DragLabel.read(write(tmp_path, "block_1_Drag_trajectory.json", content))
    with pytest.raises(ValueError, match="wide.png 96 x 48, m.png 64 x 48"):
        read.to_drag()


def test_a_label_is_checked_as_it_was_drawn_and_as_it_is_cropped(tmp_path: Path):
    def drawn(x: float, deltas: list) -> DragLabel:
        trajectory = {"original_trajectory": {"is_rotation": False, "points": [[x, 12], *deltas]}, "mask_file": "m.png"}
        return DragLabel.read(write(tmp_path, "block_1_Drag_trajectory.json", label("Drag", [trajectory])))

    inside = drawn(19, [[25, 12]]).drag_in(24, 24, 3)  # of 64 x 48 the middle 48 x 48: x from 8
    assert inside.handles[0].point == ((19.5 - 8) / 2, 12.5 / 2) and inside.handles[0].poses[0].dx == 3.0
    with pytest.raises(ValueError, match=r"^block_1_Drag: handle 0 is at \(70.5, 12.5\), outside the frame of 64 x 48"):
        drawn(70, [[25, 12]]).drag_in(24, 24, 3)
    with pytest.raises(ValueError, match="^block_1_Drag: a drag that edits has one target per handle, not 2"):
        drawn(19, [[25, 12], [26, 12]]).drag_in(24, 24, 3)
    crop = r"^block_1_Drag: cropped and scaled from 64 x 48 to {} px, "
    with pytest.raises(ValueError, match=crop.format("24 x 24") + r"handle 0 is at \(-1.75, 6.25\), outside"):
        drawn(4, [[25, 12]]).drag_in(24, 24, 3)
    with pytest.raises(ValueError, match=crop.format("8 x 48") + "the mask of handle 0 is empty"):
        drawn(19, [[25, 12]]).drag_in(48, 8, 3)


def test_a_label_may_lack_a_prompt(tmp_path: Path):
    content = label("Drag", [{"mask_file": "m.png"}])
    del content["prompt"]
    assert DragLabel.read(write(tmp_path, "block_1_Drag_trajectory.json", content)).prompt == ""
