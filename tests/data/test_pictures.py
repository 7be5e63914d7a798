"""Pictures and masks: what is cut off is refused, and transparency has a meaning."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data.pictures import read_mask, read_picture

INSIDE = np.zeros((24, 32), np.uint8)
INSIDE[4:10, 6:20] = 255


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_what_is_cut_off_is_refused(tmp_path: Path, suffix: str):
    """OpenCV fills the rest of a JPEG with grey."""
    path = tmp_path / f"a.{suffix}"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    assert read_picture(path, "image=a").shape == (64, 64, 3)
    path.write_bytes(path.read_bytes()[: int(0.7 * path.stat().st_size)])
    for read in (read_picture, read_mask):
        with pytest.raises(ValueError, match="image=a is cut off or damaged"):
            read(path, "image=a")


def test_what_is_no_picture_is_refused(tmp_path: Path):
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(ValueError, match="image=a cannot be decoded as a picture"):
        read_picture(tmp_path / "a.png", "image=a")


def test_a_picture_without_transparency_is_what_opencv_reads(tmp_path: Path):
    stored = np.random.default_rng(0).integers(0, 255, (24, 32, 4), np.uint8)
    stored[..., 3] = 255
    for channels in (3, 4):
        cv2.imwrite(str(tmp_path / "a.png"), stored[..., :channels])
        assert np.array_equal(read_picture(tmp_path / "a.png", "a"), stored[..., 2::-1])


def test_white_is_behind_what_is_transparent(tmp_path: Path, caplog):
    alpha = np.where(INSIDE > 0, 255, 0).astype(np.uint8)
    alpha[0, 0] = 51  # a fifth
    red = np.dstack([0 * INSIDE + 200, 0 * INSIDE, 0 * INSIDE, alpha])
    Image.fromarray(red).save(tmp_path / "a.png")
    shown = read_picture(tmp_path / "a.png", "image=a.png")
    assert (shown[INSIDE > 0] == (200, 0, 0)).all()
    assert (shown[-1, -1] == 255).all() and shown[0, 0].tolist() == [244, 204, 204]
    assert "image=a.png is transparent in places" in caplog.text


@pytest.mark.parametrize(
    "layers",
    [
        (INSIDE,),  # white on black
        (0 * INSIDE, INSIDE),  # painted in black on transparent
        (0 * INSIDE + 255, INSIDE),  # white everywhere, shown inside alone
        (INSIDE, 0 * INSIDE + 255),  # white on opaque black
        (INSIDE, INSIDE // 2),  # half transparent
        (INSIDE, np.where(INSIDE[::-1] > 0, 0, 255)),  # black is no part of it where some is bright
    ],
)
@pytest.mark.parametrize("mode", ["grey", "colours"])
def test_a_mask_is_what_was_painted(tmp_path: Path, layers: tuple[np.ndarray, ...], mode: str):
    colours, *alpha = (layer.astype(np.uint8) for layer in layers)
    picture = np.dstack([colours] * (1 if mode == "grey" else 3) + alpha)
    Image.fromarray(picture.squeeze()).save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png", "m"), INSIDE > 0)


def test_a_black_mask_is_empty(tmp_path: Path):
    Image.fromarray(np.dstack([0 * INSIDE, 0 * INSIDE + 255])).save(tmp_path / "m.png")
    assert not read_mask(tmp_path / "m.png", "m").any()
