"""The loop of a drag (DragStream section 4.2): the input of one denoising step is optimised, the rest of the chunk
is generated as ever.

What the user holds is first put where it shall be (warm_start.py). Then, for each segment of the way and each
iteration: read features, take the gradient of the objective with respect to the latents, make a step that a Gaussian
map confines to the region (CSS, eq. 9 and 10), hold the latents' statistics (ADSR, eq. 4). The DiT's weights, the
cache and everything outside this chunk are only read. One loop for all methods; what differs between them is their
objective and their settings.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.diffusion.noise import KeyedNoise
from models.rollout import ChunkPass
from models.wan.dit import WanDiT
from stream.dragstream.config import DragConfig
from stream.dragstream.drag import Drag, Pose
from stream.dragstream.features import FeatureReader, Reference
from stream.dragstream.geometry import bounding_box, gaussian_map
from stream.dragstream.objectives import OBJECTIVES, FramePoses, Objective, Scene, StartPoses, variants_of
from stream.dragstream.statistics import Rectify, rectifiers
from stream.dragstream.warm_start import warm_started

ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8


@dataclass
class DragLog:
    """What one chunk's optimisation did."""

    chunk: int
    losses: list[float] = field(default_factory=list)  # the objective's progress, one per iteration
    num_segments: int = 0
    seconds: float = 0.0


class DragEditor:
    """Edits the chunks that a drag concerns: a `LatentEdit` for `Rollout.next_chunk`.

    Args:
        student: the model that streams, its weights frozen.
        drag: checked by `check_drag`.
        references: features of each handle, see `read_references`.
        first_chunk: the first chunk that the drag concerns.
    """

    def __init__(
        self,
        student: WanDiT,
        cfg: DragConfig,
        drag: Drag,
        *,
        size: tuple[int, int],
        noise: KeyedNoise,
        first_chunk: int,
        references: tuple[Reference, ...],
    ) -> None:
        self.student, self.cfg, self.drag, self.size, self.noise = student, cfg, drag, size, noise
        self.first_chunk, self.references = first_chunk, references
        self.neighbours: Tensor | None = None  # inputs of cfg.step in the frames before: [1, C, n, h, w]
        self.logs: list[DragLog] = []

    def __call__(self, shown: ChunkPass) -> Tensor:
        if shown.step != self.cfg.step or self.drag.is_still or not (self.cfg.iterations or self.cfg.warm_rounds):
            return shown.noisy_latents
        began = time.perf_counter()
        reader = FeatureReader(self.student, self.cfg, shown.sigma)
        editable = self.drag.editable
        start, targets = self._poses(shown.chunk, shown.noisy_latents.shape[2])
        scene = Scene(
            self.cfg, reader, shown, self.drag.handles, self.references, start,
            None if editable is None else torch.from_numpy(editable).to(shown.noisy_latents.device),
            self.size, self.noise,
        )  # fmt: skip
        log = DragLog(shown.chunk)
        latents = self._edited(scene, targets, log)
        log.seconds = time.perf_counter() - began
        self.logs.append(log)
        return latents

    def _edited(self, scene: Scene, targets: FramePoses, log: DragLog) -> Tensor:
        rectify, rectify_last = rectifiers(self.cfg.adsr, scene.before, self.neighbours)
        latents = rectify(warm_started(scene, targets)) if self.cfg.warm_rounds else scene.before.clone()
        if self.cfg.iterations:
            segments = segment_poses(scene.start, targets, self.cfg, self.size[0])
            latents = self._optimised(latents, OBJECTIVES[self.cfg.method](scene), scene, segments, rectify, log)
        return rectify_last(latents)

    def _optimised(
        self, latents: Tensor, objective: Objective, scene: Scene, segments: Sequence[FramePoses],
        rectify: Rectify, log: DragLog,
    ) -> Tensor:  # fmt: skip
        for segment, poses in enumerate(segments):
            objective.aim(poses, segment)
            gain = self._gain(scene, poses)
            adam = LatentAdam(self.cfg)
            for iteration in range(self.cfg.iterations):
                gradient, progress = gradient_of(objective, latents, iteration)
                log.losses.append(progress)
                latents = rectify(adam.step(latents, gradient, gain))
                if self.cfg.tolerance is not None and progress < self.cfg.tolerance:
                    break
        log.num_segments = len(segments)
        return objective.finish(latents)

    def _poses(self, chunk: int, frames: int) -> tuple[StartPoses, FramePoses]:
        """Poses of the handles where this chunk's way starts, and in each of its frames (None: no target).

        The first latent frame of a video is the given one and has no target.
        """
        handles = self.drag.handles
        before: StartPoses = [None if handle.returns else Pose() for handle in handles]
        if self.drag.mode == "edit":
            ramp: list[list[Pose] | None] = [self.drag.edited(frame, frames, chunk == 0) for frame in range(frames)]
            without = len(ramp) - 1 if self.cfg.edit_frames == "last" else 0
            for frame in range(max(without, int(chunk == 0))):
                ramp[frame] = None
            return before, ramp
        first = (chunk - self.first_chunk) * frames
        start = [handle.poses[first - 1] for handle in handles] if first else before
        return start, [[handle.poses[first + frame] for handle in handles] for frame in range(frames)]

    def _gain(self, scene: Scene, targets: FramePoses) -> Tensor | None:
        """Where latents may change in each frame: [1, 1, F, h, w] in [0, 1]; None: everywhere alike."""
        if self.cfg.css_alpha is None or self.cfg.method != "dragstream":
            return None
        poses_of_all = [poses for poses in targets if poses is not None]
        maps = []
        for poses in targets:
            boxes = []
            for handle, pose in zip(scene.handles, poses if poses is not None else poses_of_all[-1]):
                here = pose if handle.returns else Pose()
                shown = {"target": [pose], "handle": [here], "both": [here, pose]}[self.cfg.css_box]
                found = [bounding_box(scene.mask(handle), each, handle.center) for each in shown]
                boxes += [box for box in [_around([box for box in found if box is not None])] if box is not None]
            maps.append(gaussian_map(boxes, *scene.latent_size, scene.size, self.cfg.css_alpha))
        return torch.stack(maps)[None, None].to(scene.before.device)


class LatentAdam:
    """Adam on one tensor, with a map that says where and how much of each step is made."""

    def __init__(self, cfg: DragConfig) -> None:
        self.cfg = cfg
        self.steps = 0
        self.mean: Tensor | float = 0.0
        self.square: Tensor | float = 0.0

    def step(self, latents: Tensor, gradient: Tensor, gain: Tensor | None) -> Tensor:
        """The next latents; where gain is 0 they do not change."""
        if self.cfg.restart_optimizer:
            self.steps, self.mean, self.square = 0, 0.0, 0.0
        if gain is not None and self.cfg.css_on == "gradient":
            gradient, gain = gradient * gain, None
        if self.cfg.grad_clip is not None:
            gradient = gradient * min(1.0, self.cfg.grad_clip / (float(gradient.norm()) + 1e-6))
        (first, second), self.steps = ADAM_BETAS, self.steps + 1
        self.mean = first * self.mean + (1 - first) * gradient
        self.square = second * self.square + (1 - second) * gradient.square()
        deviation = (self.square / (1 - second**self.steps)).sqrt()
        update = self.mean / (1 - first**self.steps) / (deviation + ADAM_EPS) + self.cfg.weight_decay * latents
        return latents - self.cfg.lr * (update if gain is None else gain * update)


def gradient_of(objective: Objective, latents: Tensor, iteration: int) -> tuple[Tensor, float]:
    """Gradient of the loss with respect to the latents, and the objective's progress."""
    with torch.enable_grad():
        leaf = latents.detach().requires_grad_()
        loss, progress = objective.loss(leaf, iteration)
        if not loss.requires_grad:  # every handle has left the frame
            return torch.zeros_like(latents), progress
        return torch.autograd.grad(loss, leaf)[0], progress


def read_references(
    reader: FeatureReader, cfg: DragConfig, drag: Drag, shown: ChunkPass, noise: KeyedNoise, frame: int = -1
) -> tuple[Reference, ...]:
    """Features of each handle: those that it brings, else those of a latent frame of the chunk shown, its last.

    Raises ValueError as `check_references` does.
    """
    check_references(reader, cfg, drag)
    current: list[Reference] = []

    def of(stored: Reference | None) -> Reference:
        if stored is not None:
            return stored
        if not current:
            current.append(reader.reference(shown, variants_of(cfg, noise, shown.chunk), frame))
        return current[0]

    return tuple(of(handle.reference) for handle in drag.handles)


def check_references(reader: FeatureReader, cfg: DragConfig, drag: Drag) -> None:
    """Raises ValueError where a handle brings other features than those that the drag optimises."""
    for index, handle in enumerate(drag.handles):
        if cfg.iterations and handle.reference is not None and handle.reference.read_as != reader.read_as:
            found = handle.reference.read_as or "drag.iterations=0, without features"
            raise ValueError(
                f"handle {index} brings a reference that was read with {found}; this drag optimises features with "
                f"{reader.read_as}: read the reference with the settings that use it, or set drag.iterations=0"
            )


def segment_poses(start: StartPoses, targets: FramePoses, cfg: DragConfig, height: int) -> list[FramePoses]:
    """The way to the targets in equal parts: poses per segment, frame and handle. A chunk has at least one.

    What is not in the frame yet has no way: it appears where it shall be.
    """
    origin = [first and (Pose() if cfg.start == "origin" else first) for first in start]
    ways = [pose.minus(first) for poses in targets if poses for first, pose in zip(origin, poses) if first]
    count = max((_num_segments(way, cfg, height) for way in ways), default=1)
    if cfg.max_iterations is not None and cfg.iterations:
        count = min(count, max(1, cfg.max_iterations // cfg.iterations))
    return [
        [
            None
            if poses is None
            else [first.toward(pose, part / count) if first else pose for first, pose in zip(origin, poses)]
            for poses in targets
        ]
        for part in range(1, count + 1)
    ]


def _num_segments(way: Pose, cfg: DragConfig, height: int) -> int:
    whole = math.ceil if cfg.subdivision == "ceil" else math.floor
    if cfg.segment_ratio is None:
        return 1
    parts = (way.distance_px / (height * cfg.segment_ratio), abs(way.degrees) / cfg.segment_degrees)
    return max(1, *(whole(part - 1e-9) if whole is math.ceil else whole(part + 1e-9) for part in parts))


def _around(boxes: Sequence[tuple[float, float, float, float]]) -> tuple[float, float, float, float] | None:
    if not boxes:
        return None
    x0, y0, x1, y1 = zip(*boxes)
    return min(x0), min(y0), max(x1), max(y1)
