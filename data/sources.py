"""Where clips come from: the sprites world, a folder of videos, OpenVid-1M, VidProM.

A source lists its items and writes each as an mp4 at the model's clip geometry beside a json sidecar
(caption, origin, and for sprites the seed and configuration from which exact tracks are simulated again).

Filters of OpenVid-1M are MotionStream's (at least 81 frames, 16:9, sampled at the clip's 16 fps). VidProM is
a list of prompts: its videos are generated elsewhere and found as <path>/<uuid>.mp4.
Left out: downloading. Licences: OpenVid-1M CC-BY-4.0, VidProM CC-BY-NC-4.0.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.sprites import Scene, SpritesConfig, render_clip, simulate, split_seed
from data.video import VideoError, probe_video, read_video, write_video
from models.condition import ClipGeometry
from models.files import replace_file

log = logging.getLogger(__name__)

VIDEO_FOLDERS = ("clips", "previews")  # of a data set: where the steps write videos
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
MAX_CRF = 51  # of H.264 with 8 bits
MAX_KEY = 240  # characters: with what files and markers add to it, a name of at most 255
CUT_KEY = 200  # of a longer key, before the hash that stands for the whole name
NSFW_COLUMNS = ("toxicity", "obscene", "identity_attack", "insult", "threat", "sexual_explicit")


@dataclass(frozen=True)
class SourceItem:
    key: str  # unique, no dots: the webdataset key
    caption: str
    origin: str  # file name or seed, for messages
    path: str | None = None  # video file of a real clip
    seed: int | None = None  # sprites


@dataclass(frozen=True)
class UnusableItem(SourceItem):
    """A clip that is to be set aside, as is known before it is rendered."""

    reason: str = ""


class Source(Protocol):
    cfg: Any

    def items(self) -> Iterator[SourceItem]:
        """All clips that the manifest lets pass. FileNotFoundError if the source is not there, ValueError if its
        manifest is broken.
        """
        ...

    def render(self, item: SourceItem, geometry: ClipGeometry, target: Path) -> dict[str, Any]:
        """Write the clip to `target` (mp4) and return its sidecar. Raises VideoError with the reason."""
        ...

    def write_manifest(self, folder: Path) -> None:
        """Leave beside the clips what else the source knows (VidProM: the filtered prompts)."""
        ...


def clip_key(name: str) -> str:
    """A webdataset key from a file name: webdataset ends keys at the first dot."""
    key = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_") or "clip"
    if len(key) <= MAX_KEY:
        return key
    return f"{key[:CUT_KEY]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"


# ------------------------------------------------------------------------------------------ sprites
class SpritesSource:
    @dataclass
    class Config:
        world: SpritesConfig = field(default_factory=SpritesConfig)  # its size follows model.clip
        num_clips: int = 256
        split: str = "train"  # train | val | test: disjoint seeds
        first_index: int = 0  # index of the first clip within the split
        crf: int = 8  # H.264 quality of the mp4, 0 (lossless) .. 51
        default_tracker: str = "exact"
        default_grid: int = 16  # rows and columns of the query grid
        default_previews: str = "8"

    def __init__(self, cfg: Config) -> None:
        if cfg.num_clips < 1:
            raise ValueError(f"source.num_clips={cfg.num_clips} must be >= 1")
        _require_quality(cfg.crf)
        self.cfg = cfg

    def items(self) -> Iterator[SourceItem]:
        for index in range(self.cfg.first_index, self.cfg.first_index + self.cfg.num_clips):
            seed = split_seed(self.cfg.split, index)
            caption = simulate(self.cfg.world, seed).caption
            yield SourceItem(f"{self.cfg.split}-{index:06d}", caption, f"seed {seed}", seed=seed)

    def render(self, item: SourceItem, geometry: ClipGeometry, target: Path) -> dict[str, Any]:
        world = self.cfg.world
        if (world.height, world.width, world.num_frames, world.fps) != _size(geometry):
            raise ValueError(f"source.world {_world_size(world)} must be model.clip {_size(geometry)} (h, w, T, fps)")
        clip = render_clip(world, item.seed or 0)
        write_video(target, clip.frames, geometry.fps, self.cfg.crf)
        return {"seed": item.seed, "sprites": asdict(world)}

    def write_manifest(self, folder: Path) -> None:
        """Nothing to add: a sprites clip is known by its seed."""


def _require_quality(crf: int) -> None:
    if not 0 <= crf <= MAX_CRF:
        raise ValueError(f"source.crf={crf} must lie in 0 (lossless) .. {MAX_CRF}")


def _size(geometry: ClipGeometry) -> tuple[int, int, int, int]:
    return geometry.height, geometry.width, geometry.num_frames, geometry.fps


def _world_size(world: SpritesConfig) -> tuple[int, int, int, int]:
    return world.height, world.width, world.num_frames, world.fps


def scene_of(sidecar: dict[str, Any]) -> Scene | None:
    """The scene a sprites clip was drawn from, or None for any other clip."""
    if "sprites" not in sidecar:
        return None
    return simulate(SpritesConfig(**sidecar["sprites"]), sidecar["seed"])


# ------------------------------------------------------------------------------------------ folders
class FolderSource:
    """Videos of a folder. Caption: <name>.txt, or "caption" in <name>.json, or a row of one CSV (file, caption); all in
    UTF-8. A clip whose own caption file cannot be read is set aside.
    """

    @dataclass
    class Config:
        path: str = ""  # folder of videos, searched recursively, through links too
        captions: str | None = None  # CSV with the columns file and caption
        default_caption: str = ""  # for clips without one
        crf: int = 8  # H.264 quality of the prepared mp4
        default_tracker: str = "lucas_kanade"
        default_grid: int = 50
        default_previews: str = "all"

    def __init__(self, cfg: Config) -> None:
        _require_quality(cfg.crf)
        self.cfg = cfg
        self.folder = _required_folder(cfg.path)

    def videos(self) -> list[Path]:
        found = (place / name for place, names in _folders_below(self.folder) for name in names)
        named = sorted(path for path in found if path.suffix.lower() in VIDEO_SUFFIXES)
        videos = [path for path in named if path.is_file()]
        if len(videos) < len(named):
            absent = len(named) - len(videos)
            log.warning("%d of %d videos are left out: links to nothing, or no files", absent, len(named))
        return videos

    def items(self) -> Iterator[SourceItem]:
        table = _caption_table(Path(self.cfg.captions)) if self.cfg.captions else {}
        paths = self.videos()
        if not paths:
            raise FileNotFoundError(f"source.path={self.folder} holds no videos ({', '.join(VIDEO_SUFFIXES)})")
        seen: set[str] = set()
        bare = 0
        for path in paths:
            relative = path.relative_to(self.folder)
            key = unused_key(clip_key(relative.with_suffix("").as_posix()), seen)
            try:
                own = _sidecar_caption(path)
            except (ValueError, OSError) as error:
                yield UnusableItem(key, "", relative.as_posix(), path=str(path), reason=str(error))
                continue
            caption = own or table.get(relative.as_posix()) or table.get(path.name)
            bare += caption is None
            yield SourceItem(key, caption or self.cfg.default_caption, relative.as_posix(), path=str(path))
        if bare:
            log.warning("%d of %d clips have no caption; using %r", bare, len(paths), self.cfg.default_caption)

    def render(self, item: SourceItem, geometry: ClipGeometry, target: Path) -> dict[str, Any]:
        return _render_video(item, geometry, target, self.cfg.crf)

    def write_manifest(self, folder: Path) -> None:
        """Nothing to add: captions are in the sidecars."""


def _folders_below(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and all below it, each with the names of its files. Links to folders come after what is no link, and no
    folder comes twice.
    """
    seen: set[str] = set()
    tops = [folder]
    for top in tops:
        for place, folders, files in os.walk(top, onerror=lambda error: log.warning("left out: %s", error)):
            real = os.path.realpath(place)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            tops += (Path(place, name) for name in sorted(folders) if os.path.islink(os.path.join(place, name)))
            yield Path(place), files


def read_item(item: SourceItem, geometry: ClipGeometry, whole: bool = False) -> np.ndarray:
    """Frames of a real clip, uint8 [T, H, W, 3], or those spread over its whole video. Raises VideoError with the
    reason where it cannot be used.
    """
    if isinstance(item, UnusableItem):
        raise VideoError(item.reason)
    if item.path is None:
        raise VideoError("the item names no video file")
    return read_video(item.path, geometry, whole)


def _render_video(item: SourceItem, geometry: ClipGeometry, target: Path, crf: int) -> dict[str, Any]:
    write_video(target, read_item(item, geometry), geometry.fps, crf)
    return {"source": item.origin}


def _required_folder(path: str) -> Path:
    if not path:
        raise ValueError("source.path is empty; set it to the folder of the videos")
    if not Path(path).is_dir():
        raise FileNotFoundError(f"source.path={path} is no folder (looked in {os.getcwd()})")
    return Path(path)


def require_apart(source: Source, out: str) -> None:
    """Raises ValueError where the source would take for new videos what is written below `out`.

    A folder of videos is searched recursively and through links; the other sources find their files in the folder
    itself.
    """
    if isinstance(source, SpritesSource) or not source.cfg.path:
        return
    videos = Path(source.cfg.path)
    searched = [place.resolve() for place, _ in _folders_below(videos)] if isinstance(source, FolderSource) else []
    for written in (Path(out) / name for name in VIDEO_FOLDERS):
        place = written.resolve()
        if place == videos.resolve() or any(place.is_relative_to(folder) for folder in searched):
            raise ValueError(
                f"out={out} lies below source.path={source.cfg.path} or around it: a next run would take the videos in "
                f"{written} for new ones; write somewhere else, or move what is there: it stays finished"
            )


def unused_key(key: str, seen: set[str]) -> str:
    """The key, or where an earlier item has it, the key with a number: names can differ in what clip_key drops."""
    candidate, number = key, 1
    while candidate in seen:
        number += 1
        suffix = f"-{number}"
        candidate = key[: MAX_KEY - len(suffix)] + suffix
    seen.add(candidate)
    return candidate


def _sidecar_caption(path: Path) -> str | None:
    """The caption beside a video, or None. ValueError, naming the file, where it is broken."""
    text, data = path.with_suffix(".txt"), path.with_suffix(".json")
    if text.is_file():
        return _read_utf8(text).strip()
    if data.is_file():
        try:
            content = json.loads(_read_utf8(data))
        except json.JSONDecodeError as error:
            raise ValueError(f"{data}: not JSON: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("caption"), str):
            raise ValueError(f"{data}: must be an object with a text field 'caption'")
        caption = content["caption"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # halves of a pair
        return caption.strip()
    return None


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8: {error}") from error


def _caption_table(path: Path) -> dict[str, str]:
    rows = _rows(path, ("file", "caption"))
    return {row["file"]: row["caption"] for row in rows}


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Rows of a CSV, read as they come (the OpenVid list has 767 MB); what a short row lacks is empty.

    FileNotFoundError if it is not there, ValueError, naming it, where it lacks a column or cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such CSV: {path}")
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, restval="")
        try:
            missing = [name for name in columns if name not in (reader.fieldnames or [])]
            if missing:
                raise ValueError(f"{path}: columns {missing} are missing; it has {reader.fieldnames}")
            yield from reader
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} must be a CSV in UTF-8; after line {reader.line_num}: {error}") from error


def _number(row: dict[str, str], column: str, manifest: str, absent: float) -> float:
    try:
        return float(row[column] or absent)
    except ValueError:
        raise ValueError(f"{manifest}: {column}={row[column]!r} must be a number") from None


# ------------------------------------------------------------------------------------------ OpenVid-1M
class OpenVidSource:
    """Clips of nkp37/OpenVid-1M, unzipped flat into one folder, chosen by its CSV (video, caption, frame,
    fps). Those of parts that were not downloaded are passed over.
    """

    @dataclass
    class Config:
        path: str = ""  # folder of the mp4 files
        manifest: str = ""  # OpenVid-1M.csv or OpenVidHD.csv
        min_frames: int = 81  # frames of the stored video
        aspect: float = 16 / 9  # width / height
        aspect_tolerance: float = 0.02  # relative
        max_clips: int | None = None  # stop after so many that are there; None = all
        crf: int = 8  # H.264 quality of the prepared mp4
        default_tracker: str = "cotracker3"
        default_grid: int = 50
        default_previews: str = "8"

    def __init__(self, cfg: Config) -> None:
        if not cfg.manifest:
            raise ValueError("source.manifest is empty; set it to data/train/OpenVid-1M.csv of nkp37/OpenVid-1M")
        if cfg.aspect <= 0:
            raise ValueError(f"source.aspect={cfg.aspect} must be above 0: width / height")
        _require_some("max_clips", cfg.max_clips)
        _require_quality(cfg.crf)
        self.cfg = cfg
        self.folder = _required_folder(cfg.path)

    def items(self) -> Iterator[SourceItem]:
        seen: set[str] = set()
        listed = (
            SourceItem(unused_key(clip_key(Path(row["video"]).stem), seen), row["caption"], row["video"],
                       path=str(self.folder / row["video"]))
            for row in _rows(Path(self.cfg.manifest), ("video", "caption", "frame"))
            if _number(row, "frame", self.cfg.manifest, absent=0) >= self.cfg.min_frames and row["caption"]
        )  # fmt: skip
        return islice(_those_there(listed, self.cfg, "min_frames"), self.cfg.max_clips)

    def render(self, item: SourceItem, geometry: ClipGeometry, target: Path) -> dict[str, Any]:
        info = probe_video(item.path or "")
        aspect = info.width / info.height
        if abs(aspect / self.cfg.aspect - 1) > self.cfg.aspect_tolerance:
            raise VideoError(f"aspect {info.width}x{info.height} = {aspect:.3f} is not {self.cfg.aspect:.3f}")
        if info.num_frames < self.cfg.min_frames:
            raise VideoError(f"{info.num_frames} frames are fewer than source.min_frames={self.cfg.min_frames}")
        return _render_video(item, geometry, target, self.cfg.crf)

    def write_manifest(self, folder: Path) -> None:
        """Nothing to add: the CSV stays where it is."""


def _require_some(name: str, limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"source.{name}={limit} must be >= 1, or null for all")


def _those_there(items: Iterator[SourceItem], cfg: Any, filter_name: str) -> Iterator[SourceItem]:
    """The items whose file is there; how many are not is told at the end. FileNotFoundError if none is, ValueError if
    the filter lets none pass.
    """
    found, absent = 0, 0
    for item in items:
        if os.path.isfile(item.path or ""):
            found += 1
            yield item
        else:
            absent += 1
    if not absent and not found:
        raise ValueError(
            f"{cfg.manifest} lists no clip with a text that source.{filter_name}={vars(cfg)[filter_name]} lets pass"
        )
    if not found:
        raise FileNotFoundError(f"source.path={cfg.path} holds none of the {absent} clips that {cfg.manifest} lists")
    if absent:
        log.warning("%d of %d clips of %s are not in %s", absent, absent + found, cfg.manifest, cfg.path)


# ------------------------------------------------------------------------------------------ VidProM
class VidPromSource:
    """Prompts of VidProM_unique.csv whose NSFW scores are all below a limit, and videos generated from them.

    `write_manifest` leaves the chosen prompts in prompts.jsonl: give it to any text-to-video model, store
    its videos as <path>/<uuid>.mp4, and run the same command again.
    """

    @dataclass
    class Config:
        path: str = ""  # folder of the generated videos
        manifest: str = ""  # VidProM_unique.csv
        max_nsfw: float = 0.2  # each of the six scores must be below this, 0..1
        max_prompts: int | None = None  # stop after so many; None = all
        crf: int = 8  # H.264 quality of the prepared mp4
        default_tracker: str = "cotracker3"
        default_grid: int = 50
        default_previews: str = "8"

    def __init__(self, cfg: Config) -> None:
        if not cfg.manifest:
            raise ValueError("source.manifest is empty; set it to VidProM_unique.csv of WenhaoWang/VidProM")
        _require_some("max_prompts", cfg.max_prompts)
        _require_quality(cfg.crf)
        self.cfg = cfg

    def prompts(self) -> Iterator[tuple[str, str]]:
        """(uuid, prompt) of the rows that pass, each uuid once: it names one video."""
        seen: set[str] = set()
        for row in _rows(Path(self.cfg.manifest), ("uuid", "prompt", *NSFW_COLUMNS)):
            scores = [_number(row, name, self.cfg.manifest, absent=1) for name in NSFW_COLUMNS]
            is_clean = all(score < self.cfg.max_nsfw for score in scores)  # nan is not
            if not is_clean or not row["prompt"].strip() or row["uuid"] in seen:
                continue
            if len(seen) == self.cfg.max_prompts:
                return
            seen.add(row["uuid"])
            yield row["uuid"], row["prompt"].strip()

    def items(self) -> Iterator[SourceItem]:
        folder = _required_folder(self.cfg.path)
        listed = (
            SourceItem(clip_key(uuid), prompt, uuid, path=str(folder / f"{uuid}.mp4"))
            for uuid, prompt in self.prompts()
        )
        return _those_there(listed, self.cfg, "max_nsfw")

    def render(self, item: SourceItem, geometry: ClipGeometry, target: Path) -> dict[str, Any]:
        return _render_video(item, geometry, target, self.cfg.crf)

    def write_manifest(self, folder: Path) -> None:
        with replace_file(folder / "prompts.jsonl") as fresh, fresh.open("w", encoding="utf-8") as file:
            for uuid, prompt in self.prompts():
                file.write(json.dumps({"uuid": uuid, "prompt": prompt}, ensure_ascii=False) + "\n")
