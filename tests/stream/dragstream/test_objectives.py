from __future__ import annotations

import numpy as np
import pytest
import torch

from models.diffusion.noise import KeyedNoise
from models.rollout import ChunkPass
from stream.dragstream.config import DragConfig
from stream.dragstream.drag import Handle, Pose
from stream.dragstream.features import Reference
from stream.dragstream.objectives import (
    NO_FILTER_RATIO,
    RANGE_DRAWS,
    DragStreamObjective,
    DragVideoObjective,
    Scene,
    SgI2vObjective,
    variants_of,
)

SIZE = (32, 32)  # px, 8 x 8 cells


def test_what_must_stay_leaves_out_the_places_of_the_handle_before_and_after() -> None:
    mask, editable = np.zeros(SIZE, bool), torch.zeros(SIZE, dtype=torch.bool)
    mask[8:16, 4:12] = editable[:, -4:] = True
    handle = Handle(mask, (8.0, 12.0), (Pose(dx=12.0),), (8.0, 12.0))
    shown = ChunkPass(1, 1, 0.75, torch.zeros(1, 1, 2, 8, 8), None, None)

    def kept(start: Pose | None, editable: torch.Tensor | None) -> torch.Tensor | None:
        scene = Scene(DragConfig(), None, shown, (handle,), (), [start], editable, SIZE, KeyedNoise(0))
        return scene.kept([None, [handle.poses[0]]], (8, 8))

    wanted = torch.ones(8, 8)
    wanted[:, -1] = wanted[2:4, 4:6] = 0
    assert torch.equal(kept(None, editable), wanted), "what comes back has no place yet"
    wanted[2:4, 1:3] = 0
    assert torch.equal(kept(Pose(), editable), wanted)
    assert kept(Pose(), None) is None and kept(Pose(), torch.ones(SIZE, dtype=torch.bool)) is None


class Ramp:
    """A reader whose one feature is a cell's place, x px, whatever the latents."""

    def features(self, shown: ChunkPass, latents: torch.Tensor) -> torch.Tensor:
        return ((torch.arange(8.0) + 0.5) * 4).expand(1, 1, 8, 8)


def scene(*poses: Pose, **settings: object) -> Scene:
    """A handle of one cell and one latent frame."""
    mask = np.zeros(SIZE, bool)
    mask[16:20, 12:16] = True
    handle = Handle(mask, (14.0, 18.0), poses, (14.0, 18.0))
    reference = Reference(torch.zeros(1, 8, 8), None, {None: Ramp().features(None, None)[0], 0.2: None, 0.4: None})
    shown = ChunkPass(1, 1, 0.75, torch.zeros(1, 1, 1, 8, 8), None, None)
    return Scene(DragConfig(**settings), Ramp(), shown, (handle,), (reference,), [Pose()], None, SIZE, KeyedNoise(0))


@pytest.mark.parametrize(("reduction", "wanted"), [("cells", 4.0), ("sum", 16.0), ("all", 2.0)])
def test_the_constancy_is_a_mean_over_what_is_kept_or_a_sum_or_a_mean_over_the_frame(reduction: str, wanted: float):
    """Two frames of 2 x 2 cells, two of which are kept, all off by 2."""
    objective = DragStreamObjective(scene(Pose(), reduction=reduction))
    objective.kept, objective.kept_before = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.zeros(2, 3, 2, 2)
    assert float(objective._constancy(objective.kept_before + 2)) == wanted


def test_each_iteration_draws_its_own_cutoff_and_each_chunk_its_own_range():
    objective = DragStreamObjective(given := scene(Pose()))
    objective.aim([[Pose()]], 0)
    draws = [objective._cutoff(given.references[0], iteration) for iteration in range(20)]
    assert set(draws) == {None, 0.2, 0.4}
    cfg = DragConfig(iterations=1, cutoff_range=[0.3, 0.5])
    first, second = (variants_of(cfg, KeyedNoise(0), chunk) for chunk in (1, 2))
    assert first != second and len(first) == RANGE_DRAWS
    assert first.count(None) == NO_FILTER_RATIO * RANGE_DRAWS
    assert all(0.3 <= cutoff < 0.5 for cutoff in first if cutoff is not None)


@pytest.mark.parametrize(("dx", "step"), [(8.0, 4.0), (1.0, 1.0)])
def test_features_move_towards_the_target_by_a_cell_at_most(dx: float, step: float):
    """Over the nine places around a point, of a feature that rises by 1 a pixel."""
    objective = DragVideoObjective(scene(Pose(dx=dx)))
    objective.aim([[Pose(dx=dx)]], 0)
    loss, distance = objective.loss(torch.zeros(1, 1, 1, 8, 8), 0)
    assert float(loss) == pytest.approx(9 * step) and distance == pytest.approx(dx / 4)  # cells


def test_a_box_moves_with_its_content_and_only_low_frequencies_of_the_result_are_new():
    objective = SgI2vObjective(given := scene(Pose(dx=8.0)))
    objective.aim([[Pose(dx=8.0)]], 0)
    (patch,) = objective.patches
    assert patch.cells.tolist() == [[22.0, 18.0]] and patch.sources.tolist() == [[14.0, 18.0]]
    chequered = 1 - 2.0 * (torch.arange(8)[:, None] + torch.arange(8)).remainder(2)
    torch.testing.assert_close(objective.finish(given.before + 1 + chequered), given.before + 1, atol=1e-3, rtol=0)
