"""Prepares a data set in four steps, each resumable: render, track, encode, pack.

    <out>/clips/<key>.mp4, .json        render: the clip at model.clip size, caption and origin
    <out>/tracks/<key>.npz              track: points and visibility of a grid of queries on frame 0
    <out>/tracks/about.json             track: the tracker that was last asked for
    <out>/previews/<key>.preview.mp4    track: the first clips with their tracks drawn
    <out>/encoded/<key>.npz             encode: latents, text embedding, CLIP features
    <out>/shards/*.tar, index.json      pack: what training reads
    <out>/rejected.jsonl                file, step and reason of every clip left out

A finished item leaves a marker with a hash of the settings that made it, so a second run does only what is
missing or was made with other settings. A source file is known by its name within the source, its size and its time: a
folder may move, and another caption costs its text embedding alone. Clips that are not asked for now keep what was made
of them and are not packed. Files appear under their name only when complete and on disk. Tracks and latents of an
earlier rendering, tracks by another tracker than the last step=track had, or latents of other weights than the last
step=encode had, are never packed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from tqdm import tqdm

from data.app import build_config, build_target, claim, require_folder
from data.encode import EncodeConfig, encode_clips, encoded_now, fingerprint, process_share, require_encoders
from data.progress import (
    STEPS,
    Call,
    accepted_keys,
    done_keys,
    forget,
    has_products,
    is_made_now,
    keys_of_origins,
    mark,
    marker,
    products,
    read_arrays,
    read_rendered,
    read_sidecar,
    rejected_keys,
    run_items,
    stamp,
    unmark,
    worker_number,
    write_rejected,
)
from data.shards import npy_bytes, write_shards
from data.sources import Source, SourceItem, SpritesSource, UnusableItem, require_apart, scene_of, unused_key
from data.trackers import TrackerConfig, build_tracker, grid_queries, on_own_device, require_available
from data.video import UnreadableVideo, draw_tracks_on, write_video
from models.condition import ClipGeometry
from models.device import pick_device
from models.files import file_state, write_json
from models.motion.tracks import Tracks

log = logging.getLogger(__name__)

# settings of sources: what the frames of a clip depend on, and what only decides whether it is taken
FRAME_SETTINGS = ("crf", "world", "aspect")
FILTER_SETTINGS = ("aspect_tolerance", "min_frames")
LACKS = {  # step to run again -> why its files are not packed
    "render": "height, width, num_frames or fps is not that of model.clip, or files of the clip are gone; run step=all "
    "with this model",
    "track": "tracks are missing, of an earlier rendering or not by the tracker of the last step=track; run "
    "step=track, then step=encode and step=pack",
    "encode": "latents are missing, of an earlier rendering or not by the weights and dtype of the last step=encode; "
    "run step=encode, then step=pack",
}


@dataclass
class PrepareConfig:
    step: str = "all"  # render | track | encode | pack | all
    out: str = "outputs/data"  # folder of the data set
    output_dir: str = "outputs/data/run"  # Hydra's own files
    num_workers: int = 0  # processes for render and track; 0 = none beside this one
    previews: str = "8"  # clips that get a preview with tracks: all, or a number
    max_shard_mb: float = 1000.0  # size at which a new shard begins
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    source: Any = None
    model: Any = None
    experiment: Any = None

    def __post_init__(self) -> None:
        if self.step not in (*STEPS, "all"):
            raise ValueError(f"step={self.step!r} must be one of {(*STEPS, 'all')}")
        if not self.out.strip():
            raise ValueError("out is empty; set it to the folder of the data set")
        if self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers} must be at least 0; 0 works in this process")
        if self.previews != "all" and not self.previews.isdecimal():
            raise ValueError(f"previews={self.previews!r} must be 'all' or a number >= 0")
        if self.max_shard_mb <= 0:
            raise ValueError(f"max_shard_mb={self.max_shard_mb} must be above 0")


@dataclass(frozen=True)
class Job:
    """All that one item needs in any process."""

    out: Path
    geometry: ClipGeometry
    source: Source
    tracker: TrackerConfig


def main(cfg: DictConfig) -> int:
    """Entry of `python -m data`. Exit code 1 if no clip at all came through a step; the steps after it are not run.

    One command at a time makes a data set: two would take each other's clips, and pack each other's shards.
    """
    settings = build_config(cfg, PrepareConfig)
    rank, world = process_share()
    if world > 1 and settings.step != "encode":
        raise ValueError(
            f"step={settings.step} under {world} processes must be step=encode, the only one that they share; "
            "run the others without torchrun (they have num_workers)"
        )
    steps = STEPS if settings.step == "all" else (settings.step,)
    if "encode" in steps:
        settings.encode.device = str(pick_device(settings.encode.device, "encode.device"))
        require_encoders(cfg.model)
    out = Path(settings.out)
    require_folder(out, f"out={settings.out}")
    job = Job(out, ClipGeometry(**cfg.model.clip), build_target(cfg.source), settings.tracker)
    if "track" in steps:
        require_available(settings.tracker, has_scene=isinstance(job.source, SpritesSource))
    if "render" in steps:
        require_apart(job.source, settings.out)
    out.mkdir(parents=True, exist_ok=True)
    with claim(out, f"out={settings.out}") if rank == 0 else nullcontext():
        for step in steps:
            alive = run_step(step, settings, job, cfg)
            if rank == 0:
                write_rejected(out)
            if not alive:
                return 1
    return 0


def run_step(step: str, settings: PrepareConfig, job: Job, cfg: DictConfig) -> int:
    """Run one step over all its items; returns the number of clips it leaves usable."""
    if step == "encode":
        return encode_clips(settings.encode, job.out, cfg.model, may_skip=settings.step == "all")
    if step == "pack":
        return pack(settings, job.out, job.geometry)
    calls = render_calls(job) if step == "render" else track_calls(job)
    usable = run_items(step, job.out, calls, settings.num_workers)
    if step == "track" and (previews := preview_calls(job, settings.previews)):
        run_items("preview", job.out, previews, settings.num_workers)
    return usable


def render_calls(job: Job) -> list[Call]:
    job.source.write_manifest(job.out)
    made_by = asdict(job.geometry), _source_settings(job, FRAME_SETTINGS)
    filters = _source_settings(job, FILTER_SETTINGS)
    calls = []
    for item in keep_keys(job.out, list(job.source.items())):
        keep_caption(job.out, item)
        described = asdict(item)
        frames_of = {name: described[name] for name in described.keys() - {"caption", "path"}}
        clip = stamp(*made_by, frames_of, file_state(item.path))
        made_with = stamp(clip, filters) if filters else clip
        calls.append(Call(item.key, item.origin, made_with, render_item, (job, item), clip))
    return calls


def keep_keys(out: Path, items: list[SourceItem]) -> list[SourceItem]:
    """The items under the keys that their files were rendered as.

    Names that differ only in what keys drop (all of "猫") are numbered in their order, which one more file moves.
    """
    keys = {item.key for item in items}
    if not any(key.rpartition("-")[0] in keys for key in keys):
        return items
    kept = keys_of_origins(out, "render", {item.origin for item in items})
    taken = {key for own in kept.values() for key in own}
    renamed = []
    for item in items:
        if own := kept.get(item.origin):
            key = item.key if item.key in own else own[0]
            own.remove(key)
        else:
            key = unused_key(item.key, taken)
        renamed.append(replace(item, key=key))
    return renamed


def keep_caption(out: Path, item: SourceItem) -> None:
    """Bring the caption beside a clip that was rendered up to date; another one has to be encoded anew."""
    if isinstance(item, UnusableItem):
        return
    path = _sidecar_path(out, item.key)
    try:
        sidecar = read_sidecar(out, item.key) if path.is_file() else {}
    except UnreadableVideo:
        unmark(out, "render", item.key)  # to be made anew
        sidecar = {}
    if sidecar.get("caption") == item.caption:
        return
    unmark(out, "encode", item.key)
    if sidecar:
        write_json(path, sidecar | {"caption": item.caption})


def track_calls(job: Job) -> list[Call]:
    made_by = _tracker_settings(job.tracker)
    (job.out / "tracks").mkdir(parents=True, exist_ok=True)
    write_json(job.out / "tracks" / "about.json", {"tracker": made_by})
    calls = []
    for key in done_keys(job.out, "render"):
        rendered = marker(job.out, "render", key)
        clip = rendered["clip"]
        calls.append(Call(key, rendered["origin"], stamp(made_by, clip), track_item, (job, key), clip))
    return calls


def _tracker_settings(tracker: TrackerConfig) -> dict[str, Any]:
    """What its tracks depend on: of a checkpoint the content, not the place."""
    settings = tracker.decisive()
    if settings.get("checkpoint"):
        settings["checkpoint"] = fingerprint(settings["checkpoint"])
    return settings


def preview_calls(job: Job, previews: str) -> list[Call]:
    """Of the first clips that have tracks."""
    keys = done_keys(job.out, "track")
    calls = []
    for key in keys if previews == "all" else keys[: int(previews)]:
        tracked = marker(job.out, "track", key)
        calls.append(Call(key, tracked["origin"], tracked["stamp"], preview_item, (job, key)))
    return calls


# ------------------------------------------------------------------------------------------ one item
def render_item(job: Job, item: SourceItem) -> None:
    clip = products(job.out, "render", item.key)[0]
    clip.parent.mkdir(parents=True, exist_ok=True)
    unmark(job.out, "render", item.key)
    sidecar = job.source.render(item, job.geometry, clip)
    content = {"caption": item.caption, **asdict(job.geometry), **sidecar}
    write_json(_sidecar_path(job.out, item.key), content)


def track_item(job: Job, key: str) -> None:
    products(job.out, "preview", key)[0].unlink(missing_ok=True)  # it shows the tracks that this replaces
    frames = read_rendered(job.out, key)
    height, width = frames.shape[1:3]
    scene = scene_of(read_sidecar(job.out, key))
    queries = grid_queries(height, width, job.tracker.rows, job.tracker.cols)
    tracker = build_tracker(on_own_device(job.tracker, worker_number()), scene)
    points, visibility = tracker.track(frames, queries)
    unmark(job.out, "track", key)
    Tracks.from_arrays(points, visibility, height, width).save(job.out / "tracks" / f"{key}.npz")


def preview_item(job: Job, key: str) -> None:
    tracks = read_arrays(job.out, "track", key)
    drawn = draw_tracks_on(read_rendered(job.out, key), tracks["points"], tracks["visibility"])
    write_video(products(job.out, "preview", key)[0], drawn, job.geometry.fps)


def _sidecar_path(out: Path, key: str) -> Path:
    return products(out, "render", key)[1]


def _source_settings(job: Job, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in asdict(job.source.cfg).items() if name in names}


# ------------------------------------------------------------------------------------------ pack
def pack(settings: PrepareConfig, out: Path, geometry: ClipGeometry) -> int:
    """Write the shards of the clips of this geometry with current tracks; if any is encoded, only of those with
    current latents.

    Current: made from the clip as it is rendered now, by what tracks/about.json and encoded/about.json name (the index
    repeats the latter), and still there. The other clips are left out and listed in rejected.jsonl with the step to run
    again. If nothing can be packed, the shards stay as they are.
    """
    rendered = accepted_keys(out, "render")
    fitting = [key for key in rendered if has_products(out, "render", key) and has_geometry(out, key, geometry)]
    tracked = tracked_now(out, fitting)
    encoded = set(encoded_now(out, tracked))
    keys = [key for key in tracked if key in encoded] if encoded else tracked
    forget(out, "pack")
    _leave_out(out, "render", sorted(set(rendered) - set(fitting)))
    _leave_out(out, "track", sorted(set(fitting) - set(tracked)))
    if encoded:
        _leave_out(out, "encode", sorted(set(tracked) - encoded))
    elif stale := done_keys(out, "encode"):
        log.warning("pack: shards without latents, though %d clips were encoded: %s", len(stale), LACKS["encode"])
    if not keys:
        log.error("pack: no clip can be packed; %s is left as it is", out / "shards")
        return 0
    if not encoded:
        for key in rejected_keys(out, "encode"):  # packed all the same
            unmark(out, "encode", key)
    note = json.loads((out / "encoded" / "about.json").read_text()) if encoded else {}
    index = write_shards(
        tqdm(
            _whole_samples(out, keys, with_latents=bool(encoded)),
            total=len(keys),
            desc="pack",
            unit="clip",
        ),
        out / "shards",
        geometry,
        max_shard_bytes=settings.max_shard_mb * 1e6,
        text_len=note.get("text_len"),
        fingerprints=note.get("fingerprints"),
    )
    packed = len(index.samples)
    log.info("pack: %d clips in %d shards, fields %s", packed, len(index.shards), ", ".join(index.fields))
    return packed


def has_geometry(out: Path, key: str, geometry: ClipGeometry) -> bool:
    """Whether a clip was rendered at this size, length and rate, by its sidecar; not if that is damaged."""
    try:
        sidecar = read_sidecar(out, key)
    except UnreadableVideo:
        return False
    return all(sidecar[name] == value for name, value in asdict(geometry).items())


def tracked_now(out: Path, keys: Sequence[str]) -> list[str]:
    """Those of the keys with tracks of the clip as it is rendered now, by the tracker that tracks/about.json names."""
    about = out / "tracks" / "about.json"
    if not about.is_file():
        return []
    made_by = json.loads(about.read_text())["tracker"]
    return [key for key in keys if is_made_now(out, "track", key, made_by)]


def _leave_out(out: Path, step: str, keys: list[str]) -> None:
    """Note the clips that lack what a step makes; those that the step rejected are listed by it."""
    listed = set(rejected_keys(out, step))
    keys = [key for key in keys if key not in listed]
    for key in keys:
        mark(out, "pack", key, "", marker(out, "render", key)["origin"], LACKS[step])
    if keys:
        log.warning("pack: %d clips left out, e.g. %s: %s", len(keys), keys[0], LACKS[step])


def _whole_samples(out: Path, keys: Sequence[str], with_latents: bool) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members) of the clips; those with damaged files are noted and passed over."""
    for key in keys:
        try:
            yield key, _members(out, key, with_latents)
        except UnreadableVideo as error:
            log.warning("pack: %s left out: %s", key, error)
            mark(out, "pack", key, "", marker(out, "render", key)["origin"], str(error))


def _members(out: Path, key: str, with_latents: bool) -> dict[str, bytes]:
    video, sidecar = products(out, "render", key)
    tracks = read_arrays(out, "track", key)
    members = {
        "mp4": video.read_bytes(),
        "json": sidecar.read_bytes(),
        "tracks.npy": npy_bytes(tracks["points"].astype(np.float32)),
        "visibility.npy": npy_bytes(tracks["visibility"]),
    }
    if with_latents:
        members |= {f"{name}.npy": npy_bytes(array) for name, array in read_arrays(out, "encode", key).items()}
    return members
