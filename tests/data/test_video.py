"""Video files: broken ones are refused with a reason, good ones come at the stated size and rate."""

from __future__ import annotations

import builtins
import errno
import os
import struct
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from data import video
from data.video import (
    DecodeFailure,
    DecordReader,
    PyavReader,
    UnreadableVideo,
    VideoError,
    VideoInfo,
    VideoWriter,
    draw_tracks_on,
    probe_video,
    read_video,
    resize_frame,
    write_video,
)
from models.condition import ClipGeometry
from models.motion.tracks import Tracks

REPO = Path(__file__).parents[2]

BEAR = Path(__file__).parents[3] / "shared/data/clips/bear.mp4"


def moving_bar(num_frames: int = 12, height: int = 48, width: int = 64) -> np.ndarray:
    frames = np.full((num_frames, height, width, 3), 40, np.uint8)
    for t in range(num_frames):
        frames[t, :, 4 * t : 4 * t + 8] = (220, 60, 30)
    return frames


@pytest.fixture
def bar_file(tmp_path):
    write_video(tmp_path / "bar.mp4", moving_bar(), 12, crf=4)
    return tmp_path / "bar.mp4"


def test_round_trip(bar_file):
    frames = read_video(bar_file)
    assert frames.shape == (12, 48, 64, 3) and frames.dtype == np.uint8
    assert np.abs(frames.astype(int) - moving_bar()).mean() < 6  # chroma is halved by yuv420p
    assert np.array_equal(frames, read_video(bar_file.read_bytes()))


def test_probe(bar_file):
    info = probe_video(bar_file)
    assert (info.num_frames, info.fps, info.height, info.width) == (12, 12.0, 48, 64)


def test_resampling_takes_the_nearest_frames_in_time(bar_file):
    half_rate = read_video(bar_file, ClipGeometry(48, 64, 5, 6))
    assert np.array_equal(half_rate, read_video(bar_file)[[0, 2, 4, 6, 8]])


def test_frames_half_way_between_two_are_picked_at_even_steps():
    info = VideoInfo(num_frames=40, fps=24.0, height=48, width=64)
    assert video._resampled(info, ClipGeometry(48, 64, 9, 16), "film") == [0, 2, 3, 5, 6, 8, 9, 11, 12]


def test_too_short_is_refused_with_the_numbers(bar_file):
    with pytest.raises(VideoError, match=r"12 frames at 12 fps give 15 at 16 fps, and 33 are needed"):
        read_video(bar_file, ClipGeometry(48, 64, 33, 16))


def test_resize_crops_about_the_centre():
    frame = np.zeros((40, 120, 3), np.uint8)
    frame[:, 50:70] = 255
    square = resize_frame(frame, 20, 20)
    assert square.shape == (20, 20, 3)
    bright = np.flatnonzero(square[10, :, 0] > 128)
    assert (bright.min(), bright.max()) == (5, 14)


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("empty.mp4", b"", "empty file"),
        ("text.mp4", b"not a video at all\n" * 20, "not an mp4"),
        ("tiny.mp4", b"abc", "not an mp4"),
        ("text.avi", b"not a video at all\n" * 20, "not decodable as video"),
    ],
)
def test_what_is_no_video(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VideoError, match=reason):
        probe_video(tmp_path / name)


def test_a_webm_file_named_mp4_is_read(tmp_path):
    import av

    with av.open(str(tmp_path / "bar.mp4"), "w", format="webm") as container:
        stream = container.add_stream("libvpx-vp9", rate=12)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame in moving_bar():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    frames = read_video(tmp_path / "bar.mp4")
    assert frames.shape == (12, 48, 64, 3) and np.abs(frames.astype(int) - moving_bar()).mean() < 10


def test_sound_alone_is_told(tmp_path):
    import av

    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="it has no video stream"):
        read_video(tmp_path / "sound.mp4")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.98])
def test_truncated_at_any_place(tmp_path, bar_file, share):
    content = bar_file.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: int(len(content) * share)])
    for function in (probe_video, read_video):
        with pytest.raises(VideoError, match="truncated"):
            function(tmp_path / "cut.mp4")


def test_truncated_with_the_index_in_front(tmp_path):
    """A web-optimised file keeps its index when cut: the missing frames are noticed by the box's length."""
    av = pytest.importorskip("av")
    path = tmp_path / "fast.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=12)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame in moving_bar():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert probe_video(path).num_frames == 12
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(VideoError, match="truncated: box 'mdat'"):
        probe_video(path)


# a quarter turn of a player clockwise: its matrix in the track header, as a, b, c, d of ISO/IEC 14496-12, 8.3.2
TURNS = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)]


def turned(path: Path, quarters: int) -> Path:
    """A copy of an mp4 that is to be shown turned clockwise."""
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    a, b, c, d = (65536 * value for value in TURNS[quarters])
    struct.pack_into(">5i", content, matrix, a, b, 0, c, d)
    copy = path.with_name(f"turned-{quarters}.mp4")
    copy.write_bytes(content)
    return copy


@pytest.mark.parametrize("reader", [DecordReader, PyavReader])
@pytest.mark.parametrize("quarters", range(4))
def test_frames_come_as_a_player_shows_them(tmp_path, reader, quarters):
    write_video(tmp_path / "bar.mp4", moving_bar(height=64, width=96), 12)
    paths = tmp_path / "bar.mp4", turned(tmp_path / "bar.mp4", quarters)
    stored, shown = (reader(path).frames([0, 5])[1] for path in paths)
    assert np.array_equal(shown, np.rot90(stored, -quarters))


def test_a_turned_video_that_decord_refuses(bar_file):
    path = turned(bar_file, 1)
    info = probe_video(path)
    assert (info.height, info.width) == (64, 48), "decord fails on frames 48 px wide"
    assert np.array_equal(read_video(path), np.rot90(read_video(bar_file), -1, axes=(1, 2)))
    assert read_video(path, ClipGeometry(24, 24, 5, 6)).shape == (5, 24, 24, 3)


def test_pyav_decodes_no_further_than_it_must(tmp_path):
    write_video(tmp_path / "long.mp4", np.zeros((200, 48, 64, 3), np.uint8), 12)
    tracemalloc.start()
    frames = PyavReader(tmp_path / "long.mp4").frames(range(5))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 10 * frames[0].nbytes


def test_pyav_reads_any_order_of_calls(bar_file):
    every, reader = read_video(bar_file), PyavReader(bar_file)
    for indices in ([0], [0, 0, 3], [3, 11], [2, 4]):
        assert np.array_equal(reader.frames(indices), every[indices])
    with pytest.raises(DecodeFailure, match="ends after frame 11, and 12 is needed"):
        reader.frames([5, 12])


def test_pyav_counts_the_frames_where_the_file_does_not_say(tmp_path, bar_file):
    av = pytest.importorskip("av")
    with av.open(str(bar_file)) as source, av.open(str(tmp_path / "bar.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    assert PyavReader(tmp_path / "bar.mkv").num_frames == 12


def test_pyav_reads_every_fragment(tmp_path):
    """The header of a fragmented mp4 states the frames of the first fragment."""
    av = pytest.importorskip("av")
    path = tmp_path / "fragments.mp4"
    with av.open(str(path), "w", options={"movflags": "frag_keyframe"}) as container:
        stream = container.add_stream("libx264", rate=12, options={"g": "4"})
        stream.height, stream.width, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in moving_bar(12, 64, 48):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        assert 0 < container.streams.video[0].frames < 12
    assert read_video(path).shape == (12, 64, 48, 3)


@pytest.mark.parametrize("width", [48, 64])  # decord refuses the first
def test_what_an_edit_list_cuts_is_left_out(tmp_path, width):
    """The header of an mp4 cut without decoding it states the frames before the cut too."""
    av = pytest.importorskip("av")
    whole, cut, seconds = tmp_path / "whole.mp4", tmp_path / "cut.mp4", 5 / 12
    write_video(whole, moving_bar(12, 64, width), 12)
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts, packet.dts = (int(at - seconds / packet.time_base) for at in (packet.pts, packet.dts))
                packet.stream = stream
                target.mux(packet)
    with av.open(str(cut)) as container:
        assert container.streams.video[0].frames == 12
    assert np.array_equal(read_video(cut), read_video(whole)[5:])


NUMBER_BITS = 8


def numbered(number: int) -> np.ndarray:
    """A frame that shows its number: bright and dark columns, a bit each."""
    bits = (number >> np.arange(NUMBER_BITS)) & 1
    return np.broadcast_to(255 * bits.astype(np.uint8).repeat(8)[None, :, None], (64, 8 * NUMBER_BITS, 3))


def number_in(frame: np.ndarray) -> int:
    return int(((frame[32, 4::8, 1] > 127) << np.arange(NUMBER_BITS)).sum())


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_shown_before_their_keyframe_are_the_right_ones(tmp_path, suffix):
    """decord alone gives other frames of open GOPs as soon as some are left out."""
    import av

    path = tmp_path / f"open.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 64, 8 * NUMBER_BITS, "yuv420p"
        stream.options = {"x264-params": "open-gop=1:keyint=48:bframes=3:b-adapt=0:scenecut=0"}
        for number in range(160):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
        container.mux(stream.encode())
    wanted = [int(n * 30 / 16 + 0.5) for n in range(81)]
    frames = read_video(path, ClipGeometry(64, 8 * NUMBER_BITS, 81, 16))
    assert [number_in(frame) for frame in frames] == wanted
    with pytest.raises(DecodeFailure, match="open GOPs"):
        DecordReader(path)


def with_pixels(path: Path, aspect: Fraction, width: int, height: int = 72) -> Path:
    """A video of a white disc on black that is round, 48 px wide and high, if its pixels are shown at this aspect."""
    import av

    rows, columns = np.mgrid[:height, :width] + 0.5
    disc = ((columns - width / 2) * float(aspect)) ** 2 + (rows - height / 2) ** 2 < 24**2
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for _ in range(5):
            frame = (255 * disc.astype(np.uint8))[..., None].repeat(3, -1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("aspect, width", [(Fraction(4, 3), 96), (Fraction(8, 9), 144)])
def test_pixels_that_are_not_square_are_stretched(tmp_path, aspect, width):
    path = with_pixels(tmp_path / "disc.mp4", aspect, width)
    info = probe_video(path)
    assert (info.height, info.width) == (72, 128), "as HDV's 1440 columns are shown on 1920"
    for frames in (read_video(path), read_video(path, ClipGeometry(72, 128, 5, 16))):
        rows, columns = np.nonzero(frames[2, ..., 0] > 127)
        assert np.ptp(rows) + 1 == pytest.approx(48, abs=2) and np.ptp(columns) + 1 == pytest.approx(48, abs=2)
    on_its_side = probe_video(turned(path, 1))
    assert (on_its_side.height, on_its_side.width) == (128, 72)


def test_less_than_a_column_is_no_stretch(tmp_path):
    path = with_pixels(tmp_path / "rounded.mp4", Fraction(200, 201), 128)
    assert probe_video(path).width == 128 and DecordReader(path).num_frames == 5


def test_absurd_pixels_are_refused(tmp_path):
    with pytest.raises(VideoError, match="pixels 20 times as wide as high must be 1/8 to 8"):
        probe_video(with_pixels(tmp_path / "wide.mp4", Fraction(20), 64))


def test_a_name_that_is_not_unicode(tmp_path, bar_file):
    path = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    path.write_bytes(bar_file.read_bytes())
    assert np.array_equal(read_video(path), read_video(bar_file))


@pytest.mark.parametrize("reader", [DecordReader, PyavReader])
def test_a_colon_in_a_name_makes_no_address(tmp_path, monkeypatch, bar_file, reader):
    monkeypatch.chdir(tmp_path)
    write_video("12:30.mp4", read_video(bar_file), 12)
    assert reader(Path("12:30.mp4")).num_frames == 12


@pytest.mark.parametrize("name, transfer", [("PQ", 16), ("HLG", 18), ("", 1)])
def test_hdr_is_refused(tmp_path, name, transfer):
    import av

    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.color_trc = transfer
        for frame in np.zeros((2, 32, 32, 3), np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    if not name:
        assert probe_video(tmp_path / "a.mkv").num_frames == 2
        return
    with pytest.raises(VideoError, match=rf"as video: HDR \({name}\) is not supported; convert it to SDR[^;]*$"):
        probe_video(tmp_path / "a.mkv")


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_file_that_the_machine_does_not_give_is_no_broken_video(tmp_path, monkeypatch, suffix):
    (tmp_path / f"a.{suffix}").write_bytes(b"\x00\x00\x00\x08free" * 9)
    with pytest.raises(VideoError) as broken:
        probe_video(tmp_path / f"a.{suffix}")
    assert not isinstance(broken.value, UnreadableVideo)

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(builtins, "open", denied)
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UnreadableVideo, match="cannot be read: .*Permission denied"):
        probe_video(tmp_path / f"a.{suffix}")


def test_short_memory_is_no_broken_video(monkeypatch, bar_file):
    import av

    def short(*args, **kwargs):
        raise av.error.MemoryError(12, "Cannot allocate memory")

    monkeypatch.setattr(video, "DecordReader", lambda source: (_ for _ in ()).throw(DecodeFailure("short")))
    monkeypatch.setattr(video, "_walk", short)
    with pytest.raises(UnreadableVideo, match="out of memory"):
        probe_video(bar_file)


def test_missing_file():
    with pytest.raises(VideoError, match="no such file"):
        probe_video("nowhere.mp4")


def test_writer_refuses_odd_sizes_and_changes_of_size(tmp_path):
    with pytest.raises(ValueError, match="47x64 must be even"), VideoWriter(tmp_path / "a.mp4", 8) as writer:
        writer.write(np.zeros((47, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="all frames"), VideoWriter(tmp_path / "b.mp4", 8) as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8))
        writer.write(np.zeros((48, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="uint8"), VideoWriter(tmp_path / "c.mp4", 8) as writer:
        writer.write(np.zeros((48, 64, 3), np.float32))
    with pytest.raises(ValueError, match="no frame"), VideoWriter(tmp_path / "d.mp4", 8):
        pass
    assert list(tmp_path.iterdir()) == []


def test_file_appears_only_when_closed(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 8) as writer:
        writer.write(moving_bar()[0])
        assert not (tmp_path / "a.mp4").exists()
    assert probe_video(tmp_path / "a.mp4").num_frames == 1


def test_a_file_that_a_full_disk_cut_off_does_not_stay(tmp_path):
    class Full:
        def mux(self, *packets):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        close = mux

    with pytest.raises(OSError, match="No space left"), VideoWriter(tmp_path / "a.mp4", 8) as writer:
        writer.write(moving_bar()[0])
        writer._container.start_encoding()  # makes the file
        assert writer.partial.is_file()
        container, writer._container = writer._container, Full()
    container.close()
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    first, second = (VideoWriter(tmp_path / "a.mp4", 8) for _ in range(2))
    for writer, num_frames in ((first, 1), (second, 2)):
        for frame in moving_bar()[:num_frames]:
            writer.write(frame)
    first.close()
    second.close()
    assert read_video(tmp_path / "a.mp4").shape[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


WRITE_ONE = """
import sys
from data.sprites import SpritesConfig, render_clip
from data.video import write_video
write_video(sys.argv[1], render_clip(SpritesConfig(), 3).frames, 16, crf=8)
"""


def test_the_file_depends_on_the_frames_only_and_not_on_what_memory_held(tmp_path):
    files = [tmp_path / f"{fill}.mp4" for fill in (33, 200)]
    for path in files:  # glibc fills fresh memory with this byte
        environment = {**os.environ, "MALLOC_PERTURB_": path.stem}
        subprocess.run([sys.executable, "-c", WRITE_ONE, path], check=True, cwd=REPO, env=environment)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_tracks_are_drawn_where_visible_and_fade():
    frames = np.zeros((6, 40, 60, 3), np.uint8)
    points = np.zeros((6, 2, 2), np.float32)
    points[:, 0] = np.stack([10.5 + 6 * np.arange(6), np.full(6, 20.5)], axis=1)
    points[:, 1] = (50.5, 30.5)
    visibility = np.ones((6, 2), bool)
    visibility[:, 1] = False
    drawn = draw_tracks_on(frames, points, visibility)
    assert drawn[5, 20, 40].max() > 200, "the head"
    assert drawn[5, 20, 37].max() > drawn[5, 20, 19].max() > 0, "the tail fades"
    assert drawn[:, 25:36, 45:56].max() == 0, "an invisible point is not drawn"
    assert frames.max() == 0, "the input stays"


def test_no_tracks_to_draw():
    frames = moving_bar(3)
    drawn = draw_tracks_on(frames, np.zeros((3, 0, 2), np.float32), np.zeros((3, 0), bool))
    assert np.array_equal(drawn, frames)


@pytest.mark.skipif(not BEAR.exists(), reason="the real clips in ../shared/data/clips are absent")
def test_real_clip():
    frames = read_video(BEAR, ClipGeometry(240, 416, 33, 16))
    assert frames.shape == (33, 240, 416, 3) and frames.std() > 20


@pytest.mark.parametrize(("have", "want"), [((120, 200), (64, 64)), ((100, 60), (48, 80)), ((54, 96), (480, 832))])
def test_tracks_stay_on_what_a_resized_picture_shows(have, want) -> None:
    picture = np.zeros((*have, 3), np.uint8)
    row, column = have[0] // 2 - 4, have[1] // 2 + 7
    picture[row - 3 : row + 3, column - 3 : column + 3] = 255
    shown = resize_frame(picture, *want)[..., 0] > 127
    rows, columns = np.nonzero(shown)
    point = np.array([[[column, row]]], np.float32)
    tracks = Tracks.from_arrays(point, np.ones((1, 1), bool), *have).resize_to(*want)
    found = np.array([columns.mean() + 0.5, rows.mean() + 0.5])
    np.testing.assert_allclose(tracks.points[0, 0, 0].numpy(), found, atol=0.6)
