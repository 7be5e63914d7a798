"""Where the optimisation of a drag starts: latents from which the student predicts the drag's result.

Beyond the paper, which starts from the latents before the drag and has its loss carry them over. A student of few
steps looks at its context more than at its noisy latents, and a few steps of Adam on features do not carry a region
over. Here the student's own prediction is warped with the mask's map (geometry.py), what the handles leave is filled
with what is beside it, and the latents follow the difference between that and what they predict, round by round: a
forward pass each, no gradients. Latents outside of what is editable, of the handles and of their targets are left as
they are. The optimisation goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stream.dragstream.drag import Pose
from stream.dragstream.geometry import cell_centers, sample, source_of
from stream.dragstream.objectives import FramePoses, Scene, StartPoses


@torch.no_grad()
def warm_started(scene: Scene, targets: FramePoses) -> Tensor:
    """Latents from which the student predicts the handles at ``targets``: [1, C, F, h, w]."""
    latents, wanted = scene.before.clone(), None
    gain, kept = scene.cfg.warm_gain, scene.kept(targets, scene.latent_size)
    free = 1.0 if kept is None else 1 - kept
    for _ in range(scene.cfg.warm_rounds):
        x0 = scene.reader.x0(scene.shown, latents)
        if wanted is None:
            wanted = warped(scene, x0, targets)
        latents = latents + gain * free * (wanted - x0)
    return latents


def warped(scene: Scene, x0: Tensor, targets: FramePoses) -> Tensor:
    """Clean latents [1, C, F, h, w] with the handles moved, and what is beside them where they were."""
    moved = x0.clone()
    for frame, poses in enumerate(targets):
        if poses is not None:
            moved[0, :, frame] = _with_handles(scene, _without_handles(scene, x0[0, :, frame], scene.start), poses)
    return moved


def _without_handles(scene: Scene, clean: Tensor, poses: StartPoses) -> Tensor:
    """Clean latents [C, h, w] where each cell that a handle covers looks like the nearest one that none does."""
    if not any(poses):
        return clean
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


def _coverage(scene: Scene, poses: StartPoses) -> Tensor:
    """Share of each cell that each handle covers, if it is in the frame: [handles, h, w]."""
    pairs = [(handle, pose) for handle, pose in zip(scene.handles, poses) if pose is not None]
    return torch.stack([scene.coverage(handle, pose, scene.latent_size) for handle, pose in pairs])
