"""Where the optimisation of a drag starts: what the user holds is already there.

Beyond the paper, which starts from the latents before the drag and has its loss carry them over: in a model of few
steps the noisy latents hold little of the video, and a few steps of Adam reach less than the drag asks for. Here the
clean part of the latents is warped with the mask's own map (geometry.py) and keeps its noise; the region that the
handles leave is filled with what is beside it. The optimisation then has to make the two fit the frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stream.dragstream.drag import Pose
from stream.dragstream.geometry import cell_centers, sample, source_of
from stream.dragstream.objectives import FramePoses, Scene


def warped(scene: Scene, start: Sequence[Pose], targets: FramePoses) -> Tensor:
    """The latents before the drag with their handles at ``targets`` instead of ``start``: [1, C, F, h, w]."""
    sigma, clean, latents = scene.shown.sigma, scene.shown.clean[0], scene.before.clone()
    for frame, poses in enumerate(targets):
        if poses is not None:
            moved = _with_handles(scene, _without_handles(scene, clean[:, frame], start), poses)
            latents[0, :, frame] += (1 - sigma) * (moved - clean[:, frame])
    return latents


def _without_handles(scene: Scene, clean: Tensor, poses: Sequence[Pose]) -> Tensor:
    """Clean latents [C, h, w] where each cell that a handle covers looks like the nearest one that none does."""
    covered = _coverage(scene, poses).amax(0)
    inside, outside = covered > 0, covered <= 0
    if not inside.any() or not outside.any():
        return clean
    centers = cell_centers(*scene.latent_size, scene.size, clean.device)
    nearest = torch.cdist(centers[inside], centers[outside]).argmin(-1)
    filled = clean.clone()
    filled[:, inside] = torch.lerp(clean[:, inside], clean[:, outside][:, nearest], covered[inside])
    return filled


def _with_handles(scene: Scene, clean: Tensor, poses: Sequence[Pose]) -> Tensor:
    """Clean latents [C, h, w] with each handle's own content at its pose; a later handle covers an earlier one."""
    centers = cell_centers(*scene.latent_size, scene.size, clean.device)
    shares = _coverage(scene, poses)
    for handle, reference, pose, share in zip(scene.handles, scene.references, poses, shares):
        content = sample(reference.clean, source_of(centers, pose, handle.center), scene.size)
        clean = torch.lerp(clean, content.permute(2, 0, 1), share)
    return clean


def _coverage(scene: Scene, poses: Sequence[Pose]) -> Tensor:
    """Share of each cell that each handle covers: [handles, h, w]."""
    pairs = zip(scene.handles, poses)
    return torch.stack([scene.coverage(handle, pose, scene.latent_size) for handle, pose in pairs])
