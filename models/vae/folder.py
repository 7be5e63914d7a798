"""Model folders: a reader finds the whole of one or nothing of it."""

from __future__ import annotations

import glob
import json
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from models.files import bring_to_disk, follow_umask
from models.pretrained import read_weights

DESCRIPTION, WEIGHTS = "model.json", "model.safetensors"
REPLACED = "replaced"  # name of the old folder in the one that it is set aside in
UNFINISHED = ".unfinished-"  # in the name of a folder that is not whole, and of no folder that a user would name
RANDOM_LENGTH = 8  # of the end that tempfile gives a name


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``folder``; when the block ends without error it takes that name.

    One process writes a folder: what killed ones left is removed, or put back where it was all that is left.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_unfinished(folder)
    fresh = _beside(folder)
    try:
        yield fresh
        for path in fresh.iterdir():
            bring_to_disk(path)
            follow_umask(path)
        follow_umask(fresh)
        if folder.exists():
            old = _beside(folder)
            folder.rename(old / REPLACED)
            fresh.rename(folder)
            shutil.rmtree(old)
        else:
            fresh.rename(folder)
    finally:
        if fresh.exists():
            shutil.rmtree(fresh)


def save_model(module: nn.Module, folder: str | Path, description: dict[str, Any]) -> None:
    """Writes model.safetensors and model.json (the description, JSON values). Atomic."""
    with replace_folder(Path(folder)) as fresh:
        save_file({name: value.contiguous() for name, value in module.state_dict().items()}, fresh / WEIGHTS)
        (fresh / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def read_model(
    folder: str | Path, what: str, made_by: str, parts: Collection[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description, of these parts, and weights of a folder that `save_model` wrote.

    Raises FileNotFoundError where there is none, ValueError where it is damaged or of another model; in these words.
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION).is_file():
        raise FileNotFoundError(f"no {what} in {folder}: there is no {DESCRIPTION}; pass a folder made by {made_by}")
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / DESCRIPTION} is not JSON: {error}; pass a folder made by {made_by}") from error
    if absent := [part for part in parts if part not in description]:
        raise ValueError(
            f"no {what} in {folder}: its {DESCRIPTION} tells no {', '.join(absent)}; pass a folder made by {made_by}"
        )
    return description, read_weights(folder / WEIGHTS)


def _beside(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{folder.name}{UNFINISHED}", dir=folder.parent))


def _clear_unfinished(folder: Path) -> None:
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}{UNFINISHED}{'?' * RANDOM_LENGTH}"):
        if not folder.exists() and (leftover / REPLACED).exists():  # killed between the two renames
            (leftover / REPLACED).rename(folder)
        shutil.rmtree(leftover)
