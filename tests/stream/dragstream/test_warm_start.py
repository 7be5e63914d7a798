"""The warm start of a drag: content is carried by the mask's own map, noise stays, the region it leaves is filled."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from models.diffusion.noise import KeyedNoise
from models.rollout import ChunkPass
from stream.dragstream.config import DragConfig
from stream.dragstream.drag import Handle, Pose
from stream.dragstream.objectives import Scene
from stream.dragstream.warm_start import warped

SIZE, CELLS, SIGMA = (64, 96), (8, 12), 0.75  # px, cells of 8 px
INSIDE = (slice(2, 4), slice(2, 4))  # cells of the handle


@dataclass
class Kept:
    """What a warm start reads of a reference."""

    clean: torch.Tensor


def draw(seed: int) -> torch.Tensor:
    return torch.randn(1, 4, 2, *CELLS, generator=torch.Generator().manual_seed(seed))


def chunk_pass(sigma: float = SIGMA) -> ChunkPass:
    clean, noise = draw(0), draw(1)
    return ChunkPass(1, 1, sigma, (1 - sigma) * clean + sigma * noise, noise, None, None)


def handle(pose: Pose) -> Handle:
    mask = np.zeros(SIZE, bool)
    mask[16:32, 16:32] = True
    return Handle(mask, (24.0, 24.0), (pose,), (24.0, 24.0))


def scene(shown: ChunkPass, *poses: Pose) -> Scene:
    handles = tuple(handle(pose) for pose in poses)
    references = tuple(Kept(draw(2 + n)[0, :, 0]) for n in range(len(handles)))
    return Scene(DragConfig(), None, shown, handles, references, None, SIZE, KeyedNoise(0))


def clean_of(latents: torch.Tensor, shown: ChunkPass) -> torch.Tensor:
    return replace(shown, noisy_latents=latents).clean[0]


def test_content_of_the_reference_appears_at_the_target_and_noise_stays():
    shown, pose = chunk_pass(), Pose(dx=24.0, dy=8.0)
    given = scene(shown, pose)
    found = clean_of(warped(given, [Pose()], [None, [pose]]), shown)
    rows, cols = INSIDE
    moved = (slice(None), 1, slice(rows.start + 1, rows.stop + 1), slice(cols.start + 3, cols.stop + 3))
    torch.testing.assert_close(found[moved], given.references[0].clean[:, rows, cols], atol=1e-5, rtol=1e-5)
    untouched = torch.ones(CELLS, dtype=torch.bool)
    untouched[INSIDE] = untouched[moved[2:]] = False
    torch.testing.assert_close(found[:, 1, untouched], shown.clean[0, :, 1, untouched], atol=1e-5, rtol=1e-5)
    assert torch.equal(warped(given, [Pose()], [None, [pose]])[:, :, 0], shown.noisy_latents[:, :, 0])


def test_what_the_handle_leaves_looks_like_the_nearest_cell_beside_it():
    shown, away = chunk_pass(), Pose(dx=500.0)
    found = clean_of(warped(scene(shown, away), [Pose()], [[away], None]), shown)
    beside = {(2, 2): [(1, 2), (2, 1)], (3, 3): [(4, 3), (3, 4)]}
    for (row, col), cells in beside.items():
        distances = [float((found[:, 0, row, col] - shown.clean[0, :, 0, r, c]).abs().max()) for r, c in cells]
        assert min(distances) < 1e-5


def test_a_handle_that_is_elsewhere_leaves_from_there():
    shown, there = chunk_pass(), Pose(dx=40.0)
    found = clean_of(warped(scene(shown, Pose(dx=500.0)), [there], [[Pose(dx=500.0)], None]), shown)
    rows, cols = INSIDE
    torch.testing.assert_close(found[:, 0, rows, cols], shown.clean[0, :, 0, rows, cols], atol=1e-5, rtol=1e-5)
    assert (found - shown.clean[0])[:, 0, rows, 7:9].abs().max() > 0.1


def test_half_a_cell_is_the_mean_of_two():
    shown, pose = chunk_pass(), Pose(dx=28.0)
    given = scene(shown, pose)
    found = clean_of(warped(given, [Pose()], [[pose], None]), shown)[:, 0, 2, 6]
    source = given.references[0].clean[:, 2]
    torch.testing.assert_close(found, 0.5 * (source[:, 2] + source[:, 3]), atol=1e-5, rtol=1e-5)


def test_a_later_handle_is_in_front():
    shown, pose = chunk_pass(), Pose(dx=24.0)
    given = scene(shown, pose, pose)
    found = clean_of(warped(given, [Pose(), Pose()], [[pose, pose], None]), shown)
    rows, cols = INSIDE
    wanted = given.references[1].clean[:, rows, cols]
    torch.testing.assert_close(found[:, 0, rows, 5:7], wanted, atol=1e-5, rtol=1e-5)


def test_pure_noise_holds_nothing_to_move():
    shown, pose = chunk_pass(sigma=1.0), Pose(dx=24.0)
    assert torch.equal(warped(scene(shown, pose), [Pose()], [[pose], [pose]]), shown.noisy_latents)


@pytest.mark.parametrize("dx", [0.0, 8.0])
def test_the_latents_before_are_only_read(dx: float):
    shown, pose = chunk_pass(), Pose(dx=dx)
    before = shown.noisy_latents.clone()
    warped(scene(shown, pose), [Pose()], [[pose], [pose]])
    assert torch.equal(shown.noisy_latents, before)
