"""The whole chain on the sprites world, on a laptop: `make quickstart`.

Runs the commands that a user would type, one process per stage, with one progress line each and the time it took, and
ends with one report to open. A stage that has finished is not run again, and an interrupted one resumes.
Left out: every setting. What each stage does is in conf/experiment/quickstart/*.yaml.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.video import read_video
from eval.report import Figure, Section, Table, Video, curves_from_log, video_side_by_side, write_report

ROOT = Path(__file__).resolve().parents[1]
REFRESH_SECONDS = 0.5
PROCESSES = min(2, os.cpu_count() or 1)  # of a training stage; two on one thread each beat one on two by far
KEEP_FREED_MEMORY = {  # glibc: reuse the big buffers of a step instead of returning them to the system
    "MALLOC_TOP_PAD_": "268435456", "MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "1073741824",
}  # fmt: skip
LINE_WIDTH = 110  # characters of the progress line
SEED_SHOWN = 1  # index of the held-out clip that the student continues at the end
CURVES = {  # stage -> what of its log is worth a look
    "vae": ("vae/loss",),
    "vae_whole": ("vae/loss",),
    "teacher": ("teacher/loss",),
    "causal_init": ("student/loss",),
    "self_forcing": ("student/loss", "critic/loss"),
}


@dataclass(frozen=True)
class Step:
    """One line of the quickstart: its name and the arguments after ``python -m``."""

    name: str
    arguments: tuple[str, ...]
    processes: int = 1

    @property
    def command(self) -> list[str]:
        """The arguments of the interpreter: ``-m train …`` or, for more than one process, the same under torchrun."""
        if self.processes == 1:
            return ["-m", *self.arguments]
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        return ["-m", *launcher, "-m", *self.arguments]

    @property
    def environment(self) -> dict[str, str]:
        """The cores are shared among the processes."""
        threads = max(1, (os.cpu_count() or 1) // self.processes)
        return {**os.environ, **KEEP_FREED_MEMORY, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}


def chain(out: Path) -> list[Step]:
    """The stages in order; everything is written under ``out``."""
    data, vae = out / "data", f"model.vae.path={out / 'vae_whole/export/vae'}"
    teacher = f"model.teacher={out / 'teacher/export/teacher'}"
    student = f"model.student={out / 'self_forcing/export/student'}"
    held_out = out / "held_out"

    def prepare(name: str, *overrides: str) -> Step:
        return Step(name, ("data", "experiment=quickstart/data", *overrides))

    def train(stage: str, *overrides: str) -> Step:
        where = (f"shards={data / 'shards'}", f"output_dir={out / stage}")
        return Step(stage, ("train", f"experiment=quickstart/{stage}", *where, *overrides), PROCESSES)

    weights = (vae, teacher, student)
    clip = ("source.split=test", f"source.first_index={SEED_SHOWN}", "source.num_clips=1", "num_workers=0")
    return [
        prepare("render, track", f"out={data}"),
        train("vae"),
        train("vae_whole", f"stage.init_from={out / 'vae/export/vae'}"),
        prepare("encode", f"out={data}", vae),
        train("teacher", vae),
        train("ode_pairs", vae, teacher),
        train("causal_init", vae, teacher, f"stage.pairs={out / 'ode_pairs/pairs'}"),
        train("self_forcing", vae, teacher, f"stage.init_from={out / 'causal_init/export/student'}"),
        prepare("held-out clip", *clip, f"out={held_out}"),
        Step("stream", ("stream", "experiment=quickstart/stream", *weights, *_stream_inputs(held_out, out))),
        Step("eval", ("eval", "experiment=quickstart/eval", *weights, f"out={out / 'eval'}")),
    ]


def _stream_inputs(held_out: Path, out: Path) -> tuple[str, ...]:
    key = f"test-{SEED_SHOWN:06d}"
    clip, tracks = held_out / "clips" / f"{key}.mp4", held_out / "tracks" / f"{key}.npz"
    return (f"image={clip}", f"tracks={tracks}", f"out={out / 'stream.mp4'}", f"output_dir={out / 'stream'}")


def run(step: Step, number: int, total: int, out: Path) -> float:
    """Run one step, its output in a log, and return the seconds it took; a finished one is skipped.

    Raises SystemExit with the end of the log where the command fails.
    """
    marker = out / "done" / f"{number:02d}_{step.name.replace(' ', '_')}.json"
    if marker.exists():
        finished = json.loads(marker.read_text())
        if finished["arguments"] == list(step.arguments):
            _say(number, total, step.name, finished["seconds"], "done before\n")
            return finished["seconds"]
    log_path = out / "logs" / f"{marker.stem}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    marker.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *step.command],
            cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=step.environment,
        )  # fmt: skip
        while process.poll() is None:
            time.sleep(REFRESH_SECONDS)
            if sys.stdout.isatty():
                _say(number, total, step.name, time.monotonic() - started, last_line(log_path))
    seconds = time.monotonic() - started
    if process.returncode:
        tail = "\n".join(log_path.read_text(errors="replace").replace("\r", "\n").splitlines()[-25:])
        command = shlex.join(["python", *step.command])
        failure = f"{step.name} failed with code {process.returncode}"
        raise SystemExit(f"\n{failure}\n$ {command}\n{tail}\n\nlog: {log_path}")
    marker.write_text(json.dumps({"arguments": list(step.arguments), "seconds": seconds}))
    _say(number, total, step.name, seconds, "\n")
    return seconds


def last_line(log_path: Path) -> str:
    """The newest non-empty line of a log, progress bars (ended by a carriage return) included."""
    with log_path.open("rb") as log:
        log.seek(max(0, log_path.stat().st_size - 2000))
        text = log.read().decode(errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
    return lines[-1] if lines else ""


def _say(number: int, total: int, name: str, seconds: float, text: str) -> None:
    minutes, rest = divmod(int(seconds), 60)
    line = f"[{number:2d}/{total}] {name:<14} {minutes:2d}:{rest:02d}  {text}"
    start = "\r\033[K" if sys.stdout.isatty() else ""
    end = "\n" if line.endswith("\n") else ""
    print(start + line.rstrip("\n")[:LINE_WIDTH], end=end, flush=True)


def report(out: Path, times: Sequence[tuple[str, float]]) -> Path:
    """One page: what was reached, what it looks like, how it was learned, how long it took."""
    metrics = json.loads((out / "eval" / "metrics.json").read_text())
    total = sum(seconds for _, seconds in times)
    rows = [*([name, f"{seconds:.0f}"] for name, seconds in times), ["all", f"{total:.0f}"]]
    everything = {"Videos with and without tracks, curves, every figure with its interval": "eval/report.html"}
    sections = [
        Section("Does the video follow the tracks?", _verdict(metrics), _headline(metrics), links=everything),
        Section("A stream", "A held-out first frame, continued along the tracks of its clip.", videos=[_video(out)]),
        Section("How it was learned", "Losses over the steps of each stage.", figures=_loss_figures(out)),
        Section("Where the time went", table=Table(["stage", "seconds"], rows)),
    ]
    note = f"make quickstart: trained from nothing in {total / 60:.1f} minutes on {os.cpu_count()} CPU cores"
    return write_report(out / "report.html", sections, title="Marionette quickstart", note=note)


def _verdict(metrics: dict) -> str:
    lines = []
    for role in ("teacher", "student"):
        gain, low = metrics[f"{role}.epe_gain_from_tracks_px"], metrics[f"{role}.epe_gain_from_tracks_px_low"]
        word = "follows" if low > 0 else "does not measurably follow"
        lines.append(f"The {role} {word} the tracks: they lower its end-point error by {gain:.2f} px "
                     f"(95 % interval from {low:.2f} px).")  # fmt: skip
    return "\n".join(lines)


def _headline(metrics: dict) -> Table:
    def interval(key: str) -> str:
        return f"{metrics[key]:.2f} [{metrics[f'{key}_low']:.2f}, {metrics[f'{key}_high']:.2f}]"

    rows = [
        [role, interval(f"{role}.epe_px"), interval(f"{role}.epe_without_tracks_px"), interval(f"{role}.psnr_db"),
         f"{metrics[f'{role}.frames_per_second']:.1f}"]
        for role in ("teacher", "student")
    ]  # fmt: skip
    columns = ["", "EPE with tracks, px", "EPE with tracks withheld, px", "PSNR, dB", "frames per second"]
    return Table(columns, rows)


def _video(out: Path) -> Video:
    truth = read_video(out / "held_out" / "clips" / f"test-{SEED_SHOWN:06d}.mp4")
    columns = {"source of the tracks": truth, "student": read_video(out / "stream.mp4")}
    return video_side_by_side(columns, fps=16)


def _loss_figures(out: Path) -> list[Figure]:
    return [
        curves_from_log(out / stage / "metrics.jsonl", keys, caption=stage)
        for stage, keys in CURVES.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], prog="python -m train.quickstart")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "quickstart", help="folder for everything")
    out = parser.parse_args().out.resolve()
    steps = chain(out)
    times = [(step.name, run(step, i, len(steps), out)) for i, step in enumerate(steps, start=1)]
    page = report(out, times)
    print(f"\n{sum(seconds for _, seconds in times) / 60:.1f} minutes. Open {page}")


if __name__ == "__main__":
    main()
