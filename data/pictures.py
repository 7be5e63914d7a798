"""Pictures and masks as users have them: whole, with their transparency.

OpenCV decodes the missing rest of a JPEG in grey and drops transparency without a word, so Pillow looks first.
Left out: colour profiles, animations (their first picture is taken).
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)


def read_picture(path: Path, given: str) -> np.ndarray:
    """uint8 [H, W, 3] RGB, with white behind what is transparent.

    Raises ValueError, naming what was given ("image=a.png"), for what is no picture, cut off or damaged.
    """
    import cv2

    if (layered := _with_alpha(path, given)) is not None:
        log.warning("%s is transparent in places: white is put behind it", given)
        alpha = layered[..., 3:] / 255
        return (layered[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return cv2.cvtColor(_decoded(path, given, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def read_mask(path: Path, given: str) -> np.ndarray:
    """bool [H, W]: what is not black and not wholly transparent; what is not transparent, where all of that is black.

    Raises ValueError as `read_picture` does.
    """
    import cv2

    if (layered := _with_alpha(path, given)) is not None:
        painted = layered[..., 3] > 0
        bright = painted & (layered[..., :3] > 0).any(axis=-1)
        return bright if bright.any() else painted
    return _decoded(path, given, cv2.IMREAD_GRAYSCALE) > 0


def _with_alpha(path: Path, given: str) -> np.ndarray | None:
    """uint8 [H, W, 4] RGBA of a picture that is transparent in places; None for any other, and for what only OpenCV
    may know.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            picture.load()
            if picture.mode not in ("RGBA", "LA", "PA") and "transparency" not in picture.info:
                return None
            layered = np.asarray(ImageOps.exif_transpose(picture).convert("RGBA"))
    except (Image.UnidentifiedImageError, Image.DecompressionBombError):
        return None
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow says of damaged files
        raise ValueError(f"{given} is cut off or damaged ({error}); copy it again") from error
    return layered if layered[..., 3].min() < 255 else None


def _decoded(path: Path, given: str, flags: int) -> np.ndarray:
    import cv2

    try:
        picture = cv2.imread(str(path), flags)
    except cv2.error as error:  # more pixels than OpenCV takes
        raise ValueError(f"{given} cannot be decoded as a picture ({error.err}); make it smaller") from error
    if picture is None:
        raise ValueError(f"{given} cannot be decoded as a picture; convert it to PNG")
    return picture
