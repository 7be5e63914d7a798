"""The ``Tracks`` type: points that move through a clip, at a stated pixel resolution.

Coordinates are (x, y) in pixels of ``height`` x ``width``; pixel column i covers x in [i, i + 1). A point
may lie outside the frame or be invisible; both are ordinary states, and neither reaches the model's input.
Files are ``.npz`` or ``.json`` with the keys points, visibility, height, width for one clip; identities are
not stored, because they are drawn anew for each training sample and each session (MotionStream eq. 1).
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from models.files import replace_file

FIELDS = ("points", "visibility", "height", "width")  # of a track file
NUM_TRACK_IDS = 10_000  # identities are integers 0..9999: integers keep the encodings far apart


@dataclass(frozen=True, eq=False)
class Tracks:
    """Point tracks of a batch of clips.

    Raises ValueError where shapes or types disagree, or the resolution is not positive.
    """

    points: Tensor  # [B, T, N, 2] float32, (x, y) in px of height x width
    visibility: Tensor  # [B, T, N] bool
    ids: Tensor  # [B, N] long, constant over time and over a whole stream
    height: int  # px
    width: int  # px

    def __post_init__(self) -> None:
        shape = tuple(self.points.shape)
        if len(shape) != 4 or shape[-1] != 2 or self.points.dtype != torch.float32:
            raise ValueError(f"points {shape} {self.points.dtype} must be [B, T, N, 2] float32")
        if tuple(self.visibility.shape) != shape[:3] or self.visibility.dtype != torch.bool:
            found = f"{tuple(self.visibility.shape)} {self.visibility.dtype}"
            raise ValueError(f"visibility {found} must be {shape[:3]} bool, as the points are {shape}")
        expected_ids = (shape[0], shape[2])
        if tuple(self.ids.shape) != expected_ids or self.ids.dtype != torch.long:
            raise ValueError(f"ids {tuple(self.ids.shape)} {self.ids.dtype} must be {expected_ids} int64")
        if self.height < 1 or self.width < 1:
            raise ValueError(f"resolution {self.height}x{self.width} must be at least 1x1 px")

    @property
    def batch_size(self) -> int:
        return self.points.shape[0]

    @property
    def num_frames(self) -> int:
        return self.points.shape[1]

    @property
    def num_tracks(self) -> int:
        return self.points.shape[2]

    @property
    def seen(self) -> Tensor:  # [B, T, N] bool
        """Where a point is visible and inside the frame: what a model is shown. NaN is outside."""
        x, y = self.points.unbind(-1)
        return self.visibility & (x >= 0) & (x < self.width) & (y >= 0) & (y < self.height)

    @classmethod
    def from_arrays(
        cls, points: np.ndarray | Tensor, visibility: np.ndarray | Tensor, height: int, width: int
    ) -> Tracks:
        """One clip: points [T, N, 2], visibility [T, N] -> Tracks with B = 1 and ids 0 (not drawn yet)."""
        points = torch.as_tensor(points, dtype=torch.float32)[None]
        visibility = torch.as_tensor(visibility, dtype=torch.bool)[None]
        ids = torch.zeros(1, points.shape[2] if points.ndim == 4 else 0, dtype=torch.long)
        return cls(points, visibility, ids, int(height), int(width))

    @classmethod
    def empty(cls, batch_size: int, num_frames: int, height: int, width: int) -> Tracks:
        """No tracks at all: motion left unspecified everywhere."""
        return cls(
            torch.zeros(batch_size, num_frames, 0, 2),
            torch.zeros(batch_size, num_frames, 0, dtype=torch.bool),
            torch.zeros(batch_size, 0, dtype=torch.long),
            height,
            width,
        )

    def resize_to(self, height: int, width: int) -> Tracks:
        """The same motion in a frame of another size, cropped in the middle to its aspect as pictures are."""
        top, left, crop_height, crop_width = centre_crop((self.height, self.width), (height, width))
        scale = self.points.new_tensor([width / crop_width, height / crop_height])
        points = (self.points - self.points.new_tensor([left, top])) * scale
        return replace(self, points=points, height=height, width=width)

    def frames(self, frames: slice) -> Tracks:
        """A stretch of pixel frames."""
        return replace(self, points=self.points[:, frames], visibility=self.visibility[:, frames])

    def released_at(self, frame: int) -> Tracks:
        """The same tracks until a frame, from which on none is visible."""
        before = torch.arange(self.num_frames, device=self.points.device) < frame
        return replace(self, visibility=self.visibility & before[:, None])

    def select(self, index: Tensor) -> Tracks:
        """Tracks by number: ``index`` [M] takes the same tracks of each clip, [B, M] others per clip."""
        index = torch.as_tensor(index, dtype=torch.long, device=self.points.device)
        index = index.expand(self.batch_size, -1) if index.ndim == 1 else index
        frames = index[:, None, :].expand(-1, self.num_frames, -1)
        return replace(
            self,
            points=self.points.gather(2, frames[..., None].expand(-1, -1, -1, 2)),
            visibility=self.visibility.gather(2, frames),
            ids=self.ids.gather(1, index),
        )

    def beside(self, *others: Tracks) -> Tracks:
        """These tracks and others of the same clips and frames, as columns of one; these come first."""
        parts = (self, *others)
        _require_equal(parts, "beside", ("batch_size", "num_frames", "height", "width"))
        points, visibility = torch.cat([p.points for p in parts], 2), torch.cat([p.visibility for p in parts], 2)
        return replace(self, points=points, visibility=visibility, ids=torch.cat([part.ids for part in parts], 1))

    def with_ids(self, ids: Tensor) -> Tracks:
        """The same motion under other identities, ids [B, N]."""
        return replace(self, ids=ids.to(self.points.device))

    def to(self, device: torch.device | str) -> Tracks:
        return replace(
            self,
            points=self.points.to(device),
            visibility=self.visibility.to(device),
            ids=self.ids.to(device),
        )

    @staticmethod
    def stack(items: Sequence[Tracks]) -> Tracks:
        """Joins clips into a batch, along B; clips with fewer tracks are padded with invisible ones."""
        _require_equal(items, "stack", ("num_frames", "height", "width"))
        most = max(item.num_tracks for item in items)
        items = [Tracks.pad(item, most) for item in items]
        return replace(
            items[0],
            points=torch.cat([item.points for item in items]),
            visibility=torch.cat([item.visibility for item in items]),
            ids=torch.cat([item.ids for item in items]),
        )

    @staticmethod
    def pad(tracks: Tracks, num_tracks: int) -> Tracks:
        """Appends invisible tracks at (0, 0) until there are ``num_tracks``."""
        missing = num_tracks - tracks.num_tracks
        if missing < 0:
            raise ValueError(
                f"num_tracks={num_tracks} must be at least the {tracks.num_tracks} there are; use select()"
            )
        return replace(
            tracks,
            points=functional.pad(tracks.points, (0, 0, 0, missing)),
            visibility=functional.pad(tracks.visibility, (0, missing)),
            ids=functional.pad(tracks.ids, (0, missing)),
        )

    def save(self, path: str | Path) -> None:
        """Writes one clip (B = 1) to ``.npz`` or ``.json``, by the suffix; whole or not at all."""
        if self.batch_size != 1:
            raise ValueError(f"batch_size={self.batch_size} must be 1: a track file holds one clip")
        suffix = _suffix(Path(path))
        fields: dict[str, Any] = {"height": self.height, "width": self.width}
        points, visibility = self.points[0].cpu().numpy(), self.visibility[0].cpu().numpy()
        with replace_file(path) as fresh, fresh.open("wb") as file:
            if suffix == ".npz":
                np.savez_compressed(file, points=points, visibility=visibility, **fields)
            else:
                file.write(json.dumps(fields | {"points": points.tolist(), "visibility": visibility.tolist()}).encode())

    @staticmethod
    def load(path: str | Path) -> Tracks:
        """Reads one clip at the resolution it was stored in; ids are 0 until drawn.

        Raises FileNotFoundError where there is no such file, ValueError, which names it, where it holds no tracks.
        """
        path = Path(path)
        fields = _read_fields(path)
        try:
            points, visibility = np.asarray(fields["points"], np.float32), np.asarray(fields["visibility"])
            height, width = (_whole(name, fields[name]) for name in ("height", "width"))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}: {error}; points are numbers, height and width whole pixels") from error
        if height < 1 or width < 1:
            raise ValueError(f"{path}: height={height} and width={width} must be at least 1 px")
        if not visibility.size and not points.size:  # JSON does not tell the shape of what is empty
            points = points.reshape(*visibility.shape, 2)
        if points.shape != (*visibility.shape, 2) or visibility.ndim != 2:
            raise ValueError(
                f"{path}: points {points.shape} must be [T, N, 2] and visibility {visibility.shape} [T, N]: frames, "
                "then tracks, then x and y"
            )
        if not (boolean := np.isin(visibility, (0, 1))).all():
            raise ValueError(
                f"{path}: visibility holds '{visibility[~boolean][0]}'; it must be true or false (scores of a tracker: "
                "compare them with its threshold first)"
            )
        return Tracks.from_arrays(points, visibility.astype(bool), height, width)


def centre_crop(have: tuple[int, int], want: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the middle of a frame of size `have` that has the aspect of size `want`, px.

    The one rule by which pictures, tracks and masks come to the model's size.
    """
    scale = max(want[0] / have[0], want[1] / have[1])
    height, width = (min(old, max(1, round(new / scale))) for old, new in zip(have, want))
    return (have[0] - height) // 2, (have[1] - width) // 2, height, width


def sample_track_ids(batch_size: int, num_tracks: int, rng: torch.Generator) -> Tensor:
    """Identities -> [B, N] long on the CPU, without replacement from 0..9999 within each clip."""
    if num_tracks > NUM_TRACK_IDS:
        raise ValueError(f"num_tracks={num_tracks} must be at most {NUM_TRACK_IDS}, the number of identities")
    draws = [torch.randperm(NUM_TRACK_IDS, generator=rng)[:num_tracks] for _ in range(batch_size)]
    return torch.stack(draws) if draws else torch.zeros(0, num_tracks, dtype=torch.long)


def _whole(name: str, value: Any) -> int:
    if int(value) != float(value):
        raise ValueError(f"{name}={value}")
    return int(value)


def _read_fields(path: Path) -> dict[str, Any]:
    """The fields of a track file. Raises FileNotFoundError, and ValueError where it is none."""
    kind, read = {".npz": ("npz", _read_npz), ".json": ("JSON", _read_json)}[_suffix(path)]
    try:
        found = read(path)
    except FileNotFoundError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not {kind}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds one {type(found).__name__}; a track file has {', '.join(FIELDS)}")
    if missing := set(FIELDS) - set(found):
        raise ValueError(f"{path}: no field {sorted(missing)}; a track file has {', '.join(FIELDS)}")
    return found


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_npz(path: Path) -> Any:
    """What np.savez wrote, by name; what np.save wrote, as it is."""
    stored = np.load(path, allow_pickle=False)
    if isinstance(stored, np.ndarray):
        return stored
    with stored:
        return dict(stored)


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".json"):
        raise ValueError(f"{path}: suffix '{path.suffix}' must be .npz or .json")
    return suffix


def _require_equal(items: Sequence[Tracks], operation: str, fields: tuple[str, ...]) -> None:
    if not items:
        raise ValueError(f"{operation}: needs at least one Tracks")
    signatures = [
        {"batch_size": t.batch_size, "num_frames": t.num_frames, "height": t.height, "width": t.width} for t in items
    ]
    for field in fields:
        values = {signature[field] for signature in signatures}
        if len(values) > 1:
            raise ValueError(f"{operation}: {field} differs between the tracks: {sorted(values)}; it must be equal")
