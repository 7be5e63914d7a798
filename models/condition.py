"""What a video is generated from: text, motion, first frame. One immutable value, sliced by chunk.

Time: latent 0 covers pixel frame 0, latent j >= 1 covers frames 4j-3 .. 4j, so a clip of F latents has 1 +
4(F-1) frames. Every rule about that grouping is in this file.

Dropping a part for guidance or training dropout replaces it by its null: the null prompt for text, zeros
for motion. The motion null is applied to the track map, that is at the *input* of the track head: behind a
biased convolution a zero would be a different, unlearnt thing (and the null of guidance must equal the null
of masked chunks).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.motion.embedding import scatter_tracks
from models.motion.tracks import Tracks

if TYPE_CHECKING:
    from models.wan.config import WanConfig

FRAMES_PER_LATENT = 4  # temporal stride of the Wan VAEs
DROPPABLE = ("text", "motion")  # in the order in which guidance evaluates them


@dataclass(frozen=True, eq=False)
class Condition:
    """All conditioning of a clip, or of one chunk of it.

    Raises ValueError where the batch sizes of the parts disagree.
    """

    prompt_embeds: Tensor  # [B, text_len, text_dim], zero beyond the true length
    null_prompt_embeds: Tensor  # [1, text_len, text_dim]: what a dropped text means
    track_map: Tensor | None = None  # [B, id_dim, T, h, w]; T = 1 + 4(F-1) if it holds frame 0, else 4F
    image_latents: Tensor | None = None  # [B, C, 1, h, w] normalised; None for later chunks and text-to-video
    clip_embeds: Tensor | None = None  # [B, 257, 1280]
    track_map_is_latent: bool = False  # True: track_map is [B, C, F, h, w], VAE latents of drawn tracks
    num_given_latents: int = 1  # leading frames of image_latents that show the image; the others pad it

    def __post_init__(self) -> None:
        for name in ("track_map", "image_latents", "clip_embeds"):
            part = self._part(name)
            if part is not None and part.shape[0] != self.batch_size:
                raise ValueError(
                    f"{name} has batch {part.shape[0]}; it must be {self.batch_size}, as prompt_embeds has"
                )
        if self.null_prompt_embeds.shape[1:] != self.prompt_embeds.shape[1:]:
            raise ValueError(
                f"null_prompt_embeds {tuple(self.null_prompt_embeds.shape)} must match prompt_embeds "
                f"{tuple(self.prompt_embeds.shape)} beyond the batch; encode both with one text encoder"
            )

    @property
    def batch_size(self) -> int:
        return self.prompt_embeds.shape[0]

    def drop(self, *names: str, where: Tensor | None = None) -> Condition:
        """The parts "text" and/or "motion" replaced by their nulls; ``where`` [B] bool: in these samples."""
        changed = self
        for name in names:
            if name not in DROPPABLE:
                raise ValueError(f"cannot drop '{name}'; a condition can drop {' or '.join(DROPPABLE)}")
            field = "prompt_embeds" if name == "text" else "track_map"
            part = self._part(field)
            if part is None:
                raise ValueError("cannot drop 'motion': there is no track_map; set the motion guidance weight to 0")
            null = self.null_prompt_embeds.expand_as(part) if name == "text" else torch.zeros_like(part)
            if where is not None:
                null = torch.where(where.to(part.device).view(-1, *[1] * (part.ndim - 1)), null, part)
            changed = replace(changed, **{field: null})
        return changed

    def mask_motion(self, masked_latents: Tensor) -> Condition:
        """Whole clip with the motion of some latent frames left unspecified; masked_latents [B, F] bool.

        Mid-frame masking of MotionStream's teacher (stage 2): the same null as drop("motion"), for part of
        the time.
        """
        if self.track_map is None:
            raise ValueError("mask_motion needs a condition with a track_map; this model has no tracks")
        masked = masked_latents.to(self.track_map.device)
        if not self.track_map_is_latent:
            masked = masked.repeat_interleave(FRAMES_PER_LATENT, dim=1)[:, FRAMES_PER_LATENT - 1 :]
        if masked.shape[1] != self.track_map.shape[2]:
            raise ValueError(
                f"masked_latents has {masked_latents.shape[1]} frames, {masked.shape[1]} track frames; "
                f"it must cover the {self.track_map.shape[2]} of the track map"
            )
        return replace(self, track_map=self.track_map.masked_fill(masked[:, None, :, None, None], 0.0))

    def chunk(self, first: int, count: int) -> Condition:
        """Conditions of latent frames [first, first + count) of a whole-clip condition."""
        image = None if self.image_latents is None else self.image_latents[:, :, first : first + count]
        if image is not None and image.shape[2] == 0:
            image = None
        given = max(0, self.num_given_latents - first)
        return replace(
            self, track_map=self._chunk_of_tracks(first, count), image_latents=image, num_given_latents=given
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        moved: dict[str, Any] = {
            name: part.to(device=device, dtype=dtype) for name, part in vars(self).items() if isinstance(part, Tensor)
        }
        return replace(self, **moved)

    def _part(self, name: str) -> Tensor | None:
        return vars(self)[name]

    def _chunk_of_tracks(self, first: int, count: int) -> Tensor | None:
        if self.track_map is None:
            return None
        num_frames = self.track_map.shape[2]
        if self.track_map_is_latent:
            frames = slice(first, first + count)
        else:
            frames = pixel_frames_of(first, count)
            if num_frames % FRAMES_PER_LATENT != 1:
                raise ValueError(
                    f"track_map has {num_frames} frames, not 1 + 4k: already a chunk; slice the whole clip"
                )
        if frames.stop > num_frames:
            raise ValueError(
                f"latent frames {first}..{first + count - 1} need {frames.stop} track frames; the clip has {num_frames}"
            )
        return self.track_map[:, :, frames]


@dataclass
class ClipGeometry:
    """Size of a clip in pixels and frames: the one owner of these numbers.

    Raises ValueError where a number is not positive or num_frames is not 1 + 4k.
    """

    height: int  # px
    width: int  # px
    num_frames: int  # 1 + 4k
    fps: int  # frames per second

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        num_latent_frames(self.num_frames)

    @property
    def num_latents(self) -> int:
        return num_latent_frames(self.num_frames)


def pixel_frames_of(first_latent: int, count: int) -> slice:
    """The pixel frames that latent frames [first_latent, first_latent + count) cover."""
    if first_latent < 0 or count < 1:
        raise ValueError(f"first_latent={first_latent} must be >= 0 and count={count} >= 1")
    start = 0 if first_latent == 0 else FRAMES_PER_LATENT * first_latent - (FRAMES_PER_LATENT - 1)
    return slice(start, num_pixel_frames(first_latent + count))


def num_pixel_frames(num_latents: int) -> int:
    """Pixel frames of a clip of ``num_latents`` latent frames: 1 + 4(F-1)."""
    if num_latents < 1:
        raise ValueError(f"num_latents={num_latents} must be at least 1")
    return 1 + FRAMES_PER_LATENT * (num_latents - 1)


def num_latent_frames(num_frames: int) -> int:
    """Latent frames of a clip; raises ValueError unless num_frames is 1 + 4k."""
    latents = max(1, 1 + (num_frames - 1 + FRAMES_PER_LATENT // 2) // FRAMES_PER_LATENT)
    if num_frames != num_pixel_frames(latents):
        raise ValueError(f"num_frames={num_frames} must be 1 + 4k; nearest valid: {num_pixel_frames(latents)}")
    return latents


def build_condition(
    *,
    prompt_embeds: Tensor,
    null_prompt_embeds: Tensor,
    tracks: Tracks | None,
    dit: WanConfig,
    latent_size: tuple[int, int],
    cell_px: int,
    image_latents: Tensor | None = None,
    clip_embeds: Tensor | None = None,
    track_latents: Tensor | None = None,
    rng: torch.Generator | None = None,
) -> Condition:
    """Assembles what this architecture reads; parts it has no input for are left out.

    prompt_embeds [B, text_len, text_dim]; tracks at latent_size * cell_px pixels; image_latents [B, C, 1,
    h, w]; clip_embeds [B, 257, 1280]; track_latents [B, C, F, h, w], the VAE latents of drawn tracks,
    replace ``tracks`` where dit.track_encoding is "rgb"; where no track is seen they are the null. ``rng``
    decides at random which of two tracks in one cell is seen (training). Raises ValueError where something the
    architecture needs is absent.
    """
    if dit.clip_dim is not None and clip_embeds is None:
        raise ValueError(f"clip_embeds=None, but dit.clip_dim={dit.clip_dim}; encode the first frame with CLIP")
    is_latent = dit.track_channels > 0 and dit.track_encoding == "rgb"
    if dit.track_channels == 0:
        track_map = None
    elif is_latent:
        if track_latents is None:
            raise ValueError("track_latents=None, but dit.track_encoding is rgb; pass vae.encode(draw_tracks(tracks))")
        track_map = track_latents if tracks is None else track_latents * _latents_with_tracks(tracks, track_latents)
    else:
        if tracks is None:
            raise ValueError(
                f"tracks=None, but dit.track_channels={dit.track_channels}; pass Tracks.empty(...) for none"
            )
        height, width = latent_size
        track_map = scatter_tracks(
            tracks,
            dim=dit.track_id_dim,
            height_cells=height,
            width_cells=width,
            cell_px=cell_px,
            with_offsets=dit.track_offsets,
            rng=rng,
        )
    return Condition(
        prompt_embeds=prompt_embeds,
        null_prompt_embeds=null_prompt_embeds,
        track_map=track_map,
        image_latents=None if dit.image_conditioning == "none" else image_latents,
        clip_embeds=None if dit.clip_dim is None else clip_embeds,
        track_map_is_latent=is_latent,
    )


def _latents_with_tracks(tracks: Tracks, latents: Tensor) -> Tensor:
    """1 where any track is seen in the pixel frames of a latent frame, else 0: [B, 1, F, 1, 1], as `latents`."""
    seen = tracks.seen.any(dim=2).to(latents)
    missing = FRAMES_PER_LATENT * latents.shape[2] - seen.shape[1]  # the video's first frame stands for four
    seen = torch.cat([seen[:, :1].expand(-1, missing), seen], dim=1)
    return seen.unflatten(1, (-1, FRAMES_PER_LATENT)).amax(dim=2)[:, None, :, None, None]
