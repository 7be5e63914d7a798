"""Where clips come from: what each source lists, with which captions, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data.sources import (
    NSFW_COLUMNS,
    FolderSource,
    OpenVidSource,
    SpritesSource,
    VidPromSource,
    clip_key,
    read_item,
    require_apart,
)
from data.video import VideoError, write_video
from models.condition import ClipGeometry

GEOMETRY = ClipGeometry(36, 64, 33, 16)


def gray_video(path: Path, num_frames: int = 40, height: int = 36, width: int = 64) -> None:
    write_video(path, np.full((num_frames, height, width, 3), 128, np.uint8), 16)


def test_sprites_follow_the_model_s_clip(tmp_path):
    source = SpritesSource(SpritesSource.Config())
    with pytest.raises(ValueError, match=r"must be model\.clip"):
        source.render(next(source.items()), ClipGeometry(32, 32, 33, 16), tmp_path / "x.mp4")


# ------------------------------------------------------------------------------------------ folders
def test_folder_captions(tmp_path):
    for name in ("one", "two", "three", "four.v2"):
        gray_video(tmp_path / f"{name}.mp4")
    (tmp_path / "one.txt").write_text("caption one\n")
    (tmp_path / "two.json").write_text('{"caption": "caption two"}')
    (tmp_path / "list.csv").write_text("file,caption\nthree.mp4,caption three\n")
    source = FolderSource(FolderSource.Config(str(tmp_path), str(tmp_path / "list.csv"), "none"))
    found = {item.key: item.caption for item in source.items()}
    assert found == {"one": "caption one", "two": "caption two", "three": "caption three", "four_v2": "none"}


def test_links_to_nothing_are_told_of(tmp_path, caplog):
    gray_video(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").symlink_to("gone.mp4")
    assert [path.name for path in FolderSource(FolderSource.Config(str(tmp_path))).videos()] == ["a.mp4"]
    assert "1 of 2 videos" in caplog.text and "left out: links to nothing" in caplog.text


def test_folder_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"source\.path is empty"):
        FolderSource(FolderSource.Config())
    with pytest.raises(FileNotFoundError, match="is no folder"):
        FolderSource(FolderSource.Config(str(tmp_path / "nowhere")))
    with pytest.raises(FileNotFoundError, match="holds no videos"):
        list(FolderSource(FolderSource.Config(str(tmp_path))).items())


def test_names_that_clash_get_other_keys(tmp_path):
    for folder in ("a.b", "a_b"):
        (tmp_path / folder).mkdir()
        gray_video(tmp_path / folder / "x.mp4")
    keys = [item.key for item in FolderSource(FolderSource.Config(str(tmp_path))).items()]
    assert keys == ["a_b_x", "a_b_x-2"] and clip_key("...") == "clip"


def test_long_names_are_cut_and_told_apart(tmp_path):
    for name in ("a" * 240, "b" * 150, *(f"{'c' * 118}{character}{'c' * 117}" for character in " _")):
        folder = tmp_path / ("f" * (0 if name.startswith("a") else 100 if name.startswith("b") else 4))
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.mp4").touch()
    (tmp_path / ("f" * 100) / f"{'b' * 149}c.mp4").touch()
    keys = [item.key for item in FolderSource(FolderSource.Config(str(tmp_path))).items()]
    assert "a" * 240 in keys, "as it always was"
    assert len(set(keys)) == 5 and max(map(len, keys)) == 240


def test_folders_are_searched_through_links_each_once(tmp_path):
    for folder in ("videos/own", "elsewhere/deep"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.mp4").touch()
    for link, target in (("a_link", "videos/own"), ("part1", "elsewhere"), ("part2", "elsewhere"), ("up", "videos")):
        (tmp_path / "videos" / link).symlink_to(tmp_path / target)
    (tmp_path / "elsewhere/deep/back").symlink_to(tmp_path / "elsewhere")
    source = FolderSource(FolderSource.Config(str(tmp_path / "videos")))
    assert [path.relative_to(source.folder).as_posix() for path in source.videos()] == ["own/x.mp4", "part1/deep/x.mp4"]
    with pytest.raises(ValueError, match="lies below source.path"):
        require_apart(source, str(tmp_path / "elsewhere/out"))
    require_apart(source, str(tmp_path / "out"))


def test_a_caption_file_that_cannot_be_read_costs_its_clip_alone(tmp_path, monkeypatch):
    for video in "ab":
        (tmp_path / f"{video}.mp4").touch()
        (tmp_path / f"{video}.txt").touch()
    read = Path.read_text

    def limited(path: Path, **kwargs) -> str:
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, **kwargs)

    monkeypatch.setattr(Path, "read_text", limited)
    first, second = FolderSource(FolderSource.Config(str(tmp_path))).items()
    with pytest.raises(VideoError, match="Permission denied"):
        read_item(first, GEOMETRY)
    assert second.key == "b"


def test_a_caption_cut_within_a_character_can_be_written(tmp_path):
    """Tools that count in UTF-16 leave half a surrogate pair; a whole pair is its character."""
    (tmp_path / "clip.mp4").touch()
    (tmp_path / "clip.json").write_text(r'{"caption": "a bear \ud83d\ude00 \ud83d"}')
    (item,) = FolderSource(FolderSource.Config(str(tmp_path))).items()
    assert item.caption == "a bear \U0001f600 \ufffd"


@pytest.mark.parametrize(
    "name, content, caption",
    [
        ("clip.txt", b"\xef\xbb\xbfa calm sea\r\n", "a calm sea"),
        ("clip.json", b'\xef\xbb\xbf{"caption": "a calm sea"}', "a calm sea"),
        ("list.csv", b"\xef\xbb\xbffile,caption\r\nclip.mp4,a calm sea\r\n", "a calm sea"),
    ],
)
def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path, name, content, caption):
    (tmp_path / "clip.mp4").touch()
    (tmp_path / name).write_bytes(content)
    table = str(tmp_path / name) if name == "list.csv" else None
    (item,) = FolderSource(FolderSource.Config(str(tmp_path), table)).items()
    assert item.caption == caption


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("b.txt", b"caf\xe9", r"b\.txt: must be UTF-8"),
        ("b.json", b'{"caption": ', r"b\.json: not JSON"),
        ("b.json", b'{"text": "a dog"}', r"b\.json: must be an object with a text field 'caption'"),
    ],
)
def test_a_broken_caption_file_costs_its_clip_alone(tmp_path, name, content, reason):
    for video in "abc":
        gray_video(tmp_path / f"{video}.mp4")
    (tmp_path / name).write_bytes(content)
    source = FolderSource(FolderSource.Config(str(tmp_path)))
    first, broken, last = source.items()
    for item in (first, last):
        source.render(item, GEOMETRY, tmp_path / "out.mp4")
    with pytest.raises(VideoError, match=reason):
        source.render(broken, GEOMETRY, tmp_path / "out.mp4")


# ------------------------------------------------------------------------------------------ public data sets
def test_openvid_filters(tmp_path):
    gray_video(tmp_path / "wide.mp4", 82)
    gray_video(tmp_path / "square.mp4", 82, 64, 64)
    (tmp_path / "list.csv").write_text(
        "video,caption,frame,fps\nwide.mp4,wide,82,16\nsquare.mp4,square,82,16\nfew.mp4,few,80,16\nbare.mp4,,90,16\n"
    )
    source = OpenVidSource(OpenVidSource.Config(str(tmp_path), str(tmp_path / "list.csv")))
    items = {item.key: item for item in source.items()}
    assert set(items) == {"wide", "square"}
    assert source.render(items["wide"], GEOMETRY, tmp_path / "out.mp4") == {"source": "wide.mp4"}
    with pytest.raises(VideoError, match="aspect 64x64"):
        source.render(items["square"], GEOMETRY, tmp_path / "out2.mp4")


def test_openvid_names_that_clash_get_other_keys(tmp_path):
    names = ("a.b.mp4", "c.mp4", "a_b.mp4", "a b.mp4", "a-b.mp4")
    for name in names:
        (tmp_path / name).touch()
    rows = "".join(f"{name},caption,90\n" for name in names)
    (tmp_path / "list.csv").write_text(f"video,caption,frame\n{rows}")
    source = OpenVidSource(OpenVidSource.Config(str(tmp_path), str(tmp_path / "list.csv")))
    found = [(item.key, item.origin) for item in source.items()]
    assert found == list(zip(("a_b", "c", "a_b-2", "a_b-3", "a-b"), names))


def test_vidprom_filters_and_leaves_its_prompts(tmp_path):
    columns = "uuid,prompt,time,toxicity,obscene,identity_attack,insult,threat,sexual_explicit\n"
    (tmp_path / "list.csv").write_text(
        f"{columns}u1,a calm sea,t,0,0,0,0,0,0.19\nu2,bad,t,0,0,0,0,0.2,0\n"
        "u3,unknown,t,,0,0,0,0,0\nu4,a dog,t,0,0,0,0,0,0\nu5,bad,t,nan,0,0,0,0,0\nu4,a dog again,t,0,0,0,0,0,0\n"
    )
    gray_video(tmp_path / "u1.mp4")
    source = VidPromSource(VidPromSource.Config(str(tmp_path), str(tmp_path / "list.csv")))
    assert list(source.prompts()) == [("u1", "a calm sea"), ("u4", "a dog")]
    source.write_manifest(tmp_path)
    assert [json.loads(x)["uuid"] for x in (tmp_path / "prompts.jsonl").read_text().splitlines()] == [
        "u1",
        "u4",
    ]
    (first,) = source.items()
    source.render(first, GEOMETRY, tmp_path / "out.mp4")


def test_clips_of_the_manifest_that_are_not_there_are_counted_once(tmp_path, caplog):
    (tmp_path / "list.csv").write_text("video,caption,frame\n" + "".join(f"{n}.mp4,caption,90\n" for n in range(9)))
    source = OpenVidSource(OpenVidSource.Config(str(tmp_path), str(tmp_path / "list.csv"), max_clips=2))
    with pytest.raises(FileNotFoundError, match=r"source\.path=\S+ holds none of the 9 clips that \S+/list\.csv lists"):
        list(source.items())
    for n in (3, 5, 7):
        (tmp_path / f"{n}.mp4").touch()
    assert [item.key for item in source.items()] == ["3", "5"]
    source.cfg.max_clips = None
    assert len(list(source.items())) == 3
    assert [record.message.split(" of ")[0] for record in caplog.records] == ["6"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"min_frames": 91}, r"list\.csv lists no clip with a text that source\.min_frames=91 lets pass"),
        ({"max_clips": 0}, r"source\.max_clips=0 must be >= 1, or null for all"),
        ({"max_clips": -1}, r"source\.max_clips=-1 must be >= 1, or null for all"),
        ({"aspect": 0.0}, r"source\.aspect=0\.0 must be above 0"),
    ],
)
def test_settings_that_leave_no_clip_are_refused(tmp_path, settings, message):
    (tmp_path / "list.csv").write_text("video,caption,frame\na.mp4,caption,90\n")
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ValueError, match=message):
        list(OpenVidSource(OpenVidSource.Config(str(tmp_path), str(tmp_path / "list.csv"), **settings)).items())


def test_csv_without_a_column_is_refused(tmp_path):
    (tmp_path / "list.csv").write_text("video,text\n")
    source = OpenVidSource(OpenVidSource.Config(str(tmp_path), str(tmp_path / "list.csv")))
    with pytest.raises(ValueError, match=r"columns \['caption', 'frame'\] are missing"):
        list(source.items())


@pytest.mark.parametrize(
    "rows, message",
    [
        (b"a.mp4,caf\xe9,90\n", "list.csv must be a CSV in UTF-8; after line"),
        (b"a.mp4,a sea,many\n", "list.csv: frame='many' must be a number"),
    ],
)
def test_a_broken_manifest_is_named(tmp_path, rows, message):
    (tmp_path / "list.csv").write_bytes(b"video,caption,frame\n" + rows)
    with pytest.raises(ValueError, match=message):
        list(OpenVidSource(OpenVidSource.Config(str(tmp_path), str(tmp_path / "list.csv"))).items())


def test_a_short_row_has_no_prompt(tmp_path):
    (tmp_path / "list.csv").write_text(f"uuid,{','.join(NSFW_COLUMNS)},prompt\nu1,0,0,0,0,0,0\nu2,0,0,0,0,0,0,a sea\n")
    source = VidPromSource(VidPromSource.Config(str(tmp_path), str(tmp_path / "list.csv")))
    assert list(source.prompts()) == [("u2", "a sea")]
