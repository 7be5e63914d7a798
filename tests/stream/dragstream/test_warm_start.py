"""The warm start of a drag: content is carried by the mask's own map, what it leaves is filled, predictions follow."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from models.diffusion.noise import KeyedNoise
from models.rollout import ChunkPass
from stream.dragstream import warm_start
from stream.dragstream.config import DragConfig
from stream.dragstream.drag import Handle, Pose
from stream.dragstream.objectives import Scene
from stream.dragstream.warm_start import warm_started, warped

SIZE, CELLS = (64, 96), (8, 12)  # px, cells of 8 px
HERE = Pose()
ROWS, COLS = slice(2, 4), slice(2, 4)  # cells of the handle


@dataclass
class Kept:
    """What a warm start reads of a reference."""

    clean: torch.Tensor


class Reader:
    """A student whose prediction is half of what it is given."""

    calls = 0

    def x0(self, shown: ChunkPass, latents: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return 0.5 * latents


def draw(seed: int) -> torch.Tensor:
    return torch.randn(1, 4, 2, *CELLS, generator=torch.Generator().manual_seed(seed))


def handle(pose: Pose) -> Handle:
    mask = np.zeros(SIZE, bool)
    mask[16:32, 16:32] = True
    return Handle(mask, (24.0, 24.0), (pose,), (24.0, 24.0))


def scene(*poses: Pose, start: Pose | None = HERE, **settings: object) -> Scene:
    handles = tuple(handle(pose) for pose in poses)
    references = tuple(Kept(draw(2 + n)[0, :, 0]) for n in range(len(handles)))
    shown = ChunkPass(1, 1, 0.75, draw(1), None, None)
    starts = [start] * len(handles)
    return Scene(DragConfig(**settings), Reader(), shown, handles, references, starts, None, SIZE, KeyedNoise(0))


class MixingReader(Reader):
    """One whose prediction anywhere depends on latents elsewhere, as a student's does."""

    def x0(self, shown: ChunkPass, latents: torch.Tensor) -> torch.Tensor:
        return super().x0(shown, latents) + latents.mean()


X0 = draw(0)


def test_content_of_the_reference_appears_at_the_target_and_the_rest_stays():
    pose = Pose(dx=24.0, dy=8.0)
    given = scene(pose)
    found = warped(given, X0, [None, [pose]])
    torch.testing.assert_close(found[0, :, 1, 3:5, 5:7], given.references[0].clean[:, ROWS, COLS], atol=1e-5, rtol=1e-5)
    untouched = torch.ones(CELLS, dtype=torch.bool)
    untouched[ROWS, COLS] = untouched[3:5, 5:7] = False
    assert torch.equal(found[0, :, 1, untouched], X0[0, :, 1, untouched])
    assert torch.equal(found[:, :, 0], X0[:, :, 0])


def test_what_the_handle_leaves_looks_like_the_nearest_cell_beside_it():
    away = Pose(dx=500.0)
    found = warped(scene(away), X0, [[away], None])
    beside = {(2, 2): [(1, 2), (2, 1)], (3, 3): [(4, 3), (3, 4)]}
    for (row, col), cells in beside.items():
        distances = [float((found[0, :, 0, row, col] - X0[0, :, 0, r, c]).abs().max()) for r, c in cells]
        assert min(distances) < 1e-5


def test_a_handle_that_is_elsewhere_leaves_from_there():
    there, away = Pose(dx=40.0), Pose(dx=500.0)
    found = warped(scene(away, start=there), X0, [[away], None])
    assert torch.equal(found[0, :, 0, ROWS, COLS], X0[0, :, 0, ROWS, COLS])
    assert (found - X0)[0, :, 0, ROWS, 7:9].abs().max() > 0.1


def test_a_handle_that_comes_back_leaves_nothing():
    pose = Pose(dx=24.0)
    found = warped(scene(pose, start=None), X0, [[pose], None])
    assert torch.equal(found[0, :, 0, ROWS, COLS], X0[0, :, 0, ROWS, COLS])
    assert (found - X0)[0, :, 0, ROWS, 5:7].abs().max() > 0.1


def test_half_a_cell_is_the_mean_of_two():
    pose = Pose(dx=28.0)
    given = scene(pose)
    found = warped(given, X0, [[pose], None])[0, :, 0, 2, 6]
    source = given.references[0].clean[:, 2]
    torch.testing.assert_close(found, 0.5 * (source[:, 2] + source[:, 3]), atol=1e-5, rtol=1e-5)


def test_a_later_handle_is_in_front():
    pose = Pose(dx=24.0)
    given = scene(pose, pose)
    found = warped(given, X0, [[pose, pose], None])
    wanted = given.references[1].clean[:, ROWS, COLS]
    torch.testing.assert_close(found[0, :, 0, ROWS, 5:7], wanted, atol=1e-5, rtol=1e-5)


def test_the_prediction_comes_closer_with_each_round_and_no_round_changes_nothing():
    pose, errors = Pose(dx=24.0), []
    for rounds in range(5):
        given = scene(pose, warm_rounds=rounds, warm_gain=0.5)
        before = given.before.clone()
        found = warm_started(given, [[pose], [pose]])
        wanted = warped(given, 0.5 * before, [[pose], [pose]])
        errors.append(float((0.5 * found - wanted).square().mean()))
        assert torch.equal(given.before, before) and given.reader.calls == rounds
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.15 * errors[0]
    assert torch.equal(warm_started(scene(pose, warm_rounds=0), [[pose], [pose]]), given.before)


def test_what_is_not_editable_is_left_as_it_is_but_for_handle_and_target():
    pose = Pose(dx=24.0, dy=8.0)
    editable = torch.zeros(SIZE, dtype=torch.bool)
    editable[:, :8] = True  # the first column of cells
    given = scene(pose, warm_rounds=3)
    found = warm_started(replace(given, editable=editable), [[pose], [pose]])
    free = torch.zeros(CELLS, dtype=torch.bool)
    free[:, 0] = free[ROWS, COLS] = free[3:5, 5:7] = True
    assert torch.equal(found[..., ~free], given.before[..., ~free])
    changed = (found != warm_started(given, [[pose], [pose]]))[0].any(dim=(0, 1))
    assert not changed[free].any(), "what is editable becomes what it would without a mask"
    assert (found != given.before)[0].any(dim=(0, 1))[3:5, 5:7].all()


def test_what_is_not_editable_stays_though_the_prediction_there_changes():
    pose, editable = Pose(dx=24.0), torch.zeros(SIZE, dtype=torch.bool)
    editable[:, :8] = True
    given = replace(scene(pose, warm_rounds=3), reader=MixingReader(), editable=editable)
    found = warm_started(given, [[pose], [pose]])
    kept = given.kept([[pose], [pose]], CELLS) == 1
    assert torch.equal(found[..., kept], given.before[..., kept])
    assert (found != given.before)[..., ~kept].any()


def test_all_rounds_lead_to_the_same_result(monkeypatch):
    """To the first prediction with the handles moved; a later prediction shows them moved already."""
    pose, asked = Pose(dx=24.0), []
    monkeypatch.setattr(warm_start, "warped", lambda *given: asked.append(given) or warped(*given))
    warm_started(scene(pose, warm_rounds=3), [[pose], [pose]])
    assert len(asked) == 1
