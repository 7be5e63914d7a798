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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from omegaconf import MISSING, DictConfig
from tqdm import tqdm

from data.app import build_config, require_folder
from data.trackers import TrackerConfig
from data.video import VideoWriter
from models.assemble import ModelConfig, build_text_encoder, load_for_inference, nearest_num_frames, validate
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
STOPPING = (signal.SIGTERM, signal.SIGHUP)  # of a scheduler or `kill`, and of a terminal that is closed


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
    inputs = read_inputs(settings, model_cfg, build_config(cfg.drag))
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
    if settings.drags is not None:
        for remark in drag_cfg.remarks():
            log.warning(remark)


def read_inputs(settings: StreamConfig, model_cfg: ModelConfig, drag_cfg: DragConfig) -> Inputs:
    """Read and check image, prompt, tracks and drags; builds no model.

    Raises:
        ValueError: tracks of another resolution, words that a closed vocabulary does not have, a length that the
            teacher cannot sample, drags or drag settings that do not fit, or an `out` that cannot be written or would
            replace what is read.
    """
    check_out(settings)
    if model_cfg.text.kind != "umt5":  # that one has weights, and takes any prompt
        build_text_encoder(model_cfg).encode([settings.prompt])
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
        drag_cfg.for_student(model_cfg.rollout.num_steps, model_cfg.dit.num_layers)
    drags = read_drags(settings, model_cfg, num_frames)
    return Inputs(load_first_frame(settings.image, model_cfg.clip), tracks, num_frames, drags, drag_cfg)


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
        ValueError: no label there, one that does not fit the frame, or one of frames that the video does not have.
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
        _check_shown(path.name, drag, label.block, chunk_frames, num_frames)
        drags.setdefault(label.block, []).append(drag)
    for block in drags.values():  # an edit makes the chunk again from which an animation starts
        block.sort(key=lambda drag: drag.mode != "edit")
    return drags


def _check_shown(name: str, drag: Drag, block: int, chunk_frames: int, num_frames: int) -> None:
    """Raises ValueError where the video does not have what a label drags after its first ``block`` chunks."""
    first = block * chunk_frames  # the latent frame after the one that the user dragged in
    if first == 1 and drag.mode == "edit":
        raise ValueError(f"{name} edits the given first frame alone, which no drag changes; drag a later chunk")
    if pixel_frames_of(first - 1, 1).stop > num_frames:
        raise ValueError(f"{name} drags after chunk {block}, but the video has {num_frames} frames")
    if drag.mode == "edit":
        return
    shown = sum(pixel_frames_of(first + frame, 1).start < num_frames for frame in range(drag.num_frames))
    remedy = f"num_frames={pixel_frames_of(first, drag.num_frames).stop} shows all"
    if not shown:
        raise ValueError(f"{name} animates what follows after the video of {num_frames} frames; {remedy}")
    if shown < drag.num_frames:
        log.warning("%s animates %d latent frames, of which %d are shown; %s", name, drag.num_frames, shown, remedy)


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

    What stops it (Ctrl-C, SIGTERM, a closed terminal, an error) leaves a video of the chunks until then, if there are
    any, and is raised again; a KeyboardInterrupt says what is left, all else is preceded by a log line that does.
    """
    stopped: BaseException | None = None
    with _handling(_terminate, *STOPPING):
        writer = VideoWriter(path, fps)
        try:
            with tqdm(total=total, unit="frame", disable=None) as bar:
                for chunk in chunks:
                    with _uninterrupted():
                        for frame in chunk:
                            writer.write(frame)
                    bar.update(len(chunk))
        except BaseException as error:
            stopped = error
        with _uninterrupted(), writer:
            if stopped is not None and writer.num_frames == 0:
                raise stopped
    if stopped is None:
        return
    left = f"{path} has the {writer.num_frames} of {total} frames made so far"
    if isinstance(stopped, KeyboardInterrupt):
        raise KeyboardInterrupt(left) from stopped
    log.error(left)
    raise stopped


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # as shells have it


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Puts off Ctrl-C and the others to the end of the block: half a frame would spoil the video."""
    waiting: list[int] = []
    with _handling(lambda number, frame: waiting.append(number), signal.SIGINT, *STOPPING):
        yield
    for number in waiting[:1]:
        signal.raise_signal(number)


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    """Signals go to a handler, but for those that are ignored or not Python's, and in the main thread alone."""
    is_main = threading.current_thread() is threading.main_thread()
    handled = [number for number in numbers if is_main and signal.getsignal(number) not in (signal.SIG_IGN, None)]
    former = [signal.signal(number, handler) for number in handled]
    try:
        yield
    finally:
        for number, each in zip(handled, former):
            signal.signal(number, each)
