"""Running what is missing: a crash costs one clip, and markers tell what was left out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data import progress
from data.config_errors import ConfigError
from data.progress import Call, done_keys, run_items, worker_number, write_rejected
from data.video import UnreadableVideo, VideoError, write_video


@pytest.fixture(autouse=True)
def no_products(monkeypatch):
    """The items here leave no files."""
    monkeypatch.setattr(progress, "PRODUCTS", {})


def rejected(out: Path) -> dict[str, dict]:
    write_rejected(out)
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return {line["file"]: line for line in lines}


def test_a_crashing_decoder_costs_one_clip(tmp_path):
    """And only what the broken pool had been given is done in processes of its own."""
    calls = [Call(f"{n:02}", f"{n}.mp4", "s", _note_or_exit, (tmp_path, n, n == 3)) for n in range(20)]
    assert run_items("render", tmp_path, calls, num_workers=1) == 19
    assert "03" not in done_keys(tmp_path, "render") and "crashed" in rejected(tmp_path)["3.mp4"]["reason"]
    processes = {path.read_text() for path in tmp_path.glob("*.process")}
    assert len(processes) <= 3, "the worker that crashed, the next, and one for the item that had waited behind it"


def test_an_interrupted_worker_ends_without_a_word(tmp_path):
    call = Call("a", "a.mp4", "s", _note_handler, (tmp_path / "handler",))
    assert run_items("render", tmp_path, [call], num_workers=1) == 1
    assert (tmp_path / "handler").read_text() == str(signal.SIG_DFL)


def _note_handler(path: Path) -> None:
    path.write_text(str(signal.getsignal(signal.SIGINT)))


def _note_or_exit(folder: Path, number: int, crash: bool) -> None:
    if crash:
        os._exit(9)
    (folder / f"{number}.process").write_text(str(os.getpid()))


def test_workers_have_numbers_of_their_own(tmp_path):
    calls = [Call(f"{n}", f"{n}", "s", _meet, (tmp_path, n)) for n in range(2)]
    assert run_items("track", tmp_path, calls, num_workers=2) == 2
    assert sorted((tmp_path / f"{n}.worker").read_text() for n in range(2)) == ["0", "1"]
    assert worker_number() == 0


def _meet(folder: Path, number: int) -> None:
    """Write down which worker this is, and wait until the other one has."""
    (folder / f"{number}.worker").write_text(str(worker_number()))
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.worker"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_file_name_that_is_not_unicode_is_listed(tmp_path, caplog):
    name = os.fsdecode(b"caf\xe9.mp4")
    assert run_items("render", tmp_path, [Call("caf", name, "s", _refuse, (f"{name} is too short",))], 0) == 0
    assert rejected(tmp_path)[name]["reason"] == f"{name} is too short"
    assert b"caf\\udce9.mp4 is too short" in caplog.text.encode(), "as a log file is written"


def test_rejected_items_that_are_not_asked_for_are_neither_listed_nor_tried_again(tmp_path):
    calls = [Call(name, f"{name}.mp4", "s", _refuse, (f"{name} is too short",)) for name in "ab"]
    run_items("render", tmp_path, calls, 0)
    run_items("render", tmp_path, calls[:1], 0)
    assert set(rejected(tmp_path)) == {"a.mp4"}
    calls[1] = replace(calls[1], function=_note_handler, arguments=(tmp_path / "tried",))
    assert run_items("render", tmp_path, calls, 0) == 0 and not (tmp_path / "tried").exists()
    assert set(rejected(tmp_path)) == {"a.mp4", "b.mp4"}


def _refuse(reason: str) -> None:
    raise VideoError(reason)


def test_an_item_that_cannot_be_read_now_is_tried_again(tmp_path):
    call = Call("a", "a.mp4", "s", _be_away, ())
    assert run_items("render", tmp_path, [call], 0) == 0
    assert rejected(tmp_path)["a.mp4"]["reason"] == "stale file handle"
    call = replace(call, function=_note_handler, arguments=(tmp_path / "tried",))
    assert run_items("render", tmp_path, [call], 0) == 1 and not rejected(tmp_path)


def _be_away() -> None:
    raise UnreadableVideo("stale file handle")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_not_the_clips_fault_ends_the_run_and_names_the_item(tmp_path, workers):
    call = Call("a", "a.mp4", "s", write_video, (tmp_path / "odd.mp4", np.zeros((1, 63, 64, 3), np.uint8), 16))
    with pytest.raises(ConfigError, match=r"^a\.mp4: frame size 63x64 must be even"):
        run_items("render", tmp_path, [call], workers)


def test_an_error_of_a_library_keeps_its_traceback(tmp_path):
    with pytest.raises(json.JSONDecodeError):
        run_items("render", tmp_path, [Call("a", "a.mp4", "s", json.loads, ("{",))], 0)


def test_no_more_workers_than_items_are_started(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(progress, "_open_pool", lambda count: started.append(count) or open_pool(count))
    call = Call("a", "a.mp4", "s", _note_handler, (tmp_path / "handler",))
    assert run_items("render", tmp_path, [call], num_workers=8) == 1 and started == [1]


open_pool = progress._open_pool


RUN_ONE = """
import sys
from pathlib import Path
from data.progress import Call, run_items
from tests.data.test_progress import _wait

if __name__ == "__main__":
    out = Path(sys.argv[1])
    run_items("render", out, [Call("a", "a.mp4", "s", _wait, (out / "process",))], num_workers=1)
"""


def _wait(path: Path) -> None:
    path.write_text(str(os.getpid()))
    time.sleep(60)


def test_workers_end_with_the_process_that_started_them(tmp_path):
    (tmp_path / "script.py").write_text(RUN_ONE)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    started = subprocess.Popen([sys.executable, tmp_path / "script.py", tmp_path], env=environment)
    noted = tmp_path / "process"
    _until(lambda: noted.exists() and noted.read_text() != "")
    worker = int(noted.read_text())
    assert _is_running(worker)
    started.kill()
    started.wait(timeout=60)
    _until(lambda: not _is_running(worker))


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _is_running(process: int) -> bool:
    """Not ended, whether or not anyone has taken notice."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
