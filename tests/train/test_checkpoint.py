"""Checkpoint folders: atomic, verified, pruned, whatever the moment of a crash."""

from __future__ import annotations

import shutil

import pytest
import torch

from data.app import RunFailedError
from train import checkpoint
from train.checkpoint import CheckpointStore, damaged


def save(store, step, value=0.0):
    return store.save(step, {"modules": {"m": {"w": torch.full((3,), value)}}}, {"step": step})


def test_round_trip(tmp_path):
    path = save(CheckpointStore(tmp_path), 7, 2.5)
    tensors, trainer = checkpoint.load(path)
    assert torch.equal(tensors["modules"]["m"]["w"], torch.full((3,), 2.5)) and trainer == {"step": 7}
    assert damaged(path) is None and path.name == "step_00000007"


@pytest.mark.parametrize("name", ["modules.pt", "trainer.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_any_damage_is_noticed(tmp_path, name, damage):
    store = CheckpointStore(tmp_path)
    save(store, 1, 1.0)
    newest = save(store, 2, 2.0)
    content = bytearray((newest / name).read_bytes())
    if damage == "remove":
        (newest / name).unlink()
    else:
        content[len(content) // 2] ^= 0xFF
        (newest / name).write_bytes(content if damage == "flip" else content[:-3])
    assert store.last_good().name == "step_00000001"


@pytest.mark.parametrize("crash_at", ["save", "manifest", "rename", "pointer"])
def test_a_crash_while_saving_leaves_the_previous_one(tmp_path, monkeypatch, crash_at):
    store = CheckpointStore(tmp_path)
    save(store, 1, 1.0)

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    target = {
        "save": (torch, "save"),
        "manifest": (checkpoint, "_manifest"),
        "rename": (checkpoint.Path, "rename"),
        "pointer": (checkpoint.os, "replace"),
    }[crash_at]
    with monkeypatch.context() as patch:
        patch.setattr(*target, crash)
        with pytest.raises(KeyboardInterrupt):
            save(store, 2, 2.0)
    assert CheckpointStore(tmp_path).last_good().name == "step_00000001"
    save(store, 2, 3.0)  # the resumed run does the step again
    tensors, _ = checkpoint.load(store.last_good())
    assert float(tensors["modules"]["m"]["w"][0]) == 3.0
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 640 vs 592")])
def test_a_full_disk_is_told_with_the_room_and_leaves_nothing_half_written(tmp_path, monkeypatch, error):
    store = CheckpointStore(tmp_path)
    save(store, 1, 1.0)

    def full(content, path):
        path.write_bytes(b"half")
        raise error

    with (
        monkeypatch.context() as patch,
        pytest.raises(RunFailedError, match=r"GB were free \(.*\); make room.* from step 1"),
    ):
        patch.setattr(torch, "save", full)
        save(store, 2, 2.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last_good", "step_00000001"]
    save(store, 2, 2.0)


def test_a_full_disk_is_told_where_not_even_the_folder_can_be_made(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.Path, "mkdir", full)
    with pytest.raises(RunFailedError, match=r"No space left on device\); make room, .* from step 0"):
        save(CheckpointStore(tmp_path / "new/checkpoints"), 2)


def test_a_step_that_is_done_again_is_not_exported(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    with store.exporting(1):
        assert not store.is_exported(1)
    assert store.is_exported(1) and not store.is_exported(2)
    save(store, 1)
    assert not store.is_exported(1)


def test_nothing_whole_is_an_error_and_nothing_at_all_is_none(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.last_good() is None
    (save(store, 1) / "modules.pt").unlink()
    with pytest.raises(ValueError, match=r"none of the checkpoints \[1\] is whole; restore one"):
        store.last_good()


def test_pickled_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    store = CheckpointStore(tmp_path)
    path = store.save(1, {"stage": {"x": Evil()}}, {"step": 1})
    with pytest.raises(Exception, match=r"[Ww]eights"):
        checkpoint.load(path)


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_damaged_later_step_does_not_count_as_the_latest(tmp_path, keep_last):
    before, store = CheckpointStore(tmp_path, 2), CheckpointStore(tmp_path, keep_last)
    for step in (500, 1000):
        save(before, step)
    (store.path(1000) / "modules.pt").unlink()
    assert store.last_good() == store.path(500)
    save(store, 700)  # resumed from 500, told to stop at 700
    assert store.last_good() == store.path(700)
    assert store.steps() == [500, 700][-keep_last:]


def test_a_copy_that_the_user_keeps_is_neither_counted_nor_removed(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1)
    copy = tmp_path / "step_00000500_backup"
    shutil.copytree(save(store, 500), copy)
    save(store, 1000)
    assert store.steps() == [1000] and store.last_good() == store.path(1000)
    assert damaged(copy) is None
