"""The figures of one evaluation: flat keys, an interval beside each mean, and what produced them.

`metrics.json` maps `role.metric_unit` to a number (null where nothing could be measured, a text beginning
"unavailable:" where weights are missing); a mean over clips has `<key>_low` and `<key>_high` beside it.
`per_clip.json` holds the values behind each mean, in the order of the clips, so that two runs can be compared clip by
clip. `meta.json` holds their names, the whole configuration, the commit and the machine: a figure without them means
nothing.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eval.metrics.interval import Interval, bootstrap_interval, paired_difference
from eval.report import Table
from models.files import write_json
from stream.provenance import git_commit, machine

log = logging.getLogger(__name__)


class Results:
    """Collects figures; means over clips get a bootstrap interval of the given coverage.

    unit: what the clips of a benchmark are called in its tables.
    """

    def __init__(self, *, seed: int, level: float = 0.95, unit: str = "clips") -> None:
        self.seed = seed
        self.level = level
        self.unit = unit
        self.clips: list[str] = []  # names of the clips behind the means, in their order
        self.values: dict[str, float | int | str | None] = {}
        self.per_clip: dict[str, list[float]] = {}
        self._intervals: dict[str, Interval] = {}

    def add(self, key: str, per_clip: Sequence[float]) -> None:
        """A mean over clips, with its interval."""
        self.per_clip[key] = [float(value) for value in per_clip]
        self._put_interval(key, bootstrap_interval(per_clip, seed=self.seed, level=self.level))

    def add_difference(self, key: str, first: Sequence[float], second: Sequence[float]) -> None:
        """mean(first - second) over the same clips, paired."""
        self._put_interval(key, paired_difference(first, second, seed=self.seed, level=self.level))

    def put(self, key: str, value: float | int | str | None) -> None:
        """One figure without an interval; nan and infinity become null."""
        self.values[key] = None if isinstance(value, float) and not math.isfinite(value) else value

    def by_role(self) -> Table:
        """The metrics that several roles share, one row each and one column per role."""
        roles = [role for role in self._roles() if self._shared(role)]
        metrics = list(dict.fromkeys(metric for role in roles for metric in self._shared(role)))
        rows = [[metric, *(self._cell(f"{role}.{metric}") for role in roles)] for metric in metrics]
        return Table(["", *(role.replace("_", " ") for role in roles)], rows)

    def others(self) -> Table:
        """Every figure that is not in `by_role`."""
        shared = {f"{role}.{metric}" for role in self._roles() for metric in self._shared(role)}
        rows = [[key, self._cell(key)] for key in self.values if key not in shared and not self._is_bound(key)]
        return Table(["", f"value, with its {self.level:.0%} interval over {self.unit}"], rows)

    def notes(self) -> list[str]:
        """What could not be measured and how to get it, each once."""
        texts = [f"{key.split('.')[-1]}: {value}" for key, value in self.values.items() if isinstance(value, str)]
        return list(dict.fromkeys(texts))

    def write(self, folder: Path, config: dict[str, Any], device: torch.device) -> None:
        """Write metrics.json, per_clip.json and meta.json, each atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "metrics.json", self.values)
        write_json(folder / "per_clip.json", self.finite_per_clip())
        write_json(
            folder / "meta.json",
            {
                "config": config,
                "git_commit": git_commit(),
                "machine": machine(device),
                "clips": self.clips,
                "interval_level": self.level,
                "written_unix_seconds": time.time(),
            },
        )

    def finite_per_clip(self) -> dict[str, list[float | None]]:
        """`per_clip` as JSON has it: null for nan."""
        return {key: [v if math.isfinite(v) else None for v in values] for key, values in self.per_clip.items()}

    def _put_interval(self, key: str, interval: Interval) -> None:
        self._intervals[key] = interval
        self.put(key, interval.mean)
        self.put(f"{key}_low", interval.low)
        self.put(f"{key}_high", interval.high)

    def _is_bound(self, key: str) -> bool:
        return any(key == f"{name}{end}" for name in self._intervals for end in ("_low", "_high"))

    def _roles(self) -> list[str]:
        return list(dict.fromkeys(key.split(".")[0] for key in self.values if "." in key))

    def _shared(self, role: str) -> list[str]:
        """Metrics of this role that another role has too, in order."""
        found = [key.split(".", 1)[1] for key in self.values if key.startswith(f"{role}.")]
        rest = [other for other in self._roles() if other != role]
        return [
            metric
            for metric in found
            if not self._is_bound(f"{role}.{metric}") and any(f"{other}.{metric}" in self.values for other in rest)
        ]

    def _cell(self, key: str) -> str:
        if key in self._intervals:
            return str(self._intervals[key])
        value = self.values.get(key, "")
        if value is None:
            return "n/a"
        return f"{value:.4g}" if isinstance(value, float) else str(value).split(":")[0]


def keep(path: Path, made_with: Mapping[str, Any], **content: Any) -> None:
    """Figures that are not to be measured again as long as nothing changes that they were made with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"made_with": made_with, "git_commit": git_commit(), **content})


def read_kept(path: Path, made_with: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `keep` wrote, or None where it is absent or was made with something else.

    The code may have changed since: then the log says which commit the figures are of.
    """
    found = json.loads(path.read_text()) if path.is_file() else {}
    if found.get("made_with") != made_with:
        return None
    if (commit := found.get("git_commit")) != git_commit():
        log.warning("%s: figures of commit %s are kept; delete the file to have them measured again", path, commit)
    return found
