"""Files appear whole under their name, or the old ones stay."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from models.files import remove_abandoned, replace_file, write_json
from models.vae.folder import replace_folder


def test_a_file_takes_its_name_when_it_is_whole_and_on_disk(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    synced = []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(path.read_bytes()))
    with replace_file(path) as fresh:
        fresh.write_bytes(b"new")
        assert fresh.parent == tmp_path and path.read_bytes() == b"old"
    assert synced == [b"old"] and path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), replace_file(path) as fresh:
        fresh.write_bytes(b"ne")
        raise error
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_weights_can_be_read_by_those_whom_the_umask_lets(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    mode = plain.stat().st_mode
    with replace_file(tmp_path / "model.safetensors") as fresh:
        save_file({"a": torch.zeros(2)}, fresh)
        fresh.chmod(0o600)  # as safetensors 0.8 leaves it
    assert (tmp_path / "model.safetensors").stat().st_mode == mode
    with replace_folder(tmp_path / "vae") as folder:
        save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
        (folder / "model.safetensors").chmod(0o600)
    (tmp_path / "made").mkdir()
    assert (tmp_path / "vae/model.safetensors").stat().st_mode == mode
    assert (tmp_path / "vae").stat().st_mode == (tmp_path / "made").stat().st_mode


@pytest.mark.parametrize("name", ["vae", "vae [1]"])
def test_what_killed_writers_of_a_folder_left_goes_or_comes_back(tmp_path, name):
    """Killed at any moment, the folder holds the old files or the new ones after the next writer has begun."""
    folder, other = tmp_path / name, tmp_path / f".{name}-original"  # the user's own
    for path in (tmp_path / f".{name}.unfinished-0123abcd", other):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(OSError, match="disk full"), replace_folder(folder) as fresh:
        assert sorted(tmp_path.iterdir()) == sorted([fresh, other])
        raise OSError("disk full")
    aside = tmp_path / f".{name}.unfinished-4567cdef/replaced"  # killed between the two renames
    aside.mkdir(parents=True)
    (aside / "model.safetensors").write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"), replace_folder(folder):
        raise OSError("disk full")
    assert sorted(tmp_path.iterdir()) == sorted([folder, other])
    assert (folder / "model.safetensors").read_bytes() == b"old"


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "file"
    with replace_file(path) as first, replace_file(path) as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert path.read_bytes() == b"first"


def test_what_killed_processes_left_is_removed_once_nobody_writes_it(tmp_path):
    left, written, other = (tmp_path / name for name in (f".{'a' * 240}.0123abcd", ".b.mp4.89abcdef", ".gitignore"))
    for path in (left, written, other):
        path.touch()
    for path in (left, other):
        os.utime(path, (0, 0))
    remove_abandoned(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted((written, other))


def test_a_file_may_have_a_long_name(tmp_path):
    write_json(tmp_path / ("a" * 255), {})
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None]}
