from __future__ import annotations

import os
import signal
import zlib
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from data.app import build_config, compose_config
from data.config_errors import ConfigError
from data.sprites import SpritesConfig, render_clip
from data.trackers import TrackerConfig
from data.video import write_video
from models.condition import ClipGeometry
from models.motion.tracks import Tracks
from stream.dragstream.config import DragConfig
from stream.dragstream.drag import Drag, Handle, Pose
from stream.dragstream.labels import DragLabel
from stream.run import StreamConfig, main, write_frames
from stream.track_source import load_first_frame, load_track_source

CLIPS = Path(__file__).resolve().parents[3] / "shared" / "data" / "clips"


@pytest.fixture(scope="module")
def sprites_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "sprites.mp4"
    write_video(path, render_clip(SpritesConfig(num_frames=34), 3).frames, 16)
    return path


def _run(tiny_weights, out: Path, *overrides: str) -> np.ndarray:
    assert main(compose_config("stream", [f"out={out}", *tiny_weights.overrides, *overrides])) == 0
    with av.open(str(out)) as container:  # decord cannot read a video as narrow as these
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_any_length_from_a_picture_and_a_track_file(tiny_weights, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "first.png"), picture)
    points = np.tile(np.array([[[3.0, 5.0]]], np.float32), (20, 1, 1))
    Tracks.from_arrays(points, np.ones((20, 1), bool), 16, 16).save(tmp_path / "tracks.json")
    given = (f"image={tmp_path / 'first.png'}", f"tracks={tmp_path / 'tracks.json'}")
    assert len(_run(tiny_weights, tmp_path / "a.mp4", *given)) == 20  # as long as its tracks
    frames = _run(tiny_weights, tmp_path / "b.mp4", *given, "num_frames=50", "prompt='a red disc'")
    assert frames.shape == (50, 16, 16, 3)
    again = _run(tiny_weights, tmp_path / "c.mp4", *given, "num_frames=50", "prompt='a red disc'")
    np.testing.assert_array_equal(frames, again)


def test_motion_transfer_from_a_video_and_the_teacher(tiny_weights, sprites_video: Path, tmp_path: Path) -> None:
    given = (f"image={sprites_video}", f"tracks={sprites_video}")
    student = _run(tiny_weights, tmp_path / "s.mp4", *given, "num_frames=10")
    teacher = _run(tiny_weights, tmp_path / "t.mp4", *given, "role=teacher", "num_inference_steps=2")
    assert len(student) == 10 and len(teacher) == 33


def test_no_more_of_a_video_is_followed_than_is_asked_for(tiny_weights, sprites_video: Path) -> None:
    """A long one would not fit in memory."""
    for wanted, frames in ((10, 13), (1, 1), (1000, 33), (None, 33)):
        tracks = load_track_source(sprites_video, tiny_weights.model_cfg, TrackerConfig(), wanted=wanted)
        assert tracks.num_frames == frames


@pytest.mark.parametrize("name", ["image", "tracks"])
def test_what_is_no_video_is_named_with_its_field(tiny_weights, sprites_video: Path, tmp_path: Path, name: str) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    given = {"image": sprites_video, "tracks": sprites_video} | {name: text}
    with pytest.raises(ValueError, match=rf"{name}={text} is neither .* nor a video: not an mp4 file"):
        _run(tiny_weights, tmp_path / "a.mp4", *(f"{key}={value}" for key, value in given.items()))


@pytest.mark.parametrize(
    ("image", "out", "message"),
    [
        ("a.png", "a.png", "out=.*a.png must be the name of an .mp4 file"),
        ("a.mp4", "a.mp4", "out=.*a.mp4 is the image itself; name another file"),
        ("a.png", "folder.mp4", "must be the name of an .mp4 file"),
    ],
)
def test_what_is_read_is_not_written_over(tiny_weights, tmp_path: Path, image, out, message) -> None:
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match=message):
        _run(tiny_weights, tmp_path / out, f"image={tmp_path / image}")


@pytest.mark.parametrize("progressive", [0, 1])
def test_a_jpeg_that_is_cut_off_is_refused(tmp_path: Path, progressive: int) -> None:
    """OpenCV fills it up with grey and says nothing."""
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    encoded = [cv2.imencode(".jpg", side, [cv2.IMWRITE_JPEG_PROGRESSIVE, progressive])[1].tobytes()
               for side in (picture, picture[:8, :8])]  # fmt: skip
    whole, small = encoded
    thumbnail = b"\xff\xe1" + (len(small) + 2).to_bytes(2, "big") + small  # has an end of its own
    whole = whole[:2] + thumbnail + whole[2:]
    path, clip = tmp_path / "first.jpg", ClipGeometry(16, 16, 1, 16)
    for share in (0.5, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match="first.jpg is cut off or damaged"):
            load_first_frame(path, clip)
    path.write_bytes(whole + bytes(99))
    assert load_first_frame(path, clip).shape == (16, 16, 3)


def test_a_picture_of_more_pixels_than_opencv_takes_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "first.png"
    cv2.imwrite(str(path), np.zeros((2, 2, 3), np.uint8))
    content = bytearray(path.read_bytes())
    content[16:24] = 2 * (60_000).to_bytes(4, "big")  # width and height
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"image=.*first.png cannot be decoded as a picture \(.*; make it smaller"):
        load_first_frame(path, ClipGeometry(16, 16, 1, 16))


def test_what_has_no_motion_is_no_source_of_tracks(tiny_weights, tmp_path: Path) -> None:
    """A picture can be read as a video of one frame; what is meant is a longer one."""
    cv2.imwrite(str(tmp_path / "first.png"), np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match=rf"tracks={tmp_path}/first.png is a picture, in which nothing moves"):
        load_track_source(tmp_path / "first.png", tiny_weights.model_cfg, TrackerConfig())
    Tracks.empty(1, 0, 16, 16).save(tmp_path / "tracks.npz")
    with pytest.raises(ValueError, match=rf"tracks={tmp_path}/tracks.npz has no frame; leave tracks out"):
        load_track_source(tmp_path / "tracks.npz", tiny_weights.model_cfg, TrackerConfig())


def test_more_tracks_than_identities_are_refused_before_anything_is_built(tiny_weights, tmp_path: Path) -> None:
    path = tmp_path / "tracks.npz"
    Tracks.from_arrays(np.zeros((5, 10_001, 2)), np.ones((5, 10_001), bool), 16, 16).save(path)
    with pytest.raises(ValueError, match=rf"tracks={path} holds 10001 tracks; a stream follows at most 10000"):
        load_track_source(path, tiny_weights.model_cfg, TrackerConfig())


def test_a_cut_picture_is_refused_by_its_field(tmp_path: Path) -> None:
    path = tmp_path / "first.jpg"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=rf"image={path} is cut off or damaged"):
        load_first_frame(path, ClipGeometry(16, 16, 33, 16))


def test_an_edit_comes_before_an_animation_of_the_same_boundary(tiny_weights, tmp_path: Path) -> None:
    mask = np.zeros((16, 16), bool)
    mask[4:12, 4:12] = True
    for mode, count in (("animate", 3), ("edit", 1)):
        handle = Handle(mask, (8, 8), (Pose(dx=1),) * count, (8, 8))
        DragLabel.from_drag(Drag(mode, (handle,)), "", 1, 3).write(tmp_path / "labels")
    cv2.imwrite(str(tmp_path / "first.png"), np.zeros((16, 16, 3), np.uint8))
    given = (f"image={tmp_path / 'first.png'}", f"drags={tmp_path / 'labels'}", "num_frames=21")
    assert len(_run(tiny_weights, tmp_path / "a.mp4", *given)) == 21
    with pytest.raises(FileNotFoundError, match="drags=nowhere: no such file or folder"):
        _run(tiny_weights, tmp_path / "a.mp4", f"image={tmp_path / 'first.png'}", "drags=nowhere")


def test_tracks_of_another_resolution_are_refused_before_anything_is_built(tiny_weights, tmp_path: Path) -> None:
    path = tmp_path / "tracks.npz"
    Tracks.from_arrays(np.full((9, 1, 2), 32.0), np.ones((9, 1), bool), 64, 128).save(path)
    nothing = ["model.vae.path=/nowhere", "model.student=/nowhere"]
    cfg = compose_config("stream", [f"image={path}", f"tracks={path}", *tiny_weights.overrides, *nothing])
    with pytest.raises(ValueError, match=r"64x128 px.*16x16.*tracks_resize=true"):
        main(cfg)
    tracks = load_track_source(path, tiny_weights.model_cfg, TrackerConfig(), resize=True)
    assert tracks.points[0, 0, 0].tolist() == [0.0, 8.0]  # the left edge of the middle 64 px


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["role=critic"], "role=critic must be student or teacher"),
        (["ending=stop"], "ending=stop must be hold or release"),
        (["role=teacher", "num_frames=49"], r"must be 33 with role=teacher.*model.clip.num_frames=45"),
        (["device=gpu"], "device=gpu must be auto, cpu or cuda"),
        (["num_frames=0"], "num_frames=0 must be at least 1"),
        (["decoder=tiny"], "model.tiny_vae is not set"),
        (["model.dit.num_layers=3"], "num_layers"),
        (["model.student=/nowhere"], "/nowhere"),
        (["image=/nowhere.png"], "no such file"),
        (["device=cuda"], "no CUDA device"),
        (["model.clip.num_frames=37"], "nearest valid num_frames"),
    ],
)  # fmt: skip
def test_wrong_settings_say_what_is_wanted(tiny_weights, sprites_video, overrides, message) -> None:
    cfg = compose_config("stream", [f"image={sprites_video}", *tiny_weights.overrides, *overrides])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(cfg)


def test_unknown_and_missing_fields() -> None:
    with pytest.raises(ConfigError, match=r"no field 'num_frame'; did you mean .*'?num_frames"):
        compose_config("stream", ["num_frame=4", "image=x"])
    with pytest.raises(ConfigError, match="image has no value"):
        build_config(compose_config("stream", ["model=tiny"]), StreamConfig)


def test_a_failed_run_leaves_no_video(tiny_weights, sprites_video, tmp_path: Path) -> None:
    cfg = compose_config("stream", [f"image={sprites_video}", "prompt=zebra", f"out={tmp_path / 'x.mp4'}",
                                    *tiny_weights.overrides])  # fmt: skip
    with pytest.raises(ValueError, match="zebra"):
        main(cfg)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not CLIPS.is_dir(), reason=f"needs the real clips in {CLIPS}")
def test_real_video_as_first_frame() -> None:
    frame = load_first_frame(CLIPS / "cat.mp4", ClipGeometry(48, 80, 33, 16))
    assert frame.shape == (48, 80, 3) and frame.std() > 10


def _label(folder: Path, mode: str, block: int, frames: int) -> Path:
    inside = np.zeros((16, 16), bool)
    inside[4:10, 4:10] = True
    poses = tuple(Pose(dx=-4.0 * (n + 1) / frames) for n in range(frames))
    drag = Drag(mode, (Handle(inside, (7.0, 7.0), poses, (7.0, 7.0)),))
    return DragLabel.from_drag(drag, "a red disc", block, 3).write(folder)


def test_labelled_drags_are_applied_after_their_chunks(
    tiny_weights, sprites_video: Path, tmp_path: Path, caplog
) -> None:
    given = (f"image={sprites_video}", "num_frames=40")
    plain = _run(tiny_weights, tmp_path / "a.mp4", *given)
    _label(tmp_path / "labels", "edit", 2, 1)
    given_drags = (f"drags={tmp_path / 'labels'}", "drag.lr=0.3", "num_inference_steps=4")
    edited = _run(tiny_weights, tmp_path / "b.mp4", *given, *given_drags)
    assert "drag.lr has no effect with drag.iterations=0" in caplog.text
    assert "num_inference_steps=4 has no effect with role=student" in caplog.text
    assert "was drawn for prompt='a red disc'; the stream's is ''" in caplog.text
    np.testing.assert_array_equal(edited[:8], plain[:8])  # frame 8 and 9 share a predicted picture of the mp4
    assert len(edited) == len(plain) and (edited[12:21] != plain[12:21]).any()
    path = _label(tmp_path / "one", "animate", 3, 3)
    animated = _run(tiny_weights, tmp_path / "c.mp4", *given, f"drags={path}", "drag=sg_i2v")
    assert (animated[34:] != plain[34:]).any()


@pytest.mark.parametrize(
    ("block", "overrides", "message"),
    [
        (3, ["num_frames=20"], "drags after chunk 3, but the video has 20 frames"),
        (1, ["role=teacher"], "drags need role=student"),
        (0, [], "drags before the first chunk"),
        (1, ["drag.step=7"], r"drag.step=7 must be in -3\.\.2: the student's steps"),
        (1, ["model.rollout.chunk_frames=1"], "block_1_Drag_trajectory.json edits the given first frame alone"),
    ],
)
def test_a_drag_that_cannot_be_is_refused_before_anything_is_built(
    sprites_video: Path, tmp_path: Path, block: int, overrides: list[str], message: str
) -> None:
    drags = [f"drags={_label(tmp_path, 'edit', block, 1)}"]
    with pytest.raises(ValueError, match=message):
        main(compose_config("stream", ["model=tiny", f"image={sprites_video}", *drags, *overrides]))


def test_an_animation_of_frames_that_are_not_there_is_refused_and_one_that_is_cut_is_told(
    tiny_weights, sprites_video: Path, tmp_path: Path, caplog
) -> None:
    drags = f"drags={_label(tmp_path, 'animate', 1, 6)}"
    with pytest.raises(
        ValueError, match=r"block_1_Animation\S+ animates what follows .* 9 frames; num_frames=33 shows"
    ):
        _run(tiny_weights, tmp_path / "a.mp4", f"image={sprites_video}", drags, "num_frames=9")
    assert len(_run(tiny_weights, tmp_path / "a.mp4", f"image={sprites_video}", drags, "num_frames=14")) == 14
    assert "animates 6 latent frames, of which 2 are shown; num_frames=33 shows all" in caplog.text
    caplog.clear()
    _run(tiny_weights, tmp_path / "a.mp4", f"image={sprites_video}", drags, "num_frames=33")
    assert "animates" not in caplog.text


def test_unknown_words_are_refused_before_anything_is_built(sprites_video: Path) -> None:
    nothing = ["model=tiny", "model.student=/nowhere", f"image={sprites_video}"]
    with pytest.raises(ValueError, match="unknown word 'zebra'"):
        main(compose_config("stream", [*nothing, "prompt=zebra"]))


def test_every_profile_of_drags_composes(sprites_video: Path) -> None:
    for profile in ("marionette", "paper", "compat", "sg_i2v", "dragvideo"):
        cfg = build_config(compose_config("stream", [f"image={sprites_video}", f"drag={profile}"]).drag)
        assert isinstance(cfg, DragConfig)
    assert DragConfig() == build_config(compose_config("stream", [f"image={sprites_video}"]).drag)


def test_a_length_that_the_teacher_does_not_take_names_one_that_it_does(tiny_weights, sprites_video, tmp_path) -> None:
    given = [f"image={sprites_video}", "role=teacher", "num_inference_steps=1"]
    with pytest.raises(ValueError, match=r"num_frames=10 must be 33 .* num_frames=9 model.clip.num_frames=9, "):
        _run(tiny_weights, tmp_path / "a.mp4", *given, "num_frames=10")
    assert len(_run(tiny_weights, tmp_path / "a.mp4", *given, "num_frames=9", "model.clip.num_frames=9")) == 9


def test_a_folder_of_out_that_is_a_file_is_refused_before_any_work(sprites_video: Path) -> None:
    nothing = ["model=tiny", "model.student=/nowhere", f"image={sprites_video}", f"out={sprites_video}/x.mp4"]
    with pytest.raises(ConfigError, match=r"out=\S+/x.mp4: \S+/sprites.mp4 is a file where a folder is needed"):
        main(compose_config("stream", nothing))


def _press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def _frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_ctrl_c_keeps_the_frames_made_so_far(tmp_path: Path) -> None:
    def chunks():
        for _ in range(2):
            yield np.zeros((9, 16, 16, 3), np.uint8)
        _press_ctrl_c()
        pytest.fail("the interrupt comes at once")

    with pytest.raises(KeyboardInterrupt, match=r"x.mp4 has the 18 of 50 frames made so far"):
        write_frames(chunks(), tmp_path / "x.mp4", 16, 50)
    assert _frames(tmp_path / "x.mp4") == 18 and len(list(tmp_path.iterdir())) == 1


class Interrupted(list):
    """Frames of which the fourth brings a signal."""

    number = signal.SIGINT

    def __iter__(self):
        for index, frame in enumerate(super().__iter__()):
            if index == 4:
                os.kill(os.getpid(), self.number)
            yield frame


def test_ctrl_c_while_a_chunk_is_written_waits_for_its_end(tmp_path: Path) -> None:
    chunk = Interrupted(np.zeros((9, 16, 16, 3), np.uint8))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="has the 9 of 50 frames"):
        write_frames(iter([chunk, chunk]), tmp_path / "x.mp4", 16, 50)
    assert _frames(tmp_path / "x.mp4") == 9
    assert signal.getsignal(signal.SIGINT) == handler


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it(tmp_path: Path) -> None:
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
    try:
        write_frames(iter([Interrupted(np.zeros((9, 16, 16, 3), np.uint8))] * 2), tmp_path / "x.mp4", 16, 18)
    finally:
        signal.signal(signal.SIGINT, former)
    assert _frames(tmp_path / "x.mp4") == 18


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_what_ends_a_process_keeps_the_frames_made_so_far(tmp_path: Path, caplog, number, code: int) -> None:
    def unhandled(*_) -> None:  # it would end the tests
        pytest.fail("the signal is not handled")

    chunk, former = Interrupted(np.zeros((9, 16, 16, 3), np.uint8)), signal.signal(number, unhandled)
    chunk.number = number
    try:
        with pytest.raises(SystemExit) as stop:
            write_frames(iter([chunk, chunk]), tmp_path / "x.mp4", 16, 50)
        assert signal.getsignal(number) == unhandled
    finally:
        signal.signal(number, former)
    assert stop.value.code == code and "x.mp4 has the 9 of 50 frames made so far" in caplog.text
    assert _frames(tmp_path / "x.mp4") == 9


def test_an_error_keeps_the_frames_made_so_far(tmp_path: Path, caplog) -> None:
    def chunks():
        yield np.zeros((9, 16, 16, 3), np.uint8)
        raise MemoryError("full")

    with pytest.raises(MemoryError, match="full"):
        write_frames(chunks(), tmp_path / "x.mp4", 16, 50)
    assert _frames(tmp_path / "x.mp4") == 9 and "x.mp4 has the 9 of 50 frames made so far" in caplog.text


def test_ctrl_c_before_the_first_frame_leaves_nothing(tmp_path: Path) -> None:
    def chunks():
        _press_ctrl_c()
        yield from ()

    with pytest.raises(KeyboardInterrupt) as stop:
        write_frames(chunks(), tmp_path / "x.mp4", 16, 50)
    assert str(stop.value) == "" and list(tmp_path.iterdir()) == []
