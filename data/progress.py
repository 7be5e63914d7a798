"""Resumable work over items: markers of what is done or rejected, and running what is missing.

A marker holds a hash of the settings that made the item, so an item is done again when they change or its files are
gone. Each step notes which items it was last asked for: markers of others stay, and count again when they are asked for
again. Clips that cannot be used raise VideoError and are noted with the reason, those that cannot be read now
(UnreadableVideo) so that the next run tries them again; any other error is ours and ends the run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import threading
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait as wait_for
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.app import REFUSED, raised_here
from data.config_errors import ConfigError
from data.video import UnreadableVideo, VideoError, read_video
from models.files import remove_abandoned, replace_file, write_json

log = logging.getLogger(__name__)

STEPS = ("render", "track", "encode", "pack")
PRODUCTS = {  # step -> files that it leaves of an item
    "render": ("clips/{key}.mp4", "clips/{key}.json"),
    "track": ("tracks/{key}.npz",),
    "preview": ("previews/{key}.preview.mp4",),
    "encode": ("encoded/{key}.npz",),
}
TRY_AGAIN = ""  # in place of the settings' hash in the marker of an item that the next run tries again
ITEMS_PER_WORKER = 2  # given to a pool at a time: one in work, one waiting

_worker_number = 0


@dataclass(frozen=True)
class Call:
    """One item of work; function and arguments must be picklable."""

    key: str
    origin: str  # file name or seed, for the user
    stamp: str  # hash of the settings
    function: Callable[..., None]
    arguments: tuple
    clip: str | None = None  # stamp of the rendered clip that the item is, or is made from


def stamp(*settings: Any) -> str:
    """Hash of the settings that an item is made with."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------ markers
def marker_path(out: Path, step: str, key: str) -> Path:
    return out / "markers" / step / f"{key}.json"


def marker(out: Path, step: str, key: str) -> dict[str, Any]:
    """The note of an item, or {} if the step has not reached it."""
    path = marker_path(out, step, key)
    return json.loads(path.read_text()) if path.is_file() else {}


def mark(
    out: Path, step: str, key: str, made_with: str, origin: str, reason: str | None = None, clip: str | None = None
) -> None:
    """Note that an item is done, or rejected for a reason; clip is the stamp of the rendering it was made from."""
    path = marker_path(out, step, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"stamp": made_with, "origin": origin, "rejected": reason, "clip": clip})


def unmark(out: Path, step: str, key: str) -> None:
    """Drop a marker before its item is written anew: if that is cut short, the old one does not vouch for it."""
    marker_path(out, step, key).unlink(missing_ok=True)


def done_keys(out: Path, step: str) -> list[str]:
    """Keys that the step was last asked for, finished and did not reject, and whose files are there, sorted."""
    return [key for key in accepted_keys(out, step) if has_products(out, step, key)]


def accepted_keys(out: Path, step: str) -> list[str]:
    """Keys that the step was last asked for, finished and did not reject, sorted; their files may be gone since."""
    return [key for key, note in _notes(out, step) if note["rejected"] is None]


def products(out: Path, step: str, key: str) -> list[Path]:
    """Files that the step leaves of an item."""
    return [out / name.format(key=key) for name in PRODUCTS.get(step, ())]


def has_products(out: Path, step: str, key: str) -> bool:
    return all(path.is_file() for path in products(out, step, key))


def is_done(out: Path, step: str, key: str, made_with: str) -> bool:
    """Whether the item was made with these settings and is there, or was rejected under them."""
    note = marker(out, step, key)
    return note.get("stamp") == made_with and (note["rejected"] is not None or has_products(out, step, key))


def is_made_now(out: Path, step: str, key: str, *settings: Any) -> bool:
    """Whether the step made this item of its clip as it is rendered now, with these settings, and it is still there."""
    made_with = stamp(*settings, marker(out, "render", key)["clip"])
    return is_done(out, step, key, made_with) and marker(out, step, key)["rejected"] is None


def read_rendered(out: Path, key: str) -> np.ndarray:
    """Frames of a rendered clip: uint8 [T, H, W, 3]. Raises UnreadableVideo, since to render it again may help."""
    path = products(out, "render", key)[0]
    try:
        return read_video(path)
    except VideoError as error:
        raise UnreadableVideo(f"{error}; delete {path} and run step=render") from error


def read_sidecar(out: Path, key: str) -> dict[str, Any]:
    """Caption, origin and geometry of a rendered clip. Raises UnreadableVideo, since to render it again may help."""
    path = products(out, "render", key)[1]
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UnreadableVideo(f"{path} is damaged ({error}); delete it and run step=render") from error


def read_arrays(out: Path, step: str, key: str) -> dict[str, np.ndarray]:
    """What step=track or step=encode stored of a clip, by name. Raises UnreadableVideo, since that step may help."""
    path = products(out, step, key)[0]
    try:
        with np.load(path) as stored:
            return dict(stored)
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UnreadableVideo(f"{path} is damaged ({error}); delete it and run step={step}") from error


def rejected_keys(out: Path, step: str) -> list[str]:
    """Keys that the step was last asked for and rejected, sorted."""
    return [key for key, note in _notes(out, step) if note["rejected"] is not None]


def ask_for(out: Path, step: str, keys: Iterable[str]) -> None:
    """Note which items of a step are wanted now: what it made of others is neither packed nor listed as rejected."""
    keys, path = sorted(keys), _asked_path(out, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    others = {made.stem for made in (out / "markers" / step).glob("*.json")} - set(keys)
    if others and step == "render":  # the steps after it take its word
        log.warning(
            "%d clips of earlier runs in %s are not among the %d of this source: they stay and are not packed",
            len(others), out, len(keys),
        )  # fmt: skip
    write_json(path, keys)


def _asked_path(out: Path, step: str) -> Path:
    return out / "markers" / f"{step}.json"


def _notes(out: Path, step: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, note) of the items asked for that the step has reached, sorted; of pack, which asks for none, all."""
    asked = _asked_path(out, step)
    if asked.is_file():
        keys = json.loads(asked.read_text())
    else:
        keys = sorted(path.stem for path in (out / "markers" / step).glob("*.json"))
    for key in keys:
        if note := marker(out, step, key):
            yield key, note


def keys_of_origins(out: Path, step: str, origins: Collection[str]) -> dict[str, list[str]]:
    """Origin -> keys that the step ever reached it as, sorted, of the origins that it reached."""
    found: dict[str, list[str]] = {}
    for path in sorted((out / "markers" / step).glob("*.json")):
        if (origin := json.loads(path.read_text())["origin"]) in origins:
            found.setdefault(origin, []).append(path.stem)
    return found


def forget(out: Path, step: str) -> None:
    """Drop all markers of a step."""
    for path in (out / "markers" / step).glob("*.json"):
        path.unlink()


def write_rejected(out: Path) -> None:
    """rejected.jsonl, made anew from the markers: one line {file, key, step, reason} per clip left out."""
    lines = []
    for step in STEPS:
        for key, note in _notes(out, step):
            if note["rejected"] is not None:
                line = {"file": note["origin"], "key": key, "step": step, "reason": note["rejected"]}
                lines.append(json.dumps(line))  # ASCII: a file name need not be Unicode
    with replace_file(out / "rejected.jsonl") as fresh:
        fresh.write_text("".join(f"{line}\n" for line in lines))


# ------------------------------------------------------------------------------------------ running
def run_items(step: str, out: Path, calls: list[Call], num_workers: int) -> int:
    """Do the calls whose marker is absent or of other settings; returns how many items are usable now."""
    for folder in {path.parent for path in (marker_path(out, step, ""), *products(out, step, ""))}:
        remove_abandoned(folder)
    ask_for(out, step, (call.key for call in calls))
    pending = [call for call in calls if not is_done(out, step, call.key, call.stamp)]
    log.info("%s: %d of %d items to do", step, len(pending), len(calls))
    for call, error in tqdm(_results(pending, num_workers), total=len(pending), desc=step, unit="clip"):
        if error is not None:
            log.warning("%s: %s rejected: %s", step, _printable(call.origin), _printable(str(error)))
        made_with = TRY_AGAIN if isinstance(error, UnreadableVideo) else call.stamp
        mark(out, step, call.key, made_with, call.origin, None if error is None else str(error), call.clip)
    usable = len(done_keys(out, step))
    log.info("%s: %d usable, %d rejected", step, usable, len(calls) - usable)
    return usable


def _printable(text: str) -> str:
    """Bytes of a file name that are not Unicode written as \\udcXX, since a log file takes Unicode only."""
    return text.encode(errors="backslashreplace").decode()


def _results(calls: list[Call], num_workers: int) -> Iterator[tuple[Call, VideoError | None]]:
    """(call, why it is rejected or None) as they finish."""
    if num_workers == 0:
        for call in calls:
            yield call, attempt(call)
        return
    waiting = deque(calls)
    while waiting:
        suspects = yield from _until_a_crash(waiting, num_workers)
        if suspects:
            log.warning("a worker process died; %d items are tried one by one", len(suspects))
        for call in suspects:
            yield call, _attempt_alone(call)


def _until_a_crash(
    waiting: deque[Call], num_workers: int
) -> Generator[tuple[Call, VideoError | None], None, list[Call]]:  # -> suspects
    """Do the calls that wait, in one pool. A decoder that crashes its process breaks the pool: what the pool had been
    given and not handed back is returned, the rest still waits.
    """
    given: dict[Future[VideoError | None], Call] = {}
    try:
        with _open_pool(min(num_workers, len(waiting))) as pool:  # all its processes start at once
            while waiting or given:
                while waiting and len(given) < ITEMS_PER_WORKER * num_workers:
                    given[pool.submit(attempt, waiting[0])] = waiting[0]
                    waiting.popleft()
                for future in wait(given, return_when=FIRST_COMPLETED).done:
                    error = future.result()
                    yield given.pop(future), error
    except BrokenProcessPool:
        return list(given.values())
    return []


def _attempt_alone(call: Call) -> VideoError | None:
    try:
        with _open_pool(1) as pool:
            return pool.submit(attempt, call).result()
    except BrokenProcessPool:
        return VideoError("its process died: the decoder crashed on this file")


def _open_pool(num_workers: int) -> ProcessPoolExecutor:
    context = get_context("spawn")
    return ProcessPoolExecutor(num_workers, context, _take_number, (context.Value("i", 0),))


def _take_number(next_number: Synchronized[int]) -> None:
    global _worker_number
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a traceback
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with next_number.get_lock():
        _worker_number = next_number.value
        next_number.value += 1


def _end_with_parent() -> None:
    """A pool's workers wait for work for ever, also when the process that gives it was killed."""
    parent = parent_process()
    assert parent is not None, "runs in a worker"
    wait_for([parent.sentinel])
    os._exit(1)


def worker_number() -> int:
    """Which worker of a pool this process is, from 0; 0 outside of one."""
    return _worker_number


def attempt(call: Call) -> VideoError | None:
    """None, or why the clip is unusable.

    Raises ConfigError, naming the item, for what our own code refuses and is not the clip's fault: by itself, no error
    says where in another process it was raised.
    """
    try:
        call.function(*call.arguments)
    except VideoError as error:
        return error
    except REFUSED as error:
        if not raised_here(error):
            raise
        raise ConfigError(f"{call.origin}: {error}") from error
    return None
