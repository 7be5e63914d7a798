"""Drags of a whole clip that a bidirectional model samples (DragStream appendix N).

The clip is sampled once without the drag. Features are read from the frame that the user dragged in, at the noise
level nearest to the student's; the latents of that step are optimised so that they appear at their targets in the
frames after it; sampling goes on from there. The loop is the editor's; there is no cache, and the frames before the
drag are held by the constancy term like everything else that is not editable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.condition import Condition
from models.diffusion.guidance import Guidance
from models.diffusion.noise import KeyedNoise
from models.diffusion.sampler import sample_teacher
from models.diffusion.schedule import flow_grid
from models.rollout import ChunkPass
from models.wan.dit import WanDiT
from stream.dragstream.config import DragConfig
from stream.dragstream.drag import Drag, Pose, check_drag
from stream.dragstream.editor import DragEditor, check_references, read_references
from stream.dragstream.features import FeatureReader
from stream.dragstream.objectives import FramePoses, StartPoses

DRAG_SIGMA = 0.9375  # of the student's second step in the paper


class ClipDragEditor(DragEditor):
    """An editor of one whole clip: the drag concerns the latent frames after ``frame``."""

    def __init__(self, *args: Any, frame: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.frame = frame

    def _poses(self, chunk: int, frames: int) -> tuple[StartPoses, FramePoses]:
        handles = self.drag.handles
        poses = [[handle.poses[n] for handle in handles] for n in range(self.drag.num_frames)]
        rest = frames - self.frame - 1 - len(poses)
        start: StartPoses = [None if handle.returns else Pose() for handle in handles]
        return start, [*[None] * (self.frame + 1), *poses, *[poses[-1]] * rest]


def drag_clip(
    teacher: WanDiT,
    condition: Condition,
    guidance: Guidance,
    drag: Drag,
    frame: int,
    cfg: DragConfig,
    *,
    size: tuple[int, int],
    num_inference_steps: int,
    shift: float,
    noise: KeyedNoise,
    sample_ids: Sequence[int],
    latent_shape: tuple[int, int, int, int],
) -> tuple[Tensor, Tensor]:
    """(x0 with the drag, x0 without), each [1, C, F, h, w]; ``frame``: latent frame that the user dragged in.

    The drag animates: a pose per latent frame after ``frame``, the last one held to the clip's end.

    Raises:
        ValueError: the drag does not fit the frame size or the frames that are left, edits, or brings references
            that were read otherwise; blocks that the teacher does not have; before anything is sampled.
    """
    check_drag(drag, height=size[0], width=size[1], chunk_frames=1)
    if not 0 <= frame < latent_shape[1]:
        raise ValueError(f"frame={frame} must be in 0..{latent_shape[1] - 1}, the latent frames of the clip")
    left = latent_shape[1] - frame - 1
    if drag.mode != "animate" or not 0 < drag.num_frames <= left:
        raise ValueError(
            f"a drag of a clip animates 1 to {left} latent frames after frame {frame}; this one has mode='{drag.mode}' "
            f"and {drag.num_frames} frames"
        )
    settings = {
        "num_inference_steps": num_inference_steps, "shift": shift, "noise": noise, "sample_ids": sample_ids,
        "latent_shape": latent_shape,
    }  # fmt: skip
    sigmas = flow_grid(num_inference_steps, shift)
    step = int((sigmas - DRAG_SIGMA).abs().argmin())
    cfg, drag = replace(cfg, step=0), drag.copied()  # one pass alone is shown
    reader = FeatureReader(teacher, cfg, sigmas[step].item())
    check_references(reader, cfg, drag)
    plain, (latents,) = sample_teacher(teacher, condition, guidance, keep_steps=[step], **settings)
    with torch.no_grad():
        prepared = teacher.prepare(condition)
    shown = ChunkPass(0, 0, reader.sigma, latents, prepared, None)
    references = read_references(reader, cfg, drag, shown, noise, frame)
    editor = ClipDragEditor(
        teacher, cfg, drag, size=size, noise=noise, first_chunk=0, references=references, frame=frame
    )
    return sample_teacher(teacher, condition, guidance, resume=(step, editor(shown)), **settings), plain
