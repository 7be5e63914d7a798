"""What produced a figure: the commit and the machine. A figure without them means nothing. And the peak of memory."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from models.device import fast_dtype, pick_device

REPO_DIR = Path(__file__).resolve().parent.parent


def git_commit() -> str:
    """The checked-out commit, with "-dirty" where files differ from it; "unknown" outside a git checkout.

    A copy of one says in a file COMMIT beside its folders what it was copied from (slurm/train.sbatch). The commit of
    another repository, in which this folder may lie, is not asked for.
    """
    if (copied := REPO_DIR / "COMMIT").is_file():
        return copied.read_text().strip()
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=REPO_DIR,
            env=os.environ | {"GIT_CEILING_DIRECTORIES": str(REPO_DIR.parent)},
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """What ran: host, processor, torch, threads, the accelerator if there is one, and the device's faster dtype."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "auto_dtype": fast_dtype(device or pick_device("auto")),  # what dtype=auto stood for
    }


def speed_of_machine(device: torch.device) -> dict[str, Any]:
    """What decides how fast it is: figures of two machines are not compared."""
    found = machine(device)
    return {key: found[key] for key in ("processor", "cpu_count", "threads", "torch", "gpu")}


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory that tensors made by a call held at once, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes, initial=0))


def extra_peak_bytes(run: Callable[[], object], than: Callable[[], object], device: torch.device) -> int:
    """How much more memory a call holds at its peak than another does."""
    return max(0, peak_bytes(run, device) - peak_bytes(than, device))


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
