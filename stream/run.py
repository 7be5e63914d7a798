"""`python -m stream`: an image, a prompt and tracks in, a video out, written chunk by chunk as it is
generated.

role=student streams any number of frames through `StreamSession`, with drags on the way; role=teacher samples one
clip of the model's length bidirectionally, for comparison. All inputs are read and checked before any weight is.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import MISSING, DictConfig
from tqdm import tqdm

from data.app import build_config, require_folder
from data.trackers import TrackerConfig
from data.video import VideoWriter
from models.assemble import ModelConfig, load_for_inference, nearest_num_frames, validate
from models.condition import pixel_frames_of
from models.device import pick_device
from models.diffusion.guidance import Guidance
from models.diffusion.noise import KeyedNoise
from models.diffusion.sampler import sample_teacher
from models.motion.tracks import Tracks
from models.wan.dit import WanDiT
from stream.codecs import DECODERS, Codecs
from stream.dragstream.config import DragConfig
from stream.dragstream.drag import Drag
from stream.dragstream.labels import DragLabel
from stream.session import StreamSession
from stream.track_buffer import ENDINGS, TrackBuffer
from stream.track_source import load_first_frame, load_track_source

log = logging.getLogger(__name__)

ROLES = ("student", "teacher")


@dataclass
class StreamConfig:
    """What is generated, and where it goes."""

    image: str = MISSING  # picture file, or a video whose first frame is taken; cropped and resized to model.clip
    prompt: str = ""
    tracks: str | None = None  # .npz, .json, or a video whose motion is taken; null: motion unspecified
    tracks_resize: bool = False  # crop and scale a track file of another resolution instead of refusing it
    drags: str | None = None  # DragStream label (.json), or a folder of them: each is applied after its chunk
    ending: str = "hold"  # beyond the last track frame: hold the points, or release them
    num_frames: int | None = None  # frames written; null: as many as the tracks have, else model.clip.num_frames
    role: str = "student"  # student: streamed, any length | teacher: one clip of model.clip.num_frames
    num_inference_steps: int = 50  # teacher: Euler steps
    decoder: str = "full"  # full | tiny (model.tiny_vae)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)  # for a video as source of tracks
    device: str = "auto"  # auto | cpu | cuda
    seed: int = 0  # of the noise and the track identities
    out: str = "outputs/stream.mp4"  # the video
    output_dir: str = "outputs/stream"  # Hydra's own files
    model: Any = None
    drag: Any = None  # conf/drag: how drags are made
    experiment: Any = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("role", self.role, ROLES),
            ("ending", self.ending, ENDINGS),
            ("decoder", self.decoder, DECODERS),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value} must be {' or '.join(allowed)}")
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames={self.num_frames} must be at least 1")
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={self.num_inference_steps} must be at least 1")


@dataclass(frozen=True)
class Inputs:
    """What the user gave, at the model's size."""

    first_frame: np.ndarray  # uint8 [H, W, 3]
    tracks: Tracks | None
    num_frames: int
    drags: Mapping[int, Sequence[Drag]] = field(default_factory=dict)  # by the number of chunks made before them
    drag_cfg: DragConfig = field(default_factory=DragConfig)


def main(cfg: DictConfig) -> int:
    """Entry of `python -m stream`."""
    settings, model_cfg = build_config(cfg, StreamConfig), build_config(cfg.model)
    validate(model_cfg)
    inputs = replace(read_inputs(settings, model_cfg), drag_cfg=build_config(cfg.drag))
    warn_of_idle_settings(settings, inputs.drag_cfg)
    device = pick_device(settings.device)
    model_cfg = model_cfg.on(device)
    dit = load_for_inference(model_cfg, settings.role, device)
    codecs = Codecs.load(model_cfg, device=device, tiny=settings.decoder == "tiny")
    make = stream_frames if settings.role == "student" else sample_frames
    started = time.perf_counter()
    write_frames(make(dit, codecs, inputs, settings), Path(settings.out), model_cfg.clip.fps, inputs.num_frames)
    seconds = time.perf_counter() - started
    print(f"{settings.out}: {inputs.num_frames} frames in {seconds:.1f} s, {inputs.num_frames / seconds:.1f} FPS")
    return 0


def warn_of_idle_settings(settings: StreamConfig, drag_cfg: DragConfig) -> None:
    """Say what was set and changes nothing."""
    if settings.role == "student" and settings.num_inference_steps != StreamConfig.num_inference_steps:
        log.warning(
            "num_inference_steps=%d has no effect with role=student: model.rollout says its steps",
            settings.num_inference_steps,
        )
    if settings.drags is not None and (idle := drag_cfg.without_effect()):
        log.warning("drag.%s have no effect with drag.iterations=0; set it to optimise", ", drag.".join(idle))


def read_inputs(settings: StreamConfig, model_cfg: ModelConfig) -> Inputs:
    """Read and check image and tracks; builds no model.

    Raises:
        ValueError: tracks of another resolution, a length that the teacher cannot sample, or an `out` that cannot be
            written or would replace what is read.
    """
    check_out(settings)
    tracks, clip_frames = None, model_cfg.clip.num_frames
    if settings.tracks is not None:
        wanted = clip_frames if settings.role == "teacher" else settings.num_frames
        tracks = load_track_source(
            settings.tracks, model_cfg, settings.tracker, resize=settings.tracks_resize, wanted=wanted
        )
    if settings.role == "teacher":
        if settings.num_frames not in (None, clip_frames):
            nearest = nearest_num_frames(model_cfg, settings.num_frames)
            raise ValueError(
                f"num_frames={settings.num_frames} must be {clip_frames} with role=teacher, which samples one clip of "
                f"model.clip; leave it out, set num_frames={nearest} model.clip.num_frames={nearest}, the nearest that "
                "a model of these chunks has, or take role=student"
            )
        num_frames = clip_frames
    else:
        num_frames = settings.num_frames or (clip_frames if tracks is None else tracks.num_frames)
    drags = read_drags(settings, model_cfg, num_frames)
    return Inputs(load_first_frame(settings.image, model_cfg.clip), tracks, num_frames, drags)


def check_out(settings: StreamConfig) -> None:
    """Raises ValueError for an `out` that is no mp4 to be, lies below a file, or is the image or the tracks."""
    out = Path(settings.out)
    if out.suffix.lower() != ".mp4" or out.is_dir():
        raise ValueError(f"out={settings.out} must be the name of an .mp4 file")
    require_folder(out.parent, f"out={settings.out}")
    for name in ("image", "tracks"):
        given = getattr(settings, name)
        if given is not None and Path(given).resolve() == out.resolve():
            raise ValueError(f"out={settings.out} is the {name} itself; name another file")


def read_drags(settings: StreamConfig, model_cfg: ModelConfig, num_frames: int) -> dict[int, list[Drag]]:
    """Labelled drags at the model's size, by the number of chunks made before each.

    Raises:
        ValueError: no label there, one that does not fit the frame, or one after the end of the video.
    """
    if settings.drags is None:
        return {}
    if settings.role != "student":
        raise ValueError("drags need role=student: they act on a running stream")
    where, clip, chunk_frames = Path(settings.drags), model_cfg.clip, model_cfg.rollout.chunk_frames
    if not where.exists():
        raise FileNotFoundError(f"drags={where}: no such file or folder")
    paths = sorted(where.glob("*_trajectory.json")) if where.is_dir() else [where]
    if not paths:
        raise ValueError(f"drags={where} has no *_trajectory.json; pass a label or a folder of labels")
    drags: dict[int, list[Drag]] = {}
    for path in paths:
        label = DragLabel.read(path)
        if label.prompt not in ("", settings.prompt):
            log.warning("%s was drawn for prompt=%r; the stream's is %r", path.name, label.prompt, settings.prompt)
        drag = label.drag_in(clip.height, clip.width, chunk_frames)
        if label.block < 1:
            raise ValueError(f"{path.name} drags before the first chunk; the number in its name must be at least 1")
        if pixel_frames_of(label.block * chunk_frames - 1, 1).stop > num_frames:
            raise ValueError(f"{path.name} drags after chunk {label.block}, but the video has {num_frames} frames")
        drags.setdefault(label.block, []).append(drag)
    for block in drags.values():  # an edit makes the chunk again from which an animation starts
        block.sort(key=lambda drag: drag.mode != "edit")
    return drags


def stream_frames(student: WanDiT, codecs: Codecs, inputs: Inputs, settings: StreamConfig) -> Iterator[np.ndarray]:
    """Chunks of frames as the student makes them: uint8 [n, H, W, 3]."""
    session = StreamSession(
        student, codecs, first_frame=inputs.first_frame, prompt=settings.prompt, tracks=inputs.tracks,
        num_frames=inputs.num_frames, ending=settings.ending, seed=settings.seed, drag=inputs.drag_cfg,
    )  # fmt: skip
    for chunk in session:
        for drag in inputs.drags.get(session.chunk_index, ()):
            edited = session.drag(drag).frames
            chunk = chunk if edited is None else edited[: len(chunk)]
        yield chunk


def sample_frames(teacher: WanDiT, codecs: Codecs, inputs: Inputs, settings: StreamConfig) -> Iterator[np.ndarray]:
    """The teacher's whole clip, as one chunk: uint8 [T, H, W, 3]."""
    model_cfg, noise = codecs.model_cfg, KeyedNoise(settings.seed)
    buffer = TrackBuffer(
        model_cfg.clip.height,
        model_cfg.clip.width,
        ending=settings.ending,
        rng=noise.generator("track_ids", 0),
    )
    if inputs.tracks is not None:
        buffer.push(inputs.tracks)
    condition = codecs.condition(
        codecs.encode_prompts([settings.prompt]),
        buffer.take(inputs.num_frames),
        codecs.encode_first_frames(inputs.first_frame[None]),
    )
    guidance = Guidance(model_cfg.guidance)
    log.info("teacher: %d steps, %s", settings.num_inference_steps, guidance.describe())
    with tqdm(total=settings.num_inference_steps, desc="denoise", unit="step", disable=None, leave=False) as bar:
        latents = sample_teacher(
            teacher,
            condition,
            guidance,
            num_inference_steps=settings.num_inference_steps,
            shift=model_cfg.rollout.shift,
            noise=noise,
            sample_ids=[0],
            latent_shape=model_cfg.latent_shape,
            progress=lambda done, total: bar.update(),
        )
    yield codecs.decode(latents)[0]


def write_frames(chunks: Iterator[np.ndarray], path: Path, fps: int, total: int) -> None:
    """Write frames to the mp4 as they come; the bar's rate is the FPS so far.

    Ctrl-C leaves a video of the chunks until then, and the KeyboardInterrupt says so.
    """
    interrupted = None
    with VideoWriter(path, fps) as writer, tqdm(total=total, unit="frame", disable=None) as bar:
        try:
            for chunk in chunks:
                with _uninterrupted():
                    for frame in chunk:
                        writer.write(frame)
                bar.update(len(chunk))
        except KeyboardInterrupt as stop:
            if writer.num_frames == 0:
                raise
            interrupted = stop
    if interrupted is not None:
        raise KeyboardInterrupt(f"{path} has the {writer.num_frames} of {total} frames made so far") from interrupted


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Puts off Ctrl-C to the end of the block: half a frame would spoil the video."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals come to the main thread
        return
    waiting: list[int] = []
    former = signal.signal(signal.SIGINT, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
    if waiting:
        raise KeyboardInterrupt
