"""What the latents are optimised for: DragStream and the two baselines that its paper adapts, as one interface.

An objective is aimed at a segment (where each handle shall be in each frame), gives the loss of latents, and may
have the last word on the result. All else (segments, optimiser, rectification) is the editor's, the same for all.

* DragStream (eq. 3): features of the handle, frequency-filtered at random, appear at the target; features outside
  the editable region stay.
* SG-I2V (arXiv 2411.04989, section 4): frames attend to the reference frame alone while features are read; boxes
  move, weighted by a Gaussian; afterwards the result keeps only its low frequencies.
* DragVideo (arXiv 2312.02216, section 3): features move by a unit step toward the target, then points are tracked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.diffusion.noise import KeyedNoise
from models.rollout import ChunkPass
from stream.dragstream.config import DragConfig
from stream.dragstream.drag import Handle, Pose
from stream.dragstream.features import FeatureReader, Reference
from stream.dragstream.frequency import butterworth
from stream.dragstream.geometry import bounding_box, cell_centers, moved, moved_mask, sample, source_of

FramePoses = Sequence[Sequence[Pose] | None]  # per latent frame: a pose per handle, or no target
StartPoses = Sequence[Pose | None]  # per handle: where its way starts; None: it is not in the frame yet
NO_FILTER_RATIO = 0.25  # share of the draws without a filter, beside a cutoff_range
RANGE_DRAWS = 8  # cutoffs drawn at once from a range


@dataclass(frozen=True, eq=False)
class Scene:
    """One chunk's problem, the same for every objective."""

    cfg: DragConfig
    reader: FeatureReader
    shown: ChunkPass
    handles: tuple[Handle, ...]
    references: tuple[Reference, ...]  # per handle
    start: StartPoses
    editable: Tensor | None  # bool [H, W]
    size: tuple[int, int]  # (height, width) px of the frame
    noise: KeyedNoise

    @property
    def before(self) -> Tensor:
        """Latents before the drag, [1, C, F, h, w]."""
        return self.shown.noisy_latents

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.before.shape[-2], self.before.shape[-1]

    def mask(self, handle: Handle) -> Tensor:
        return torch.from_numpy(handle.mask).to(self.before.device)

    def coverage(self, handle: Handle, pose: Pose, grid: tuple[int, int]) -> Tensor:
        """Share of each cell of a grid that the handle covers at a pose."""
        return moved_mask(self.mask(handle), pose, handle.center, *grid)

    def kept(self, targets: FramePoses, grid: tuple[int, int]) -> Tensor | None:
        """Share of each cell that must stay, in any frame: [rows, cols]; None: all may change.

        1 outside of what is editable, of the handles where they start, and of their targets.
        """
        if self.editable is None:
            return None
        free = F.adaptive_avg_pool2d(self.editable[None].float(), grid)[0]
        for poses in (self.start, *targets):
            for handle, pose in zip(self.handles, poses or ()):
                if pose is not None:
                    free = torch.maximum(free, self.coverage(handle, pose, grid))
        return 1 - free if (free < 1).any() else None


class Objective(Protocol):
    """See the module's head."""

    def aim(self, targets: FramePoses, segment: int) -> None:
        """Where the handles shall be in each frame from now on."""
        ...

    def loss(self, latents: Tensor, iteration: int) -> tuple[Tensor, float]:
        """What to descend, and its part that says how far the drag has come."""
        ...

    def finish(self, latents: Tensor) -> Tensor:
        """The result, from the optimised latents."""
        ...


@dataclass(frozen=True, eq=False)
class _Patch:
    """Cells of one frame that one handle shall fill."""

    frame: int
    reference: Reference
    cells: Tensor  # [n, 2] px
    sources: Tensor  # [n, 2] px: where their content is in the reference
    weights: Tensor  # [n]


class DragStreamObjective:
    """Reconstruction at the target and constancy elsewhere."""

    def __init__(self, scene: Scene) -> None:
        self.scene, self.cfg = scene, scene.cfg
        with torch.no_grad():
            if self.cfg.cst_on == "x0":
                features, self.kept_before = scene.reader.features_and_x0(scene.shown, scene.before)
            else:
                features = self.kept_before = scene.reader.features(scene.shown, scene.before)
        self.grid = (features.shape[-2], features.shape[-1])
        self.patches: list[_Patch] = []
        self.kept: Tensor | None = None

    def aim(self, targets: FramePoses, segment: int) -> None:
        self.segment = segment
        self.patches = [patch for frame, poses in enumerate(targets) if poses for patch in self._patches(frame, poses)]
        grid = self.scene.latent_size if self.cfg.cst_on == "x0" else self.grid
        self.kept = self.scene.kept(targets, grid) if self.cfg.cst_weight else None

    def loss(self, latents: Tensor, iteration: int) -> tuple[Tensor, float]:
        scene = self.scene
        if self.cfg.cst_on == "x0":
            features, now = scene.reader.features_and_x0(scene.shown, latents)
        else:
            features = now = scene.reader.features(scene.shown, latents)
        reconstruction = self._reconstruction(features, iteration)
        total = self.cfg.rec_weight * reconstruction
        if self.kept is not None:
            total = total + self.cfg.cst_weight * self._constancy(now)
        return total, float(reconstruction.detach())

    def finish(self, latents: Tensor) -> Tensor:
        return latents

    def _reconstruction(self, features: Tensor, iteration: int) -> Tensor:
        total, weight = features.new_zeros((), dtype=torch.float32), 0.0
        for patch in self.patches:
            cutoff = self._cutoff(patch.reference, iteration)
            wanted = sample(patch.reference.variants[cutoff], patch.sources, self.scene.size)
            found = sample(features[patch.frame], patch.cells, self.scene.size)
            total = total + (self._distance(found, wanted).mean(-1) * patch.weights).sum()
            weight += float(patch.weights.abs().sum())
        return total if self.cfg.reduction == "sum" or not weight else total / weight

    def _constancy(self, now: Tensor) -> Tensor:
        assert self.kept is not None, "asked for only where something is kept"
        distance = self._distance(now, self.kept_before)
        if self.cfg.cst_on == "x0":  # [1, C, F, h, w]
            distance = distance[0].transpose(0, 1)
        per_cell = distance.mean(dim=1) * self.kept  # [F, rows, cols]
        if self.cfg.reduction == "sum":
            return per_cell.sum()
        return per_cell.mean() if self.cfg.reduction == "all" else per_cell.mean(0).sum() / self.kept.sum()

    def _distance(self, found: Tensor, wanted: Tensor) -> Tensor:
        difference = found.float() - wanted.float()
        return difference.abs() if self.cfg.norm == "l1" else difference.square()

    def _cutoff(self, reference: Reference, iteration: int) -> float | None:
        """The same for all handles and layers of an iteration."""
        variants = list(reference.variants)
        key = ("drag", self.scene.shown.chunk, "segment", self.segment, "iteration", iteration, "cutoff")
        return variants[self.scene.noise.integers(len(variants), *key)]

    def _patches(self, frame: int, poses: Sequence[Pose]) -> list[_Patch]:
        """Cells under each handle at its pose; a later handle covers an earlier one."""
        scene, patches = self.scene, []
        rows, cols = scene.latent_size
        centers = cell_centers(rows, cols, scene.size, scene.before.device)
        in_front = torch.zeros(rows, cols, device=scene.before.device)
        for handle, reference, pose in reversed(list(zip(scene.handles, scene.references, poses))):
            covered = scene.coverage(handle, pose, (rows, cols))
            weights, in_front = covered * (1 - in_front), torch.maximum(in_front, covered)
            seen = weights > 0
            if seen.any():
                sources = source_of(centers[seen], pose, handle.center)
                patches.append(_Patch(frame, reference, centers[seen], sources, weights[seen]))
        return patches


class SgI2vObjective:
    """Boxes that move, in features that attend to the reference frame alone."""

    SIGMA, CUTOFF = 0.4, 0.25  # of half a box; cycles per latent cell, half of the Nyquist frequency

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    def aim(self, targets: FramePoses, segment: int) -> None:
        scene, (rows, cols) = self.scene, self.scene.latent_size
        centers = cell_centers(rows, cols, scene.size, scene.before.device)
        self.patches = []
        for frame, poses in enumerate(targets):
            for handle, reference, pose in zip(scene.handles, scene.references, poses or ()):
                box = bounding_box(scene.mask(handle), Pose(), handle.center)
                if box is None:
                    continue
                x0, y0, x1, y1 = box
                sources = source_of(centers.reshape(-1, 2), pose, handle.center)
                low, high = sources.new_tensor([x0, y0]), sources.new_tensor([x1, y1])
                offset = (sources - (low + high) / 2) / (self.SIGMA * (high - low) / 2).clamp_min(1.0)
                weights = torch.exp(-0.5 * offset.square().sum(-1)) * ((sources >= low) & (sources < high)).all(-1)
                seen = weights > 0
                if seen.any():
                    cells = centers.reshape(-1, 2)[seen]
                    self.patches.append(_Patch(frame, reference, cells, sources[seen], weights[seen]))

    def loss(self, latents: Tensor, iteration: int) -> tuple[Tensor, float]:
        scene, total, weight = self.scene, latents.new_zeros(()), 0.0
        features: dict[int, Tensor] = {}
        for patch in self.patches:
            key = id(patch.reference)
            if key not in features:
                features[key] = scene.reader.features_of_reference(scene.shown, latents, patch.reference)
            wanted = sample(patch.reference.alone, patch.sources, scene.size)
            found = sample(features[key][patch.frame], patch.cells, scene.size)
            total = total + ((found.float() - wanted.float()).square().mean(-1) * patch.weights).sum()
            weight += float(patch.weights.sum())
        total = total / weight if weight else total
        return total, float(total.detach())

    def finish(self, latents: Tensor) -> Tensor:
        """Low frequencies of the result, high ones of the latents before (SG-I2V section 4.4)."""
        response = butterworth(latents.shape[-2], latents.shape[-1], self.CUTOFF, latents.device)
        before = torch.fft.fft2(self.scene.before.float())
        return torch.fft.ifft2(before + (torch.fft.fft2(latents.float()) - before) * response).real


class DragVideoObjective:
    """Motion supervision by unit steps, and point tracking after each."""

    PATCH, SEARCH, MASK_WEIGHT, MAX_POINTS = 1, 3, 0.1, 9  # radii in latent cells

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        rows, cols = scene.latent_size
        self.cell = scene.before.new_tensor([scene.size[1] / cols, scene.size[0] / rows])

    def aim(self, targets: FramePoses, segment: int) -> None:
        """Points of each handle: where they are in the reference, are now, and shall be."""
        scene = self.scene
        centers = cell_centers(*scene.latent_size, scene.size, scene.before.device)
        self.tracks: list[tuple[int, Reference, Tensor, Tensor, Tensor]] = []
        for frame, poses in enumerate(targets):
            for handle, reference, pose in zip(scene.handles, scene.references, poses or ()):
                inside = centers[scene.coverage(handle, Pose(), scene.latent_size) >= 0.5]
                if not len(inside):
                    inside = centers.new_tensor([handle.point])
                start = inside[torch.linspace(0, len(inside) - 1, min(len(inside), self.MAX_POINTS)).long()]
                self.tracks.append((frame, reference, start, start.clone(), moved(start, pose, handle.center)))
        self.kept = scene.kept(targets, scene.latent_size)

    def loss(self, latents: Tensor, iteration: int) -> tuple[Tensor, float]:
        scene = self.scene
        features = scene.reader.features(scene.shown, latents)
        self._track(features.detach())
        total, distance, patch = latents.new_zeros(()), 0.0, self._window(self.PATCH)
        for frame, _, _, now, target in self.tracks:
            way = (target - now) / self.cell
            length = way.norm(dim=-1, keepdim=True)
            step = way / length.clamp_min(1.0) * self.cell  # at most one cell
            around = now[:, None] + patch
            held = sample(features[frame], around, scene.size).detach()
            ahead = sample(features[frame], around + step[:, None], scene.size)
            total = total + (ahead.float() - held.float()).abs().mean(-1).sum(-1).mean()
            distance += float(length.mean())
        if self.kept is not None:
            outside = (latents - scene.before).abs() * self.kept
            total = total + self.MASK_WEIGHT * outside.mean(dim=1).sum()
        return total, distance / max(1, len(self.tracks))

    def finish(self, latents: Tensor) -> Tensor:
        return latents

    def _track(self, features: Tensor) -> None:
        """Moves each point to where, nearby, the features are most like those it started from."""
        window = self._window(self.SEARCH)
        for frame, reference, start, now, _ in self.tracks:
            wanted = sample(reference.variants[None], start, self.scene.size).float()
            near = now[:, None] + window
            found = sample(features[frame], near, self.scene.size).float()
            best = (found - wanted[:, None]).abs().mean(-1).argmin(-1)
            now.copy_(near[torch.arange(len(now)), best])

    def _window(self, radius: int) -> Tensor:
        """Offsets of a square of cells: [(2 radius + 1)^2, 2] px, the middle first: it wins a draw."""
        steps = torch.arange(-radius, radius + 1, dtype=torch.float32, device=self.cell.device)
        offsets = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1).reshape(-1, 2)
        return offsets[offsets.abs().sum(-1).argsort(stable=True)] * self.cell


OBJECTIVES: dict[str, Callable[[Scene], Objective]] = {
    "dragstream": DragStreamObjective, "sg_i2v": SgI2vObjective, "dragvideo": DragVideoObjective,
}  # fmt: skip


def variants_of(cfg: DragConfig, noise: KeyedNoise, chunk: int) -> list[float | None]:
    """Cutoffs that a drag's reference is read with; none where nothing is optimised."""
    if not cfg.iterations:
        return []
    if cfg.method != "dragstream":
        return [None]
    if cfg.cutoff_range is None:
        return list(cfg.cutoffs)
    low, high = cfg.cutoff_range
    drawn = [low + (high - low) * noise.uniform("drag", chunk, "cutoffs", n) for n in range(RANGE_DRAWS)]
    return [None if n < NO_FILTER_RATIO * RANGE_DRAWS else cutoff for n, cutoff in enumerate(drawn)]
