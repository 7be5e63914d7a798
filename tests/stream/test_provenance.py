from __future__ import annotations

import subprocess
from pathlib import Path

from stream import provenance


def test_a_folder_inside_another_repository_has_not_its_commit(tmp_path: Path, monkeypatch) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True)
    monkeypatch.setattr(provenance, "REPO_DIR", tmp_path)
    assert provenance.git_commit() == head.stdout.strip()
    (inside := tmp_path / "copy").mkdir()
    monkeypatch.setattr(provenance, "REPO_DIR", inside)
    assert provenance.git_commit() == "unknown"
