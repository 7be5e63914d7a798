"""Video files: probing, reading at a stated size and rate (decord), writing (PyAV, H.264), drawing tracks.

A broken file is refused with a `VideoError` that says why. Because decoders can crash or hang on cut files,
the box structure of an mp4 is checked in plain Python before any decoder opens it.
Frames come as a player shows them: with square pixels, turned by the rotation that the file states. Left out: audio,
mirroring, variable frame rate (frames are taken by the average rate), HDR (refused).
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from models.condition import ClipGeometry
from models.files import bring_to_disk, fresh_path
from models.motion.tracks import centre_crop

Result = TypeVar("Result")

ISO_SUFFIXES = (".mp4", ".m4v", ".mov")
READ_BYTES = 1 << 24  # at a time, where only it matters whether a file can be read
MATROSKA_START = b"\x1a\x45\xdf\xa3"  # also of WebM, which some downloads name .mp4
DECODE_FRAMES = 8  # frames decoded at a time: bounds the memory of full-resolution frames
MAX_PIXEL_ASPECT = 8  # width / height of a pixel, or its inverse, beyond which a header must be wrong
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # transfer characteristics of ISO/IEC 23091-2


class VideoError(ValueError):
    """A video that cannot be used; the message is the reason."""


class UnreadableVideo(VideoError):
    """A video that cannot be read on this machine now; it may be usable the next time."""


@dataclass(frozen=True)
class VideoInfo:
    num_frames: int
    fps: float
    height: int  # px, as shown
    width: int  # px, as shown


def probe_video(path: str | Path) -> VideoInfo:
    """Size, rate and length of a video. Raises VideoError: empty, not a video, cut off, no frames."""
    source = Path(path)
    _check_file(source)
    return _first_that_works(source, source.name, lambda reader: _info(reader, source.name))


def read_video(source: str | Path | bytes, geometry: ClipGeometry | None = None, whole: bool = False) -> np.ndarray:
    """Decode a clip -> uint8 [T, H, W, 3] RGB.

    With a geometry: frames nearest to 0, 1/fps, 2/fps … for geometry.num_frames, cropped about the centre to
    its aspect, resized (area when shrinking, cubic when enlarging). Without: every frame at the size it is shown at.
    whole: geometry.num_frames frames from the first to the last, evenly spread, at whatever rate that is.
    Raises VideoError if the file is broken or too short, UnreadableVideo where the machine does not give it.
    """
    name = "video bytes" if isinstance(source, bytes) else Path(source).name
    if not isinstance(source, bytes):
        _check_file(Path(source))
    return _first_that_works(source, name, lambda reader: _read(reader, geometry, name, whole))


def _read(reader: DecordReader | PyavReader, geometry: ClipGeometry | None, name: str, whole: bool) -> np.ndarray:
    if geometry is None:
        return np.stack(reader.frames(range(reader.num_frames)))
    info = _info(reader, name)
    indices = _spread(info, geometry, name) if whole else _resampled(info, geometry, name)
    frames: list[np.ndarray] = []
    for start in range(0, len(indices), DECODE_FRAMES):
        decoded = reader.frames(indices[start : start + DECODE_FRAMES])
        frames.extend(resize_frame(frame, geometry.height, geometry.width) for frame in decoded)
    return np.stack(frames)


def resize_frame(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Centre crop to the aspect of height x width, then resize: uint8 [h, w, 3] -> [height, width, 3]."""
    have_h, have_w = frame.shape[:2]
    if (have_h, have_w) == (height, width):
        return frame
    top, left, crop_h, crop_w = centre_crop((have_h, have_w), (height, width))
    crop = frame[top : top + crop_h, left : left + crop_w]
    return _resize(crop, height, width, is_smaller=max(height / have_h, width / have_w) < 1)


def _resize(frame: np.ndarray, height: int, width: int, is_smaller: bool) -> np.ndarray:
    import cv2

    return cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA if is_smaller else cv2.INTER_CUBIC)


# ------------------------------------------------------------------------------------------ reading
class DecodeFailure(Exception):
    """One decoder gave up; another may not."""


class DecordReader:
    """Random access by decord, with one thread; drop it after use, it decodes ahead while it lives.

    Files that it would show otherwise than a player does are refused (`_misread_by_decord`).
    """

    def __init__(self, source: str | Path | bytes) -> None:
        import decord

        decord.logging.set_level(decord.logging.FATAL)  # the reason is in the exception
        # decord takes no file name that is not Unicode
        self._errors = (decord.DECORDError, RuntimeError, IndexError, UnicodeEncodeError)
        try:
            self._reader = decord.VideoReader(_for_ffmpeg(source), num_threads=1)
            self.num_frames, self.fps = len(self._reader), float(self._reader.get_avg_fps())
        except self._errors as error:
            raise DecodeFailure(_first_line(error)) from error
        if (reason := _misread_by_decord(source, self.num_frames)) is not None:
            raise DecodeFailure(reason)

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        try:
            return list(self._reader.get_batch(list(indices)).asnumpy().copy())
        except self._errors as error:
            raise DecodeFailure(f"frames {indices[0]}..{indices[-1]}: {_first_line(error)}") from error


class PyavReader:
    """Access in order by PyAV, for what decord refuses (AV1; frames 48 px wide) or misreads; drop it after use, it
    keeps the file open. Only frames up to the last one asked for are decoded, and none is kept but the last.
    """

    def __init__(self, source: str | Path | bytes) -> None:
        import av

        self._source = source
        self._errors = (av.FFmpegError, IndexError, ValueError)
        try:
            with _open(source) as container:
                if not container.streams.video:
                    raise DecodeFailure("it has no video stream")
                _refuse_hdr(container)
                self.fps = float(container.streams.video[0].average_rate or 0)
                self._pixel_aspect = _pixel_aspect(container)
                self.num_frames, _ = _walk(container)
            self._rewind()
        except self._errors as error:
            raise DecodeFailure(_first_line(error)) from error

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Frames at ascending indices; below the last index of the call before, the video is decoded anew."""
        if indices[0] < self._index:
            self._rewind()
        try:
            return [self._frame(index) for index in indices]
        except self._errors as error:
            raise DecodeFailure(f"frames {indices[0]}..{indices[-1]}: {_first_line(error)}") from error
        except StopIteration:
            raise DecodeFailure(f"the video ends after frame {self._index}, and {indices[-1]} is needed") from None

    def _frame(self, index: int) -> np.ndarray:
        while self._index < index:
            self._decoded = next(self._decoder)
            self._index += 1
        stored = self._decoded.to_ndarray(format="rgb24")
        shown = _with_square_pixels(stored, self._pixel_aspect)
        return np.rot90(shown, self._decoded.rotation // 90)  # both anticlockwise

    def _rewind(self) -> None:
        self._decoder = _open(self._source).decode(video=0)
        self._index = -1


def _open(source: str | Path | bytes) -> Any:
    import av

    return av.open(_for_ffmpeg(source))


def _for_ffmpeg(source: str | Path | bytes) -> io.BytesIO | str:
    """What decoders and encoders open: a path is made absolute, since they take "12:30.mp4" for an address."""
    return io.BytesIO(source) if isinstance(source, bytes) else os.path.abspath(source)


def _walk(container: Any) -> tuple[int, bool]:
    """Number of frames to be shown, and whether some are shown before the keyframe that precedes them in the file (open
    GOPs: x265's default, broadcast H.264).

    By the packets: a header may state no number (Matroska), that of the first fragment, or one with what an edit list
    cuts.
    """
    num_shown, has_open_gops = 0, False
    keyframe_pts: int | None = None
    for packet in container.demux(video=0):
        num_shown += packet.size > 0 and not packet.is_discard
        if packet.pts is None:
            continue
        if packet.is_keyframe:
            keyframe_pts = packet.pts
        elif keyframe_pts is not None and packet.pts < keyframe_pts:
            has_open_gops = True
    return num_shown, has_open_gops


def _pixel_aspect(container: Any) -> Fraction:
    """Width / height at which a pixel is shown. 1 where the file states none, or one that makes less than a column of
    the frame: so encoders note that they rounded its width. Raises DecodeFailure if it is absurd.
    """
    stream = container.streams.video[0]
    aspect = stream.sample_aspect_ratio or Fraction(1)
    if not Fraction(1, MAX_PIXEL_ASPECT) <= aspect <= MAX_PIXEL_ASPECT:
        raise DecodeFailure(f"pixels {aspect} times as wide as high must be 1/{MAX_PIXEL_ASPECT} to {MAX_PIXEL_ASPECT}")
    return aspect if abs(aspect - 1) * stream.codec_context.width >= 1 else Fraction(1)


def _refuse_hdr(container: Any) -> None:
    """Raises DecodeFailure: taken for the usual curve, the curves of HDR give dark and washed out frames."""
    transfer = HDR_TRANSFERS.get(container.streams.video[0].codec_context.color_trc)
    if transfer is not None:
        raise DecodeFailure(
            f"HDR ({transfer}) is not supported; convert it to SDR, for example with ffmpeg's tonemap filter"
        )


def _with_square_pixels(frame: np.ndarray, pixel_aspect: Fraction) -> np.ndarray:
    """Stretch or shrink the width: uint8 [H, W, 3] -> [H, W * pixel_aspect, 3]."""
    height, width = frame.shape[:2]
    shown_width = max(1, round(width * pixel_aspect))
    return frame if shown_width == width else _resize(frame, height, shown_width, is_smaller=shown_width < width)


def _misread_by_decord(source: str | Path | bytes, num_frames: int) -> str | None:
    """What decord, which counts `num_frames`, would show otherwise than a player. None: nothing, or PyAV cannot say.

    Where an edit list cuts frames, it shows the last one again and again in their stead. In open GOPs it gives other
    frames than asked for as soon as some are skipped. It takes all pixels for square.
    """
    import av

    try:
        with _open(source) as container:
            _refuse_hdr(container)
            pixel_aspect = _pixel_aspect(container)
            num_shown, has_open_gops = _walk(container)
    except (av.FFmpegError, IndexError, ValueError):
        return None
    if num_shown != num_frames:
        return f"decord counts {num_frames} frames where {num_shown} are to be shown"
    if has_open_gops:
        return "decord misses frames of open GOPs: some are shown before the keyframe that precedes them in the file"
    if pixel_aspect != 1:
        return f"decord takes pixels for square that are {pixel_aspect} times as wide as high"
    return None


def _first_that_works(source: str | Path | bytes, name: str, use: Callable[[Any], Result]) -> Result:
    try:
        return use(DecordReader(source))
    except DecodeFailure as first:
        try:
            return use(PyavReader(source))
        except DecodeFailure as second:
            _require_readable(source, second)
            reasons = dict.fromkeys((str(first), str(second)))  # one where both give the same
            raise VideoError(f"{name} is not decodable as video: {'; '.join(reasons)}") from second


def _require_readable(source: str | Path | bytes, failure: DecodeFailure) -> None:
    """Raises UnreadableVideo where it was not the file that made the decoders fail: memory is short, or the file cannot
    be read to its end, whatever is in it.
    """
    if isinstance(failure.__cause__, MemoryError):
        raise UnreadableVideo("out of memory") from failure
    if isinstance(source, bytes):
        return
    try:
        with open(source, "rb") as file:
            while file.read(READ_BYTES):
                pass
    except OSError as error:
        raise UnreadableVideo(f"cannot be read: {error}") from error


def _info(reader: DecordReader | PyavReader, name: str) -> VideoInfo:
    if reader.num_frames < 1 or reader.fps <= 0:
        raise VideoError(f"{name} has no frames (frames={reader.num_frames}, fps={reader.fps})")
    height, width = reader.frames([0])[0].shape[:2]
    return VideoInfo(reader.num_frames, reader.fps, height, width)


def _resampled(info: VideoInfo, geometry: ClipGeometry, name: str) -> list[int]:
    available = int((info.num_frames - 1) * geometry.fps / info.fps + 1e-6) + 1
    if available < geometry.num_frames:
        raise VideoError(
            f"{name} is too short: {info.num_frames} frames at {info.fps:.4g} fps give {available} at "
            f"{geometry.fps} fps, and {geometry.num_frames} are needed"
        )
    step = info.fps / geometry.fps
    # halves always up: rounded to even ones, 24 fps would be 16 by steps of 2, 1, 1, 2
    return [min(math.floor(i * step + 0.5), info.num_frames - 1) for i in range(geometry.num_frames)]


def _spread(info: VideoInfo, geometry: ClipGeometry, name: str) -> list[int]:
    if info.num_frames < geometry.num_frames:
        raise VideoError(f"{name} has {info.num_frames} frames; {geometry.num_frames} needed")
    return np.linspace(0, info.num_frames - 1, geometry.num_frames).round().astype(int).tolist()


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].split("] ")[-1][:200] if lines else type(error).__name__


def _check_file(path: Path) -> None:
    try:
        if not path.is_file():
            raise VideoError(f"no such file: {path}")
        size = path.stat().st_size
        if size == 0:
            raise VideoError("empty file (0 bytes)")
        if path.suffix.lower() in ISO_SUFFIXES:
            with path.open("rb") as file:
                if file.read(len(MATROSKA_START)) != MATROSKA_START:
                    _check_boxes(file, size)
    except OSError as error:
        raise UnreadableVideo(f"cannot be read: {error}") from error


def _check_boxes(file: io.BufferedReader, size: int) -> None:
    """Walk the top-level boxes of an ISO media file (ISO/IEC 14496-12, 4.2)."""
    seen: list[str] = []
    position = 0
    while position + 8 <= size:
        file.seek(position)
        length, kind = struct.unpack(">I4s", file.read(8))
        if not seen and kind not in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"pnot"):
            raise VideoError("not an mp4 file: no ISO media header at the start")
        name = kind.decode("latin-1")
        if length == 1:
            length = struct.unpack(">Q", file.read(8).rjust(8, b"\0"))[0]
        elif length == 0:  # "to the end of the file"
            length = size - position
        if length < 8 or position + length > size:
            missing = "" if "moov" in seen else ", moov (the frame index) missing"
            raise VideoError(
                f"truncated: box '{name}' at byte {position} states {length} bytes, the file has "
                f"{size - position} left{missing}"
            )
        seen.append(name)
        position += length
    if not seen:
        raise VideoError("not an mp4 file: no ISO media header at the start")
    if "moov" not in seen:
        raise VideoError(f"truncated: moov (the frame index) missing; boxes found: {', '.join(seen)}")


# ------------------------------------------------------------------------------------------ writing
class VideoWriter:
    """H.264 mp4 written frame by frame; appears under its name only once closed without an error.

    frames: uint8 [H, W, 3] RGB, H and W even (yuv420p). crf: 0 (lossless) .. 51.
    """

    def __init__(self, path: str | Path, fps: float, crf: int = 12, preset: str = "veryfast") -> None:
        import av

        self.path = Path(path)
        self.partial = fresh_path(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._av = av
        self._container = av.open(_for_ffmpeg(self.partial), "w", format="mp4")
        self._stream = self._container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        # x264's macroblock tree reads memory that nobody wrote when frames are small: the same frames became
        # other bytes from one run to the next. Without it the file depends on its frames only.
        self._stream.options = {"crf": str(crf), "preset": preset, "x264-params": "mbtree=0"}
        self._stream.thread_count = 1
        self._stream.pix_fmt = "yuv420p"
        self.num_frames = 0

    def write(self, frame: np.ndarray) -> None:
        height, width = self._checked_size(frame)
        if self.num_frames == 0:
            self._stream.height, self._stream.width = height, width
        elif (self._stream.height, self._stream.width) != (height, width):
            raise ValueError(
                f"{self.path.name}: frame {self.num_frames} is {height}x{width}, the first was "
                f"{self._stream.height}x{self._stream.width}; all frames of a video must agree"
            )
        video_frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        for packet in self._stream.encode(video_frame):
            self._container.mux(packet)
        self.num_frames += 1

    def _checked_size(self, frame: np.ndarray) -> tuple[int, int]:
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"frame {frame.shape} {frame.dtype} must be [H, W, 3] uint8")
        height, width = frame.shape[:2]
        if height % 2 or width % 2:
            raise ValueError(f"frame size {height}x{width} must be even (yuv420p); resize or crop it first")
        return height, width

    def close(self) -> None:
        if self.num_frames == 0:
            self.discard()
            raise ValueError(f"{self.path.name}: no frame was written")
        try:
            for packet in self._stream.encode():
                self._container.mux(packet)
            self._container.close()
            bring_to_disk(self.partial)
            self.partial.replace(self.path)
        except BaseException:  # a full disk must not stay full of what nobody can read
            self.discard()
            raise

    def discard(self) -> None:
        try:
            self._container.close()
        finally:
            self.partial.unlink(missing_ok=True)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float, crf: int = 12) -> None:
    """Write uint8 frames [H, W, 3] (an array [T, H, W, 3] or any iterable) to an mp4."""
    with VideoWriter(path, fps, crf) as writer:
        for frame in frames:
            writer.write(frame)


# ------------------------------------------------------------------------------------------ drawing
def track_colors(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Colour by initial position: points [N, 2] px -> uint8 [N, 3]; hue by angle, saturation by distance."""
    import cv2

    if len(points) == 0:
        return np.zeros((0, 3), np.uint8)
    offset = points / np.array([width, height]) - 0.5
    hue = (np.arctan2(offset[:, 1], offset[:, 0]) / (2 * np.pi) % 1 * 179).astype(np.uint8)
    saturation = np.clip(110 + 290 * np.linalg.norm(offset, axis=1), 0, 255).astype(np.uint8)
    hsv = np.stack([hue, saturation, np.full_like(hue, 255)], axis=1)
    return cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]


def draw_tracks_on(frames: np.ndarray, points: np.ndarray, visibility: np.ndarray, tail_frames: int = 8) -> np.ndarray:
    """Draw tracks with fading tails: frames uint8 [T, H, W, 3], points [T, N, 2] px, visibility [T, N] ->
    copy.

    A visible point is a disc in the colour of its initial position; its last `tail_frames` steps fade out.
    """
    import cv2

    height, width = frames.shape[1:3]
    colors = [tuple(int(c) for c in color) for color in track_colors(points[0], height, width)]
    radius, shift = max(1, round(height / 160)), 4
    # cv2 takes integers with `shift` fractional bits and puts pixel centres on integers
    fixed = np.round((np.nan_to_num(points).clip(-1e4, 1e4) - 0.5) * 2**shift).astype(np.int64)
    drawn = []
    for t, frame in enumerate(frames):
        canvas = frame.copy()
        for s in range(max(0, t - tail_frames), t):
            layer = canvas.copy()
            for n in np.flatnonzero(visibility[s] & visibility[s + 1]):
                start, end = (tuple(int(v) for v in fixed[i, n]) for i in (s, s + 1))
                cv2.line(layer, start, end, colors[n], 1, cv2.LINE_AA, shift)
            fade = 1 - (t - s) / (tail_frames + 1)
            canvas = cv2.addWeighted(layer, fade, canvas, 1 - fade, 0)
        for n in np.flatnonzero(visibility[t]):
            center = tuple(int(v) for v in fixed[t, n])
            cv2.circle(canvas, center, radius << shift, colors[n], -1, cv2.LINE_AA, shift)
        drawn.append(canvas)
    return np.stack(drawn)
