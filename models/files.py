"""Files that are there whole or not at all, also after a crash.

Each is written under a name of its own beside its place, brought to disk (fsync) and renamed. Left out: folders of
weights, which are replaced as a whole (``models/vae/folder.py``).
"""

from __future__ import annotations

import glob
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

UMASK = os.umask(0o077)  # of this process; only setting it tells what it was
os.umask(UMASK)
SUFFIX_LENGTH = 8  # of the name that a file has while it is written
FRESH_SUFFIX = "[0-9a-f]" * SUFFIX_LENGTH
KEPT_LENGTH = 240  # of the file's own name in that one: file systems take 255 bytes
ABANDONED_SECONDS = 3600  # a file that has not grown for so long is not being written any more


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Yields a path to write to; when the block ends without error, what is there takes the name ``path``.

    Several processes may replace the same file: what one of them wrote stays.
    """
    path = Path(path)
    fresh = fresh_path(path)
    try:
        yield fresh
        bring_to_disk(fresh)
        follow_umask(fresh)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def fresh_path(path: Path) -> Path:
    """A name of its own beside a file, to write to before it takes the file's place."""
    return path.with_name(f".{path.name[:KEPT_LENGTH]}.{uuid.uuid4().hex[:SUFFIX_LENGTH]}")


def remove_unfinished(path: Path) -> None:
    """Delete what killed processes left of `replace_file`; for a file that this process alone writes."""
    for fresh in path.parent.glob(f".{glob.escape(path.name[:KEPT_LENGTH])}.{FRESH_SUFFIX}"):
        fresh.unlink(missing_ok=True)


def remove_abandoned(folder: Path) -> None:
    """Delete what killed processes left of any file in a folder, and no other process is writing."""
    limit = time.time() - ABANDONED_SECONDS
    for fresh in folder.glob(f".*.{FRESH_SUFFIX}"):
        with suppress(FileNotFoundError):  # another process was faster
            if fresh.stat().st_mtime < limit:
                fresh.unlink()


def file_state(path: str | Path | None) -> tuple[int, int] | None:
    """Size in bytes and time of change in ns, by which a replaced file is known; None where no file is."""
    if path is None or not os.path.isfile(path):
        return None
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def bring_to_disk(path: Path) -> None:
    """Wait until the content of a file would outlive a crash of the machine."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def follow_umask(path: Path) -> None:
    """Let those read a file or folder whom the umask lets: others on a cluster.

    Temporary folders are for their owner alone, and so is what safetensors 0.8 writes (huggingface/safetensors#782).
    """
    path.chmod((0o777 if path.is_dir() else 0o666) & ~UMASK)


def write_json(path: str | Path, content: Any) -> None:
    """Replaces the file. Raises ValueError for nan and infinity, which JSON has not."""
    with replace_file(path) as fresh:
        fresh.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
