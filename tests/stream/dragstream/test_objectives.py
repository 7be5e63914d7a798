from __future__ import annotations

import numpy as np
import torch

from models.diffusion.noise import KeyedNoise
from models.rollout import ChunkPass
from stream.dragstream.config import DragConfig
from stream.dragstream.drag import Handle, Pose
from stream.dragstream.objectives import Scene

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
