"""Where clips come from: what each source lists, with which captions, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data.sources import NSFW_COLUMNS, FolderSource, OpenVidSource, SpritesSource, VidPromSource, clip_key
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
    rows = "".join(f"{name},caption,90\n" for name in names)
    (tmp_path / "list.csv").write_text(f"video,caption,frame\n{rows}")
    source = OpenVidSource(OpenVidSource.Config(str(tmp_path), str(tmp_path / "list.csv")))
    found = [(item.key, item.origin) for item in source.items()]
    assert found == list(zip(("a_b", "c", "a_b-2", "a_b-3", "a-b"), names))


def test_vidprom_filters_and_leaves_its_prompts(tmp_path):
    columns = "uuid,prompt,time,toxicity,obscene,identity_attack,insult,threat,sexual_explicit\n"
    (tmp_path / "list.csv").write_text(
        f"{columns}u1,a calm sea,t,0,0,0,0,0,0.19\nu2,bad,t,0,0,0,0,0.2,0\n"
        "u3,unknown,t,,0,0,0,0,0\nu4,a dog,t,0,0,0,0,0,0\n"
    )
    gray_video(tmp_path / "u1.mp4")
    source = VidPromSource(VidPromSource.Config(str(tmp_path), str(tmp_path / "list.csv")))
    assert list(source.prompts()) == [("u1", "a calm sea"), ("u4", "a dog")]
    source.write_manifest(tmp_path)
    assert [json.loads(x)["uuid"] for x in (tmp_path / "prompts.jsonl").read_text().splitlines()] == [
        "u1",
        "u4",
    ]
    first, second = source.items()
    source.render(first, GEOMETRY, tmp_path / "out.mp4")
    with pytest.raises(VideoError, match="no such file"):
        source.render(second, GEOMETRY, tmp_path / "out2.mp4")


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
