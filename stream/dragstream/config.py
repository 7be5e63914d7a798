"""Settings of a drag editor; conf/drag has one file per profile, with where each value comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace

METHODS = ("dragstream", "sg_i2v", "dragvideo")
OPTIMISATION = (  # fields that nothing reads where iterations=0
    "method", "layers", "max_iterations", "segment_ratio", "segment_degrees", "subdivision", "start",
    "lr", "restart_optimizer", "weight_decay", "grad_clip", "tolerance",
    "norm", "reduction", "rec_weight", "cst_weight", "cst_on", "detach_key_value", "recompute",
    "cutoffs", "cutoff_range", "filter_rope", "css_alpha", "css_box", "css_on",
)  # fmt: skip
REFERENCE_DEPTH, REFERENCE_LAYERS = 30, (12, 16)  # blocks 12 to 15 of Wan 1.3B's 30


@dataclass
class DragConfig:
    """How latents are optimised so that a region's features appear elsewhere."""

    method: str = "dragstream"  # dragstream | sg_i2v | dragvideo (objectives.py)
    layers: list[int] | None = None  # blocks whose self-attention gives the features; null: 0.4 to 0.53 of the depth
    tracks: str = "follow"  # of the stream, on a handle: they "follow" it (led_tracks.py; not in the paper) | "release"
    step: int = -1  # denoising step whose input is optimised; negative: counted from the last, -1
    iterations: int = 0  # per segment, of the paper's optimisation; 0: tracks and warm start alone (docs/dragstream.md)
    max_iterations: int | None = 32  # per chunk; segments become longer where they would need more
    segment_ratio: float | None = None  # a drag goes in segments of at most this share of the height; null: in one
    segment_degrees: float = 8.0  # and of at most this turn, where segment_ratio is set
    subdivision: str = "ceil"  # ceil: at most the segment's size | floor: up to twice as long
    start: str = "previous"  # a chunk's first segment starts where the last chunk ended | at the "origin"
    warm_rounds: int = 3  # of a start from where the drag leads (warm_start.py; not in the paper); 0: from the latents
    warm_gain: float = 0.3  # of the prediction's error, per round
    edit_frames: str = "ramp"  # of a chunk made again: "last" alone has a target | all, on a "ramp" to it

    lr: float = 0.04  # size of one step: latents have about unit variance
    restart_optimizer: bool = False  # a new AdamW per iteration, as the official code: sign descent
    weight_decay: float = 0.0
    grad_clip: float | None = None  # largest norm of the gradient
    tolerance: float | None = None  # a segment ends early where the reconstruction loss falls under this

    norm: str = "mse"  # mse | l1
    reduction: str = "cells"  # mean of each loss over its own cells | "sum" | "all": L_cst is a mean over the frame
    rec_weight: float = 1.0
    cst_weight: float = 1.0
    cst_on: str = "features"  # what must not change outside the editable region: features | x0
    detach_key_value: bool = True  # gradients reach the recorded attention through its queries alone
    recompute: bool = True  # keep only each block's input for the backward pass: a third of the memory, more time

    adsr: str = "own"  # statistics to hold: own | neighbours | compat | off (statistics.py)
    adsr_frames: int = 9  # neighbours: latent frames before the chunk
    match_clean: bool = False  # the official code's shift of every x0 to the chunks before it, drag or no drag

    cutoffs: list[float | None] = field(default_factory=lambda: [None, 0.2, 0.4, 0.6])  # cycles per token
    cutoff_range: list[float] | None = None  # drawn between these instead, and now and then none
    filter_rope: str = "post"  # keys are filtered after ("post") or before ("pre") their rotation

    css_alpha: float | None = 1.0  # width of the map where latents may change; null: everywhere
    css_box: str = "both"  # around the "target", the "handle", or "both"
    css_on: str = "update"  # weighs the "update" | the "gradient", which Adam undoes

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", METHODS), ("tracks", ("follow", "release")),
            ("subdivision", ("ceil", "floor")), ("start", ("previous", "origin")),
            ("edit_frames", ("last", "ramp")), ("norm", ("mse", "l1")), ("reduction", ("cells", "sum", "all")),
            ("cst_on", ("features", "x0")), ("adsr", ("own", "neighbours", "compat", "off")),
            ("filter_rope", ("post", "pre")), ("css_box", ("target", "handle", "both")),
            ("css_on", ("update", "gradient")),
        ):  # fmt: skip
            if vars(self)[name] not in allowed:
                raise ValueError(f"drag.{name}={vars(self)[name]} must be {' or '.join(allowed)}")
        if self.iterations < 0 or (self.max_iterations is not None and self.max_iterations < self.iterations):
            raise ValueError(
                f"drag.iterations={self.iterations} must be >= 0 and at most max_iterations={self.max_iterations}"
            )
        for name in ("warm_rounds", "warm_gain", "lr", "weight_decay", "rec_weight", "cst_weight", "adsr_frames"):
            if not 0 <= vars(self)[name] < math.inf:  # nan is not
                raise ValueError(f"drag.{name}={vars(self)[name]} must be >= 0 and finite")
        for name in ("grad_clip", "css_alpha"):
            if vars(self)[name] is not None and not vars(self)[name] > 0:
                raise ValueError(f"drag.{name}={vars(self)[name]} must be > 0, or null for none")
        if not ((self.segment_ratio is None or self.segment_ratio > 0) and self.segment_degrees > 0):
            raise ValueError(f"segment_ratio={self.segment_ratio}, segment_degrees={self.segment_degrees} must be > 0")
        if self.adsr == "neighbours" and not self.adsr_frames:
            raise ValueError("drag.adsr_frames=0 gives adsr=neighbours nothing to match; set it, or adsr=own or off")
        if not self.cutoffs or not all(cutoff is None or cutoff > 0 for cutoff in self.cutoffs):
            raise ValueError(f"drag.cutoffs={list(self.cutoffs)} must be positive, or null for no filter")
        if self.cutoff_range is not None and not (
            len(self.cutoff_range) == 2 and 0 < self.cutoff_range[0] < self.cutoff_range[1]
        ):
            raise ValueError(f"drag.cutoff_range={list(self.cutoff_range)} must be two rising numbers > 0")

    def without_effect(self) -> list[str]:
        """Fields that were set to something and change nothing: those of an optimisation with iterations=0."""
        defaults = DragConfig()
        idle = OPTIMISATION if not self.iterations else ()
        return [
            each.name
            for each in fields(self)
            if each.name in idle and vars(self)[each.name] != vars(defaults)[each.name]
        ]

    def remarks(self) -> list[str]:
        """What was set and changes nothing, a sentence for each reason."""
        idle, uncut = self.without_effect(), []
        if self.iterations and self.segment_ratio is None:
            uncut = [
                name for name in ("segment_degrees", "subdivision") if vars(self)[name] != vars(DragConfig())[name]
            ]
        reasons = (idle, "iterations=0; set it to optimise"), (uncut, "segment_ratio=null; set it to cut the way")
        return [
            f"drag.{', drag.'.join(names)} {'has' if len(names) == 1 else 'have'} no effect with drag.{reason}"
            for names, reason in reasons
            if names
        ]

    def for_student(self, num_steps: int, num_layers: int) -> DragConfig:
        """The same with its step >= 0. Raises ValueError for a step or a block that the student does not have."""
        if not -num_steps <= self.step < num_steps:
            raise ValueError(f"drag.step={self.step} must be in {-num_steps}..{num_steps - 1}: the student's steps")
        self.layers_of(num_layers)
        return replace(self, step=self.step % num_steps)

    def layers_of(self, num_layers: int) -> list[int]:
        """The blocks to read in a model of so many. Raises ValueError for one that it does not have."""
        if self.layers is None:
            first, end = (round(layer * num_layers / REFERENCE_DEPTH) for layer in REFERENCE_LAYERS)
            return list(range(first, max(end, first + 1)))
        if not self.layers or not all(0 <= layer < num_layers for layer in self.layers):
            raise ValueError(f"drag.layers={list(self.layers)} must be blocks of the model, 0..{num_layers - 1}")
        return list(self.layers)
