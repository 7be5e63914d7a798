"""Checkpoints: whole, atomic, verified.

`<output_dir>/checkpoints/step_00000100/` holds modules.pt, optimizers.pt, ema.pt, stage.pt, trainer.json and
manifest.json (size and SHA-256 of every file). A folder gets its name by a rename when everything in it is on
the disk, and only then does `last_good` point at it: a process killed at any moment leaves the previous one
valid. Loading verifies the sums; a damaged checkpoint is reported and the one before it is used.

`exported` names the step whose weights the run has exported for the next stage.

Tensors are read with torch.load(weights_only=True), but for what DeepSpeed writes and reads by itself, with pickle:
resume no checkpoint of somebody else in that launch mode. Left out: what a state means (`trainer.py`), gathering of
shards (`state.py`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from data.app import RunFailedError
from models.files import replace_file

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
POINTER = "last_good"
EXPORTED = "exported"
PARTIAL = ".partial"


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep_last: int = 2, keep_every: int = 0) -> None:
        self.folder, self.keep_last, self.keep_every = Path(folder), keep_last, keep_every

    # ------------------------------------------------------------------------------------------ writing
    def save(self, step: int, tensors: Mapping[str, Any], trainer: Mapping[str, Any]) -> Path:
        """Write <name>.pt for each of `tensors` and trainer.json. Main process only.

        Raises RunFailedError, with the room that there is, where it cannot be written; what was of it is removed.
        """
        final = self.path(step)
        partial = final.with_name(final.name + PARTIAL)
        try:
            partial.mkdir(parents=True, exist_ok=True)
            for name, content in tensors.items():
                torch.save(content, partial / f"{name}.pt")
            (partial / "trainer.json").write_text(json.dumps(dict(trainer), indent=1))
            (partial / MANIFEST).write_text(json.dumps(_manifest(partial), indent=1))
            for file in _files(partial):
                _fsync(file)
            _fsync(partial)
        except (OSError, RuntimeError) as error:  # torch.save has its own for a full disk
            free = free_gb(self.folder)
            shutil.rmtree(partial, ignore_errors=True)
            raise RunFailedError(
                f"the checkpoint of step {step} cannot be written to {self.folder}, where {free:.3g} GB were "
                f"free ({error}); make room, and the same command goes on from step {max(self.steps(), default=0)}"
            ) from error
        if self.is_exported(step):  # with weights that the run had when it came here before
            (self.folder / EXPORTED).unlink()
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _fsync(self.folder)
        self._point_at(final)
        self._prune(step)
        return final

    @contextmanager
    def exporting(self, step: int) -> Iterator[None]:
        """The block exports the weights of a step that is saved; at its end `is_exported`. Main process only.

        Raises RunFailedError, with the room that there is, where they cannot be written.
        """
        try:
            yield
            with replace_file(self.folder / EXPORTED) as fresh:
                fresh.write_text(self.path(step).name + "\n")
        except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
            folder = self.folder.parent
            raise RunFailedError(
                f"step {step} is saved, its export cannot be written to {folder}, where {free_gb(folder):.3g} GB were "
                f"free ({error}); make room, and the same command exports it"
            ) from error

    def _point_at(self, final: Path) -> None:
        pointer = self.folder / POINTER
        fresh = pointer.with_name(POINTER + PARTIAL)
        fresh.write_text(final.name + "\n")
        _fsync(fresh)
        os.replace(fresh, pointer)
        _fsync(self.folder)

    def _prune(self, newest: int) -> None:
        """Keep the last `keep_last` up to `newest`, which `last_good` names. What is later belongs to a course that
        the run left when it resumed from before it, and goes.
        """
        steps = self.steps()
        kept = [step for step in steps if step <= newest][-self.keep_last :]
        for step in steps:
            if step in kept or (self.keep_every and step % self.keep_every == 0):
                continue
            if step > newest:
                log.warning("removing %s: the run went back and is at step %d", self.path(step), newest)
            shutil.rmtree(self.path(step))
        for leftover in self.folder.glob(f"step_*{PARTIAL}"):
            shutil.rmtree(leftover)

    # ------------------------------------------------------------------------------------------ reading
    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def is_exported(self, step: int) -> bool:
        marker = self.folder / EXPORTED
        return marker.is_file() and marker.read_text().strip() == self.path(step).name

    def partial_path(self, step: int) -> Path:
        """Where processes put files of their own before the main process calls `save`."""
        return self.path(step).with_name(self.path(step).name + PARTIAL)

    def clear_partial(self, step: int) -> None:
        """Throw away what a crash while saving this step left."""
        if self.partial_path(step).exists():
            shutil.rmtree(self.partial_path(step))

    def steps(self) -> list[int]:
        """Steps with a finished folder, ascending; not copies that the user named otherwise (step_00000500_backup)."""
        names = [re.fullmatch(r"step_([0-9]{8,})", path.name) for path in self.folder.glob("step_*")]
        return sorted(int(name[1]) for name in names if name is not None)

    def last_good(self) -> Path | None:
        """The newest checkpoint that is whole; None if the run has none.

        The pointer comes first, then older folders. What is damaged is named in the log. Raises ValueError if
        there are checkpoints and none is whole: starting again silently would throw the run away.
        """
        steps = self.steps()
        candidates = [self.path(step) for step in reversed(steps)]
        pointer = self.folder / POINTER
        if pointer.is_file():
            pointed = self.folder / pointer.read_text().strip()
            candidates = [pointed, *[path for path in candidates if path < pointed]]
        for path in candidates:
            damage = damaged(path)
            if damage is None:
                return path
            log.warning("checkpoint %s is damaged (%s); trying the one before", path, damage)
        if steps:
            raise ValueError(
                f"{self.folder}: none of the checkpoints {steps} is whole; restore one, or set "
                "resume=never with another output_dir to start again"
            )
        return None


def free_gb(folder: Path) -> float:
    """Room on the disk of a folder, which need not be there yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free / 1e9


def load(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors by file name, trainer.json) of a checkpoint folder, on the CPU."""
    tensors = {
        file.stem: torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        for file in sorted(path.glob("*.pt"))
    }
    return tensors, json.loads((path / "trainer.json").read_text())


def changed_fields(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """ "optim.lr: 0.1 there, 0.2 here" for each value in which two composed configurations differ."""
    changed: list[str] = []
    for key in dict.fromkeys((*there, *here)):
        old, new = there.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed += changed_fields(old, new, f"{prefix}{key}.")
        elif old != new:
            changed.append(f"{prefix}{key}: {old} there, {new} here")
    return changed


def damaged(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"no readable {MANIFEST}: {error}"
    for name, stated in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != stated["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {stated['bytes']}"
        if _sha256(file) != stated["sha256"]:
            return f"{name} has another checksum than when written"
    return None


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in _files(folder)
        if file.name != MANIFEST
    }


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(2**22):
            digest.update(part)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
