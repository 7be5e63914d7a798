"""Writing a model folder so that a reader finds the whole of it or nothing of it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.files import bring_to_disk, follow_umask


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``folder``; when the block ends without error it takes that name."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield fresh
        for path in fresh.iterdir():
            bring_to_disk(path)
            follow_umask(path)
        follow_umask(fresh)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            folder.rename(old / "replaced")
            fresh.rename(folder)
            shutil.rmtree(old)
        else:
            fresh.rename(folder)
    finally:
        if fresh.exists():
            shutil.rmtree(fresh)
